"""What the entries of the kernels are given: one weight matrix, or the three of a gated MLP, as they are stored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.grid import QuantizedTensor

Weight = QuantizedTensor | torch.Tensor  # [out, in]; a floating tensor, of any strides, stands for itself


@dataclass(frozen=True)
class Mlp:
    """An expert, a shared expert or a dense MLP.  gate, up: ``[width, hidden]``.  down: ``[hidden, width]``."""

    gate: Weight
    up: Weight
    down: Weight


class AnnouncedExperts(Sequence[Mlp]):
    """Experts that want to know beforehand which of them will be asked for, so that they can be read ahead."""

    @abstractmethod
    def announce(self, numbers: Sequence[int]) -> None:
        """These will be asked for next, each once and in this order."""

    @abstractmethod
    def schemes(self, number: int) -> tuple[str, ...]:
        """Names of the schemes of an expert's matrices, known before it is read."""


def shape_of(weight: Weight) -> tuple[int, int]:
    """(out, in).  Codes of every scheme have the shape of their weight."""
    rows, columns = (weight.codes if isinstance(weight, QuantizedTensor) else weight).shape
    return int(rows), int(columns)
