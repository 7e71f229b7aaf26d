"""GGUF headers: byte for byte as the gguf package writes them; whatever else is read ends in a header or a CheckpointError."""

from __future__ import annotations

import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.errors import CheckpointError, OutputError
from quantkit.gguf_header import TYPE_SIZES, MetadataEntry, build_header, parse_header

ARRAY, STRING, UINT32 = GGUFValueType.ARRAY, GGUFValueType.STRING, GGUFValueType.UINT32
ARCHITECTURE = MetadataEntry("general.architecture", STRING, "llama4")
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

INTEGERS = {
    GGUFValueType.UINT8: (0, 2**8 - 1),
    GGUFValueType.INT8: (-(2**7), 2**7 - 1),
    GGUFValueType.UINT16: (0, 2**16 - 1),
    GGUFValueType.INT16: (-(2**15), 2**15 - 1),
    GGUFValueType.UINT32: (0, 2**32 - 1),
    GGUFValueType.INT32: (-(2**31), 2**31 - 1),
    GGUFValueType.UINT64: (0, 2**64 - 1),
    GGUFValueType.INT64: (-(2**63), 2**63 - 1),
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS: dict[GGUFValueType, st.SearchStrategy[Any]] = {
    **{kind: st.integers(*bounds) for kind, bounds in INTEGERS.items()},
    GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    GGUFValueType.BOOL: st.booleans(),
    STRING: TEXTS,
}
TENSORS = {  # whose type cannot be told from an array's dtype is written as bytes
    "F32": np.float32,
    "F16": np.float16,
    "I8": np.int8,
    "Q8_0": np.uint8,
    "Q4_K": np.uint8,
    "BF16": np.uint8,
    "IQ4_NL": np.uint8,
}


@st.composite
def entries(draw: st.DrawFn) -> list[MetadataEntry]:
    keys = draw(st.lists(TEXTS.filter(lambda key: not key.startswith("general.a")), unique=True, max_size=6))
    found = [ARCHITECTURE]
    for key in keys:
        kind = draw(st.sampled_from(list(SCALARS)))
        if draw(st.booleans()):
            found.append(MetadataEntry(key, ARRAY, tuple(draw(st.lists(SCALARS[kind], min_size=1, max_size=5))), kind))
        else:
            found.append(MetadataEntry(key, kind, draw(SCALARS[kind])))
    return found


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...]]]:
    names = draw(st.lists(st.text("abc._0", min_size=1, max_size=63), unique=True, max_size=5))
    found = []
    for name in names:
        kind = draw(st.sampled_from(list(TENSORS)))
        outer = draw(st.lists(st.integers(1, 3), max_size=3))
        found.append((name, kind, (*outer, draw(st.integers(1, 3)) * TYPE_SIZES[kind][0])))
    return found


