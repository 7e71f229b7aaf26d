"""TensorFiles: what is read is what the safetensors library reads; files and index that lie are found out."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from four_shards import EXPERTS, INDEX, SHARDS, contents, edit_index, edit_shard, shard_of, truncate, write_four_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.llama4 import inventory, units
from quantkit.tensor_files import TensorFiles
from quantkit.workspace import Workspace


@pytest.fixture
def scout(tmp_path: Path) -> Path:
    return write_four_shards(tmp_path / "scout")


def test_tensor_files_of_any_dtype(tmp_path: Path) -> None:
    tensors = {
        "packed": torch.arange(6, dtype=torch.int32).view(2, 3),
        "scale": torch.ones(3).to(torch.float8_e4m3fn),
        "shape": torch.tensor([5, 7]),
        "codes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.ones(0, 4),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with TensorFiles.open(source) as files:
            assert set(files.tensors) == set(tensors)
            assert [path.name for path in files.paths] == ["model.safetensors"]
            for name, tensor in tensors.items():
                found = files.read(name)
                assert found.dtype == tensor.dtype
                assert found.shape == tensor.shape
                assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else found == tensor
                assert files.tensors[name].elements == tensor.numel()
                assert sum(len(chunk) for chunk in files.chunks(name)) == tensor.nbytes


def test_dtype_that_is_not_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with TensorFiles.open(tmp_path) as files, pytest.raises(CheckpointError, match="tensor x is C64"):
        files.read("x")


def test_slices_land_in_the_buffer_that_is_given(scout: Path) -> None:
    name = f"{EXPERTS}down_proj"
    with Checkpoint.open(scout) as checkpoint:
        buffer = np.full(100_000, 7, np.uint8)
        tensor = checkpoint.read_slice(name, 2, buffer)
        assert tensor.data_ptr() == buffer.ctypes.data
        assert torch.equal(tensor, contents(scout)[name][2])
        assert (buffer[tensor.nbytes :] == 7).all()
        for expert in (-1, 4):
            with pytest.raises(IndexError):
                checkpoint.read_slice(name, expert)


def test_short_reads_are_continued(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, expected = f"{EXPERTS}gate_up_proj", contents(scout)[f"{EXPERTS}gate_up_proj"]
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: original(fd, [buffers[0][:999]], offset))
    with Checkpoint.open(scout) as checkpoint:
        assert torch.equal(checkpoint.read_slice(name, 1), expected[1])


def test_threads_do_not_disturb_each_other(scout: Path) -> None:
    expected = contents(scout)
    with Checkpoint.open(scout) as checkpoint, ThreadPoolExecutor(8) as pool:
        names = [name for name in expected for _ in range(4)]
        for name, tensor in zip(names, pool.map(checkpoint.read_slice, names), strict=True):
            assert torch.equal(tensor, expected[name])


def test_chunks_share_one_bounded_buffer(scout: Path) -> None:
    with Checkpoint.open(scout) as checkpoint:
        chunks = checkpoint.chunks("language_model.lm_head.weight", 4096)
        first, second = next(chunks), next(chunks)
        assert len(first) == len(second) == 4096
        assert np.frombuffer(first, np.uint8).ctypes.data == np.frombuffer(second, np.uint8).ctypes.data


def test_closing_lets_go_of_every_file(scout: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Checkpoint.open(scout) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read_slice(name)
        assert len(os.listdir("/proc/self/fd")) == before + len(list(scout.glob("*.safetensors")))
    assert len(os.listdir("/proc/self/fd")) == before


def test_symlinked_snapshot(scout: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    scout.rename(blobs)
    for item in blobs.iterdir():
        (snapshot / item.name).symlink_to(Path("../../blobs") / item.name)
    with Checkpoint.open(snapshot) as checkpoint:
        expected = contents(blobs)
        assert all(torch.equal(checkpoint.read_slice(name), tensor) for name, tensor in expected.items())
        assert "LICENSE" in {path.name for path in checkpoint.carried_files()}


# ---------------------------------------------------------------------------------------------------- faults on reading


def vanish(path: Path) -> None:
    path.unlink()


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"), [(vanish, "No such file"), (truncate, "has changed since"), (rewrite, "has changed since")]
)
def test_shard_harmed_after_opening(harm: Callable[[Path], None], message: str, scout: Path) -> None:
    name = f"{EXPERTS}gate_up_proj"
    shard = shard_of(scout, name)
    with Checkpoint.open(scout) as checkpoint:
        harm(shard)
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint.read_slice(name, 2)
        assert all(part in str(caught.value) for part in (shard.name, name, "expert 2"))
        with pytest.raises(CheckpointError, match=message):
            list(checkpoint.chunks(name))


def test_shard_truncated_after_its_first_read(scout: Path) -> None:
    name = f"{EXPERTS}gate_up_proj"
    with Checkpoint.open(scout) as checkpoint:
        checkpoint.read_slice(name, 0)
        truncate(shard_of(scout, name))
        with pytest.raises(CheckpointError, match=rf"has changed .*{name}, expert 1"):
            checkpoint.read_slice(name, 1)


def test_end_of_file_within_a_tensor(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)
    message = r"is truncated: tensor .*down_proj, expert 3 lacks 65,536 bytes"
    with Checkpoint.open(scout) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.read_slice(f"{EXPERTS}down_proj", 3)


def test_device_that_fails(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with Checkpoint.open(scout) as checkpoint, pytest.raises(CheckpointError, match=r"Input/output error, at tensor .*q_proj"):
        checkpoint.read_slice("language_model.model.layers.0.self_attn.q_proj.weight")


# ---------------------------------------------------------------------------------------------------- faults on opening


def test_lying_index(scout: Path) -> None:
    name = f"{EXPERTS}down_proj"
    true = shard_of(scout, name).name
    false = next(path.name for path in sorted(scout.glob("*.safetensors")) if path.name != true)
    edit_index(scout, lambda index: index.update({name: false}))
    with pytest.raises(CheckpointError, match=rf"not where the index says \(1\): {name} \(in {true}; index: {false}\)"):
        Checkpoint.open(scout)
    edit_index(scout, lambda index: index.pop(name))
    with pytest.raises(CheckpointError, match=rf"{name} \(in {true}; index: not listed\)"):
        Checkpoint.open(scout)
    edit_index(scout, lambda index: index.update({name: true, "ghost": true}))
    with pytest.raises(CheckpointError, match=rf"in no shard \(1\): ghost \(index: {true}\)"):
        Checkpoint.open(scout)


def test_tensor_stored_twice(scout: Path) -> None:
    name = f"{EXPERTS}down_proj"
    true, other = shard_of(scout, name), next(path for path in sorted(scout.glob("*.safetensors")) if path != shard_of(scout, name))
    edit_shard(other, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(CheckpointError, match=rf"stored twice \(1\): {name} \(in .* and .*\)") as caught:
        Checkpoint.open(scout)
    assert true.name in str(caught.value)
    assert other.name in str(caught.value)


def test_both_a_single_file_and_an_index(scout: Path) -> None:
    save_file({"a": torch.ones(1)}, scout / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not listed \(1\): model\.safetensors"):
        Checkpoint.open(scout)


# ------------------------------------------------------------------------------------------------------------ mutations


def opened_or_refused(directory: Path) -> None:
    """Opens, and then everything is read; or a documented error with a message of bounded length."""
    try:
        with Checkpoint.open(directory) as checkpoint:
            assert set(checkpoint.tensors) == {tensor.name for tensor in inventory(checkpoint.config)}
            for unit in units(checkpoint.config):
                checkpoint.read_unit(unit, Workspace())
    except QuantkitError as error:
        assert str(error)
        assert len(str(error)) < 20_000


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("victim")
    tiny_models.write_tiny_model(directory, "text", shard_bytes=300_000, num_hidden_layers=1, num_local_experts=2, vocab_size=8)
    return directory


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_in_any_small_text(victim: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([victim / "config.json", victim / INDEX, *sorted(victim.glob("*.safetensors"))]))
    original = path.read_bytes()
    limit = 8 + int.from_bytes(original[:8], "little") if path.suffix == ".safetensors" else len(original)
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(mutated)
        opened_or_refused(victim)
    finally:
        path.write_bytes(original)


TREES = st.recursive(
    st.none() | st.integers(-(2**70), 2**70) | st.text(max_size=6) | st.sampled_from([SHARDS[0], "/etc/x", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(TREES, st.sampled_from(["whole", "weight_map", "entry"]), st.integers(0, 8))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_index(victim: Path, tree: Any, place: str, number: int) -> None:
    path = victim / INDEX
    original = path.read_text()
    content = json.loads(original)
    if place == "whole":
        content = tree
    elif place == "weight_map":
        content["weight_map"] = tree
    else:
        content["weight_map"][sorted(content["weight_map"])[number]] = tree
    try:
        path.write_text(json.dumps(content))
        opened_or_refused(victim)
    finally:
        path.write_text(original)
