"""Importance files of llama.cpp: read by the ``gguf`` package and by llama.cpp, round trips, hostile bytes, interrupted writes."""

from __future__ import annotations

import ctypes
import os
import struct
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import CalibrationError, OutputError
from quantkit.imatrix import Imatrix, Importance, read_imatrix, write_imatrix
from tests.importance_files import Array, tensors_by_gguf, written
from tests.llama_cpp import library


def sample(seed: int = 0) -> Imatrix:
    """One dense and one stacked tensor; expert 1 of the latter received nothing."""
    generator = torch.Generator().manual_seed(seed)
    stacked = torch.rand(3, 8, generator=generator)
    stacked[1] = 0
    return Imatrix(
        {
            "blk.0.attn_q.weight": Importance(torch.rand(1, 8, generator=generator), torch.tensor([70])),
            "blk.0.ffn_up_exps.weight": Importance(stacked, torch.tensor([30, 0, 40])),
        },
        ("a.txt", "bücher"),
        7,
        10,
    )


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=3e-7, atol=0)


# ----------------------------------------------------------------------------------------------------------------- files


def test_gguf_file_has_the_names_keys_and_values_that_llama_cpp_reads(tmp_path: Path) -> None:
    imatrix = sample()
    path = written(tmp_path, imatrix)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("general.architecture") is None
    assert reader.get_field("imatrix.datasets").contents() == ["a.txt", "bücher"]
    for key, value in (("imatrix.chunk_count", 7), ("imatrix.chunk_size", 10)):
        field = reader.get_field(key)
        assert field.types == [gguf.GGUFValueType.UINT32] and field.contents() == value
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}  # innermost first
    assert shapes == {
        "blk.0.attn_q.weight.in_sum2": [8],
        "blk.0.attn_q.weight.counts": [1],
        "blk.0.ffn_up_exps.weight.in_sum2": [8, 3],
        "blk.0.ffn_up_exps.weight.counts": [1, 3],
    }
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in reader.tensors)
    values = tensors_by_gguf(path)
    for name, entry in imatrix.entries.items():
        assert np.array_equal(values[f"{name}.counts"].reshape(-1), entry.counts.numpy())
        expected = entry.mean_square.numpy() * entry.counts.numpy()[:, None]
        assert np.allclose(values[f"{name}.in_sum2"].reshape(expected.shape), expected, rtol=1e-6)


