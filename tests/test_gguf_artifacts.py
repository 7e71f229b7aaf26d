"""Conversion to GGUF end to end: company of other formats, workers, kills, recipes, what is refused, what goes along."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from quantkit.calibration import CalibrationOptions
from quantkit.convert import convert, plan
from quantkit.errors import (
    CheckpointError,
    OutputError,
    QuantkitError,
    RecipeError,
    ResumeError,
    UnsupportedModelError,
)
from quantkit.recipe import Recipe, Rule, parse_recipe
from quantkit.verify import verify
from tests.artifact_files import digests, entries, run_killed, stop_after
from tests.gguf_models import pure, stored_tensors, text_file, vision_file, write_source

FREE = ["Q4_K_M", "Q8_0", "fp8-dynamic"]
SPLIT = 1_500_000  # bytes of a file
CALIBRATION = CalibrationOptions(samples=3, sequence_length=128)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts, and a vision tower."""
    return write_source(tmp_path_factory.mktemp("source") / "Tiny-Scout", seed=7, num_hidden_layers=2)


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Digests of the files of artifacts that were made by themselves, by one worker."""
    output = tmp_path_factory.mktemp("alone")
    return {name: digests(convert(source, name, output, workers=1).artifacts[0].directory) for name in FREE}


def types(directory: Path) -> dict[str, str]:
    return {name: kind for name, (kind, _, _) in stored_tensors(text_file(directory)).items()}


# ------------------------------------------------------------------------------------------------------------ company, workers


@pytest.mark.parametrize("workers", [2, 7])
def test_bytes_depend_neither_on_workers_nor_on_company(
    workers: int, source: Path, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Two formats and three artifacts in one pass, as many files as planned, each as large as planned."""
    predicted = {artifact.name: artifact.file_sizes for artifact in plan(source, FREE).artifacts}
    for made in convert(source, FREE, tmp_path, workers=workers).artifacts:
        assert digests(made.directory) == alone[made.name]
        assert {path.name: path.stat().st_size for path in made.directory.iterdir()} == predicted[made.name]
        assert all(check.ok for check in verify(made.directory, source, sample=64).checks)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FREE)


def test_every_weight_is_read_once_for_all_formats(source: Path, tmp_path: Path, bytes_read: Callable[[], int]) -> None:
    result = convert(source, FREE, tmp_path)
    assert result.source_bytes <= bytes_read() < 1.02 * result.source_bytes


def test_calibrated_files_share_a_pass_with_calibrated_safetensors(source: Path, tmp_path: Path) -> None:
    names = ["Q4_K_M-gptq", "Q3_K_M-importance", "w4a16-gptq", "Q8_0"]
    together = convert(source, names, tmp_path / "together", calibration=CALIBRATION, workers=3).artifacts
    for name, made in zip(names, together, strict=True):
        [single] = convert(source, name, tmp_path / "alone", calibration=CALIBRATION, workers=1).artifacts
        assert digests(made.directory) == digests(single.directory), name


def test_a_split_model_holds_the_same_tensors(source: Path, alone: dict[str, dict[str, str]], tmp_path: Path) -> None:
    [planned] = plan(source, "Q8_0", max_shard_bytes=SPLIT).artifacts
    [split] = convert(source, "Q8_0", tmp_path / "split", max_shard_bytes=SPLIT).artifacts
    [whole] = convert(source, "Q8_0", tmp_path / "whole").artifacts
    assert digests(whole.directory) == alone["Q8_0"]
    assert {path.name: path.stat().st_size for path in split.directory.iterdir()} == planned.file_sizes
    parts = sorted(split.directory.glob("Tiny-Scout-Q8_0-*-of-*.gguf"))
    assert len(parts) >= 3
    assert all(path.stat().st_size <= SPLIT for path in parts)
    found: dict[str, Any] = {}
    for path in parts:
        found |= stored_tensors(path)
    expected = stored_tensors(text_file(whole.directory))
    assert found.keys() == expected.keys()
    for name, (kind, data, shape) in expected.items():
        assert (found[name][0], found[name][2]) == (kind, shape)
        assert found[name][1].tobytes() == data.tobytes(), name
    assert all(check.ok for check in verify(split.directory, source, sample=64).checks)
    modelfile = (split.directory / "Modelfile").read_text()
    assert all(f"FROM ./{path.name}\n" in modelfile for path in parts)


