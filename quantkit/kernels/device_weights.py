"""Weights of one scheme, stacked on a device as the Triton kernels read them.

Codes are kept row after row, ``[matrices * rows, ...]``, and whatever belongs to a group of inputs (scales, zero points) is kept
group after group, ``[matrices * groups, rows]``, so that a tile of weights and the scales of its rows are two plain rectangles.
Inputs are padded with zeros to a multiple of 128 and rows to a multiple of 16; results of padded rows are never written.

The rows of gate and up alternate in blocks of 8, gate first.  That is how a tensor core hands out the rows of its result: a thread
that has row r of a tile also has row r + 8, so a thread has gate and up of the same unit and no thread needs another's.

A kind of weight is a function here that takes a matrix apart, and a line in ``PARTS``; its kernels stand in
:mod:`quantkit.kernels.moe_triton`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch

from quantkit.grid import QuantizedTensor, dequantize
from quantkit.kernels.planes import GROUP, PLANES
from quantkit.kernels.weights import Weight, shape_of
from quantkit.scheme import BLOCK_SIZE, Scheme

PAIRED = 8  # neighbouring rows of gate, then of up
ROWS = 16  # rows are padded to a multiple
FLOATING = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Parts:
    """One matrix taken apart: codes ``[out, ...]`` over padded inputs; tables ``[out, groups]`` each, by name."""

    codes: torch.Tensor
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceWeight:
    """A stack of matrices of one scheme and shape.

    kind: which kernels multiply it.  scheme: None for plain floating numbers.  matrices: in the stack; one that is ``paired`` holds
    gate and up.  outputs, inputs: of one matrix as it was given, so without padding, and of gate alone.  codes: ``[matrices * rows,
    ...]``.  tables: ``[matrices * groups, rows]`` each.  input_scale: float32 ``[matrices]`` where activations are quantized with a
    stored scale.
    """

    kind: str
    scheme: Scheme | None
    matrices: int
    paired: bool
    outputs: int
    inputs: int
    codes: torch.Tensor
    tables: Mapping[str, torch.Tensor]
    input_scale: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of one matrix, padding and both of a pair included."""
        return self.codes.shape[0] // self.matrices

    @property
    def padded_inputs(self) -> int:
        """Inputs of one matrix, padding included."""
        return padded(self.inputs, GROUP)

    @property
    def nbytes(self) -> int:
        """Bytes of the device that it takes."""
        return sum(tensor.nbytes for tensor in (self.codes, *self.tables.values()))


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return size + -size % multiple


def kind_of(weight: Weight) -> str:
    """Which kernels multiply it.  Schemes that have none are dequantized and rounded to BF16 when they are brought to the device:
    such figures are a hair off, by half a step in 256 of every weight."""
    if not isinstance(weight, QuantizedTensor) or weight.scheme.name in FLOATING:
        return "floating"
    scheme = weight.scheme
    if scheme.number.startswith("int"):
        return "integer"
    if scheme.number == "fp8":
        return "fp8"
    return "blocks" if scheme.name in ("Q8_0", "Q4_K", "Q6_K") else "floating"


def build(weight: Weight, device: torch.device, up: Weight | None = None) -> DeviceWeight:
    """One matrix ``[out, in]`` as a stack of one on the device; or gate with ``up``, of the same scheme and shape."""
    kind, matrices = kind_of(weight), [weight] if up is None else [weight, up]
    assert len({(kind_of(matrix), scheme_of(matrix), shape_of(matrix)) for matrix in matrices}) == 1, "gate and up are alike"
    outputs, inputs = shape_of(weight)
    parts = [_taken_apart(matrix, device) for matrix in matrices]
    codes = _joined([part.codes for part in parts])
    tables = {name: _joined([part.tables[name] for part in parts]).t().contiguous() for name in parts[0].tables}
    return DeviceWeight(kind, scheme_of(weight), 1, up is not None, outputs, inputs, codes, tables, _input_scale(matrices, device))