class InitParameters(ctypes.Structure):
    """``gguf_init_params`` of ggml's ``gguf.h``."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


def test_llama_cpp_itself_finds_keys_and_tensors(tmp_path: Path) -> None:
    imatrix, loaded = sample(), library()
    path = written(tmp_path, imatrix)
    content = path.read_bytes()
    for name, result, arguments in (
        ("gguf_init_from_file", c_void_p, [c_char_p, InitParameters]),
        ("gguf_find_key", c_int64, [c_void_p, c_char_p]),
        ("gguf_get_val_str", c_char_p, [c_void_p, c_int64]),
        ("gguf_get_val_u32", ctypes.c_uint32, [c_void_p, c_int64]),
        ("gguf_get_arr_n", ctypes.c_size_t, [c_void_p, c_int64]),
        ("gguf_get_arr_str", c_char_p, [c_void_p, c_int64, ctypes.c_size_t]),
        ("gguf_get_n_tensors", c_int64, [c_void_p]),
        ("gguf_get_tensor_name", c_char_p, [c_void_p, c_int64]),
        ("gguf_get_tensor_size", ctypes.c_size_t, [c_void_p, c_int64]),
        ("gguf_get_tensor_offset", ctypes.c_size_t, [c_void_p, c_int64]),
        ("gguf_get_data_offset", ctypes.c_size_t, [c_void_p]),
        ("gguf_free", None, [c_void_p]),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    file = loaded.gguf_init_from_file(str(path).encode(), InitParameters(True, None))
    assert file
    assert loaded.gguf_get_val_str(file, loaded.gguf_find_key(file, b"general.type")) == b"imatrix"
    assert loaded.gguf_get_val_u32(file, loaded.gguf_find_key(file, b"imatrix.chunk_count")) == 7
    assert loaded.gguf_get_val_u32(file, loaded.gguf_find_key(file, b"imatrix.chunk_size")) == 10
    datasets = loaded.gguf_find_key(file, b"imatrix.datasets")
    texts = [loaded.gguf_get_arr_str(file, datasets, index) for index in range(loaded.gguf_get_arr_n(file, datasets))]
    assert texts == [b"a.txt", "bücher".encode()]
    found = {}
    for index in range(loaded.gguf_get_n_tensors(file)):
        start = loaded.gguf_get_data_offset(file) + loaded.gguf_get_tensor_offset(file, index)
        data = content[start : start + loaded.gguf_get_tensor_size(file, index)]
        found[loaded.gguf_get_tensor_name(file, index).decode()] = np.frombuffer(data, np.float32)
    loaded.gguf_free(file)
    assert {name: values.tolist() for name, values in found.items()} == {
        name: values.reshape(-1).tolist() for name, values in tensors_by_gguf(path).items()
    }


def test_legacy_file_is_laid_out_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    imatrix = sample()
    data = written(tmp_path, imatrix, legacy=True).read_bytes()
    stacked = imatrix.entries["blk.0.ffn_up_exps.weight"].mean_square.numpy().astype(np.float64)
    stacked[1] = (30 * stacked[0] + 40 * stacked[2]) / 70  # the older format cannot say that nothing is known
    position = 4
    assert struct.unpack_from("<i", data) == (2,)
    for name, calls, values in (
        ("blk.0.attn_q.weight", 7, imatrix.entries["blk.0.attn_q.weight"].mean_square.numpy()),
        ("blk.0.ffn_up_exps.weight", 4, stacked),
    ):
        (length,) = struct.unpack_from("<i", data, position)
        assert data[position + 4 : position + 4 + length] == name.encode()
        position += 4 + length
        assert struct.unpack_from("<ii", data, position) == (calls, values.size)
        stored = np.frombuffer(data, "<f4", values.size, position + 8)
        assert np.allclose(stored, calls * values.reshape(-1), rtol=1e-6)
        position += 8 + 4 * values.size
    dataset = "a.txt, bücher".encode()
    assert data[position:] == struct.pack("<ii", 7, len(dataset)) + dataset


def test_files_round_trip(tmp_path: Path) -> None:
    imatrix = sample()
    back = read_imatrix(written(tmp_path, imatrix))
    assert (back.datasets, back.chunk_count, back.chunk_size) == (imatrix.datasets, 7, 10)
    assert back.entries.keys() == imatrix.entries.keys()
    for name, entry in imatrix.entries.items():
        assert torch.equal(back.entries[name].counts, entry.counts)
        assert close(back.entries[name].mean_square, entry.mean_square)
    legacy = read_imatrix(written(tmp_path, imatrix, legacy=True))
    assert (legacy.datasets, legacy.chunk_count, legacy.chunk_size) == (("a.txt, bücher",), 7, 0)
    assert close(legacy.entries["blk.0.attn_q.weight"].mean_square, imatrix.entries["blk.0.attn_q.weight"].mean_square)
    assert legacy.entries["blk.0.ffn_up_exps.weight"].mean_square.shape == (1, 24)


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["wiki"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    sums = np.array([[2, 4, 6], [0, 0, 0]], np.float32)
    writer.add_tensor("blk.3.ffn_down_exps.weight.in_sum2", sums)
    writer.add_tensor("blk.3.ffn_down_exps.weight.in_sum", -sums)  # newer files hold plain sums and more beside it
    writer.add_tensor("blk.3.ffn_down_exps.weight.counts", np.array([[4], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    imatrix = read_imatrix(path)
    assert (imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (("wiki",), 3, 512)
    [(name, entry)] = imatrix.entries.items()
    assert name == "blk.3.ffn_down_exps.weight"
    assert entry.counts.tolist() == [4, 0]
    assert entry.mean_square.tolist() == [[0.5, 1.0, 1.5], [0.0, 0.0, 0.0]]


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "importance.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        write_imatrix(path, sample())
    assert path.read_bytes() == b"precious"
    write_imatrix(path, sample(), force=True)
    assert read_imatrix(path).entries.keys() == sample().entries.keys()
    assert os.listdir(tmp_path) == [path.name]


def test_a_name_taken_while_writing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sync = tmp_path / "importance.gguf", os.fsync

    def take(descriptor: int) -> None:
        path.write_bytes(b"precious")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", take)
    with pytest.raises(OutputError, match="exists already"):
        write_imatrix(path, sample())
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="no such directory"):
        write_imatrix(tmp_path / "missing" / "importance.gguf", sample())

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_imatrix(tmp_path / "importance.gguf", sample())
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_no_file_can_hold_is_refused(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "importance"
    empty = Imatrix({"blk.0.attn_q.weight": Importance(torch.zeros(1, 8), torch.tensor([0]))})
    huge = Imatrix({"blk.0.attn_q.weight": Importance(torch.full((1, 8), 3e38), torch.tensor([9]))})
    for imatrix, reason in ((empty, "no tensor received a token"), (huge, "too large")):
        with pytest.raises(CalibrationError, match=reason):
            write_imatrix(path, imatrix, legacy=legacy)
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------- hostile bytes


def gguf_bytes(tensors: dict[str, Array], **keys: Any) -> bytes:
    """A GGUF file spelled out; keys replace the three of an importance file, None leaves one out."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    values = {"general.type": "imatrix", "imatrix.datasets": ["x"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 512}
    values = {
        key: value for key, value in (values | {k.replace("__", "."): v for k, v in keys.items()}).items() if value is not None
    }
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, value in values.items():
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, list):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        else:
            out += struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)
    data = b""
    for name, array in tensors.items():
        kind = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}[array.dtype]
        out += text(name) + struct.pack(f"<I{array.ndim}QIQ", array.ndim, *reversed(array.shape), kind, len(data))
        data += array.tobytes()
        data += bytes(-len(data) % 32)
    return out + bytes(-len(out) % 32) + data