def reference(path: Path, metadata: list[MetadataEntry], tensors: list[tuple[str, str, tuple[int, ...]]], alignment: int) -> bytes:
    """The file that the gguf package writes, its tensors full of zeros."""
    writer = gguf.GGUFWriter(path, "llama4")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for entry in metadata:
        if entry.key not in ("general.architecture", "general.alignment"):
            value = list(entry.value) if isinstance(entry.value, tuple) else entry.value
            writer.add_key_value(entry.key, value, entry.type, entry.items)
    for name, kind, shape in tensors:
        block, nbytes = TYPE_SIZES[kind]
        stored = (*shape[:-1], shape[-1] // block * nbytes) if TENSORS[kind] is np.uint8 else shape
        writer.add_tensor(name, np.zeros(stored, TENSORS[kind]), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@FUZZ
@given(entries(), tensor_lists(), st.sampled_from([32, 32, 8, 64, 4096]))
def test_as_the_gguf_package_writes_and_reads(
    tmp_path: Path, metadata: list[MetadataEntry], tensors: list[tuple[str, str, tuple[int, ...]]], alignment: int
) -> None:
    if alignment != 32:
        metadata.insert(1, MetadataEntry("general.alignment", UINT32, alignment))
    path = tmp_path / "a.gguf"
    expected = reference(path, metadata, tensors, alignment)
    header, offsets, size = build_header(metadata, tensors, alignment)
    assert (header, size) == (expected[: len(header)], len(expected))
    parsed = parse_header(path)
    assert list(parsed.metadata.values()) == metadata
    assert (parsed.version, parsed.alignment, parsed.data_start, parsed.file_size) == (3, alignment, len(header), size)
    assert [(tensor.name, tensor.type, tensor.shape) for tensor in parsed.tensors.values()] == tensors
    assert {tensor.name: tensor.offset for tensor in parsed.tensors.values()} == offsets
    if tensors:  # the package cannot read a file that ends with its header
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for tensor in parsed.tensors.values():
            theirs = read[tensor.name]
            assert (tensor.offset, tensor.nbytes, tensor.elements) == (theirs.data_offset, theirs.n_bytes, theirs.n_elements)


@pytest.mark.parametrize("kind", list(TYPE_SIZES))
def test_every_type_of_the_package(tmp_path: Path, kind: str) -> None:
    block, nbytes = TYPE_SIZES[kind]
    path = write(tmp_path, [ARCHITECTURE], [("a", kind, (3, 2 * block)), ("b", "F32", (5,))])
    tensors = parse_header(path).tensors
    assert (tensors["a"].type, tensors["a"].nbytes) == (kind, 6 * nbytes)
    assert [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors] == [kind, "F32"]


def write(directory: Path, metadata: list[MetadataEntry], tensors: list[tuple[str, str, tuple[int, ...]]]) -> Path:
    header, _, size = build_header(metadata, tensors)
    path = directory / "b.gguf"
    path.write_bytes(header + bytes(size - len(header)))
    return path


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (MetadataEntry("k", UINT32, -1), "UINT32"),
        (MetadataEntry("k", UINT32, 2**32), "UINT32"),
        (MetadataEntry("k", UINT32, True), "expected int"),
        (MetadataEntry("k", UINT32, 1.0), "expected int"),
        (MetadataEntry("k", GGUFValueType.FLOAT32, 1), "expected float"),
        (MetadataEntry("k", GGUFValueType.FLOAT32, 1e300), "FLOAT32"),
        (MetadataEntry("k", GGUFValueType.BOOL, 1), "expected bool"),
        (MetadataEntry("k", STRING, 5), "expected text"),
        (MetadataEntry("k", STRING, "\ud800"), "Unicode"),
        (MetadataEntry("k", STRING, "x", UINT32), "no array"),
        (MetadataEntry("k", ARRAY, (), UINT32), "empty"),
        (MetadataEntry("k", ARRAY, (1, 2)), "type of its elements"),
        (MetadataEntry("k", ARRAY, (1, 2**31), GGUFValueType.INT32), "INT32"),
        (MetadataEntry("k", ARRAY, ((1,),), ARRAY), "no array"),
        (MetadataEntry("general.architecture", STRING, "again"), "twice"),
        (MetadataEntry("general.alignment", UINT32, 64), "Correct it"),
    ],
)
def test_metadata_that_cannot_be_written(entry: MetadataEntry, named: str) -> None:
    with pytest.raises(OutputError, match=named):
        build_header([ARCHITECTURE, entry], [])


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (("a", "Q9_Z", (32,)), "no type"),
        (("a", "Q8_0", (32, 33)), "multiple of 32"),
        (("a", "Q8_0", ()), "multiple of 32"),
        (("a", "F32", (1, 1, 1, 1, 1)), "at most 4"),
        (("a", "F32", (-1,)), "shape"),
        (("a", "F32", (2**40, 2**40)), "large"),
        (("x" * 64, "F32", (1,)), "63"),
        (("first", "F32", (1,)), "twice"),
    ],
)
def test_tensors_that_cannot_be_written(tensor: tuple[str, str, tuple[int, ...]], named: str) -> None:
    with pytest.raises(OutputError, match=named):
        build_header([ARCHITECTURE], [("first", "F32", (1,)), tensor])


@pytest.mark.parametrize("alignment", [0, 3, -32, 2**40])
def test_alignments_that_cannot_be(alignment: int) -> None:
    with pytest.raises(OutputError, match="power of two"):
        build_header([ARCHITECTURE], [], alignment)
    with pytest.raises(OutputError, match="Add that key"):
        build_header([ARCHITECTURE], [], 64)


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def tensor_entry(name: str | bytes, sizes: tuple[int, ...], number: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)


def file_of(keys: list[bytes], tensors: list[bytes], data: int = 0, version: int = 3) -> bytes:
    header = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32 + data)


