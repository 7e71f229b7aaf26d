"""All experts of a layer on a device: stacked by scheme, so that each scheme takes one launch, with the shared expert as one more.

An expert goes to its place in the stack as soon as it is there, so beside the layer there is one expert, not all of them again.

This module needs no Triton: who evaluates many times prepares once, and gives the result to ``dispatch.moe_forward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.kernels.device_weights import DeviceWeight, Filling, alike, build, kind_of, scheme_of
from quantkit.kernels.weights import AnnouncedExperts, Mlp

Entry = tuple[DeviceWeight, DeviceWeight | None, DeviceWeight]  # gate, up, down of an expert


@dataclass(frozen=True)
class Stack:
    """Experts of one scheme and shape on a device.

    numbers: int64 ``[experts]``, which they are, on the device; the shared expert is number ``Mixture.experts``.  routed: how many
    of them are not the shared expert, which comes last.  gate, up: paired in ``gate``, unless their schemes differ.
    """

    numbers: torch.Tensor
    routed: int
    gate: DeviceWeight
    up: DeviceWeight | None
    down: DeviceWeight

    @property
    def shared(self) -> bool:
        """Whether the shared expert is among them."""
        return self.routed < len(self.numbers)


@dataclass(frozen=True)
class Mixture:
    """All experts of a layer that are wanted, and the shared one, ready to be multiplied; see :func:`prepare`."""

    experts: int
    stacks: tuple[Stack, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the device that it takes."""
        weights = (weight for group in self.stacks for weight in (group.gate, group.up, group.down))
        return sum(weight.nbytes for weight in weights if weight is not None)


def prepare(experts: Sequence[Mlp], shared: Mlp, device: torch.device, wanted: Sequence[int] | None = None) -> Mixture:
    """Experts on the device, stacked by scheme.  wanted: the experts to ask for, ascending; None for all."""
    numbers = list(range(len(experts)) if wanted is None else wanted)
    names: list[tuple[str, ...]] = [()] * len(numbers)
    if isinstance(experts, AnnouncedExperts):
        experts.announce(numbers)
        names = [experts.schemes(number) for number in numbers]
    last = _on_device(shared, device)
    groups: list[_Group] = []
    for place, number in enumerate(numbers):
        entry = _on_device(experts[number], device)
        group = next((group for group in groups if group.takes(names[place], entry)), None)
        if group is None:
            group = _Group(names[place], entry, names[place:].count(names[place]) + _alike(entry, last))
            groups.append(group)
        group.add(number, entry)
        del entry  # before the next one is read
    group = next((group for group in groups if _alike(group.first, last)), None)
    if group is None:
        group = _Group((), last, 1)
        groups.append(group)
    group.add(len(experts), last)
    return Mixture(len(experts), tuple(group.stacked(len(experts), device) for group in groups))


class _Group:
    """Experts of one scheme, which become a stack.

    names: of the schemes, as far as they are known before.  first: the first of them.  room: how many there will be, or more.
    """

    def __init__(self, names: tuple[str, ...], first: Entry, room: int) -> None:
        self.first = first
        self._names, self._numbers = names, list[int]()
        self._fillings = [None if weight is None else Filling(weight, room) for weight in first]

    def takes(self, names: tuple[str, ...], entry: Entry) -> bool:
        """Whether an expert belongs to it."""
        return names == self._names and _alike(self.first, entry)

    def add(self, number: int, entry: Entry) -> None:
        """The next one."""
        self._numbers.append(number)
        for filling, weight in zip(self._fillings, entry, strict=True):
            if filling is not None and weight is not None:
                filling.add(weight)

    def stacked(self, experts: int, device: torch.device) -> Stack:
        """All of them.  experts: in the layer."""
        gate, up, down = (None if filling is None else filling.finish() for filling in self._fillings)
        assert gate is not None and down is not None
        routed = sum(number < experts for number in self._numbers)
        return Stack(torch.tensor(self._numbers, device=device), routed, gate, up, down)


def _on_device(mlp: Mlp, device: torch.device) -> Entry:
    down = build(mlp.down, device)
    if kind_of(mlp.gate) == kind_of(mlp.up) and scheme_of(mlp.gate) == scheme_of(mlp.up):
        return build(mlp.gate, device, mlp.up), None, down
    return build(mlp.gate, device), build(mlp.up, device), down


def _alike(one: Entry, other: Entry) -> bool:
    """Whether two experts can stand in one stack."""
    pairs = zip(one, other, strict=True)
    return all(mine is theirs if mine is None or theirs is None else alike(mine, theirs) for mine, theirs in pairs)
