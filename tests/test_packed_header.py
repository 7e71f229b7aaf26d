"""Headers of packed files: what is built is read back, and whatever else the bytes are ends in one documented error."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import CheckpointError, OutputError
from quantkit.packed_files import PackedFiles
from quantkit.packed_header import MAX_HEADER_BYTES, BlockContent, build_header, model_of, parse_header, read_header, tensor_bytes
from tests.mutated_json import any_json, places
from tests.packed_decoder import read_file, read_json

BLOCKS = [
    BlockContent("a.experts.0", {"up": "int4-g128"}, [("up.codes", "I32", (8, 16)), ("up.scale", "BF16", (1, 8))]),
    BlockContent("a.experts.1", {}, [("up.weight", "BF16", (8, 128)), ("down.weight", "F32", (128, 8)), ("x", "U8", (3,))]),
    BlockContent("head", {"weight": "Q8_0"}, [("weight", "Q8_0", (5, 64))]),
]


def write_file(path: Path, blocks: list[BlockContent], number: int = 0, count: int = 1, model: str = "m") -> Path:
    """A file whose tensors are all of one byte value each, with their checksums."""
    built = build_header(blocks, number, count, model)
    data = bytearray(built.size)
    data[: len(built.data)] = built.data
    sizes = {f"{block.name}.{key}": tensor_bytes(dtype, shape) for block in blocks for key, dtype, shape in block.tensors}
    for value, (name, offset) in enumerate(built.offsets.items(), 1):
        content = bytes([value]) * sizes[name]
        data[offset : offset + sizes[name]] = content
        struct.pack_into("<Q", data, built.checksums[name], xxhash.xxh3_64(content).intdigest())
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("whole") / "model.packed", BLOCKS)


def rebuilt(data: bytes, text: bytes) -> bytes:
    """The file with another JSON, as a program would write it that got everything else right."""
    _, start = read_json(data)
    begin = -(-(64 + len(text)) // 4096) * 4096
    prelude = struct.pack("<8sIIQQQ16x", b"QKPACKED", 1, 64, len(text), begin, begin + len(data) - start)
    head = prelude + struct.pack("<Q", xxhash.xxh3_64(prelude + text).intdigest()) + text
    return head + bytes(begin - len(head)) + data[start:]


# ----------------------------------------------------------------------------------------------------------------- whole


def test_what_is_built_is_read_back(whole: Path) -> None:
    header = read_header(whole)
    assert (header.number, header.count, header.model, header.file_size) == (0, 1, "m", whole.stat().st_size)
    tensors, schemes, places_of = read_file(whole)
    assert {name: (block.offset, block.size) for name, block in header.blocks.items()} == places_of
    found = {tensor.name: tensor for block in header.blocks.values() for tensor in block.tensors}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: entry[:2] for name, entry in tensors.items()
    }
    assert {name: scheme for block in header.blocks.values() for name, scheme in block.schemes.items()} == schemes
    data = whole.read_bytes()
    for name, tensor in found.items():
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == tensors[name][2]
    with PackedFiles.open(whole) as files:
        for name in files.blocks:
            files.check_block(name)
            files.read_block(name)


_names = st.text(st.characters(codec="utf-8", categories=["L", "N"], include_characters="._-"), min_size=1, max_size=12)
_tensors = st.dictionaries(
    _names,
    st.one_of(
        st.tuples(
            st.sampled_from(["BF16", "F16", "F32", "F8_E4M3", "U8", "I8", "I32"]),
            st.lists(st.integers(1, 9), min_size=1, max_size=3),
        ),
        st.tuples(st.just("Q8_0"), st.tuples(st.integers(1, 5), st.sampled_from([32, 64])).map(list)),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=80, deadline=None)
@given(content=st.dictionaries(_names, st.tuples(st.dictionaries(_names, _names, max_size=2), _tensors), min_size=1, max_size=5))
def test_any_blocks_come_back(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    blocks = [
        BlockContent(name, schemes, [(key, dtype, tuple(shape)) for key, (dtype, shape) in tensors.items()])
        for name, (schemes, tensors) in content.items()
    ]
    names = [f"{block.name}.{key}" for block in blocks for key, _, _ in block.tensors]
    if len(set(names)) < len(names):
        return
    path = write_file(tmp_path_factory.mktemp("any") / "x.packed", blocks)
    tensors, _, places_of = read_file(path)
    header = read_header(path)
    assert list(tensors) == names == [tensor.name for block in header.blocks.values() for tensor in block.tensors]
    assert [size for _, size in places_of.values()] == [block.size for block in blocks]


def test_models_of_other_layouts_have_other_names() -> None:
    other = [BlockContent("head", {}, [("weight", "Q8_0", (5, 64))])]
    assert len({model_of([BLOCKS]), model_of([BLOCKS[:2], BLOCKS[2:]]), model_of([other]), model_of([BLOCKS[2:]])}) == 4
    assert model_of([BLOCKS]) == model_of([list(BLOCKS)])


def test_a_header_that_readers_would_refuse_is_not_written() -> None:
    huge = BlockContent("a" * (MAX_HEADER_BYTES + 1), {}, [("x", "U8", (1,))])
    with pytest.raises(OutputError, match="larger than"):
        build_header([huge], 0, 1, "m")


# ---------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d[:10], "no packed file of quantkit"),
        (lambda d: b"", "no packed file of quantkit"),
        (lambda d: b"GGUF" + d[4:], "no packed file of quantkit"),
        (
            lambda d: d[:8] + struct.pack("<I", 2) + d[12:],
            "version 2 of the packed format; this quantkit reads version 1. Update it",
        ),
        (lambda d: d[:8] + struct.pack("<I", 0) + d[12:], "version 0 of the packed format"),
        (lambda d: d[:12] + struct.pack("<I", 72) + d[16:], "damaged at its start"),
        (lambda d: d[:12] + struct.pack("<I", 4096) + d[16:], "declares a prelude of 4,096 bytes, .* which do not go together"),
        (lambda d: d[:16] + struct.pack("<Q", 2**63) + d[24:], "declares a header of 9,223,372,036,854,775,808 bytes"),
        (lambda d: d[:16] + struct.pack("<Q", 10) + d[24:], "checksum that was stored with it|damaged"),
        (lambda d: d[:24] + struct.pack("<Q", 8192) + d[32:], "damaged at its start"),
        (lambda d: d[:32] + struct.pack("<Q", 2**64 - 1) + d[40:], "truncated: "),
        (lambda d: d[:32] + struct.pack("<Q", 9) + d[40:], "declares 9 bytes in all"),
        (lambda d: d[:45] + b"x" + d[46:], "does not have the checksum"),
        (lambda d: d[:60] + bytes([d[60] ^ 1]) + d[61:], "does not have the checksum"),
        (lambda d: d[:80] + bytes([d[80] ^ 1]) + d[81:], "does not have the checksum"),
        (lambda d: d[:4095] + b"x" + d[4096:], "damaged between header and data"),
        (lambda d: d[:-1], "truncated: 1 of"),
        (lambda d: d[:4096], "truncated: "),
        (lambda d: d + b"x", "1 bytes follow after the last block"),
    ],
)
def test_damage_is_named(whole: Path, tmp_path: Path, change: Callable[[bytes], bytes], said: str) -> None:
    path = tmp_path / "model.packed"
    path.write_bytes(change(whole.read_bytes()))
    for reader in (read_header, PackedFiles.open):
        with pytest.raises(CheckpointError, match=said):
            reader(path)


def edit(content: dict[str, Any], *keys: Any) -> Callable[[Any], None]:
    *path, last = keys
    for key in path:
        content = content[key]
    return lambda value: content.__setitem__(last, value)


EXPERT = ("blocks", "a.experts.1")


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("file",), 1, "file 1 of 1"),
        (("file",), True, "file True of 1"),
        (("files",), 0, "file 0 of 0"),
        (("files",), 10**9, "file 0 of 1000000000"),
        (("model",), 3, "says of no model"),
        (("blocks",), {}, "holds no blocks"),
        (("blocks",), [], "holds no blocks"),
        (EXPERT, 1, "expected an object of offset"),
        ((*EXPERT, "more"), 1, "expected an object of offset"),
        ((*EXPERT, "offset"), 0, "they have to be"),  # overlaps the block before it
        ((*EXPERT, "offset"), 8192, "they have to be"),
        ((*EXPERT, "offset"), 4096.0, "expected positions"),
        ((*EXPERT, "size"), 8192 * 2, "they have to be"),
        ((*EXPERT, "size"), -4096, "they have to be"),
        ((*EXPERT, "checksums"), 2**62, "they have to be"),
        ((*EXPERT, "schemes"), {"x": 1}, "expected an object of names"),
        ((*EXPERT, "tensors"), {}, "expected an object of at least one"),
        ((*EXPERT, "tensors", "x"), ["U8", [3]], "expected dtype, shape and offset"),
        ((*EXPERT, "tensors", "x"), ["U9", [3], 6144], "unknown dtype 'U9'"),
        ((*EXPERT, "tensors", "x"), [["U8"], [3], 6144], "unknown dtype"),
        ((*EXPERT, "tensors", "x"), ["U8", [0], 6144], "expected sizes"),
        ((*EXPERT, "tensors", "x"), ["U8", [], 6144], "expected sizes"),
        ((*EXPERT, "tensors", "x"), ["U8", [-3], 6144], "expected sizes"),
        ((*EXPERT, "tensors", "x"), ["U8", [2**40, 2**40], 6144], "impossibly large"),
        ((*EXPERT, "tensors", "x"), ["U8", [2**50], 6144], "they have to be"),
        ((*EXPERT, "tensors", "x"), ["Q8_0", [3], 6144], "no whole blocks of Q8_0"),
        ((*EXPERT, "tensors", "x"), ["U8", [3], 2048], "it has to follow at 6144"),  # overlaps
        ((*EXPERT, "tensors", "x"), ["U8", [3], 6400], "it has to follow at 6144"),  # leaves a hole
        ((*EXPERT, "tensors", "x"), ["U8", [3], None], "expected a position"),
        ((*EXPERT, "tensors", "up.weight"), ["BF16", [8, 129], 0], "it has to follow at 2304"),
    ],
)
def test_a_lying_header_is_found_behind_a_valid_checksum(whole: Path, tmp_path: Path, keys: Any, value: Any, said: str) -> None:
    data = whole.read_bytes()
    content, _ = read_json(data)
    edit(content, *keys)(value)
    path = tmp_path / "model.packed"
    path.write_bytes(rebuilt(data, json.dumps(content).encode()))
    with pytest.raises(CheckpointError, match=re.escape(said)):
        PackedFiles.open(path)


def test_names_that_meet_are_refused(tmp_path: Path) -> None:
    path = write_file(
        tmp_path / "x.packed", [BlockContent("a", {}, [("b.c", "U8", (1,))]), BlockContent("a.b", {}, [("c", "U8", (1,))])]
    )
    with pytest.raises(CheckpointError, match=r"tensor 'a\.b\.c' is in two blocks"):
        read_header(path)


_json = any_json(2**63, 2**64, 4096, "F32", "Q4_K", 10**40)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_json_is_read_or_refused(whole: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing but a CheckpointError, and never more memory than the header's own size calls for."""
    content, _ = read_json(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(content)))
        container[key] = data.draw(_json)
    path = tmp_path_factory.mktemp("mutated") / "x.packed"
    path.write_bytes(rebuilt(whole.read_bytes(), json.dumps(content).encode()))
    tracemalloc.start()
    try:
        with PackedFiles.open(path) as files:
            for name in files.blocks:
                assert files.blocks[name].block.size <= path.stat().st_size
    except CheckpointError as error:
        assert len(str(error)) < 2000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4_000_000


