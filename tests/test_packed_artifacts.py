"""Conversion to the packed format end to end: sizes, company, workers, kills, calibration, verification, inspection."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.calibration import CalibrationOptions
from quantkit.convert import convert, plan
from quantkit.errors import AlreadyQuantizedError, ArtifactError, OutputError, RecipeError, ResumeError
from quantkit.formats import packed
from quantkit.grid import QuantizedTensor, dequantize
from quantkit.inspection import inspect
from quantkit.packed_files import PackedFiles
from quantkit.recipe import PACKED_PRESETS, Recipe, Rule, parse_recipe, resolve_recipe
from quantkit.scheme import parse_scheme
from quantkit.stored_model import open_model
from quantkit.verify import verify
from tests.artifact_files import digests, entries, run_killed, sign_again, stop_after
from tests.gguf_models import write_source
from tests.packed_decoder import read_file
from tests.test_verify import list_files

CHECKS = ["manifest", "headers", "tensors", "blocks", "scales", "ledger"]
SPLIT = 1_500_000  # bytes of a file
CALIBRATION = CalibrationOptions(samples=3, sequence_length=128)
BASE = "language_model.model.layers"
RECIPE = """
name = "mine"
format = "packed"

[[rules]]
name = 'layers\\.0\\.feed_forward\\.experts\\.3\\.'
scheme = "int8-channel"

[[rules]]
name = 'experts\\.1\\.down_proj'
scheme = "keep"

[[rules]]
roles = ["routed_expert"]
scheme = "int4-g32"

[[rules]]
roles = ["shared_expert"]
scheme = "fp8-channel-dynamic"

[[rules]]
roles = ["lm_head"]
scheme = "Q6_K"

[[rules]]
scheme = "keep"
"""

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts, and a vision tower."""
    return write_source(tmp_path_factory.mktemp("source") / "Tiny-Scout", seed=7, num_hidden_layers=2)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(RECIPE, "test")


@pytest.fixture(scope="module")
def artifact(source: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, recipe, tmp_path_factory.mktemp("alone"), workers=1).artifacts[0].directory


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


# --------------------------------------------------------------------------------------------------------- whole artifacts


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_depend_neither_on_workers_nor_on_company(
    workers: int, source: Path, recipe: Recipe, artifact: Path, tmp_path: Path
) -> None:
    """With other formats in one pass; files as many and as large as planned."""
    targets = [recipe, "w4a16-rtn-g32", "Q8_0"]
    predicted = plan(source, targets).artifacts[0].file_sizes
    made = convert(source, targets, tmp_path, workers=workers).artifacts[0]
    assert digests(made.directory) == digests(artifact)
    assert {path.name: path.stat().st_size for path in made.directory.iterdir()} == predicted


def test_a_whole_artifact_passes_with_and_without_its_source(source: Path, artifact: Path) -> None:
    assert [check.name for check in verify(artifact).checks] == [*CHECKS, "sample"]
    result = verify(artifact, source, sample=1000)
    assert [check.name for check in result.checks] == [*CHECKS, "source"]
    assert result.sampled == 2 * 4 * 3 - 2 + 2 * 3 + 1


def test_every_expert_has_the_scheme_that_its_rule_gives(artifact: Path) -> None:
    with PackedFiles.open(artifact) as files:
        schemes = files.schemes
    expected = {}
    for layer in (0, 1):
        for expert in range(4):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                if (expert, projection) != (1, "down_proj"):
                    scheme = "int8-channel" if (layer, expert) == (0, 3) else "int4-g32"
                    expected[f"{BASE}.{layer}.feed_forward.experts.{expert}.{projection}"] = scheme
        for projection in ("gate_proj", "up_proj", "down_proj"):
            expected[f"{BASE}.{layer}.feed_forward.shared_expert.{projection}"] = "fp8-channel-dynamic"
    assert schemes == {**expected, "language_model.lm_head.weight": "Q6_K"}
    assert {name: entry.applied for name, entry in entries(artifact).items() if entry.applied != "keep"} == schemes


def test_weights_are_those_of_the_other_formats(source: Path, artifact: Path, tmp_path: Path) -> None:
    """The same method and scheme give the same numbers, however they are stored."""
    plain = Recipe("plain", (Rule("int4-g32", roles=("routed_expert",)), Rule("keep")))
    [made] = convert(source, plain, tmp_path).artifacts
    from safetensors.torch import load_file

    from quantkit.formats import compressed_tensors

    stored, scheme = load_file(made.directory / "model.safetensors"), parse_scheme("int4-g32")
    assert scheme is not None
    with PackedFiles.open(artifact) as files:
        for expert in (0, 2):
            name = f"{BASE}.1.feed_forward.experts.{expert}.up_proj"
            block = files.read_block(f"{BASE}.1.feed_forward.experts.{expert}")
            one, two = packed.decode(name, block, scheme), compressed_tensors.decode(name, stored, scheme)
            assert torch.equal(dequantize(one), dequantize(two))


