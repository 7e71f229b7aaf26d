"""GPTQ as the paper has it, in float64, on any lattice; and how tests call the library's.

Frantar et al. 2022 (arXiv 2210.17323), algorithm 1: inverse Hessian, its Cholesky factor, one column after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit import grid
from quantkit.evidence import Evidence
from quantkit.grid import QuantizationStatistics, QuantizedTensor
from quantkit.methods import gptq
from quantkit.scheme import Scheme
from quantkit.team import Team
from quantkit.workspace import Workspace

TIE = 1e-3  # steps by which float32 may miss the middle between two codes


def quantize(
    weights: list[torch.Tensor], scheme: Scheme, evidence: Evidence, *, clip_search: bool = False, threads: int = 2
) -> list[tuple[QuantizedTensor, QuantizationStatistics]]:
    with Team(threads) as members:
        return gptq.quantize(weights, scheme, clip_search=clip_search, workspace=Workspace(), evidence=evidence, team=members)


def one(
    weight: torch.Tensor, scheme: Scheme, evidence: Evidence, *, clip_search: bool = False, threads: int = 2
) -> tuple[QuantizedTensor, QuantizationStatistics]:
    ((quantized, statistics),) = quantize([weight], scheme, evidence, clip_search=clip_search, threads=threads)
    return quantized, statistics


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    double = hessian.to(torch.float64)
    return double + damping * double.diagonal().mean() * torch.eye(len(double), dtype=torch.float64)


@dataclass(frozen=True)
class Oracle:
    """codes: of the paper's algorithm, int8 ``[out, in]``.  excess: by how many steps at most the codes under test miss what that
    algorithm would have rounded to nearest, had it made the same choices before."""

    codes: torch.Tensor
    excess: float


@dataclass(frozen=True)
class Lattice:
    """What the weights of a group can become.

    codes: int64 ``[codes]``, in order of preference where values are equally near.  values: float64 ``[out, groups, codes]``.
    step: the least distance that counts, float64 ``[out, groups]``; 0 where all codes mean the same.
    """

    codes: torch.Tensor
    values: torch.Tensor
    step: torch.Tensor


def lattice(quantized: QuantizedTensor) -> Lattice:
    """The lattice that stored scales make, by the formulas of :class:`QuantizedTensor`."""
    scheme, kept = quantized.scheme, torch.float32
    if scheme.number != "ggml":
        lowest, highest = grid.INT_RANGE[scheme.number]
        codes, step = torch.arange(lowest, highest + 1), quantized.scale.to(torch.float64)
        shift = torch.zeros_like(step) if quantized.zero_point is None else quantized.zero_point.to(torch.float64)
        return Lattice(codes, (codes - shift[..., None]) * step[..., None], step)
    kind = scheme.block_type
    codes = torch.arange(kind.codes[0], kind.codes[1] + 1)
    levels = (codes - kind.offset if kind.levels is None else torch.tensor(kind.levels)).to(kept)
    if quantized.scale.dtype == torch.uint8:  # a power of two; levels are doubled
        steps = torch.exp2(quantized.scale.to(torch.float64) - 128).to(kept)
    else:
        steps = quantized.scale.to(kept)
    parts = kind.block // kind.group if kind.group else 1
    if quantized.group_scale is not None:
        steps = steps.repeat_interleave(parts, 1) * quantized.group_scale.to(kept)
    values = steps[..., None] * levels
    if quantized.minimum is not None and quantized.group_minimum is not None:
        values = values - (quantized.minimum.to(kept).repeat_interleave(parts, 1) * quantized.group_minimum.to(kept))[..., None]
    elif quantized.minimum is not None:
        values = values + quantized.minimum.to(kept)[..., None]
    return Lattice(codes, values.to(torch.float64), steps.abs().to(torch.float64))


def paper(target: torch.Tensor, quantized: QuantizedTensor, hessian: torch.Tensor, order: torch.Tensor) -> Oracle:
    """The paper's algorithm with columns in ``order``; all in float64.  target: what is to be approximated."""
    rows, inputs = target.shape
    possible = lattice(quantized)
    wide = inputs // possible.step.shape[1]
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    free, led = (target.to(torch.float64)[:, order].clone() for _ in range(2))
    codes, excess, row = torch.zeros(rows, inputs, dtype=torch.int8), 0.0, torch.arange(rows)
    for number, column in enumerate(order.tolist()):
        values, step = possible.values[:, column // wide], possible.step[:, column // wide]
        nearest = (free[:, number, None] - values).abs().argmin(1)
        codes[:, column] = possible.codes[nearest].to(torch.int8)
        given = quantized.codes[:, column].to(torch.int64) - int(possible.codes[0])
        distances = (led[:, number, None] - values).abs()
        missed = (distances[row, given] - distances.amin(1)) / 2  # beyond the middle between the two
        excess = max(excess, float((missed / step.where(step > 0, 1.0)).max()))
        for current, code in ((free, nearest), (led, given)):
            error = (current[:, number] - values[row, code]) / upper[number, number]
            current[:, number:] -= error[:, None] * upper[number, number:]
    return Oracle(codes, excess)


def activation_order(hessian: torch.Tensor) -> torch.Tensor:
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)
