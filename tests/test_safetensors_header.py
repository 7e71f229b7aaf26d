"""The header, against the safetensors library: what it writes we build byte for byte, what we accept it accepts."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from quantkit import safetensors_header
from quantkit.errors import CheckpointError, OutputError
from quantkit.safetensors_header import DTYPE_BITS, build_header, parse_header, read_header

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def built_file(tensors: dict[str, tuple[str, torch.Tensor]]) -> bytes:
    """A whole file, made with our header and the tensors' bytes at its offsets."""
    header, offsets, size = build_header([(name, dtype, tuple(tensor.shape)) for name, (dtype, tensor) in tensors.items()])
    file = bytearray(size)
    file[: len(header)] = header
    for name, (_, tensor) in tensors.items():
        raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        file[offsets[name] : offsets[name] + len(raw)] = raw
    return bytes(file)


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(TORCH)), SHAPES), max_size=8), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_built_file_is_the_librarys_file(layout: dict[str, tuple[str, tuple[int, ...]]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in layout.items():
        size = DTYPE_BITS[dtype] // 8 * math.prod(shape)
        raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (size,), dtype=torch.uint8, generator=generator)
        tensors[name] = (dtype, raw.view(TORCH[dtype]).view(shape))
    assert built_file(tensors) == save({name: tensor for name, (_, tensor) in tensors.items()}, {"format": "pt"})


def test_one_tensor_of_every_dtype_comes_in_the_librarys_order() -> None:
    tensors = {f"t{number}": (dtype, torch.zeros(3).to(kind)) for number, (dtype, kind) in enumerate(TORCH.items())}
    assert built_file(tensors) == save({name: tensor for name, (_, tensor) in tensors.items()}, {"format": "pt"})


def test_a_header_too_large_for_readers_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "MAX_HEADER_BYTES", 1000)
    build_header([("a", "F32", (1,))])
    with pytest.raises(OutputError, match="smaller shard size"):
        build_header([(f"tensor{number}", "F32", (1,)) for number in range(20)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "none": torch.ones(0, 5), "x": torch.tensor(7)}
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    return path


def test_reads_what_the_library_wrote(file: Path) -> None:
    header = read_header(file)
    assert header.metadata == {"format": "pt", "note": "ü"}
    assert header.file_size == file.stat().st_size
    data = file.read_bytes()
    with safetensors.safe_open(file, "pt") as library:
        assert set(header.tensors) == set(library.keys())
        for name, entry in header.tensors.items():
            tensor = library.get_tensor(name)
            assert entry.shape == tuple(tensor.shape)
            assert TORCH[entry.dtype] == tensor.dtype
            raw = data[header.data_start + entry.begin : header.data_start + entry.end]
            assert raw == (bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b"")


def test_digest_covers_header_and_nothing_else(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    other = tmp_path / "other.safetensors"
    data[-1] ^= 1
    other.write_bytes(data)
    assert read_header(other).digest == read_header(file).digest
    data[data.index(b"note")] = ord("m")
    other.write_bytes(data)
    assert read_header(other).digest != read_header(file).digest


# ------------------------------------------------------------------------------------------------------------- faults


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FAULTS: dict[str, tuple[Any, str]] = {
    "unknown dtype": ({"a": entry("F33")}, "tensor 'a': unknown dtype 'F33'"),
    "dtype no string": ({"a": entry(["F32"])}, "unknown dtype"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "unknown dtype None"),
    "shape no list": ({"a": entry(shape=2)}, "shape is 2"),
    "negative size": ({"a": entry(shape=[-2])}, "shape is"),
    "fractional size": ({"a": entry(shape=[2.0])}, "shape is"),
    "boolean size": ({"a": entry(shape=[True, 2])}, "shape is"),
    "huge size": ({"a": entry(shape=[2**63])}, "shape is"),
    "huge product": ({"a": entry(shape=[2**40, 2**40])}, "impossibly large"),
    "one offset": ({"a": entry(offsets=[0])}, "data_offsets"),
    "offsets no list": ({"a": entry(offsets={"begin": 0})}, "data_offsets"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, "data_offsets"),
    "end before begin": ({"a": entry(offsets=[8, 0])}, "does not fill"),
    "too few bytes": ({"a": entry(offsets=[0, 7])}, "does not fill the bytes 0 to 7"),
    "hole at start": ({"a": entry(offsets=[8, 16])}, "leaves a hole"),
    "hole between": ({"a": entry(), "b": entry(offsets=[9, 17])}, "tensor 'b' begins at byte 9, which leaves a hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, "tensor 'b' begins at byte 4, which overlaps"),
    "entry no object": ({"a": [1, 2]}, "header entry is"),
    "metadata no map": ({"__metadata__": "pt", "a": entry()}, "__metadata__"),
    "metadata not text": ({"__metadata__": {"format": 1}, "a": entry()}, "__metadata__"),
    "long names stay short": ({"n" * 100_000: entry("F33")}, "unknown dtype"),
    "half a 4-bit pair": ({"a": entry("F4", [3], [0, 2])}, "does not fill"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name: str) -> None:
    content, message = FAULTS[name]
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        parse_header(json.dumps(content).encode(), "shard 7")
    assert str(caught.value).startswith("shard 7: ")
    assert len(str(caught.value)) < 1000


RAW_FAULTS = {
    "empty": (b"", "does not begin"),
    "list": (b"[]", "does not begin"),
    "space first": (b" {}", "does not begin"),
    "cut": (b'{"a":', "damaged"),
    "no UTF-8": (b'{"\xff":1}', "not UTF-8 text at byte 2"),
    "duplicate tensor": (b'{"a":1,"a":2}', "the key 'a' occurs twice"),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', "the key 'dtype' occurs twice"),
    "nested lists": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "nested objects": (b'{"a":' * 100_000, "nested too deeply"),
    "endless integer": (b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"9" * 1_000_000 + b"]}}", "damaged"),
    "not a number": (b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[NaN]}}', "shape is"),
    "infinite": (b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[1e999]}}', "shape is"),
    "text behind": (b"{} {}", "damaged"),
}


@pytest.mark.parametrize("name", RAW_FAULTS)
def test_each_damaged_text_is_named(name: str) -> None:
    text, message = RAW_FAULTS[name]
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        parse_header(text, "shard 7")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "times"),
    [
        (b'{"a":{"shape":[' + b"[]," * 500_000 + b"[]]}}", 100),
        (b'{"a":' + b"[{}," * 300_000, 100),
        (b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"1," * 1_000_000 + b"1]}}", 30),
        (b"{" + b",".join(b'"%d":1' % number for number in range(150_000)) + b"}", 100),
    ],
)
def test_hostile_headers_cost_memory_in_proportion(text: bytes, times: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            parse_header(text, "shard 7")
        assert tracemalloc.get_traced_memory()[1] < times * len(text)
    finally:
        tracemalloc.stop()


def test_truncated_file_says_how_much_is_missing(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=f"truncated: 10 of {len(data)} bytes are missing"):
        read_header(file)


def test_bytes_behind_the_last_tensor_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"abc")
    with pytest.raises(CheckpointError, match="3 bytes follow after the last tensor"):
        read_header(file)


