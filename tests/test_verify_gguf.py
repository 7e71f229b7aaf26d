"""Verification of GGUF artifacts: what is whole passes, also when the gguf package wrote it; what is not is named."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from ctypes import c_bool, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.convert import convert
from quantkit.errors import ArtifactError
from quantkit.ggml import TYPES
from quantkit.gguf_artifact import finite_scales
from quantkit.gguf_header import GGUFValueType, MetadataEntry, parse_header
from quantkit.recipe import Recipe, Rule
from quantkit.verify import verify
from tests.artifact_files import sign_again
from tests.gguf_models import DEMO, change_metadata, text_file, vision_file
from tests.llama_cpp import ggml_quantize, library
from tests.mutated_json import any_json, check_verification, places
from tests.test_verify import list_files
from tests.tiny_models import write_tiny_model

CHECKS = ["manifest", "headers", "tensors", "metadata", "scales", "ledger"]
MIXED = Recipe(
    "mixed",
    (
        Rule("Q4_K", roles=("routed_expert",), layers="0"),
        Rule("keep", roles=("routed_expert",), layers="1"),
        Rule("Q5_1", roles=("routed_expert",)),
        Rule("Q4_1", roles=("lm_head",)),
        Rule("F16", roles=("embedding",)),
        Rule("Q5_K", roles=("shared_expert",)),
        Rule("keep"),
    ),
    format="gguf",
)
Q4_1 = Recipe(
    "small", (Rule("Q4_1", roles=("routed_expert", "shared_expert", "dense_mlp", "lm_head")), Rule("keep")), format="gguf"
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO, [MIXED], tmp_path_factory.mktemp("whole")).artifacts[0].directory


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO, [MIXED], tmp_path_factory.mktemp("parts"), max_shard_bytes=6_000_000).artifacts[0].directory


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture
def parts(in_parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(in_parts, tmp_path / "copy"))


def change_bytes(directory: Path, tensor: str, change: Callable[[np.ndarray[Any, Any]], object], sign: bool = True) -> None:
    """Change the bytes of one tensor in place."""
    for path in directory.glob("*.gguf"):
        if tensor in (tensors := parse_header(path).tensors):
            place = tensors[tensor]
            content = bytearray(path.read_bytes())
            data = np.frombuffer(content, np.uint8)[place.offset : place.offset + place.nbytes]
            change(data.reshape(*place.shape[:-1], -1))
            del data
            path.write_bytes(content)
            break
    else:
        pytest.fail(f"no {tensor}")
    if sign:
        sign_again(directory)


def change_header(path: Path, change: Callable[[dict[str, MetadataEntry]], object]) -> None:
    """The same artifact with other metadata in one of its files."""
    change_metadata(path, change)
    sign_again(path.parent)


def set_key(key: str, value: Any, kind: GGUFValueType = GGUFValueType.UINT32) -> Callable[[dict[str, MetadataEntry]], object]:
    return lambda metadata: metadata.update({key: MetadataEntry(key, kind, value)})


# -------------------------------------------------------------------------------------------------------- what is whole


def test_a_whole_artifact_passes_with_and_without_its_source(artifact: Path) -> None:
    assert [check.name for check in verify(artifact).checks] == [*CHECKS, "sample"]
    result = verify(artifact, DEMO, sample=1000)
    assert [check.name for check in result.checks] == [*CHECKS, "source"]
    entries = json.loads((artifact / "ledger.json").read_text())["tensors"]
    assert result.sampled == sum(entry["applied"] != "keep" for entry in entries)
    assert f"{len(entries) - result.sampled} kept tensors equal the source" in result.checks[-1].detail
    assert {entry["role"] for entry in entries if entry["applied"] != "keep"} >= {"embedding", "lm_head", "routed_expert"}


def test_a_split_artifact_passes(in_parts: Path) -> None:
    assert len(list(in_parts.glob("*-of-*.gguf"))) > 2
    assert verify(in_parts, DEMO, sample=8).tensors == verify(in_parts).tensors


@pytest.mark.parametrize("kind", ["maverick", "text"])
def test_other_models_pass(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    write_tiny_model(source, kind, num_hidden_layers=4, use_qk_norm=True, vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # which llama.cpp can express
        shutil.copy(DEMO / name, source / name)
    [made] = convert(source, [Q4_1], tmp_path / "out").artifacts
    assert bool(list(made.directory.glob("mmproj-*"))) == (kind != "text")
    verify(made.directory)
    assert verify(made.directory, source).checks[-1].name == "source"


def test_the_same_content_written_by_the_gguf_package_passes(copy: Path) -> None:
    for path in copy.glob("*.gguf"):
        reader = gguf.GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(path.with_suffix(".new"), str(architecture))
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and key != "general.architecture":
                writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        del reader
        path.with_suffix(".new").replace(path)
    sign_again(copy)
    assert [check.name for check in verify(copy, DEMO).checks if check.ok] == [*CHECKS, "source"]


# ----------------------------------------------------------------------------------------------------- what is damaged


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def _swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _forget(directory: Path, path: Path) -> None:
    """As if the file had never been a part of the artifact."""
    path.unlink()
    list_files(directory, lambda files: files.pop(path.name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: change_bytes(d, "output.weight", lambda a: a.__setitem__((0, 9), a[0, 9] ^ 1), sign=False),
            "has another sha256",
        ),
        (lambda d: _cut(text_file(d)), r"manifest: .*bytes; the manifest says [^$]*headers: .*truncated: tensor"),
        (lambda d: vision_file(d).unlink(), r"manifest: mmproj-.* is missing\n  tensors: the ledger lists a vision tower"),
        (lambda d: _forget(d, vision_file(d)), "the ledger lists a vision tower, but no file holds one"),
        (lambda d: text_file(d).unlink(), "expected one llama4 model and at most one vision tower, found mmproj-"),
        (lambda d: [path.unlink() for path in d.glob("*.gguf")], "headers: .* holds no GGUF files"),
        (lambda d: shutil.copy(text_file(d), d / "copy.gguf"), r"copy.gguf is not listed[^$]*headers: .*different models"),
        (lambda d: (d / "manifest.json").unlink(), r"manifest.json cannot be read[^$]*tensors: .*manifest.json cannot be read"),
        (
            lambda d: (d / "ledger.json").write_text("{}"),
            r"manifest: ledger.json has 2 bytes[^$]*ledger: ledger.json has version None",
        ),
        (lambda d: (d / "Modelfile").write_text("FROM ./x.gguf\n"), r"metadata: 1 problem: Modelfile does not name these files"),
    ],
)
def test_damaged_files_are_named(copy: Path, change: Callable[[Path], object], message: str) -> None:
    change(copy)
    with pytest.raises(ArtifactError, match=message):
        verify(copy, DEMO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda first, second, last: _swap(first, second), "split.no is 1; expected 0"),
        (lambda first, second, last: second.unlink(), r"missing \(1 of"),
        (lambda first, second, last: shutil.copy(first, last), "split.no is 0; expected"),
        (lambda first, second, last: _cut(second), "truncated: tensor"),
    ],
)
def test_damaged_splits_are_named(parts: Path, change: Callable[[Path, Path, Path], object], message: str) -> None:
    first, second, *_, last = sorted(parts.glob("tiny-*.gguf"))
    change(first, second, last)
    with pytest.raises(ArtifactError, match=rf"headers: [^$]*{message}"):
        verify(parts)


EXPERTS = "blk.2.ffn_down_exps.weight"


def _swap_experts(stack: np.ndarray[Any, Any]) -> None:
    stack[[4, 5]] = stack[[5, 4]]


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (EXPERTS, _swap_experts, r"experts\.[45]\.down_proj: relative error to the source is .*; the ledger says"),
        (EXPERTS, lambda a: a.__setitem__((3, 0, slice(2)), [0, 0x7C]), rf"{EXPERTS} \(Q5_1\) holds a scale that is not finite"),
        (EXPERTS, lambda a: a.__setitem__((3, 0, slice(2, 4)), [1, 0xFE]), rf"{EXPERTS} \(Q5_1\) holds a scale that is not finite"),
        ("output.weight", lambda a: a.__setitem__((0, 1), 0xFF), r"output.weight \(Q4_1\) holds a scale that is not finite"),
        ("output.weight", lambda a: a.__setitem__(slice(9), 0), "lm_head.weight: relative error to the source"),
        (
            "token_embd.weight",
            lambda a: a.__setitem__((0, 1), 0x7C),
            r"token_embd.weight \(F16\) holds a number that is not finite",
        ),
        ("blk.1.ffn_up_exps.weight", lambda a: a.__setitem__((7, 0, 0), a[7, 0, 0] ^ 1), r"experts.7.up_proj is kept but differs"),
        ("blk.1.ffn_gate_inp.weight", lambda a: a.__setitem__((0, 2), a[0, 2] ^ 1), "router.weight is kept but differs"),
        ("output_norm.weight", lambda a: a.__setitem__(0, a[0] ^ 1), "model.norm.weight is kept but differs"),
        ("v.blk.0.ln1.bias", lambda a: a.__setitem__(2, a[2] ^ 1), "input_layernorm.bias is kept but differs"),
        ("v.blk.1.attn_q.weight", lambda a: a.__setitem__((0, 0), a[0, 0] ^ 1), "q_proj.weight is kept but differs"),
        ("rope_freqs.weight", lambda a: a.__setitem__(5, a[5] ^ 1), "rope_freqs.weight differs from what rope_scaling"),
    ],
)
def test_wrong_data_is_found_behind_a_valid_manifest(
    copy: Path, tensor: str, change: Callable[[np.ndarray[Any, Any]], object], message: str
) -> None:
    change_bytes(copy, tensor, change)
    with pytest.raises(ArtifactError, match=message):
        verify(copy, DEMO, sample=1000)


@pytest.mark.parametrize(
    ("change", "message", "needs_source"),
    [
        (set_key("llama4.block_count", 3), r"tensors: .*problems: blk\.3\.\S+ is not expected", False),
        (set_key("llama4.block_count", 2**31), "layers with 16 experts cannot be", False),
        (set_key("llama4.expert_count", 8), r"expected Q4_K \[8, ", False),
        (
            set_key("llama4.attention.value_length", 7),
            r"metadata: 1 problem: llama4.attention.value_length is 7 \(UINT32\)",
            False,
        ),
        (set_key("llama4.use_qk_norm", False, GGUFValueType.BOOL), "llama4.use_qk_norm is False", False),
        (set_key("general.file_type", 2), r"general.file_type is 2 \(UINT32\)", False),
        (lambda keys: keys.pop("llama4.vocab_size"), r"llama4.vocab_size is missing; expected 2048 \(UINT32\)", False),
        (lambda keys: keys.pop("llama4.rope.freq_base"), "has no key llama4.rope.freq_base", False),
        (set_key("general.architecture", "llama", GGUFValueType.STRING), r"found .*\('llama'\)", False),
        (set_key("llama4.rope.freq_base", 1e4, GGUFValueType.FLOAT32), "llama4.rope.freq_base is 10000.0", True),
        (
            set_key("llama4.expert_used_count", 2),
            r"not the source of this artifact: 1 problem: llama4.expert_used_count is 2",
            True,
        ),
        (set_key("llama4.context_length", 9), "llama4.context_length is 9", True),
        (set_key("tokenizer.ggml.eos_token_id", 9), "tokenizer.ggml.eos_token_id is 9", True),
        (lambda keys: keys.pop("tokenizer.chat_template"), "tokenizer.chat_template is missing", True),
        (set_key("llama4.attention.sliding_window", 9), "llama4.attention.sliding_window is not expected", True),
    ],
)
def test_an_edited_header_is_found_behind_a_valid_manifest(
    copy: Path, change: Callable[[dict[str, MetadataEntry]], object], message: str, needs_source: bool
) -> None:
    change_header(text_file(copy), change)
    if needs_source:
        verify(copy)
    with pytest.raises(ArtifactError, match=message):
        verify(copy, DEMO if needs_source else None)


def test_the_name_of_the_model_and_its_card_may_differ(copy: Path) -> None:
    change_header(text_file(copy), set_key("general.name", "Something Else", GGUFValueType.STRING))
    assert [check.name for check in verify(copy, DEMO).checks if check.ok] == [*CHECKS, "source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_key("clip.vision.block_count", 1), r"v\.blk\.1\.\S+ is not expected"),
        (set_key("clip.vision.block_count", 2**31), "layers cannot be"),
        (set_key("clip.projector_type", "mlp", GGUFValueType.STRING), "its projector is 'mlp'; expected llama4"),
        (set_key("clip.vision.projection_dim", 5), "clip.vision.projection_dim is 5"),
        (set_key("clip.use_gelu", False, GGUFValueType.BOOL), "clip.use_gelu is False"),
    ],
)
def test_an_edited_header_of_the_vision_tower_is_found(
    copy: Path, change: Callable[[dict[str, MetadataEntry]], object], message: str
) -> None:
    change_header(vision_file(copy), change)
    with pytest.raises(ArtifactError, match=message):
        verify(copy)


def _edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda manifest: manifest["recipe"]["rules"][0].update(scheme="Q5_K"),
            r"blk.0.ffn_gate_exps.weight is Q4_K .*expected Q5_K",
        ),
        (lambda manifest: manifest["recipe"].update(mixture=[]), "unknown mixture"),
        (lambda manifest: manifest["recipe"].update(format="compressed-tensors"), "is for 'compressed-tensors'"),
        (lambda manifest: manifest.pop("recipe"), "manifest.json holds no recipe"),
        (lambda manifest: manifest["recipe"].update(rules=5), r"needs at least one \[\[rules\]\] table"),
    ],
)
def test_another_recipe_is_found(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    _edit_manifest(copy, change)
    with pytest.raises(ArtifactError, match=message):
        verify(copy)


def test_a_ledger_that_says_something_else_is_found(copy: Path) -> None:
    path = copy / "ledger.json"
    path.write_text(path.read_text().replace('"asked": "Q4_K", "applied": "Q4_K"', '"asked": "Q4_K", "applied": "Q4_0"', 1))
    sign_again(copy)
    with pytest.raises(ArtifactError, match="asked Q4_K, applied Q4_0, but the artifact says Q4_K"):
        verify(copy)


def test_the_wrong_source_is_refused(copy: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "other", "scout", num_hidden_layers=4)
    shutil.copy(DEMO / "tokenizer.json", tmp_path / "other" / "tokenizer.json")
    with pytest.raises(ArtifactError, match=r"source: "):
        verify(copy, tmp_path / "other")


# ----------------------------------------------------------------------------------------------------------------- fuzz

_json = any_json("(", "keep", "Q4_K_M", 10**400)


@pytest.fixture(scope="module")
def spare(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(artifact, tmp_path_factory.mktemp("spare") / "copy"))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["ledger.json", "manifest.json"]))
def test_mutated_json_fails_verification_and_nothing_else(artifact: Path, spare: Path, data: st.DataObject, name: str) -> None:
    content = json.loads((artifact / name).read_text())
    part = data.draw(st.sampled_from([content, content.get("recipe", content)]))
    container, key = data.draw(st.sampled_from(places(part)))
    container[key] = data.draw(_json)
    check_verification(artifact, spare, name, content, DEMO)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_mutated_header_fails_verification_and_nothing_else(artifact: Path, spare: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([text_file(spare), vision_file(spare)]))
    header = parse_header(path)
    content = bytearray(path.read_bytes())
    # the vocabulary takes most of a text model's header; what is worth damaging stands before and behind it
    reach = min(3000, header.data_start // 2)
    place = data.draw(st.integers(0, reach) | st.integers(header.data_start - reach, header.data_start - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        with pytest.raises(ArtifactError, match="has another sha256"):
            verify(spare, DEMO, sample=1)
        sign_again(spare)
        with contextlib.suppress(ArtifactError):
            verify(spare, sample=1)
    finally:
        for name in (path.name, "manifest.json"):
            shutil.copy(artifact / name, spare / name)


# --------------------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_scales_are_finite_where_ggml_says_so(kind: str) -> None:
    """Every single byte of a block is set to what makes a number infinite or NaN, and ggml's own check decides."""
    validate = library().ggml_validate_row_data
    validate.restype, validate.argtypes = c_bool, [c_int32, c_void_p, c_size_t]
    weights = np.random.default_rng(3).standard_normal((1, 512)).astype(np.float32)
    if TYPES[kind].floating:
        data = gguf.quantize(weights, gguf.GGMLQuantizationType[kind]).view(np.uint8)[0]
    else:
        data = ggml_quantize(kind, weights, np.ones(512, np.float32) if kind.startswith("IQ") else None)[0]
    found = set()
    for place in range(min(len(data), TYPES[kind].nbytes * 2)):
        for value in (0x7C, 0x7F, 0xFC, 0xFF, 0xC0, 0x70):
            changed = data.copy()
            changed[place] = value
            if kind == "IQ1_M":  # two numbers together hold the exponent
                changed[TYPES[kind].nbytes - 1] |= 0x70
            expected = bool(validate(TYPES[kind].id, changed.ctypes.data, changed.size))
            assert finite_scales(TYPES[kind], changed) is expected, (place, value)
            found.add(expected)
    assert True in found and (False in found or TYPES[kind].floating)