def test_what_stands_beside_the_weights(source: Path, artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "quantkit-packed", "version": 1}
    assert config == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert (artifact / name).read_bytes() == (source / name).read_bytes()
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["format"] == "packed" and manifest["files"].keys() == {path.name for path in artifact.iterdir()} - {
        "manifest.json"
    }


def test_a_split_model_holds_the_same_tensors(source: Path, recipe: Recipe, artifact: Path, tmp_path: Path) -> None:
    [planned] = plan(source, recipe, max_shard_bytes=SPLIT).artifacts
    [made] = convert(source, recipe, tmp_path, max_shard_bytes=SPLIT).artifacts
    assert {path.name: path.stat().st_size for path in made.directory.iterdir()} == planned.file_sizes
    paths = sorted(made.directory.glob("model-*-of-*.packed"))
    assert len(paths) >= 3 and all(path.stat().st_size <= SPLIT + 65_536 for path in paths)
    found: dict[str, Any] = {}
    for path in paths:
        tensors, _, _ = read_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    assert found == read_file(artifact / "model.packed")[0]
    verify(made.directory, source, sample=64)
    paths[1].unlink()
    with pytest.raises(ArtifactError, match=r"missing: file 2 of"):
        verify(made.directory)


def test_a_model_with_dense_layers_and_128_experts(tmp_path: Path) -> None:
    source = write_source(tmp_path / "Tiny", "maverick", num_local_experts=128, use_qk_norm=False, num_hidden_layers=2)
    [made] = convert(source, "packed-int8", tmp_path / "out").artifacts
    verify(made.directory, source, sample=8)
    with PackedFiles.open(made.directory) as files:
        assert len([name for name in files.blocks if ".experts." in name]) == 128
        assert next(iter(files.read_block("language_model.model.layers.0.feed_forward"))).endswith(".feed_forward.gate_proj.codes")


def test_a_kv_cache_in_fp8_is_stored_with_the_attention(source: Path, tmp_path: Path) -> None:
    recipe = Recipe("cache", (Rule("fp8-tensor-static", roles=("routed_expert",)), Rule("keep")), format="packed", kv_cache="fp8")
    [made] = convert(source, recipe, tmp_path, calibration=CALIBRATION).artifacts
    verify(made.directory, source, sample=64)
    with PackedFiles.open(made.directory) as files:
        attention = files.read_block(f"{BASE}.1.self_attn")
        assert list(attention)[-2:] == [f"{BASE}.1.self_attn.k_scale", f"{BASE}.1.self_attn.v_scale"]
        assert f"{BASE}.1.feed_forward.experts.0.up_proj.input_scale" in files.tensors
    assert json.loads((made.directory / "config.json").read_text())["quantization_config"]["kv_cache"] == "fp8"