@pytest.mark.parametrize("size", [0, 7])
def test_file_without_a_size_field(size: int, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"only {size} bytes"):
        read_header(file)


def test_header_cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="truncated: its header needs"):
        read_header(file)


def test_huge_header_is_refused_before_it_is_read(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write((150_000_000).to_bytes(8, "little"))
        stream.truncate(200_000_000)  # sparse: the bytes would be there
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="declares a header of 150,000,000 bytes"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


# ---------------------------------------------------------------------------------------------------------- mutations


def check_against_library(path: Path, data: bytes) -> None:
    """Either a CheckpointError, or a header that the library reads in the same way."""
    path.write_bytes(data)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    expected = {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in safetensors.deserialize(data)}
    found = {
        name: (entry.dtype, list(entry.shape), data[header.data_start + entry.begin : header.data_start + entry.end])
        for name, entry in header.tensors.items()
    }
    assert found == expected


@pytest.fixture(scope="module")
def sample() -> bytes:
    return save({"layers.0.weight": torch.ones(2, 3), "layers.0.bias": torch.ones(3, dtype=torch.bfloat16)}, {"format": "pt"})


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "mutated.safetensors"


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes(sample: bytes, scratch: Path, data: st.DataObject) -> None:
    mutated = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
    check_against_library(scratch, bytes(mutated))


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_and_spliced_files(sample: bytes, scratch: Path, data: st.DataObject) -> None:
    start, stop, at = (data.draw(st.integers(0, len(sample))) for _ in range(3))
    mutated = data.draw(st.sampled_from([sample[:stop], sample[start:], sample[:at] + sample[start:stop] + sample[at:]]))
    check_against_library(scratch, mutated)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**31, 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "I64", "F4", "shape", "dtype"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "x"]), inner, max_size=3),
    max_leaves=8,
)


def _replace_field(content: dict[str, Any], data: st.DataObject) -> None:
    fields = content[data.draw(st.sampled_from(sorted(content)))]
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(JSON)


def _move_data(content: dict[str, Any], data: st.DataObject) -> None:
    content["layers.0.bias"]["data_offsets"] = [data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))]


def _reshape(content: dict[str, Any], data: st.DataObject) -> None:
    content["layers.0.weight"]["shape"] = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 6, 2**31, 2**62]), max_size=4))


def _add_entry(content: dict[str, Any], data: st.DataObject) -> None:
    content[data.draw(st.text(max_size=5))] = data.draw(JSON)


@given(st.sampled_from([_replace_field, _move_data, _reshape, _add_entry]), st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_fields(
    sample: bytes, scratch: Path, mutate: Callable[[dict[str, Any], st.DataObject], None], data: st.DataObject
) -> None:
    length = int.from_bytes(sample[:8], "little")
    content = json.loads(sample[8 : 8 + length])
    mutate(content, data)
    text = json.dumps(content).encode()
    check_against_library(scratch, len(text).to_bytes(8, "little") + text + sample[8 + length :])
