"""Experts on a device: every one at its place in the stack of its schemes, and no layer twice in the device's memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from simulated_device import simulate
from test_moe_triton import matrix

from quantkit.kernels import device_weights
from quantkit.kernels.device_mixture import Mixture, prepare
from quantkit.kernels.weights import AnnouncedExperts, Mlp

CPU = torch.device("cpu")
HIDDEN, WIDTH = 256, 128


def mlp(names: tuple[str, str, str], seed: int) -> Mlp:
    torch.manual_seed(seed)
    gate, up, down = (None if name == "BF16" else name for name in names)
    return Mlp(matrix(gate, WIDTH, HIDDEN), matrix(up, WIDTH, HIDDEN), matrix(down, HIDDEN, WIDTH))


class Announced(AnnouncedExperts):
    """Experts whose schemes are known before they are read."""

    def __init__(self, experts: Sequence[Mlp], names: Sequence[tuple[str, str, str]]) -> None:
        self._experts, self._names = experts, names

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, index: int) -> Mlp:  # type: ignore[override]
        return self._experts[index]

    def announce(self, numbers: Sequence[int]) -> None:
        """Nothing is read ahead."""

    def schemes(self, number: int) -> tuple[str, ...]:
        return self._names[number]


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


INT4, INT8 = ("int4-g128",) * 3, ("int8-channel-dynamic",) * 3
MIXED = ("int4-g128", "int8-channel", "int4-g128")  # gate and up do not share a launch
FLOATS = ("BF16",) * 3


@pytest.mark.parametrize("wanted", [None, [1, 2, 4]])
@pytest.mark.parametrize("shared", [INT4, FLOATS, ("fp8-channel-dynamic",) * 3], ids=["like some", "like one", "like none"])
@pytest.mark.parametrize("announced", [True, False])
def test_experts_stand_in_stacks(announced: bool, shared: tuple[str, str, str], wanted: list[int] | None) -> None:
    names = [INT4, INT8, INT4, MIXED, FLOATS, INT4]
    given = [mlp(each, number) for number, each in enumerate(names)]
    last = mlp(shared, len(names))
    mixture = prepare(Announced(given, names) if announced else given, last, CPU, wanted)
    kinds = dict(enumerate([*names, shared]))
    chosen = [*(range(len(names)) if wanted is None else wanted), len(names)]
    expected: dict[tuple[str, str, str], list[int]] = {}
    for number in chosen:
        expected.setdefault(kinds[number], []).append(number)
    assert mixture.experts == len(names) and [group.numbers.tolist() for group in mixture.stacks] == list(expected.values())
    for group, members in zip(mixture.stacks, expected.values(), strict=True):
        assert group.routed == sum(number < len(names) for number in members)
        mine = [[*given, last][number] for number in members]
        if group.up is None:
            gates = [device_weights.build(one.gate, CPU, one.up) for one in mine]
        else:
            gates = [device_weights.build(one.gate, CPU) for one in mine]
            check(group.up, [device_weights.build(one.up, CPU) for one in mine])
        check(group.gate, gates)
        check(group.down, [device_weights.build(one.down, CPU) for one in mine])


def check(found: device_weights.DeviceWeight, pieces: Sequence[device_weights.DeviceWeight]) -> None:
    assert found.matrices == len(pieces) and found.scheme == pieces[0].scheme
    assert same(found.codes, torch.cat([piece.codes for piece in pieces]))
    assert found.tables.keys() == pieces[0].tables.keys()
    for name, table in found.tables.items():
        assert same(table, torch.cat([piece.tables[name] for piece in pieces]))


@pytest.mark.parametrize("names", [INT4, FLOATS], ids=["int4", "BF16"])
def test_a_layer_does_not_lie_on_the_device_twice(names: tuple[str, str, str]) -> None:
    count = 48
    one = mlp(names, 1)
    experts = Announced([one] * count, [names] * count)
    with simulate() as simulation:
        mixture: Mixture = prepare(experts, one, torch.device("cuda"))
        assert [len(group.numbers) for group in mixture.stacks] == [count + 1]
        assert mixture.nbytes <= simulation.used[0] <= mixture.nbytes + 8 * (count + 1)
        assert simulation.most[0] < 1.5 * mixture.nbytes, "beside the layer some experts, while they are taken apart"
