"""All experts of a layer on a device: stacked by scheme, so that each scheme takes one launch, with the shared expert as one more.

This module needs no Triton: who evaluates many times prepares once, and gives the result to ``dispatch.moe_forward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.kernels.device_weights import DeviceWeight, alike, build, kind_of, scheme_of, stack
from quantkit.kernels.weights import AnnouncedExperts, Mlp

Entry = tuple[int, DeviceWeight, DeviceWeight | None, DeviceWeight]  # number, gate, up, down of an expert


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
    numbers = range(len(experts)) if wanted is None else wanted
    if isinstance(experts, AnnouncedExperts):
        experts.announce(numbers)
    groups: list[list[Entry]] = []
    for number in (*numbers, len(experts)):
        mlp = shared if number == len(experts) else experts[number]
        entry = (number, *_on_device(mlp, device))
        for group in groups:
            if all(_both_alike(one, other) for one, other in zip(group[0][1:], entry[1:], strict=True)):
                group.append(entry)
                break
        else:
            groups.append([entry])
        del mlp  # before the next one is read
    return Mixture(len(experts), tuple(_stacked(group, len(experts), device) for group in groups))


def _on_device(mlp: Mlp, device: torch.device) -> tuple[DeviceWeight, DeviceWeight | None, DeviceWeight]:
    down = build(mlp.down, device)
    if kind_of(mlp.gate) == kind_of(mlp.up) and scheme_of(mlp.gate) == scheme_of(mlp.up):
        return build(mlp.gate, device, mlp.up), None, down
    return build(mlp.gate, device), build(mlp.up, device), down


def _both_alike(one: DeviceWeight | None, other: DeviceWeight | None) -> bool:
    return one is other if one is None or other is None else alike(one, other)


def _stacked(group: list[Entry], experts: int, device: torch.device) -> Stack:
    numbers = [entry[0] for entry in group]
    ups = [up for _, _, up, _ in group if up is not None]
    gate = stack([gate for _, gate, _, _ in group])
    down = stack([down for _, _, _, down in group])
    return Stack(
        torch.tensor(numbers, device=device), sum(number < experts for number in numbers), gate, stack(ups) if ups else None, down
    )
