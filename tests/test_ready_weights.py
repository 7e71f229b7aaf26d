"""Weights as products take them: read ahead by threads, embedding and head as tables, room on a device."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from quantkit import ready_weights
from quantkit.kernels.weights import Mlp
from quantkit.llama4 import Unit, WeightMatrix
from quantkit.ready_weights import DeviceWeights, StoredExperts, StoredWeights
from quantkit.stored_model import StoredModel, open_model
from quantkit.team import Team
from tests.tiny_models import write_tiny_model

CPU = torch.device("cpu")
PLENTY = 1 << 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoredModel]:
    directory = tmp_path_factory.mktemp("model")
    write_tiny_model(directory, num_local_experts=8)
    with open_model(directory) as opened:
        yield opened


def values(mlp: Mlp) -> list[torch.Tensor]:
    return [weight for weight in (mlp.gate, mlp.up, mlp.down) if isinstance(weight, torch.Tensor)]


@pytest.mark.parametrize(("threads", "ahead", "together"), [(3, 1 << 30, 3), (4, 1, 1), (1, 1 << 30, 1)])
def test_announced_experts_are_read_by_threads_and_once(
    model: StoredModel, threads: int, ahead: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [unit for unit in model.units if unit.layer == 0 and unit.expert is not None]
    wanted, alone = [0, 2, 3, 5, 7], StoredExperts(model, units)
    monkeypatch.setattr(ready_weights, "AHEAD_BYTES", ahead)
    reads: list[str] = []
    read, lock = model.read, threading.Lock()

    def counted(matrix: WeightMatrix) -> object:
        with lock:
            reads.append(matrix.name)
        return read(matrix)

    expected = {number: values(alone[number]) for number in wanted}
    with Team(threads) as team, mock.patch.object(model, "read", counted):
        experts = StoredExperts(model, units, team)
        assert len(experts) == 8
        experts.announce(wanted)
        for place, number in enumerate(wanted):
            found = values(experts[number])
            assert all(torch.equal(one, other) for one, other in zip(found, expected[number], strict=True))
            assert len(reads) == 3 * min(len(wanted), -(-(place + 1) // together) * together)
        assert len(set(reads)) == len(reads)
        assert len(values(experts[1])) == 3  # which was not announced


def test_tables_on_a_device(model: StoredModel) -> None:
    tokens = torch.tensor([5, 0, 255, 5])
    with Team(1) as team:
        stored, there = StoredWeights(model), DeviceWeights(model, team, CPU, None)
        with mock.patch.object(ready_weights, "device_memory", return_value=PLENTY):
            assert torch.equal(there.embed(tokens), stored.embed(tokens))
            assert there.kept == 2 * 256 * 128  # BF16, as in the file
            expected = stored.embed(tokens)
            with mock.patch.object(model, "rows", side_effect=AssertionError("read again")):
                assert torch.equal(there.embed(tokens), expected)
        head = torch.cat([rows.clone() for _, rows in stored.head()])
        for memory in (0, PLENTY):
            with (
                mock.patch.object(ready_weights, "device_memory", return_value=memory),
                mock.patch.object(ready_weights, "DEVICE_TABLE_ROWS", 100),
            ):
                tiles = list(there.head())
            assert [(first, len(rows), rows.dtype) for first, rows in tiles] == [
                (0, 100, torch.float32),
                (100, 100, torch.float32),
                (200, 56, torch.float32),
            ]
            assert torch.equal(torch.cat([rows for _, rows in tiles]), head)


def test_a_table_that_is_not_bf16_stays_as_it_is(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, dtype=torch.float32)
    with open_model(tmp_path) as model, Team(1) as team, mock.patch.object(ready_weights, "device_memory", return_value=PLENTY):
        there, tokens = DeviceWeights(model, team, CPU, None), torch.arange(256)
        assert torch.equal(there.embed(tokens), StoredWeights(model).embed(tokens))
        assert there.kept == 4 * 256 * 128


def test_nothing_stays_without_room_or_budget(model: StoredModel) -> None:
    units = [unit for unit in model.units if unit.layer == 0]
    experts, qkv = [unit for unit in units if unit.expert is not None], next(unit for unit in units if unit.key.endswith("qkv"))
    shared = {unit.key.rpartition(".")[2]: unit for unit in units if unit.matrices and unit.expert is None}
    pair = shared["gate_up_proj"], shared["down_proj"]
    layer = 2 * sum(math.prod(matrix.shape) for unit in (*experts, *pair) for matrix in unit.matrices)
    for memory, budget, stays in ((PLENTY, 0, False), (PLENTY, layer - 1, False), (PLENTY, layer, True), (PLENTY, None, True)):
        assert _stays(model, memory, budget, experts, pair) == stays
    reserved = ready_weights.RESERVED_BYTES
    assert not _stays(model, reserved + 2 * layer - 1, None, experts, pair)  # beside the layer as much again, and the reserve
    assert _stays(model, reserved + 2 * layer, None, experts, pair)
    with Team(1) as team, mock.patch.object(ready_weights, "device_memory", return_value=PLENTY):
        there = DeviceWeights(model, team, CPU, None)
        assert there.matrices(qkv)[0] is there.matrices(qkv)[0]
        assert there.vector("language_model.model.norm.weight") is there.vector("language_model.model.norm.weight")


def _stays(model: StoredModel, memory: int, budget: int | None, experts: list[Unit], pair: tuple[Unit, Unit]) -> bool:
    with Team(1) as team, mock.patch.object(ready_weights, "device_memory", return_value=memory):
        there = DeviceWeights(model, team, CPU, budget)
        first, second = there.mixture(experts, pair), there.mixture(experts, pair)
        assert (first[1] is None) == (second[1] is None)
        return first[0] is second[0]
