"""The packed format: tensors of every scheme, files read back by a decoder written from the specification, damage of any byte."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.convert import convert, plan
from quantkit.errors import ArtifactError, CheckpointError, RecipeError
from quantkit.formats import packed
from quantkit.grid import QuantizedTensor, dequantize, fit, fit_global_scale, snap
from quantkit.llama4 import SourceTensor, WeightMatrix
from quantkit.packed_files import PackedFiles
from quantkit.recipe import Recipe, Rule
from quantkit.scheme import GGML, Scheme, parse_scheme, scheme_names
from quantkit.workspace import Workspace
from tests.packed_decoder import read_file, weight
from tests.tiny_models import write_tiny_model

EXPERT = "language_model.model.layers.0.feed_forward.experts"
SCHEMES = [name for name in scheme_names() if name != "keep"]
# Every expert and nearly every matrix of two layers has another scheme.
VARIED = Recipe(
    "varied",
    (
        Rule("int8-channel", name=r"layers\.0\..*experts\.0\."),
        Rule("int4-g32-asym", name=r"layers\.0\..*experts\.1\.gate"),
        Rule("fp8-block-dynamic", name=r"layers\.0\..*experts\.1\.up"),
        Rule("keep", name=r"layers\.0\..*experts\.1\.down"),
        Rule("nvfp4", name=r"layers\.0\..*experts\.2\."),
        Rule("mxfp4", name=r"layers\.0\..*experts\.3\."),
        Rule("int2-g64-asym", name=r"layers\.1\..*experts\.0\."),
        Rule("int3-g128", name=r"layers\.1\..*experts\.1\."),
        Rule("int5-g32", name=r"layers\.1\..*experts\.2\."),
        Rule("int6-channel", name=r"layers\.1\..*experts\.3\."),
        Rule("fp8-channel-dynamic", roles=("shared_expert",)),
        Rule("int8-channel-dynamic", roles=("attention",), layers="0"),
        Rule("Q8_0", roles=("attention", "embedding"), name="q_proj|embed"),
        Rule("F16", roles=("lm_head",)),
        Rule("keep"),
    ),
    format="packed",
    maximum_error=1.0,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "tiny"
    write_tiny_model(directory, "scout", seed=3)
    return directory


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, VARIED, tmp_path_factory.mktemp("artifact")).artifacts[0].directory


@pytest.fixture
def files(artifact: Path) -> Iterator[PackedFiles]:
    with PackedFiles.open(artifact) as opened:
        yield opened


def quantized(scheme: Scheme, rows: int, columns: int, seed: int) -> QuantizedTensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    divisor = fit_global_scale(float(values.abs().max())) if scheme.global_scale else None
    found = snap(values, scheme, *fit(values, scheme, divisor), divisor)
    if scheme.static_activations:
        return QuantizedTensor(scheme, found.codes, found.scale, input_scale=torch.tensor([0.25], dtype=torch.bfloat16))
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(one: QuantizedTensor, two: QuantizedTensor) -> None:
    for field in fields(QuantizedTensor):
        left, right = getattr(one, field.name), getattr(two, field.name)
        if isinstance(left, torch.Tensor):
            assert left.shape == right.shape and left.dtype == right.dtype and torch.equal(bits(left), bits(right)), field.name
        else:
            assert left == right, field.name


# --------------------------------------------------------------------------------------------------------------- tensors


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(SCHEMES), st.sampled_from([8, 24, 128, 256]), st.integers(1, 10), st.integers(0, 2**31), st.booleans())
def test_every_scheme_comes_back(name: str, rows: int, width: int, seed: int, reuse: bool) -> None:
    """Codes, scales and zero points bit for bit; names, dtypes and sizes are those planned."""
    scheme = parse_scheme(name)
    assert scheme is not None
    columns = 32 * width
    if packed.misfit(scheme, rows, columns):
        columns, rows = 128 * width, 128
    assert packed.misfit(scheme, rows, columns) is None
    given_tensor = quantized(scheme, rows, columns, seed)
    encoded = packed.encode("a.b_proj", given_tensor, Workspace() if reuse else None)
    matrix = WeightMatrix("a.b_proj", (rows, columns), "attention", 0, "b_proj", "x")
    planned = packed.output_tensors(matrix, scheme, "BF16")
    assert [tensor.name for tensor in planned] == list(encoded)
    assert [tensor.shape for tensor in planned] == [tuple(tensor.shape) for tensor in encoded.values()]
    assert [tensor.nbytes for tensor in planned] == [tensor.numel() * tensor.element_size() for tensor in encoded.values()]
    assert all(tensor.is_contiguous() for tensor in encoded.values())
    assert_same(packed.decode("a.b_proj", encoded, scheme), given_tensor)


def test_rows_that_are_filled_up_come_back() -> None:
    """A row of 96 inputs fills a group of planes for three quarters; its scales tell."""
    scheme = parse_scheme("int4-g32")
    assert scheme is not None
    given_tensor = quantized(scheme, 8, 96, 0)
    encoded = packed.encode("x", given_tensor)
    assert encoded["x.codes"].shape == (8, 16)
    assert_same(packed.decode("x", encoded, scheme), given_tensor)


def test_without_groups_rows_must_fill_their_planes() -> None:
    scheme = parse_scheme("int4-channel")
    assert scheme is not None
    assert "multiple of 128" in (packed.misfit(scheme, 8, 96) or "")
    assert packed.misfit(scheme, 8, 256) is None


def test_decoding_names_what_is_wrong() -> None:
    scheme = parse_scheme("int4-g32-asym")
    assert scheme is not None
    encoded = packed.encode("m", quantized(scheme, 8, 128, 0))
    for name, replacement in [
        ("m.codes", None),
        ("m.scale", None),
        ("m.zero_point", None),
        ("m.scale", encoded["m.scale"].float()),
        ("m.zero_point", encoded["m.zero_point"][:1]),
        ("m.codes", encoded["m.codes"][:4]),
        ("m.codes", encoded["m.codes"].view(-1)),
    ]:
        changed = {key: tensor for key, tensor in encoded.items() if key != name}
        if replacement is not None:
            changed[name] = replacement
        with pytest.raises(ArtifactError, match=r"m\.(codes|scale|zero_point)"):
            packed.decode("m", changed, scheme)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "F16", "IQ4_XS"])
def test_types_of_llama_cpp_are_rows_of_their_blocks(name: str) -> None:
    scheme = GGML[name]
    matrix = WeightMatrix("m", (4, 512), "attention", 0, "m", "x")
    [planned] = packed.output_tensors(matrix, scheme, "BF16")
    assert (planned.dtype, planned.nbytes) == (name, 4 * 512 // scheme.block_type.block * scheme.block_type.nbytes)


def test_only_types_of_llama_cpp_for_what_is_no_matrix_of_a_layer() -> None:
    copy = SourceTensor("lm_head.weight", (64, 256), "lm_head")
    assert packed.copied_tensor(copy, GGML["Q4_K"], "BF16").dtype == "Q4_K"
    with pytest.raises(RecipeError, match=r"lm_head.weight cannot be int4-g128 .*Q8_0"):
        packed.copied_tensor(copy, parse_scheme("int4-g128"), "BF16")
    with pytest.raises(RecipeError, match="not a multiple of the block"):
        packed.copied_tensor(SourceTensor("lm_head.weight", (64, 200), "lm_head"), GGML["Q4_K"], "BF16")


def test_shapes_that_do_not_fit_are_listed_before_any_work(tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    write_tiny_model(narrow, "text", hidden_size=96, head_dim=24)
    recipe = Recipe("x", (Rule("int8-channel", roles=("routed_expert", "shared_expert")), Rule("keep")), format="packed")
    with pytest.raises(
        RecipeError, match=r"cannot hold some(.|\n)*gate_proj cannot be int8-channel: input size 96(.|\n)*and \d+ more"
    ):
        plan(narrow, recipe)


# ----------------------------------------------------------------------------------------------------------------- files


def test_a_decoder_written_from_the_specification_reads_the_same_weights(artifact: Path, files: PackedFiles) -> None:
    [path] = artifact.glob("*.packed")
    tensors, schemes, places = read_file(path)
    assert schemes == files.schemes and tensors.keys() == files.tensors.keys()
    seen = set()
    for name in files.schemes:
        scheme = parse_scheme(schemes[name])
        assert scheme is not None
        if scheme.number != "ggml":
            parts = {key: files.read(key) for key in files.tensors if key.startswith(f"{name}.")}
            ours = dequantize(packed.decode(name, parts, scheme)).numpy()
            np.testing.assert_array_equal(weight(tensors, name, schemes[name]), ours, err_msg=name)
            seen.add(scheme.name)
    assert len(seen) == 11
    kept = f"{EXPERT}.1.down_proj"
    np.testing.assert_array_equal(weight(tensors, kept, None), files.read(f"{kept}.weight").float().numpy())
    assert all(position % 4096 == 0 and size % 4096 == 0 for position, size in places.values())


def test_an_expert_is_one_block_that_is_read_at_once_or_mapped(files: PackedFiles) -> None:
    name = f"{EXPERT}.1"
    block = files.blocks[name].block
    assert block.offset % 4096 == 0 and block.size % 4096 == 0
    assert [tensor.name.removeprefix(f"{name}.") for tensor in block.tensors] == [
        *(f"gate_proj.{part}" for part in ("codes", "scale", "zero_point")),
        *(f"up_proj.{part}" for part in ("codes", "scale")),
        "down_proj.weight",
    ]
    assert block.schemes == {f"{name}.gate_proj": "int4-g32-asym", f"{name}.up_proj": "fp8-block-dynamic"}
    buffer = np.full(block.size + 100, 7, np.uint8)
    for tensors in (
        files.read_block(name),
        files.read_block(name, buffer),
        files.map_block(name),
        files.map_block(name, check=False),
    ):
        assert list(tensors) == [tensor.name for tensor in block.tensors]
        for key, tensor in tensors.items():
            expected = files.read(key)
            assert tensor.dtype == expected.dtype and torch.equal(bits(tensor), bits(expected))
    assert np.shares_memory(files.read_block(name, buffer)[f"{name}.down_proj.weight"].view(torch.uint8).numpy(), buffer)
    assert (buffer[block.size :] == 7).all()


def test_a_map_is_private(artifact: Path, files: PackedFiles) -> None:
    [path] = artifact.glob("*.packed")
    before = path.read_bytes()
    mapped = files.map_block(f"{EXPERT}.0")
    next(iter(mapped.values())).zero_()
    assert path.read_bytes() == before


def test_all_blocks_of_all_kinds_are_there(files: PackedFiles) -> None:
    base = "language_model.model.layers.0"
    attention = [tensor.name for tensor in files.blocks[f"{base}.self_attn"].block.tensors]
    assert attention[0] == f"{base}.self_attn.q_proj.codes" and any("o_proj" in name for name in attention)
    assert f"{base}.feed_forward.shared_expert" in files.blocks
    for single in (f"{base}.input_layernorm", f"{base}.feed_forward.router", "language_model.lm_head", "language_model.model.norm"):
        assert [tensor.name for tensor in files.blocks[single].block.tensors] == [f"{single}.weight"]
    vision = files.blocks["vision_model.model.layers.0.mlp.fc1"].block
    assert [tensor.name.rpartition(".")[2] for tensor in vision.tensors] == ["weight", "bias"]
    with pytest.raises(CheckpointError, match="no file holds 'x'"):
        files.read("x")
    with pytest.raises(CheckpointError, match="no file holds a block 'x'"):
        files.read_block("x")


# ---------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def spare(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(artifact, tmp_path_factory.mktemp("spare") / "copy"))


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_flipped_bit_anywhere_in_a_block_is_found_by_every_reader_of_it(spare: Path, data: st.DataObject) -> None:
    """In a tensor, a checksum or the padding; and only by those that read it."""
    [path] = spare.glob("*.packed")
    with PackedFiles.open(spare) as whole:
        blocks = list(whole.blocks)
    name = data.draw(st.sampled_from([block for block in blocks if "experts." in block or "shared" in block] + blocks[:3]))
    with PackedFiles.open(spare) as before:
        block = before.blocks[name].block
    inside = data.draw(
        st.one_of(st.integers(0, block.size - 1), st.integers(block.tensors[-1].checksum - block.offset - 8, block.size - 1))
    )
    position, bit = block.offset + inside, data.draw(st.integers(0, 7))
    flip(path, position, bit)
    try:
        with PackedFiles.open(spare) as files:  # the header is whole
            for read in (files.read_block, files.map_block, files.check_block):
                with pytest.raises(ArtifactError, match=r"model\.packed: .*(checksum|padding)"):
                    read(name)
            files.map_block(name, check=False)
            for tensor in block.tensors:
                touched = any(
                    start <= position < start + size for start, size in ((tensor.offset, tensor.nbytes), (tensor.checksum, 8))
                )
                if touched:
                    with pytest.raises(ArtifactError, match=tensor.name):
                        files.read(tensor.name)
                    with pytest.raises(ArtifactError, match=tensor.name):
                        list(files.chunks(tensor.name, 1000))
                else:
                    files.read(tensor.name)
            other = next(found for found in blocks if found != name)
            files.read_block(other)
    finally:
        flip(path, position, bit)


def test_an_error_names_layer_and_expert(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    with PackedFiles.open(copy) as files:
        at = files.locate(f"{EXPERT}.2.up_proj.scale").offset
    flip(copy / "model.packed", at, 3)
    with (
        PackedFiles.open(copy) as files,
        pytest.raises(ArtifactError, match=r"layer 0, expert 2.*Copy or download this file again"),
    ):
        files.read(f"{EXPERT}.2.up_proj.scale")


def test_a_file_that_changes_or_shrinks_while_it_is_open_is_noticed(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    with PackedFiles.open(copy) as files:
        name = list(files.blocks)[-1]
        with (copy / "model.packed").open("r+b") as file:
            file.truncate(files.blocks[name].block.offset + 10)
        for read in (files.read_block, files.map_block, files.check_block):
            with pytest.raises(CheckpointError, match="has changed since it was opened"):
                read(name)
