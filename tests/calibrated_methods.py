"""What methods learn from, and how their results are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch

from quantkit import grid
from quantkit.evidence import Evidence
from quantkit.grid import QuantizationStatistics, QuantizedTensor

Result = tuple[QuantizedTensor, QuantizationStatistics]


def evidence_of(rows: torch.Tensor, missing: torch.Tensor | None = None, counted: float = 0.0) -> Evidence:
    """counted: ``Evidence.rows``; with 0 the damping is the usual 1 %."""
    double = rows.to(torch.float64)
    hessian = (double.t() @ double / len(rows)).to(torch.float32)
    return Evidence(len(rows), rows.square().mean(0), rows.abs().amax(0), hessian, missing, counted)


def output_error(weight: torch.Tensor, quantized: QuantizedTensor, rows: torch.Tensor) -> float:
    """Relative L2 error of the outputs for these inputs."""
    exact, inputs = weight.to(torch.float64), rows.to(torch.float64)
    difference = (exact - grid.dequantize(quantized).to(torch.float64)) @ inputs.t()
    return float(difference.norm() / (exact @ inputs.t()).norm())


def assert_same(left: Result, right: Result) -> None:
    """To the bit, in every tensor."""
    for name in (field.name for field in fields(QuantizedTensor) if field.name != "scheme"):
        mine, other = getattr(left[0], name), getattr(right[0], name)
        assert (mine is None) == (other is None), name
        assert mine is None or torch.equal(mine.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name
    assert left[1] == right[1]


def assert_threads_change_nothing(quantize: Callable[[int], list[Result]]) -> None:
    """quantize: told how many threads to use."""
    first = quantize(1)
    for threads in (1, 2, 3):
        for mine, other in zip(quantize(threads), first, strict=True):
            assert_same(mine, other)