@settings(max_examples=150, deadline=None)
@given(text=st.binary(max_size=200))
def test_any_bytes_as_json_are_refused(text: bytes) -> None:
    prelude = struct.pack("<8sIIQQQ16x", b"QKPACKED", 1, 64, len(text), 4096, 4096)
    with pytest.raises(CheckpointError):
        parse_header(prelude + struct.pack("<Q", xxhash.xxh3_64(prelude + text).intdigest()), text, "x")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_changed_bytes_are_refused_or_lie_in_blocks(
    whole: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(whole.read_bytes())
    position = data.draw(st.one_of(st.integers(0, 63), st.integers(0, 5000)))
    piece = data.draw(st.binary(min_size=1, max_size=8))
    path = tmp_path_factory.mktemp("changed") / "x.packed"
    changed = content[:position] + piece + content[position + len(piece) :]
    path.write_bytes(changed)
    try:
        header = read_header(path)
    except CheckpointError:
        assert changed != content
    else:
        assert changed[:4096] == content[:4096] and header.file_size == len(content)


# ------------------------------------------------------------------------------------------------------- several files


def parts(directory: Path, model: str = "m") -> list[Path]:
    names = [f"model-{number + 1:05d}-of-00003.packed" for number in range(3)]
    return [write_file(directory / name, [BLOCKS[number]], number, 3, model) for number, name in enumerate(names)]


def test_files_of_one_model_are_opened_together(tmp_path: Path) -> None:
    parts(tmp_path)
    with PackedFiles.open(tmp_path) as files:
        assert list(files.blocks) == [block.name for block in BLOCKS]
        assert files.schemes == {"a.experts.0.up": "int4-g128", "head.weight": "Q8_0"}
        assert files.read("head.weight").shape == (5, 68)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d, files: files[1].unlink(), r"missing: file 2 of 3"),
        (lambda d, files: write_file(files[1], [BLOCKS[1]], 1, 3, "other"), "00002-of-00003.packed belongs to another model"),
        (lambda d, files: write_file(files[1], [BLOCKS[1]], 1, 2), "belongs to another model"),
        (lambda d, files: write_file(files[1], [BLOCKS[0]], 1, 3), r"both hold a\.experts\.0"),
        (lambda d, files: write_file(files[1], [BLOCKS[1]], 2, 3), r"both file 3 of 3(.|\n)*missing: file 2 of 3"),
        (lambda d, files: write_file(d / "more.packed", [BLOCKS[1]], 1, 3), "are both file 2 of 3"),
        (lambda d, files: files[2].write_bytes(b"x"), "no packed file of quantkit"),
        (lambda d, files: [path.unlink() for path in files], "holds no packed files"),
    ],
)
def test_files_that_do_not_belong_together_are_named(tmp_path: Path, change: Callable[[Path, list[Path]], Any], said: str) -> None:
    change(tmp_path, parts(tmp_path))
    with pytest.raises(CheckpointError, match=said):
        PackedFiles.open(tmp_path)


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be"):
        PackedFiles.open(tmp_path / "absent.packed")