class Filling:
    """A stack that is filled one matrix after the other, in memory that is taken at once, so that they do not lie there twice.

    first: like all that will come.  room: how many stacks of that size will come, or more.
    """

    def __init__(self, first: DeviceWeight, room: int) -> None:
        self._first, self._room, self._count = first, room, 0
        self._stacks: dict[str, torch.Tensor] = {}
        self._scales: list[torch.Tensor] = []

    def add(self, weight: DeviceWeight) -> None:
        """The next one."""
        assert alike(self._first, weight) and self._count < self._room
        if self._room > 1:
            for name, piece in _tensors(weight).items():
                if name not in self._stacks:
                    self._stacks[name] = piece.new_empty((self._room * len(piece), *piece.shape[1:]))
                self._stacks[name][self._count * len(piece) : (self._count + 1) * len(piece)] = piece
        if weight.input_scale is not None:
            self._scales.append(weight.input_scale)
        self._count += 1

    def finish(self) -> DeviceWeight:
        """The stack of all that were added."""
        if self._count == 1:
            return self._first
        if self._count < self._room:
            for name, full in self._stacks.items():
                self._stacks[name] = full[: len(full) // self._room * self._count].clone()
        tables = {name: self._stacks[f"table {name}"] for name in self._first.tables}
        scales = torch.cat(self._scales) if self._scales else None
        matrices = self._count * self._first.matrices
        return replace(self._first, matrices=matrices, codes=self._stacks["codes"], tables=tables, input_scale=scales)


def _tensors(weight: DeviceWeight) -> dict[str, torch.Tensor]:
    return {"codes": weight.codes, **{f"table {name}": table for name, table in weight.tables.items()}}


def stack(weights: Sequence[DeviceWeight]) -> DeviceWeight:
    """Stacks of the same scheme and size as one, in their order."""
    filling = Filling(weights[0], len(weights))
    for weight in weights:
        filling.add(weight)
    return filling.finish()


def alike(one: DeviceWeight, other: DeviceWeight) -> bool:
    """Whether two can stand in one stack."""
    mine, theirs = ((w.kind, w.scheme, w.paired, w.outputs, w.inputs, w.codes.dtype, w.codes.device) for w in (one, other))
    return mine == theirs


def scheme_of(weight: Weight) -> Scheme | None:
    """The scheme, None for plain floating numbers."""
    return weight.scheme if isinstance(weight, QuantizedTensor) else None


# ------------------------------------------------------------------------------------------------------------ kinds


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int8 ``[out, in]`` as planes, int32 ``[out, words]``: what :func:`quantkit.kernels.planes.pack_planes` gives, on any
    device."""
    stored = pad_inputs(codes).to(torch.int32) + (1 << (bits - 1))
    planes, shift = [], 0
    for width in PLANES[bits]:
        fields = (stored >> shift & (1 << width) - 1).view(len(stored), -1, 32 // width, 4 * width)  # [out, groups, fields, words]
        words = fields[:, :, 0].clone()
        for number in range(1, 32 // width):
            words |= fields[:, :, number] << (width * number)
        planes.append(words)
        shift += width
    return torch.cat(planes, -1).flatten(1)


def pad_inputs(values: torch.Tensor, multiple: int = GROUP) -> torch.Tensor:
    """``[out, in]`` with zeros to a multiple of 128 inputs, or of other things; itself where there is nothing to add."""
    missing = -values.shape[1] % multiple
    if not missing:
        return values
    result = values.new_zeros((values.shape[0], values.shape[1] + missing))
    result[:, : values.shape[1]] = values
    return result


def integer_parts(weight: Weight, device: torch.device) -> Parts:
    """Codes as planes; scales BF16 and zero points int8, one for each group or one for each row."""
    assert isinstance(weight, QuantizedTensor)
    stored = {"scales": weight.scale, "zero_points": weight.zero_point}
    groups = GROUP // weight.scheme.group_size if weight.scheme.granularity == "group" else 1  # of 128 inputs
    tables = {name: pad_inputs(table.to(device), groups) for name, table in stored.items() if table is not None}
    return Parts(pack(weight.codes.to(device), weight.scheme.bits), tables)


def fp8_parts(weight: Weight, device: torch.device) -> Parts:
    """Codes as they are; scales float32, one for each row, or one for each 128 inputs of it where blocks are 128 x 128."""
    assert isinstance(weight, QuantizedTensor)
    outputs, scale = weight.codes.shape[0], weight.scale.to(device, torch.float32)
    if weight.scheme.granularity == "block":
        scale = scale.repeat_interleave(BLOCK_SIZE, 0)
    codes = pad_inputs(weight.codes.to(device).view(torch.uint8)).view(torch.float8_e4m3fn)
    return Parts(codes, {"scales": scale.expand(outputs, -1)})


def floating_parts(weight: Weight, device: torch.device) -> Parts:
    """BF16 numbers; others are rounded to BF16, as the kernels multiply nothing else."""
    values = dequantize(weight) if isinstance(weight, QuantizedTensor) else weight
    return Parts(pad_inputs(values.to(device, torch.bfloat16)).contiguous())


PARTS: dict[str, Callable[[Weight, torch.device], Parts]] = {
    "integer": integer_parts,
    "fp8": fp8_parts,
    "floating": floating_parts,
}
PARTS_ELSEWHERE = {"blocks": "quantkit.kernels.device_blocks"}  # modules with a function ``parts`` for kinds that are long to tell


def _taken_apart(weight: Weight, device: torch.device) -> Parts:
    kind = kind_of(weight)
    if kind in PARTS:
        return PARTS[kind](weight, device)
    function = cast("Callable[[Weight, torch.device], Parts]", importlib.import_module(PARTS_ELSEWHERE[kind]).parts)
    return function(weight, device)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows ``[out, ...]`` padded; of a pair alternating in blocks of 8."""
    outputs, width = parts[0].shape
    height = padded(outputs, PAIRED if len(parts) == 2 else ROWS)
    if len(parts) == 1 and height == outputs:
        return parts[0].contiguous()
    # zeros of a dtype without arithmetic, such as FP8, are made as bytes
    result = torch.zeros(height * len(parts), width * parts[0].element_size(), dtype=torch.uint8, device=parts[0].device)
    blocks = result.view(parts[0].dtype).view(height // PAIRED, len(parts), PAIRED, width) if len(parts) == 2 else None
    for number, part in enumerate(parts):
        if blocks is None:
            result.view(part.dtype)[:outputs] = part
            continue
        whole = outputs // PAIRED
        blocks[:whole, number] = part[: whole * PAIRED].reshape(whole, PAIRED, width)
        if whole * PAIRED < outputs:
            blocks[whole, number, : outputs - whole * PAIRED] = part[whole * PAIRED :]
    return result.view(parts[0].dtype)


def _input_scale(matrices: Sequence[Weight], device: torch.device) -> torch.Tensor | None:
    """The stored scale of activations; gate and up share theirs."""
    scales = [matrix.input_scale for matrix in matrices if isinstance(matrix, QuantizedTensor) and matrix.input_scale is not None]
    return scales[0].to(device, torch.float32).reshape(1) if scales else None