def pair(sums: Array, counts: Array) -> dict[str, Array]:
    return {"a.in_sum2": sums, "a.counts": counts}


ONE = np.ones((1, 4), np.float32)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "model": (gguf_bytes({}, general__type="model"), "of type 'model'"),
    "no keys": (gguf_bytes({}, imatrix__chunk_size=None), "no key imatrix.chunk_size"),
    "wrong key type": (gguf_bytes(pair(ONE, ONE[:, :1]), imatrix__chunk_count=1.0), "expected UINT32"),
    "wrong datasets": (gguf_bytes(pair(ONE, ONE[:, :1]), imatrix__datasets=5), "array of strings"),
    "no tensors": (gguf_bytes({}), "no importance"),
    "no counts": (gguf_bytes({"a.in_sum2": ONE}), "no counts"),
    "no sums": (gguf_bytes({"a.counts": ONE}), "counts without sums"),
    "half precision": (gguf_bytes(pair(ONE.astype(np.float16), ONE[:, :1])), "expected F32"),
    "NaN": (gguf_bytes(pair(ONE * np.nan, ONE[:, :1])), "not finite"),
    "infinite": (gguf_bytes(pair(ONE * np.inf, ONE[:, :1])), "not finite"),
    "negative": (gguf_bytes(pair(-ONE, ONE[:, :1])), "negative"),
    "negative count": (gguf_bytes(pair(ONE, -ONE[:, :1])), "negative"),
    "huge count": (gguf_bytes(pair(ONE, 1e30 * ONE[:, :1])), "impossibly large"),
    "sums without tokens": (gguf_bytes(pair(ONE, 0 * ONE[:, :1])), "counts no tokens"),
    "odd counts": (gguf_bytes(pair(ONE, np.ones((3, 1), np.float32))), "do not fit"),
    "other counts": (gguf_bytes(pair(np.ones((3, 4), np.float32), np.ones((2, 1), np.float32))), "2 counts"),
    "empty": (gguf_bytes(pair(ONE[:, :0], ONE[:, :1])), "do not fit"),
    "truncated": (gguf_bytes(pair(ONE, ONE[:, :1]))[:-40], "truncated"),
    "only magic": (b"GGUF", "too few"),
    "nothing": (b"", "end of the file"),
    "text": (b"These are no numbers at all, but text.", "neither GGUF"),
    "no entries": (struct.pack("<i", 0), "number of entries is 0"),
    "negative entries": (struct.pack("<i", -5), "number of entries"),
    "many entries": (struct.pack("<ii", 2**31 - 1, 1), "number of entries"),
    "long name": (struct.pack("<ii", 1, 2**31 - 1) + bytes(60), "length of a name"),
    "many values": (struct.pack("<ii1siif", 1, 1, b"a", 1, 2**31 - 1, 1.0), "number of values"),
    "no calls": (struct.pack("<ii1siif", 1, 1, b"a", 0, 1, 1.0), "number of chunks"),
    "legacy NaN": (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, float("nan")), "not finite"),
    "legacy negative": (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, -1.0), "negative"),
    "twice": (struct.pack("<i", 2) + 2 * struct.pack("<i1siif", 1, b"a", 1, 1, 1.0), "occurs twice"),
    "torn end": (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, 1.0) + b"xy", "end of the file"),
    "long dataset": (struct.pack("<ii1siifii", 1, 1, b"a", 1, 1, 1.0, 1, 99), "the dataset's name"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_end_in_one_error(tmp_path: Path, case: str) -> None:
    path, (data, reason) = tmp_path / "importance", HOSTILE[case]
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match=reason) as caught:
        read_imatrix(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(".")


def test_the_smallest_files_of_both_formats_are_read(tmp_path: Path) -> None:
    path = tmp_path / "importance"
    path.write_bytes(gguf_bytes(pair(ONE, ONE[:, :1])))
    assert read_imatrix(path).entries["a"].mean_square.tolist() == [[1, 1, 1, 1]]
    path.write_bytes(struct.pack("<ii1siif", 1, 1, b"a", 4, 1, 2.0))
    assert read_imatrix(path).entries["a"].mean_square.tolist() == [[0.5]]
    assert read_imatrix(path).datasets == ()


@pytest.mark.parametrize("name", ["absent", "\0"])
def test_a_path_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(CalibrationError, match="cannot be read"):
            read_imatrix(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_gives_a_sound_file_or_the_one_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = tmp_path_factory.getbasetemp() / "damaged"
    write_imatrix(base, sample(), legacy=data.draw(st.booleans()), force=True)
    content = bytearray(base.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(("byte", "word", "cut", "insert")))
        if kind == "byte":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "word":
            content[place : place + 4] = struct.pack("<I", data.draw(st.sampled_from((0, 1, 2**31 - 1, 2**31, 2**32 - 1))))
        elif kind == "cut":
            del content[max(place, 1) :]
        else:
            content[place:place] = data.draw(st.binary(max_size=9))
    base.write_bytes(content)
    _sound(base)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_sound_file_or_the_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    base = tmp_path_factory.getbasetemp() / "anything"
    base.write_bytes(content)
    _sound(base)


def _sound(path: Path) -> None:
    try:
        imatrix = read_imatrix(path)
    except CalibrationError:
        return
    assert imatrix.entries
    for entry in imatrix.entries.values():
        assert entry.mean_square.dtype == torch.float32 and entry.counts.dtype == torch.int64
        assert entry.mean_square.ndim == 2 and entry.mean_square.shape[0] == len(entry.counts)
        assert bool(entry.mean_square.isfinite().all()) and not bool((entry.mean_square < 0).any())
        assert not bool((entry.counts < 0).any()) and not bool(entry.mean_square[entry.counts == 0].any())
