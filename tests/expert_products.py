"""The oracle of products with experts' weights: float64, and how far rounding explains what is found.

A result in BF16 is off by its own rounding, and float32 sums by a share of the sum of the magnitudes that were added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from quantkit import grid
from quantkit.grid import QuantizedTensor
from quantkit.kernels.weights import Weight

OUTPUT_ROUNDING = 2.0**-8  # of BF16, and a little for float32 sums
SUM_ROUNDING = 1e-5  # of float32 sums, relative to the sum of magnitudes


def exact(weight: Weight) -> torch.Tensor:
    """The stored values, float64."""
    return (grid.dequantize(weight) if isinstance(weight, QuantizedTensor) else weight).to(torch.float64)


def product(x: torch.Tensor, weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` float64 times the transposed weight, and what float32 sums of its terms, minimums apart, may be off by."""
    values = exact(weight)
    magnitude = values.abs()
    if isinstance(weight, QuantizedTensor) and weight.minimum is not None:
        _, minimum = grid.block_steps(weight)
        assert minimum is not None
        magnitude = magnitude + 2 * minimum.to(torch.float64).repeat_interleave(32, 1)
    return x @ values.t(), SUM_ROUNDING * (x.abs() @ magnitude.t())


def deviation(result: torch.Tensor, x: torch.Tensor, weight: Weight, up: Weight | None = None) -> float:
    """The largest error of a product, or of one that ``up`` gates in BF16, divided by what rounding explains."""
    wanted, slack = product(x, weight)
    if up is not None:
        other, other_slack = product(x, up)
        inner = wanted * torch.sigmoid(wanted)
        slack = slack * other.abs() * 1.1 + other_slack * inner.abs()
        wanted = inner * other
        slack = slack + wanted.abs() * OUTPUT_ROUNDING
    return float(((result - wanted).abs() / (slack + 1e-30)).max()) if x.numel() else 0.0


def worst_deviation(
    result: torch.Tensor,
    rows: torch.Tensor,
    counts: Sequence[int],
    matrices: Sequence[Weight],
    ups: Sequence[Weight] | None,
    rounded: Callable[[torch.Tensor, Weight], torch.Tensor] = lambda rows, _: rows,
) -> float:
    """The largest of :func:`deviation` over experts with so many rows each.  rounded: what clients make of rows in float32."""
    found = [0.0]
    given, results = torch.split(rows, list(counts)), torch.split(result, list(counts))
    for number, (x, here) in enumerate(zip(given, results, strict=True)):
        inputs = rounded(x.to(torch.float32), matrices[number]).to(torch.float64)
        found.append(deviation(here.to(torch.float64), inputs, matrices[number], ups[number] if ups is not None else None))
    return max(found)