# ------------------------------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("max_shard_bytes", [None, SPLIT])
@pytest.mark.parametrize("count", [1, 9, 16])
def test_a_stopped_run_resumes_to_the_same_bytes(count: int, max_shard_bytes: int | None, source: Path, tmp_path: Path) -> None:
    targets = ["Q8_0", "Q4_K_M"]
    straight = convert(source, targets, tmp_path / "straight", max_shard_bytes=max_shard_bytes)
    stop_after(count, source, targets, tmp_path / "stopped", max_shard_bytes=max_shard_bytes, workers=2)
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["Q4_K_M.partial", "Q8_0.partial"]
    resumed = convert(source, targets, tmp_path / "stopped", max_shard_bytes=max_shard_bytes)
    for one, two in zip(straight.artifacts, resumed.artifacts, strict=True):
        assert digests(one.directory) == digests(two.directory)
        assert two.units_resumed >= count
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["Q4_K_M", "Q8_0"]


KILLED = """
import sys
from pathlib import Path
from quantkit.convert import convert
from tests.crash_points import kill_before
source, output, call, size = sys.argv[1:]
kill_before(int(call))
convert(source, ["Q8_0"], output, workers=2, max_shard_bytes=int(size) or None)
"""


@pytest.mark.parametrize("size", [0, SPLIT])
@pytest.mark.parametrize("call", [25, 100])
def test_a_killed_run_resumes_to_the_same_bytes(
    call: int, size: int, source: Path, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Killed just before a change of the disk; half of a write that it hits is done."""
    run_killed(KILLED, source, tmp_path / "out", call, size)
    assert not (tmp_path / "out" / "Q8_0").exists()
    [made] = convert(source, "Q8_0", tmp_path / "out", max_shard_bytes=size or None).artifacts
    if size:
        [straight] = convert(source, "Q8_0", tmp_path / "straight", max_shard_bytes=size).artifacts
        assert digests(made.directory) == digests(straight.directory)
    else:
        assert digests(made.directory) == alone["Q8_0"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Q8_0"]


def test_another_size_of_files_does_not_resume(source: Path, tmp_path: Path) -> None:
    stop_after(5, source, "Q8_0", tmp_path)
    with pytest.raises(ResumeError, match=f"max_shard_bytes: was usual, is now {SPLIT}"):
        convert(source, "Q8_0", tmp_path, max_shard_bytes=SPLIT)


def test_an_existing_artifact_is_kept_unless_forced(source: Path, alone: dict[str, dict[str, str]], tmp_path: Path) -> None:
    [made] = convert(source, "Q8_0", tmp_path).artifacts
    with pytest.raises(OutputError, match="--force"):
        convert(source, "Q8_0", tmp_path)
    assert digests(made.directory) == alone["Q8_0"]
    convert(source, "Q8_0", tmp_path, force=True)
    assert digests(made.directory) == alone["Q8_0"]


# --------------------------------------------------------------------------------------------------------------------- recipes

OVERRIDES = """
format = "gguf"
mixture = "Q4_K_S"
vision = "BF16"

[[rules]]
name = 'blk\\.1\\.ffn_down_exps'
scheme = "Q6_K"

[[rules]]
name = 'model\\.layers\\.0\\.self_attn\\.v_proj$'
scheme = "Q8_0"

[[rules]]
roles = ["shared_expert"]
layers = "1"
scheme = "IQ4_XS"

[[rules]]
roles = ["embedding"]
scheme = "keep"
"""


def test_a_recipe_file_overrides_its_mixture_by_either_name_by_role_and_by_layer(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OVERRIDES)
    [made] = convert(source, path, tmp_path).artifacts
    assert made.name == "mine"
    usual = {"attn_q", "attn_k", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
    expected = {f"blk.{layer}.{part}.weight": "Q4_K" for layer in (0, 1) for part in usual}
    expected |= {f"blk.1.ffn_{part}_shexp.weight": "IQ4_XS" for part in ("gate", "up", "down")}
    expected |= {"blk.0.ffn_down_exps.weight": "Q4_K", "blk.1.ffn_down_exps.weight": "Q6_K", "output.weight": "Q6_K"}
    expected |= {"blk.0.attn_v.weight": "Q8_0", "blk.1.attn_v.weight": "Q5_K", "token_embd.weight": "BF16"}
    found = types(made.directory)
    assert {name: kind for name, kind in found.items() if kind != "F32"} == expected
    assert vision_file(made.directory).name == "mmproj-Tiny-Scout-BF16.gguf"
    assert all(check.ok for check in verify(made.directory, source, sample=64).checks)
    ledger = entries(made.directory)
    assert ledger["language_model.model.layers.1.feed_forward.experts.3.down_proj"].applied == "Q6_K"
    assert ledger["language_model.model.layers.0.feed_forward.experts.3.down_proj"].applied == "Q4_K"


def gguf_recipe(*rules: Rule, **others: Any) -> Recipe:
    return Recipe("mine", rules, format="gguf", **({"mixture": "Q4_K_M"} | others))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            lambda: gguf_recipe(Rule("Q8_0", name=r"layers\.1\.feed_forward\.experts\.2\.")),
            r"all experts in blk\.1\.ffn_gate_exps\.weight must have one type: .*0\.gate_proj has Q4_K, .*2\.gate_proj has Q8_0",
        ),
        (
            lambda: gguf_recipe(Rule("keep", name=r"layers\.0\.feed_forward\.experts\.3\.down_proj")),
            r"all experts in blk\.0\.ffn_down_exps\.weight must have one type: .*has keep",
        ),
        (lambda: gguf_recipe(Rule("int4-g128", roles=("attention",))), r"q_proj has int4-g128, which is no type of GGUF files"),
        (lambda: gguf_recipe(Rule("Q4_K", roles=("router",))), "router tensors are always kept"),
        (lambda: gguf_recipe(Rule("Q4_K", roles=("norm",))), "norm tensors are always kept"),
        (
            lambda: gguf_recipe(Rule("F16", name=r"vision_model.*norm.*\.weight")),
            r"decides no tensor: vision_model.*layernorm.* is no matrix, and such tensors are always kept",
        ),
        (lambda: gguf_recipe(Rule("F16", name="positional_embedding")), "positional_embedding_vlm is no matrix, and such"),
        (lambda: gguf_recipe(Rule("Q8_0", name="patch_embedding")), r"linear\.weight cannot be Q8_0"),
        (lambda: gguf_recipe(Rule("Q4_K", name="ffn_gate_up_exps")), r"rule 1 \(.*ffn_gate_up_exps\) decides no tensor"),
        (lambda: gguf_recipe(Rule("Q4_K", roles=("projector",), layers="3")), "decides no tensor"),
        (lambda: gguf_recipe(mixture="IQ2_M"), "IQ2_M is useless without importance: take method importance or gptq"),
        (lambda: gguf_recipe(mixture="Q4_K_X"), "unknown mixture 'Q4_K_X' .did you mean 'Q4_K_.'.*Mixtures: .*Q4_K_M"),
        (lambda: gguf_recipe(vision="Q4_K"), "vision is 'Q4_K'; expected one of F16, BF16, F32, Q8_0"),
        (lambda: gguf_recipe(method="awq"), "awq is not for the types of GGUF files"),
        (lambda: gguf_recipe(Rule("Q4_K", method="awq")), "method awq is not for Q4_K"),
        (lambda: gguf_recipe(Rule("IQ3_S", method="gptq")), "method gptq is not for IQ3_S, which takes method importance or rtn"),
        (lambda: gguf_recipe(kv_cache="fp8"), "kv_cache is for safetensors; with llama.cpp say --cache-type-k"),
        (lambda: Recipe("mine", (Rule("Q4_K", roles=("attention",)), Rule("keep"))), "Q4_K"),
        (lambda: Recipe("mine", (Rule("keep"),), mixture="Q4_K_M"), "a mixture is for format = 'gguf'"),
        (lambda: parse_recipe('format = "gguf"\nmixture = 4', "test"), "mixture"),
        (lambda: parse_recipe('format = "gguf"\nmixtures = "Q4_K_M"', "test"), "unknown key 'mixtures' .did you mean 'mixture'"),
        (lambda: "Q4_K_L", "unknown preset 'Q4_K_L' .did you mean"),
    ],
)
def test_a_wrong_recipe_is_one_clear_error_before_any_output(recipe: Any, said: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        convert(source, recipe(), tmp_path / "out", calibration=CALIBRATION)
    assert not (tmp_path / "out").exists()


def test_rows_that_no_block_fits_are_an_error_by_rule_and_a_fallback_by_mixture(tmp_path: Path) -> None:
    """As llama.cpp does, where a mixture chooses; a rule says what the user wants, and cannot have."""
    narrow = write_source(tmp_path / "narrow", num_hidden_layers=1, head_dim=32, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(RecipeError, match=r"o_proj cannot be Q4_K: .*256"):
        convert(narrow, pure("Q4_K"), tmp_path)
    [made] = convert(narrow, "Q4_K_M", tmp_path).artifacts
    found = types(made.directory)
    assert found["blk.0.attn_output.weight"] == "Q5_0"
    assert found["blk.0.attn_q.weight"] == "Q4_K"


# ------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"use_qk_norm": False}, "use_qk_norm is False with 4 experts, but llama.cpp goes by the number"),
        ({"no_rope_layers": [1, 0]}, r"layer 1 is not given rotary positions"),
        ({"attention_chunk_size": 4096}, "attention_chunk_size is 4096"),
        ({"moe_layers": [0], "interleave_moe_layer_step": 1}, "the layers with experts are"),
        ({"num_local_experts": 128}, "use_qk_norm is True with 128 experts"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(overrides: dict[str, Any], said: str, tmp_path: Path) -> None:
    """By convert and by plan; for safetensors it is none of llama.cpp's business."""
    odd = write_source(tmp_path / "odd", num_hidden_layers=2, **overrides)
    for attempt in (lambda: convert(odd, "Q8_0", tmp_path / "out"), lambda: plan(odd, ["fp8-dynamic", "Q8_0"])):
        with pytest.raises(UnsupportedModelError, match=rf"{said}(.|\n)*Choose a safetensors format"):
            attempt()
    assert not (tmp_path / "out").exists()
    plan(odd, "fp8-dynamic")


def test_a_missing_tokenizer_is_an_error_of_gguf_only(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", num_hidden_layers=1)
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing; a GGUF file holds the tokenizer"):
        convert(source, "Q8_0", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(source, "fp8-dynamic", tmp_path / "out")


def test_a_tokenizer_for_more_words_than_the_model_has_is_an_error(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", num_hidden_layers=1, vocab_size=1024)
    with pytest.raises(CheckpointError, match=r"vocab_size in config\.json is 1024"):
        convert(source, "Q8_0", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------- calibration


@pytest.fixture(scope="module")
def calibrated(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts by name, of one calibration."""
    names = ["Q4_K_M-importance", "Q4_K_M-gptq", "IQ2_M-importance"]
    result = convert(source, names, tmp_path_factory.mktemp("calibrated"), calibration=CALIBRATION)
    return {made.name: made.directory for made in result.artifacts}


def test_the_ledger_of_a_calibrated_file_says_what_it_learned_from(calibrated: dict[str, Path], source: Path) -> None:
    for name, directory in calibrated.items():
        assert all(check.ok for check in verify(directory, source, sample=64).checks)
        found = entries(directory)
        matrices = [entry for entry in found.values() if entry.role in ("attention", "shared_expert", "routed_expert")]
        matrices = [entry for entry in matrices if entry.applied != "keep"]
        assert len(matrices) == 2 * (4 + 3 + 4 * 3)
        for entry in matrices:
            assert entry.method == name.rpartition("-")[2]
            assert 0 < entry.output_error < 0.5 and 0 < entry.relative_error < 0.6
            assert entry.tokens <= 3 * 128 and (entry.tokens == 3 * 128 or entry.role == "routed_expert")
        streamed = [found[f"language_model.{part}.weight"] for part in ("model.embed_tokens", "lm_head")]
        embedding = "gptq" if name.endswith("gptq") else "rtn"  # gptq rounds it by what the first layer reads of it
        assert [(entry.method, entry.tokens) for entry in streamed] == [(embedding, 0), ("rtn", 0)]
    routed = [entry for entry in entries(calibrated["Q4_K_M-gptq"]).values() if entry.role == "routed_expert"]
    assert sum(entry.tokens for entry in routed if entry.name.endswith("down_proj")) == 2 * 3 * 128


def test_gptq_is_nearer_in_the_outputs_than_importance_alone(calibrated: dict[str, Path]) -> None:
    """Matrix by matrix, where both were asked for the outputs of the source; routed experts make up for others besides."""
    learned, weighted = (entries(calibrated[f"Q4_K_M-{method}"]) for method in ("gptq", "importance"))
    compared = 0
    for name, entry in learned.items():
        if entry.method == "gptq" and entry.role not in ("routed_expert", "embedding"):
            assert entry.applied == weighted[name].applied
            assert entry.output_error < weighted[name].output_error, name
            compared += 1
    assert compared == 2 * (4 + 3)


def test_importance_changes_the_numbers_of_a_file_and_not_its_name(
    calibrated: dict[str, Path], alone: dict[str, dict[str, str]]
) -> None:
    [plain] = [digest for name, digest in alone["Q4_K_M"].items() if name.startswith("Tiny-Scout")]
    path = text_file(calibrated["Q4_K_M-importance"])
    assert path.name == "Tiny-Scout-Q4_K_M.gguf"
    assert hashlib.sha256(path.read_bytes()).hexdigest() != plain


def test_a_file_type_of_two_bits_is_a_mixture(calibrated: dict[str, Path]) -> None:
    kinds = Counter(types(calibrated["IQ2_M-importance"]).values())
    assert kinds["IQ2_S"] > 5 and kinds["IQ3_S"] > 0


# ------------------------------------------------------------------------------------------------------------------ company


def test_what_stands_beside_the_model(source: Path, tmp_path: Path) -> None:
    """Licences go along; config and tokenizer stand in the header, and a model card would speak of other files."""
    [made] = convert(source, "Q8_0", tmp_path).artifacts
    assert sorted(path.name for path in made.directory.iterdir()) == [
        "LICENSE",
        "Modelfile",
        "Tiny-Scout-Q8_0.gguf",
        "USE_POLICY.md",
        "ledger.json",
        "manifest.json",
        "mmproj-Tiny-Scout-F16.gguf",
    ]
    for name in ("LICENSE", "USE_POLICY.md"):
        assert (made.directory / name).read_bytes() == (source / name).read_bytes()
    lines = (made.directory / "Modelfile").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "FROM ./Tiny-Scout-Q8_0.gguf",
        "FROM ./mmproj-Tiny-Scout-F16.gguf",
    ]
    manifest = json.loads((made.directory / "manifest.json").read_text())
    assert manifest["files"].keys() == {path.name for path in made.directory.iterdir()} - {"manifest.json"}
    fields = GGUFReader(text_file(made.directory)).fields
    assert fields["general.architecture"].contents() == "llama4"
    assert fields["general.file_type"].contents() == 7
    assert fields["general.quantization_version"].contents() == 2
    assert next(note.client for note in made.notes if note.loads).startswith("llama.cpp")


def test_a_text_model_has_one_file(tmp_path: Path) -> None:
    source = write_source(tmp_path / "Text", "text", num_hidden_layers=1)
    [made] = convert(source, "Q8_0", tmp_path).artifacts
    assert [path.name for path in made.directory.glob("*.gguf")] == ["Text-Q8_0.gguf"]
    lines = (made.directory / "Modelfile").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["FROM ./Text-Q8_0.gguf"]


def test_tensors_lie_as_the_gguf_package_expects(source: Path, tmp_path: Path) -> None:
    """In order, aligned, each of its type's size, and nothing behind the last."""
    [made] = convert(source, "Q4_K_M", tmp_path).artifacts
    for path in made.directory.glob("*.gguf"):
        reader = GGUFReader(path)
        offsets = [tensor.data_offset for tensor in reader.tensors]
        assert offsets == sorted(offsets) and all(offset % 32 == 0 for offset in offsets)
        ends = [int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors]
        assert all(after - end < 32 for end, after in zip(ends, offsets[1:], strict=False))
        assert 0 <= path.stat().st_size - ends[-1] < 32


def test_a_damaged_file_does_not_verify(source: Path, tmp_path: Path) -> None:
    [made] = convert(source, "Q8_0", tmp_path).artifacts
    path = text_file(made.directory)
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    try:
        assert not all(check.ok for check in verify(made.directory, source, sample=64).checks)
    except QuantkitError as error:
        assert path.name in str(error)
