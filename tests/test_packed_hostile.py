"""Packed files whose header is sound, checksum and all, but says of the model what cannot be: refused with one documented error."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.convert import convert
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.inspection import inspect
from quantkit.packed_header import BlockContent, read_header
from quantkit.stored_model import open_model
from tests.test_packed_header import write_file
from tests.tiny_models import write_tiny_model

DTYPES = ("BF16", "F32", "F8_E4M3", "U8", "I8", "I32", "Q8_0", "Q4_K")
SCHEMES = (
    "int4-g128",
    "int4-g64-asym",
    "int8-channel",
    "int3-g32",
    "fp8-channel-dynamic",
    "fp8-block-dynamic",
    "fp8-tensor-static",
)
NAMES = (
    *SCHEMES,
    "nvfp4",
    "mxfp4",
    "Q8_0",
    "BF16",
    "keep",
    "",
    "int4",
    "int99-g128",
    "int4-g7",
    "int4-g99999999999999999999",
    "\u0664",
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made")
    write_tiny_model(output / "source", "text")
    return convert(output / "source", "packed-int4", output).artifacts[0].directory


@pytest.fixture(scope="module")
def blocks(artifact: Path) -> list[BlockContent]:
    """What the header of the artifact says."""

    def content(name: str) -> BlockContent:
        block = read_header(artifact / "model.packed").blocks[name]
        schemes = {key.removeprefix(f"{name}."): scheme for key, scheme in block.schemes.items()}
        tensors = [(tensor.name.removeprefix(f"{name}."), tensor.dtype, tensor.shape) for tensor in block.tensors]
        return BlockContent(name, schemes, tensors)

    return [content(name) for name in read_header(artifact / "model.packed").blocks]


def changed(block: BlockContent, data: st.DataObject) -> BlockContent:
    """One lie about a block, of which a program could write a sound header."""
    what = data.draw(st.sampled_from(["scheme", "name", "dtype", "shape", "tensor gone", "tensor more"]))
    tensors, schemes = list(block.tensors), dict(block.schemes)
    number = data.draw(st.integers(0, len(tensors) - 1))
    key, dtype, shape = tensors[number]
    if what == "scheme":
        known = [name.rpartition(".")[0] or name for name, _, _ in tensors]
        schemes[data.draw(st.sampled_from([*schemes, *known]))] = data.draw(st.sampled_from(NAMES))
    elif what == "name":
        return replace(
            block, name=data.draw(st.sampled_from([f"{block.name}0", "x", f"language_model.{block.name}", "a.experts.9999"]))
        )
    elif what == "dtype":
        kind = data.draw(st.sampled_from(DTYPES))
        tensors[number] = (key, kind, (*shape[:-1], 256) if kind.startswith("Q") else shape)
    elif what == "shape":
        one = data.draw(st.lists(st.sampled_from([1, 2, 3, 16, 128, 129]), min_size=1, max_size=4)).__iter__()
        tensors[number] = (key, "U8" if dtype.startswith("Q") else dtype, tuple(one))
    elif what == "tensor gone" and len(tensors) > 1:
        del tensors[number]
    else:
        tensors.insert(number, (f"{key}x", "U8", (3,)))
    return replace(block, schemes=schemes, tensors=tensors)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_cannot_be_is_refused(
    artifact: Path, blocks: list[BlockContent], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    listed = list(blocks)
    for _ in range(data.draw(st.integers(1, 2))):
        number = data.draw(st.integers(0, len(listed) - 1))
        listed[number] = changed(listed[number], data)
    if len({block.name for block in listed}) < len(listed):
        return
    directory = tmp_path_factory.mktemp("hostile")
    shutil.copy(artifact / "config.json", directory)
    file = write_file(directory / "model.packed", listed)
    try:
        found = inspect(file)
        assert found.parameters >= 0 and found.bytes == file.stat().st_size
    except (CheckpointError, ArtifactError) as error:
        assert str(file) in str(error)
    try:
        with open_model(directory) as model:
            assert model.bytes > 0
            for unit in model.units:
                for matrix in unit.matrices:
                    model.read(matrix)
    except (CheckpointError, ArtifactError) as error:
        assert str(directory) in str(error) or any(block.name in str(error) for block in listed), error
    shutil.rmtree(directory)
