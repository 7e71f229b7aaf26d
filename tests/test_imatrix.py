"""Importance files: read by the ``gguf`` package, round trips, experts without tokens, hostile bytes, and the way to our units."""

from __future__ import annotations

import ctypes
import dataclasses
import json
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
from quantkit.evidence import Evidence
from quantkit.imatrix import (
    Imatrix,
    Importance,
    has_peaks,
    imatrix_from_statistics,
    read_imatrix,
    statistics_from_imatrix,
    write_imatrix,
)
from quantkit.llama4 import Llama4Config, parse_config, units
from quantkit.statistics import Statistics
from tests.llama_cpp import library
from tests.sample_statistics import PROVENANCE, sample_statistics
from tests.tiny_models import tiny_config

DEMO = Path(__file__).resolve().parent.parent / "demo" / "tiny-scout"
SCOUT = parse_config(json.loads((DEMO / "config.json").read_text()))
MAVERICK = parse_config(tiny_config("maverick"))
CONFIGS = {"scout": SCOUT, "maverick": MAVERICK}
Array = np.ndarray[Any, Any]


def written(tmp_path: Path, imatrix: Imatrix, *, legacy: bool = False) -> Path:
    path = tmp_path / ("importance.dat" if legacy else "importance.gguf")
    write_imatrix(path, imatrix, legacy=legacy, force=True)
    return path


def tensors_by_gguf(path: Path) -> dict[str, Array]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


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


# ------------------------------------------------------------------------------------------------------------- statistics

# The names of a layer's units, and what GGUF calls the tensors that share their input; written out once more, as the oracle.
ATTENTION = {"self_attn.qkv": ("attn_q", "attn_k", "attn_v"), "self_attn.o_proj": ("attn_output",)}
SPARSE = {
    "feed_forward.shared_expert.gate_up_proj": ("ffn_gate_shexp", "ffn_up_shexp"),
    "feed_forward.shared_expert.down_proj": ("ffn_down_shexp",),
}
DENSE = {"feed_forward.gate_up_proj": ("ffn_gate", "ffn_up"), "feed_forward.down_proj": ("ffn_down",)}
EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}