ONE = text("k") + struct.pack("<II", 4, 7)
HUGE = 2**63 - 1
BROKEN = {
    "nothing": (b"", "too few"),
    "only the magic": (b"GGUF\3\0\0\0", "too few"),
    "another format": (b"\x93NUMPY" + bytes(30), "no GGUF"),
    "an old version": (file_of([], [], version=1), "version 1"),
    "a later version": (file_of([], [], version=4), "version 4"),
    "big endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0) + bytes(8), "big-endian"),
    "keys without end": (struct.pack("<4sIQQ", b"GGUF", 3, 0, HUGE) + bytes(99), "too many"),
    "tensors without end": (struct.pack("<4sIQQ", b"GGUF", 3, HUGE, 0) + bytes(99), "too many"),
    "a key without end": (file_of([struct.pack("<Q", HUGE) + bytes(20)], []), "truncated"),
    "a text without end": (file_of([text("k") + struct.pack("<IQ", 8, HUGE)], []), "truncated"),
    "an array without end": (file_of([text("k") + struct.pack("<IIQ", 9, 0, HUGE)], []), "elements"),
    "texts without end": (file_of([text("k") + struct.pack("<IIQ", 9, 8, 2**60)], []), "elements"),
    "a key twice": (file_of([ONE, ONE], []), "twice"),
    "a key that is no text": (file_of([text(b"\xff\xfe") + struct.pack("<II", 4, 7)], []), "UTF-8"),
    "a token that is no text": (file_of([text("k") + struct.pack("<IIQ", 9, 8, 1) + text(b"\xff")], []), "UTF-8"),
    "an unknown type of value": (file_of([text("k") + struct.pack("<II", 13, 7)], []), "unknown type 13"),
    "an array of arrays": (file_of([text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(16)], []), "arrays"),
    "a flag of 2": (file_of([text("k") + struct.pack("<IB", 7, 2)], []), "only 0 and 1"),
    "alignment 3": (file_of([text("general.alignment") + struct.pack("<II", 4, 3)], []), "power of two"),
    "alignment 0": (file_of([text("general.alignment") + struct.pack("<II", 4, 0)], []), "power of two"),
    "alignment 2**31": (file_of([text("general.alignment") + struct.pack("<II", 4, 2**31)], []), "power of two"),
    "alignment of a wrong width": (file_of([text("general.alignment") + struct.pack("<IQ", 10, 32)], []), "UINT32"),
    "a tensor twice": (file_of([], [tensor_entry("a", (8,), 0, 0), tensor_entry("a", (8,), 0, 32)], 64), "twice"),
    "a tensor that is no text": (file_of([], [tensor_entry(b"\xc3", (8,), 0, 0)], 64), "UTF-8"),
    "a long name": (file_of([], [tensor_entry("a" * 64, (8,), 0, 0)], 64), "longer"),
    "five dimensions": (file_of([], [tensor_entry("a", (1,) * 5, 0, 0)], 64), "dimensions"),
    "dimensions without end": (file_of([], [text("a") + struct.pack("<I", 2**32 - 1) + bytes(40)], 64), "dimensions"),
    "an impossible size": (file_of([], [tensor_entry("a", (2**63,), 0, 0)], 64), "large"),
    "an impossible product": (file_of([], [tensor_entry("a", (2**32, 2**32), 0, 0)], 64), "large"),
    "a row that is no multiple": (file_of([], [tensor_entry("a", (33,), 8, 0)], 64), "block of 32"),
    "a gap": (file_of([], [tensor_entry("a", (8,), 0, 0), tensor_entry("b", (8,), 0, 64)], 96), "expected 32"),
    "an overlap": (file_of([], [tensor_entry("a", (16,), 0, 0), tensor_entry("b", (8,), 0, 32)], 96), "expected 64"),
    "a first tensor that is not first": (file_of([], [tensor_entry("a", (8,), 0, 32)], 64), "expected 0"),
    "data that is not there": (file_of([], [tensor_entry("a", (8,), 0, 0)], 31), "truncated"),
    "no data at all": (file_of([], [tensor_entry("a", (2**40, 2**20), 0, 0)]), "truncated"),
    "an unknown type before its time": (
        file_of([], [tensor_entry("a", (8,), 99, 0), tensor_entry("b", (1,), 0, 9)], 64),
        "cannot be",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files(tmp_path: Path, case: str) -> None:
    data, named = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=named) as raised:
        parse_header(path)
    assert str(path) in str(raised.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path, tmp_path / ("x" * 300), f"{tmp_path}/a\0b"):
        with pytest.raises(CheckpointError):
            parse_header(path)


def test_what_llama_cpp_reads_too(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    # version 2, an empty array, text cut within a character, a scalar, types that nobody knows yet, bytes behind the last tensor
    keys = [text("empty") + struct.pack("<IIQ", 9, 5, 0), text("cut") + struct.pack("<I", 8) + text("é".encode()[:1])]
    tensors = [
        tensor_entry("scalar", (), 0, 0),
        tensor_entry("new", (64, 2), 77, 32),
        tensor_entry("b", (3,), 0, 96),
        tensor_entry("z", (9,), 78, 128),
    ]
    path.write_bytes(file_of(keys, tensors, data=200, version=2))
    header = parse_header(path)
    assert (header.value("empty"), header.value("cut"), header.value("other")) == ((), "\\xc3", None)
    found = {name: (tensor.type, tensor.shape, tensor.nbytes) for name, tensor in header.tensors.items()}
    assert found["scalar"] == ("F32", (), 4)
    assert found["new"] == ("type 77", (2, 64), 64)
    assert found["z"] == ("type 78", (9,), header.file_size - header.data_start - 128)
    path.write_bytes(file_of([ONE], [], data=0)[:41])  # metadata alone, without padding
    assert parse_header(path).tensors == {}


# ------------------------------------------------------------------------------------------------------------- any bytes


def sample() -> bytes:
    tokens = MetadataEntry("tokens", ARRAY, tuple(f"t{number}" for number in range(20)), STRING)
    kinds = MetadataEntry("kinds", ARRAY, tuple(range(20)), GGUFValueType.INT32)
    flags = MetadataEntry("flags", ARRAY, (True, False), GGUFValueType.BOOL)
    alignment = MetadataEntry("general.alignment", UINT32, 32)
    header, _, size = build_header([ARCHITECTURE, alignment, tokens, kinds, flags], [("a", "Q8_0", (2, 64)), ("b", "F32", (3,))])
    return header + bytes(size - len(header))


SAMPLE = sample()
CHANGES = st.lists(
    st.tuples(
        st.integers(0, len(SAMPLE) - 1),
        st.sampled_from([1, 4, 8]),
        st.sampled_from([0, 1, 2, 255, 2**31, 2**32 - 1, HUGE, 2**64 - 1]),
    ),
    min_size=1,
    max_size=4,
)


def read_any(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        header = parse_header(path)
    except CheckpointError as error:
        assert len(str(error)) < 2000
        return
    for tensor in header.tensors.values():
        assert header.data_start <= tensor.offset and tensor.offset + tensor.nbytes <= len(data) == header.file_size
        assert tensor.elements == math.prod(tensor.shape)


@FUZZ
@given(CHANGES, st.integers(0, len(SAMPLE)))
def test_any_change_of_a_good_file(tmp_path: Path, changes: list[tuple[int, int, int]], length: int) -> None:
    data = bytearray(SAMPLE)
    for position, width, value in changes:
        data[position : position + width] = (value % 256**width).to_bytes(width, "little")
    read_any(tmp_path / "c.gguf", bytes(data))
    read_any(tmp_path / "c.gguf", bytes(data[:length]))


@FUZZ
@given(st.binary(max_size=400))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    read_any(tmp_path / "d.gguf", data)
    read_any(tmp_path / "d.gguf", struct.pack("<4sIQQ", b"GGUF", 3, len(data) % 3, len(data) % 5) + data)


@pytest.mark.parametrize("count", [2**33, 2**40, HUGE])
@pytest.mark.parametrize("kind", [0, 8, 10])
def test_no_memory_for_what_a_large_file_only_declares(tmp_path: Path, count: int, kind: int) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, kind, count))
    with path.open("r+b") as file:
        file.truncate(2**42)  # a hole, which takes no space
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        parse_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("kind", [GGUFValueType.UINT8, GGUFValueType.BOOL])
def test_little_memory_for_a_header_full_of_small_elements(tmp_path: Path, kind: GGUFValueType) -> None:
    path = tmp_path / "full.gguf"
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2))
        for key in "ab":
            file.write(text(key) + struct.pack("<IIQ", 9, kind, 2**23 - 1))
            file.seek(2**23 - 1, 1)
        file.truncate()
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="elements of arrays"):
        parse_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**29
