"""KeptModel: a stored model that keeps in memory what it has read, as far as a budget goes.

Generating reads every weight once per token.  Of a model that fits into memory nothing should be read, unpacked and converted more
than once; one that does not fit is read again each time, but for the part that the budget holds.  Which part hardly matters, since
each step needs all of it: what is asked for first is kept.

Numbers do not change.  Matrices are kept in float32, which is what products on the CPU are made in, when the whole model fits that
way; otherwise, or where a scheme also says how inputs are rounded, as they are stored.  What a device keeps is the business of
:mod:`quantkit.ready_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch

from quantkit.grid import QuantizedTensor, dequantize
from quantkit.kernels.weights import Weight
from quantkit.llama4 import WeightMatrix
from quantkit.stored_model import StoredModel

KEPT_BYTES = 2 << 30


class KeptModel(StoredModel):
    """``model``, with at most ``budget`` bytes of it in memory.  Closing this one leaves ``model`` open."""

    def __init__(self, model: StoredModel, budget: int = KEPT_BYTES) -> None:
        self.path, self.config, self.units = model.path, model.config, model.units
        self.schemes, self.frequencies, self.format, self.files = model.schemes, model.frequencies, model.format, model.files
        self._model, self._left = model, budget
        self._as_floats = 4 * model.parameters <= budget
        self._matrices: dict[str, Weight] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._tables: dict[tuple[str, int], list[tuple[int, torch.Tensor]]] = {}

    @property
    def name(self) -> str:
        """See :class:`StoredModel`."""
        return self._model.name

    @property
    def kept(self) -> int:
        """Bytes in memory."""
        tables = (table for parts in self._tables.values() for _, table in parts)
        return sum(map(_size, [*self._matrices.values(), *self._vectors.values(), *tables]))

    def stored_bytes(self) -> dict[str, int]:
        """See :class:`StoredModel`."""
        return self._model.stored_bytes()

    def fingerprint(self) -> dict[str, Any]:
        """See :class:`StoredModel`."""
        return self._model.fingerprint()

    def close(self) -> None:
        """Let go of what is kept."""
        for kept in (self._matrices, self._vectors, self._tables):
            kept.clear()

    def read(self, matrix: WeightMatrix) -> Weight:
        """See :class:`StoredModel`."""
        found = self._matrices.get(matrix.name)
        if found is None:
            weight = self._model.read(matrix)
            if not self._take(4 * math.prod(matrix.shape) if self._as_floats else _size(weight)):
                return weight
            found = self._matrices[matrix.name] = self._kept_form(weight)
        return found

    def vector(self, name: str) -> torch.Tensor:
        """See :class:`StoredModel`."""
        found = self._vectors.get(name)
        if found is None:
            found = self._model.vector(name)
            if self._take(_size(found)):
                self._vectors[name] = found
        return found

    def rows(self, name: str, at_once: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See :class:`StoredModel`."""
        kept = self._tables.get((name, at_once))
        if kept is not None:
            yield from kept
            return
        if not self._take(4 * self.config.vocab_size * self.config.hidden_size):
            yield from self._model.rows(name, at_once)
            return
        copied = [(first, table.clone()) for first, table in self._model.rows(name, at_once)]
        self._tables[name, at_once] = copied
        yield from copied

    def _take(self, size: int) -> bool:
        if size > self._left:
            return False
        self._left -= size
        return True

    def _kept_form(self, weight: Weight) -> Weight:
        if isinstance(weight, torch.Tensor):
            # Contiguous, so that the rest of a larger tensor that this may be a view of is not kept with it.
            return weight.to(torch.float32 if self._as_floats else weight.dtype).contiguous()
        if self._as_floats and not (weight.scheme.dynamic_activations or weight.scheme.static_activations):
            return dequantize(weight)
        return weight


def _size(weight: Weight) -> int:
    if isinstance(weight, QuantizedTensor):
        parts = (getattr(weight, part.name) for part in fields(weight))
        return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    return weight.nbytes