def named(config: Llama4Config) -> dict[str, tuple[str, int]]:
    """Tensor and row for every unit that is calibrated, through the first of its matrices; all in plain sight."""
    found: dict[str, tuple[str, int]] = {}
    for layer in range(config.num_layers):
        base = f"{config.prefix}model.layers.{layer}."
        plain = ATTENTION | (SPARSE if config.moe_layers[layer] else DENSE)
        found |= {base + module: (f"blk.{layer}.{stems[0]}.weight", 0) for module, stems in plain.items()}
        if config.moe_layers[layer]:
            for expert in range(config.num_experts):
                for projection, stems in EXPERTS.items():
                    key = f"{base}feed_forward.experts.{expert}.{projection}"
                    found[key] = (f"blk.{layer}.{stems[0]}.weight", expert)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_unit_goes_to_its_tensors_and_comes_back(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    statistics = sample_statistics(config)
    assert named(config).keys() == statistics.inputs.keys()
    path = written(tmp_path, imatrix_from_statistics(statistics, config))
    values = tensors_by_gguf(path)
    for key, (tensor, row) in named(config).items():
        evidence = statistics.inputs[key]
        sums, counts = values[f"{tensor}.in_sum2"], values[f"{tensor}.counts"]
        assert counts.reshape(-1)[row] == evidence.tokens
        assert np.allclose(sums.reshape(counts.size, -1)[row], evidence.tokens * evidence.mean_square.numpy(), rtol=1e-6)
    for layer in range(config.num_layers):
        plain = ATTENTION | (SPARSE if config.moe_layers[layer] else DENSE)
        for stems in [*plain.values(), *(EXPERTS.values() if config.moe_layers[layer] else ())]:
            first = values[f"blk.{layer}.{stems[0]}.weight.in_sum2"]
            assert all(np.array_equal(first, values[f"blk.{layer}.{stem}.weight.in_sum2"]) for stem in stems)
    back = statistics_from_imatrix(read_imatrix(path), config, PROVENANCE)
    assert back.inputs.keys() == statistics.inputs.keys()
    for key, evidence in statistics.inputs.items():
        assert back.inputs[key].tokens == evidence.tokens
        assert close(back.inputs[key].mean_square, evidence.mean_square)


def test_what_an_importance_file_does_not_tell_is_marked(tmp_path: Path) -> None:
    statistics = sample_statistics(SCOUT)
    path = written(tmp_path, imatrix_from_statistics(statistics, SCOUT))
    back = statistics_from_imatrix(read_imatrix(path), SCOUT, PROVENANCE)
    assert has_peaks(statistics) and not has_peaks(back)
    assert not back.cache_peaks and all(evidence.peak.numel() == 0 for evidence in back.inputs.values())
    assert back.kinds == ("imatrix",)
    assert back.description["source"] == PROVENANCE
    assert back.description["corpus"]["source"] == "imatrix" and back.description["corpus"]["samples"] == 7
    assert back.experts.keys() == statistics.experts.keys()
    for layer, counts in back.experts.items():
        gate = [
            back.inputs[f"{SCOUT.prefix}model.layers.{layer}.feed_forward.experts.{e}.gate_up_proj"].tokens
            for e in range(SCOUT.num_experts)
        ]
        assert counts.tokens.tolist() == gate and torch.equal(counts.kinds.sum(1), counts.tokens)


def with_expert(statistics: Statistics, layer: int, expert: int, tokens: int, mean_square: float | None) -> Statistics:
    """The same statistics, with another expert's input; None keeps the mean square."""
    inputs = dict(statistics.inputs)
    for projection in EXPERTS:
        key = f"{SCOUT.prefix}model.layers.{layer}.feed_forward.experts.{expert}.{projection}"
        old = inputs[key]
        square = old.mean_square if mean_square is None else torch.full_like(old.mean_square, mean_square)
        inputs[key] = Evidence(tokens, square, old.peak)
    return Statistics(inputs, statistics.experts, statistics.cache_peaks, statistics.kinds, statistics.description)


def test_an_expert_that_was_only_lent_tokens_is_exported_with_its_estimate(tmp_path: Path) -> None:
    statistics = with_expert(sample_statistics(SCOUT), 0, 3, 0, None)
    values = tensors_by_gguf(written(tmp_path, imatrix_from_statistics(statistics, SCOUT)))
    key = f"{SCOUT.prefix}model.layers.0.feed_forward.experts.3.down_proj"
    assert values["blk.0.ffn_down_exps.weight.counts"][3] == 1
    assert np.array_equal(values["blk.0.ffn_down_exps.weight.in_sum2"][3], statistics.inputs[key].mean_square.numpy())


def test_an_expert_without_anything_is_imported_as_the_weighted_mean_of_the_others(tmp_path: Path) -> None:
    statistics = with_expert(sample_statistics(SCOUT), 0, 3, 0, 0.0)
    statistics = with_expert(statistics, 0, 1, 500, None)
    path = written(tmp_path, imatrix_from_statistics(statistics, SCOUT))
    assert tensors_by_gguf(path)["blk.0.ffn_down_exps.weight.counts"][3] == 0
    keys = [f"{SCOUT.prefix}model.layers.0.feed_forward.experts.{expert}.down_proj" for expert in range(SCOUT.num_experts)]
    others = [statistics.inputs[key] for number, key in enumerate(keys) if number != 3]
    total = sum(evidence.tokens for evidence in others)
    expected = sum(evidence.tokens / total * evidence.mean_square.to(torch.float64) for evidence in others)
    for legacy in (False, True):  # in the older format it has been written there already
        path = written(tmp_path, imatrix_from_statistics(statistics, SCOUT), legacy=legacy)
        back = statistics_from_imatrix(read_imatrix(path), SCOUT, PROVENANCE)
        assert torch.allclose(back.inputs[keys[3]].mean_square.to(torch.float64), expected, rtol=1e-5)
        assert close(back.inputs[keys[1]].mean_square, statistics.inputs[keys[1]].mean_square)
        if not legacy:
            assert back.inputs[keys[3]].tokens == 0 and back.inputs[keys[1]].tokens == 500


def test_ones_for_an_expert_of_the_older_format_mean_that_nothing_is_known(tmp_path: Path) -> None:
    imatrix = imatrix_from_statistics(sample_statistics(SCOUT), SCOUT)
    entries = dict(imatrix.entries)
    name = "blk.1.ffn_down_exps.weight"
    entries[name].mean_square[2] = 1.0
    path = written(tmp_path, Imatrix(entries, chunk_count=5, chunk_size=3), legacy=True)
    back = statistics_from_imatrix(read_imatrix(path), SCOUT, PROVENANCE)
    key = f"{SCOUT.prefix}model.layers.1.feed_forward.experts.2.down_proj"
    others = entries[name].mean_square[torch.arange(SCOUT.num_experts) != 2]
    assert back.inputs[key].tokens == 0
    assert torch.allclose(back.inputs[key].mean_square, others.mean(0), rtol=1e-5)  # all chunks count alike


def test_files_of_another_model_are_refused_with_all_that_differs() -> None:
    imatrix = imatrix_from_statistics(sample_statistics(SCOUT), SCOUT)

    def problems(entries: dict[str, Importance]) -> str:
        with pytest.raises(CalibrationError, match="does not belong to this model") as caught:
            statistics_from_imatrix(Imatrix(entries), SCOUT, PROVENANCE)
        return str(caught.value)

    entries = dict(imatrix.entries)
    removed = entries.pop("blk.0.attn_output.weight")
    assert "no importance of" in problems(entries) and "blk.0.attn_output.weight" in problems(entries)
    entries = imatrix.entries | {"blk.999.attn_q.weight": removed}
    assert "blk.999.attn_q.weight', which the model does not have" in problems(entries)
    wrong = Importance(removed.mean_square[:, :-1], removed.counts)
    assert "instead of" in problems(imatrix.entries | {"blk.0.attn_output.weight": wrong})
    nothing = Importance(torch.zeros_like(removed.mean_square), torch.tensor([0]))
    assert "received no token" in problems(imatrix.entries | {"blk.0.attn_output.weight": nothing})
    # What llama.cpp measures beside our matrices does no harm, and one of several names of an input is enough.
    entries = dict(imatrix.entries)
    del entries["blk.0.attn_q.weight"], entries["blk.0.ffn_gate_exps.weight"]
    entries |= dict.fromkeys(("blk.0.ffn_gate_inp.weight", "output.weight", "token_embd.weight"), removed)
    back = statistics_from_imatrix(Imatrix(entries), SCOUT, PROVENANCE)
    assert back.inputs.keys() == {unit.key for unit in units(SCOUT) if unit.matrices}


def test_chunks_are_as_many_as_hold_the_tokens() -> None:
    statistics = sample_statistics(SCOUT)
    told = imatrix_from_statistics(statistics, SCOUT)
    assert (told.chunk_count, told.chunk_size, told.datasets) == (7, 100, ("bundled",))
    corpus = {"source": "a.txt", "samples": 90, "tokens": 700, "sequence_length": 64}  # documents shorter than the window
    described = dataclasses.replace(statistics, description={"corpus": corpus})
    told = imatrix_from_statistics(described, SCOUT)
    assert (told.chunk_count, told.chunk_size, told.datasets) == (11, 64, ("a.txt",))
    nothing = imatrix_from_statistics(dataclasses.replace(statistics, description={}), SCOUT)
    assert (nothing.chunk_count, nothing.chunk_size, nothing.datasets) == (0, 1, ("unknown",))


def test_statistics_that_lack_a_unit_are_not_exported() -> None:
    with pytest.raises(CalibrationError, match=r"no statistics of .*layers\.1"):
        imatrix_from_statistics(sample_statistics(SCOUT, layers=(0,)), SCOUT)