def test_what_is_stored_in_blocks_of_llama_cpp_is_read_as_what_it_is(source: Path, tmp_path: Path) -> None:
    """Tables by rows, matrices as codes or floats."""
    rules = (Rule("Q8_0", roles=("embedding",)), Rule("F16", name="q_proj"), Rule("Q4_K", roles=("attention",)), Rule("keep"))
    made = convert(source, Recipe("blocks", rules, format="packed"), tmp_path).artifacts[0].directory
    with open_model(made) as ours, open_model(source) as reference:
        [table] = [name for name in ours.schemes if name.endswith("embed_tokens.weight")]
        exact = torch.cat([rows.clone() for _, rows in reference.rows(table, 1000)])
        found = torch.cat([rows.clone() for _, rows in ours.rows(table, 300)])
        assert float((exact - found).norm() / exact.norm()) < 0.01
        query, key = (matrix for unit in ours.units for matrix in unit.matrices[:2] if unit.key.endswith("layers.1.self_attn.qkv"))
        weight, blocks = ours.read(query), ours.read(key)
        assert isinstance(weight, torch.Tensor) and weight.dtype == torch.float16 and isinstance(blocks, QuantizedTensor)
        assert torch.allclose(weight.float(), reference.read(query).float(), atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ calibration


@pytest.mark.parametrize("name", list(PACKED_PRESETS))
def test_every_preset_converts_and_verifies(name: str, source: Path, tmp_path: Path) -> None:
    [made] = convert(source, name.upper(), tmp_path, calibration=CALIBRATION, workers=2).artifacts
    assert made.name == name
    assert all(check.ok for check in verify(made.directory, source, sample=64).checks)
    found = entries(made.directory)
    experts = [entry for entry in found.values() if entry.role == "routed_expert"]
    assert {entry.applied for entry in experts} == {resolve_recipe(name).rules[0].scheme}
    if name.endswith("gptq"):
        assert all(entry.method == "gptq" and entry.tokens + entry.borrowed > 0 and entry.output_error > 0 for entry in experts)
        assert sum(entry.tokens for entry in experts if entry.name.endswith("down_proj")) == 2 * 3 * 128


# ------------------------------------------------------------------------------------------------------------- stop, resume


@pytest.mark.parametrize("max_shard_bytes", [None, SPLIT])
@pytest.mark.parametrize("count", [1, 16])
def test_a_stopped_run_resumes_to_the_same_bytes(
    count: int, max_shard_bytes: int | None, source: Path, recipe: Recipe, tmp_path: Path
) -> None:
    [straight] = convert(source, recipe, tmp_path / "straight", max_shard_bytes=max_shard_bytes).artifacts
    stop_after(count, source, recipe, tmp_path / "stopped", max_shard_bytes=max_shard_bytes, workers=2)
    [resumed] = convert(source, recipe, tmp_path / "stopped", max_shard_bytes=max_shard_bytes).artifacts
    assert digests(straight.directory) == digests(resumed.directory)
    assert resumed.units_resumed >= count


KILLED = """
import sys
from pathlib import Path
from quantkit.convert import convert
from quantkit.recipe import load_recipe
from tests.crash_points import kill_before
source, recipe, output, call = sys.argv[1:]
kill_before(int(call))
convert(source, load_recipe(Path(recipe)), output, workers=2)
"""


@pytest.mark.parametrize("call", [25, 70, 150])
def test_a_killed_run_resumes_to_the_same_bytes(call: int, source: Path, recipe: Recipe, artifact: Path, tmp_path: Path) -> None:
    """Killed just before a change of the disk, the writing of a checksum among them; half of a write that it hits is done."""
    (tmp_path / "mine.toml").write_text(RECIPE)
    run_killed(KILLED, source, tmp_path / "mine.toml", tmp_path / "out", call)
    assert not (tmp_path / "out" / "mine").exists()
    [made] = convert(source, recipe, tmp_path / "out").artifacts
    assert digests(made.directory) == digests(artifact)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_another_size_of_files_does_not_resume_and_an_artifact_is_kept(source: Path, recipe: Recipe, tmp_path: Path) -> None:
    stop_after(5, source, recipe, tmp_path)
    with pytest.raises(ResumeError, match="max_shard_bytes"):
        convert(source, recipe, tmp_path, max_shard_bytes=SPLIT)
    convert(source, recipe, tmp_path)
    with pytest.raises(OutputError, match="--force"):
        convert(source, recipe, tmp_path)


# ------------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ((Rule("int4-g128", roles=("lm_head",)),), r"lm_head.weight cannot be int4-g128 in the packed format"),
        ((Rule("Q8_0", roles=("router",)),), "router tensors are always kept"),
        ((Rule("Q4_K", name="experts\\.9\\."),), "decides no tensor"),
        ((), "quantizes nothing"),
    ],
)
def test_a_wrong_recipe_is_one_clear_error_before_any_output(
    rules: tuple[Rule, ...], said: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        convert(source, Recipe("x", (*rules, Rule("keep")), format="packed"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_artifact_is_no_source(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(AlreadyQuantizedError):
        convert(artifact, "packed-int4", tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------- verification


def change_file(directory: Path, name: str, change: Callable[[bytearray], object]) -> None:
    data = bytearray((directory / name).read_bytes())
    change(data)
    (directory / name).write_bytes(data)


def change_config(directory: Path, **section: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = section
    (directory / "config.json").write_text(json.dumps(config))
    sign_again(directory)


def spoil(directory: Path, tensor: str) -> None:
    """Change a byte of a tensor, and sign the manifest again: only the checksum in the file tells."""
    with PackedFiles.open(directory) as files:
        at = files.locate(tensor).offset
    change_file(directory, "model.packed", lambda data: data.__setitem__(at + 3, data[at + 3] ^ 1))
    sign_again(directory)


def forge(directory: Path, tensor: str, start: int, value: bytes) -> None:
    """Change a tensor and everything that vouches for it: checksum and manifest."""
    import xxhash

    with PackedFiles.open(directory) as files:
        location, entry = (
            files.locate(tensor),
            next(found for block in files.blocks.values() for found in block.block.tensors if found.name == tensor),
        )

    def change(data: bytearray) -> None:
        data[location.offset + start : location.offset + start + len(value)] = value
        content = data[location.offset : location.offset + location.nbytes]
        data[entry.checksum : entry.checksum + 8] = xxhash.xxh3_64(bytes(content)).intdigest().to_bytes(8, "little")

    change_file(directory, "model.packed", change)
    sign_again(directory)


EXPERT = f"{BASE}.0.feed_forward.experts.0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: change_file(d, "model.packed", lambda data: data.__setitem__(9000, data[9000] ^ 1)), "has another sha256"),
        (lambda d: (d / "model.packed").unlink(), r"model.packed is missing(.|\n)*holds no packed files"),
        (lambda d: (d / "config.json").unlink(), "it has no config.json"),
        (lambda d: (d / "more.packed").write_bytes(b"x"), "more.packed is not listed"),
        (lambda d: list_files(d, lambda files: files.pop("model.packed")), "model.packed is not listed"),
        (lambda d: spoil(d, f"{EXPERT}.up_proj.codes"), r"blocks: .*experts\.0\.up_proj\.codes \(layer 0, expert 0\)"),
        (lambda d: change_config(d), "has no quantization_config of quantkit-packed"),
        (lambda d: change_config(d, quant_method="quantkit-packed", version=9), "which this quantkit does not write"),
        (
            lambda d: change_config(d, quant_method="quantkit-packed", version=1, kv_cache="int4"),
            "which this quantkit does not write",
        ),
        (
            lambda d: change_config(d, quant_method="quantkit-packed", version=1, kv_cache="fp8"),
            r"block \S+self_attn holds no more; expected k_scale BF16 \[1\]",
        ),
        (lambda d: forge(d, f"{EXPERT}.up_proj.scale", 0, b"\x80\x7f"), r"scales: \S+experts\.0\.up_proj\.scale holds a scale"),
        (lambda d: forge(d, f"{EXPERT}.up_proj.scale", 0, b"\0\0"), r"scales: \S+experts\.0\.up_proj\.scale holds a scale"),
        (
            lambda d: forge(d, "language_model.lm_head.weight", 208, b"\0\x7c"),
            "scales: language_model.lm_head.weight holds a scale",
        ),
        (lambda d: forge(d, f"{EXPERT}.up_proj.codes", 0, b"\0" * 999), "up_proj: relative error to the source"),
        (
            lambda d: forge(d, f"{BASE}.0.feed_forward.experts.1.down_proj.weight", 0, b"\x01\x3f"),
            "is kept but differs from the source",
        ),
        (lambda d: forge(d, f"{BASE}.0.feed_forward.router.weight", 0, b"\x01\x3f"), "is kept but differs from the source"),
    ],
)
def test_damage_is_named(copy: Path, source: Path, change: Callable[[Path], object], said: str) -> None:
    change(copy)
    with pytest.raises(ArtifactError, match=said):
        verify(copy, source, sample=1000)


def test_a_file_of_another_model_is_found(copy: Path, source: Path, tmp_path: Path) -> None:
    """Whole in itself, but not what config.json implies."""
    other = write_source(tmp_path / "Other", num_hidden_layers=1)
    [made] = convert(other, "packed-int8", tmp_path / "out").artifacts
    shutil.copy(made.directory / "model.packed", copy / "model.packed")
    sign_again(copy)
    with pytest.raises(ArtifactError, match=r"tensors: \d+ problems: block \S+layers\.1\S+ is missing"):
        verify(copy)
    with pytest.raises(ArtifactError, match="is not the source of this artifact"):
        verify(made.directory, source)


# ----------------------------------------------------------------------------------------------------------------- inspection


def test_inspection_of_a_directory_and_of_a_file(source: Path, artifact: Path) -> None:
    found = inspect(artifact)
    assert (found.kind, found.format) == ("artifact", "packed") and found.notes == ()
    assert found.parameters == inspect(source).parameters
    rows = {row.role: row for row in found.roles}
    assert rows["routed_expert"].schemes == ("BF16", "int4-g32", "int8-channel")
    assert rows["shared_expert"].schemes == ("fp8-channel-dynamic",)
    assert rows["lm_head"].schemes == ("Q6_K",)
    assert rows["lm_head"].bits_per_weight == pytest.approx(6.5625)
    with PackedFiles.open(artifact) as files:
        assert dict(found.facts)["blocks"].startswith(f"{len(files.blocks)}, the largest of ")
    single = inspect(artifact / "model.packed")
    assert single.format == "packed" and single.bytes == (artifact / "model.packed").stat().st_size
    assert "single file" in single.notes[0]
    assert single.parameters == found.parameters
    assert [(row.role, row.schemes, row.parameters, row.bytes) for row in single.roles] == [
        (row.role, row.schemes, row.parameters, row.bytes) for row in found.roles
    ]


def test_what_an_inspection_finds_missing(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    assert any("no manifest.json" in note for note in inspect(copy).notes)
