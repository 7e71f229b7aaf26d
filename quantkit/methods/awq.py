"""AWQ's search for scales: round to nearest, with scales that are judged by the outputs and not by the weights.

Lin et al. 2023 (arXiv 2306.00978) observe that few inputs carry most of an output, and that plain rounding serves them better when
the scale of their group is chosen for them.  Their search for the range to clip at compares the outputs of a group before and
after.  Here the same comparison is made without a copy of the inputs: with the Hessian H, the mean of x x^T, the squared error of
the outputs of a row is e^T H e, e = weight - stored value, and H is what calibration sums up anyway.

Choices:

* Of a candidate not only the own part e_g^T H_gg e_g is counted but also 2 e_g^T c_g, with c_g = sum of H_gh e_h over the other
  groups h: the groups of a row are chosen one after the other, in ``SWEEPS`` sweeps.  In the first one the groups that are yet to
  come have no errors.
* The search starts from the scales, and zero points, of round to nearest, clip search included, and only takes what is better.
* Codes are the nearest ones: what is stored is a rounding of the source, closer to its weights than what GPTQ stores.  Little
  evidence spoils little: one number per group is learned.
* Where a routed expert shall make up for its shared expert, what that lacks is one more term in c.
* Inputs are not scaled against each other, which is the other half of AWQ.  An exact scaling must fold into what comes before: of
  down into up, of gate and up into a norm that router and all experts share.

Rows do not depend on each other, so threads take parts of fixed size and need memory for these alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quantkit import grid
from quantkit.errors import CalibrationError, RecipeError
from quantkit.evidence import Evidence
from quantkit.grid import QuantizationStatistics, QuantizedTensor
from quantkit.kernels.awq import STRIP, Group, search_group, write_codes
from quantkit.methods import rtn
from quantkit.scheme import Scheme
from quantkit.team import Team, output_power, sampled, spans
from quantkit.workspace import Workspace

SWEEPS = 2
# Offsets of stored scales, in rounds, as in ``rtn.SEARCH``.  More than there, because outputs are less smooth in a scale than
# weights are, and because judging candidates is a small part of the work beside the products that c takes.
SEARCH: rtn.Rounds = ((-40, -32, -24, -16, -8, 8, 16, 24, 32), (-4, 4), (-2, 2), (-1, 1))
# Of 2 and 3 bits: what the largest weight of a group was worth by itself is often not what it is worth to the outputs.
SEARCH_OF_FEW: rtn.Rounds = ((-160, -128, -96, -64, -32, 32, 64), (-16, 16), (-8, 8), (-4, 4), (-2, 2))
PART = 512  # rows that a thread takes: their weights and errors are some 20 MB


def quantize(
    weights: Sequence[torch.Tensor],
    scheme: Scheme,
    *,
    clip_search: bool,
    workspace: Workspace,
    evidence: Evidence | None = None,
    team: Team | None = None,
) -> list[tuple[QuantizedTensor, QuantizationStatistics]]:
    """Quantize matrices that share their input to an integer scheme with groups.

    weights: ``[out, in]``, BF16, F16 or F32, of either stride order.  evidence.hessian: float32 ``[in, in]``; only the upper
    triangle is read.  Results live in ``workspace`` and are valid until the next call that uses it.

    Raises WeightError for a weight that is NaN or infinite, CalibrationError for evidence that is not finite.
    """
    if evidence is None or evidence.hessian is None or team is None:
        raise RecipeError("AWQ needs calibration: the Hessian of what reaches these weights")
    assert scheme.number in grid.INT_RANGE and scheme.granularity == "group"
    mean = float(evidence.hessian.diagonal().mean(dtype=torch.float64))
    if not 0 < mean < float("inf"):
        raise CalibrationError(f"the mean square of the inputs is {mean}; AWQ needs inputs that are finite and not all zero")
    rounded = rtn.quantize(weights, scheme, clip_search=clip_search, workspace=workspace)
    if not clip_search:  # nothing is left of the method; a recipe that says so is refused
        return rounded
    results, first = [], 0
    for weight, (start, statistics) in zip(weights, rounded, strict=True):
        missing = None if evidence.missing is None else evidence.missing[first : first + weight.shape[0]]
        first += weight.shape[0]
        quantized, squared, clipped = _search(team, weight, start, evidence.hessian, missing, mean)
        scale = grid.effective_scale(scheme, quantized.scale)
        results.append(
            (
                quantized,
                QuantizationStatistics(
                    squared_error=squared,
                    squared_weight=statistics.squared_weight,
                    clipped=clipped,
                    scale_minimum=float(scale.min()),
                    scale_maximum=float(scale.max()),
                    output_error=_output_error(team, weight, quantized, evidence.hessian),
                ),
            )
        )
    return results


def rounds_of(scheme: Scheme) -> rtn.Rounds:
    """The candidates for a scheme, as in ``rtn.SEARCH``."""
    rounds = SEARCH_OF_FEW if scheme.bits <= 3 else SEARCH
    return rounds if scheme.symmetric else (*rounds, rtn.ZERO_POINTS)


def _search(
    team: Team, weight: torch.Tensor, start: QuantizedTensor, hessian: torch.Tensor, missing: torch.Tensor | None, mean: float
) -> tuple[QuantizedTensor, float, int]:
    """The matrix with better scales, the sum of its squared errors and the number of clipped weights.

    start: what to begin with; its codes and scales are overwritten.
    """
    scheme, (rows, inputs) = start.scheme, weight.shape
    numbers, groups = rtn.numbers_of(scheme), spans(inputs, scheme.group_size)
    search = rtn.search_of(rounds_of(scheme))
    metrics = [_metric(hessian[group, group], mean) for group in groups]
    parts = spans(rows, PART)
    sums = np.zeros((len(parts), 2))

    def work(number: int) -> None:
        part = parts[number]
        count = part.stop - part.start
        height = count + -count % STRIP  # zeros as padding
        values = _by_input(weight[part], height)
        scale_codes = _by_input(start.scale.view(torch.int16)[part], height, torch.int32)
        zero_points = torch.zeros(len(groups), height)
        if start.zero_point is not None:
            zero_points = _by_input(start.zero_point[part], height)
        wanted = None if missing is None else _by_input(missing[part], height)
        errors, cross = torch.zeros(inputs, height), torch.empty(scheme.group_size, height)

        def view(index: int) -> Group:
            group = groups[index]
            return Group(
                weights=values[group].numpy().reshape(-1),
                errors=errors[group].numpy().reshape(-1),
                cross=cross.numpy().reshape(-1),
                metric=metrics[index].numpy().reshape(-1),
                scale_codes=scale_codes[index].numpy(),
                zero_points=zero_points[index].numpy(),
                inputs=scheme.group_size,
                rows=height,
            )

        for sweep in range(SWEEPS):
            for index, group in enumerate(groups):
                torch.mm(hessian[: group.start, group].t(), errors[: group.start], out=cross)
                if sweep:
                    cross.addmm_(hessian[group, group.stop :], errors[group.stop :])
                if wanted is not None:
                    cross += wanted[group]
                cross.mul_(2 / mean)
                search_group(numbers, view(index), search)
        codes = torch.empty(height, inputs, dtype=torch.int8)
        for index, group in enumerate(groups):
            sums[number] += write_codes(numbers, view(index), group.start, inputs, codes.numpy().reshape(-1))
        start.codes[part] = codes[:count]
        start.scale.view(torch.int16)[part] = scale_codes[:, :count].t().to(torch.int16)
        if start.zero_point is not None:
            start.zero_point[part] = zero_points[:, :count].t().to(torch.int8)

    team.run(work, range(len(parts)))
    squared, clipped = sums.sum(0)
    return start, float(squared), int(clipped)


def _by_input(rows: torch.Tensor, height: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[rows, in]`` as contiguous ``[in, height]``, with zeros for the rows that are not there."""
    result = torch.zeros(rows.shape[1], height, dtype=dtype)
    result[:, : rows.shape[0]] = rows.t()
    return result


def _metric(corner: torch.Tensor, mean: float) -> torch.Tensor:
    """Upper triangular M with e^T M e = e^T H e / mean, for H of which only the upper triangle is read."""
    return (torch.triu(corner) * 2 - torch.diag(corner.diagonal())) / mean


def _output_error(team: Team, weight: torch.Tensor, quantized: QuantizedTensor, hessian: torch.Tensor) -> float:
    """Relative L2 error of the outputs, from a sample of the rows."""
    rows, zero_point = sampled(weight).to(torch.float32), quantized.zero_point
    sample = QuantizedTensor(
        quantized.scheme, sampled(quantized.codes), sampled(quantized.scale), None if zero_point is None else sampled(zero_point)
    )
    signal = output_power(team, rows, hessian)
    noise = max(0.0, output_power(team, rows - grid.dequantize(sample), hessian))
    return (noise / signal) ** 0.5 if signal else 0.0
