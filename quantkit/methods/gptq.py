"""GPTQ: round one input after the other and let the inputs that are still to come make up for the error.

Frantar et al. 2022 (arXiv 2210.17323), in the form that QuIP (arXiv 2307.13304, theorem 6) shows to be the same: with the Hessian
H = U D U^T, U upper triangular with ones on its diagonal, input k of every row is rounded to

    code_k = nearest(w_k + sum over j < k of (w_j - stored_j) U_jk)

which minimizes, one input at a time, the error of the outputs tr(E H E^T) = sum over k of D_k (rounding error at k)^2, where
E = weight - stored value.  Only original weights and their errors appear, so U is needed but no inverse: one Cholesky
factorization, from the last row to the first, where the usual form takes a factorization, an inversion and a second
factorization.  Matrices that share their input (gate and up; q, k and v) share H and U, and are quantized side by side.

Choices:

* Inputs are taken in order of falling H_kk ("activation order"): the most important ones are rounded while all others can still
  make up for it.  Scales belong to groups of neighbouring inputs in the original order and are fixed beforehand, so nothing but
  the codes changes and no ``g_idx`` is stored.
* Scales, and zero points, are those of round to nearest, clip search included.  Those of llama.cpp's types, two levels of them, are
  searched with each input weighted by its mean square, the diagonal of H; rounding then knows all of H.
* Damping: 1 % of the mean of the diagonal is added to it, and 0.3 times the inputs per row seen: as far as that passes 1, or all of
  it where the outputs are to make up for something.  What is learned from few rows does not hold elsewhere.  If H is still not
  positive definite in float32 the damping grows step by step.  The ledger says to what.
* An input that was never active has H_kk = 0; damping alone is left of it, and it is rounded to nearest.  It is not set to zero:
  calibration that is silent about an input is no proof that it is useless.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit import grid
from quantkit.errors import CalibrationError, RecipeError
from quantkit.evidence import Evidence
from quantkit.grid import QuantizationStatistics, QuantizedTensor
from quantkit.kernels.gptq import BLOCK, STRIP, Table, permute_rows, quantize_block, transpose_codes
from quantkit.methods import blocks, rtn
from quantkit.scheme import Scheme
from quantkit.team import TILE, Team, factor_upper, output_power, sampled, spans
from quantkit.workspace import Workspace

DAMPING = 0.01  # added to the diagonal, relative to its mean
DAMPING_OF_FEW = 0.3  # and this times inputs per row seen, where rows are few
ESCALATION = (1.0, 3.0, 10.0, 30.0, 100.0)  # factors tried one after the other
MOST_MADE_UP = 0.25  # of the outputs' own size, that they are asked to make up for what is missing beside them
SCRATCH = ("gptq errors", "gptq corrections", "gptq codes")  # names of the largest buffers that results do not live in
PANEL = 4 * BLOCK  # inputs for which the errors of all earlier ones are fed forward in one product


def quantize(
    weights: Sequence[torch.Tensor],
    scheme: Scheme,
    *,
    clip_search: bool,
    workspace: Workspace,
    evidence: Evidence | None = None,
    team: Team | None = None,
) -> list[tuple[QuantizedTensor, QuantizationStatistics]]:
    """Quantize matrices that share their input to an integer scheme or to a type of llama.cpp without codebook.

    weights: ``[out, in]``, BF16, F16 or F32, of either stride order.  evidence.hessian: float32 ``[in, in]``; only the upper
    triangle is read.  Results live in ``workspace`` and are valid until the next call that uses it.

    Raises WeightError for a weight that is NaN or infinite, CalibrationError when the Hessian cannot be factored.
    """
    if evidence is None or evidence.hessian is None or team is None:
        raise RecipeError("GPTQ needs calibration: the Hessian of what reaches these weights")
    rounded, lattices = lattices_of(weights, scheme, clip_search, workspace, evidence, team)
    order, factor, variances, mean, damping = _factor(evidence, workspace, team)
    inputs = weights[0].shape[1]
    heights = [weight.shape[0] + -weight.shape[0] % STRIP for weight in weights]  # zeros as padding
    first = [sum(heights[:index]) for index in range(len(weights))]
    rows = sum(heights)

    errors = workspace.tensor("gptq errors", torch.float32, inputs, rows)
    groups = lattices[0].scale.shape[1]
    scales = workspace.tensor("gptq scales", torch.float32, groups, rows).zero_()  # padded rows stay zeros on any lattice
    zero_points = workspace.tensor("gptq zero points", torch.float32, groups, rows).fill_(lattices[0].offset)
    minimums = workspace.tensor("gptq minimums", torch.float32, groups if lattices[0].minimum is not None else 0, rows).zero_()
    for weight, lattice, start, height in zip(weights, lattices, first, heights, strict=True):
        columns = slice(start, start + weight.shape[0])
        _load(team, weight, order, errors[:, columns])
        errors[:, columns.stop : start + height] = 0.0
        scales[:, columns] = lattice.scale.t()
        if lattice.zero_point is not None:
            zero_points[:, columns] = lattice.zero_point.t()
        if lattice.minimum is not None:
            minimums[:, columns] = lattice.minimum.t()
    codes = workspace.tensor("gptq codes", torch.int8, inputs, rows)
    powers = [output_power(team, sampled(weight).to(torch.float32), evidence.hessian) for weight in weights]
    shifts = _shifts(team, workspace, evidence.missing, order, factor, variances * mean, rows, powers[0])
    parts = [
        slice(start + part.start, start + part.stop) for start, height in zip(first, heights, strict=True) for part in spans(height)
    ]
    sums = _round_all(
        team, workspace, lattices[0], order, factor, variances, errors, (scales, zero_points, minimums), codes, parts, shifts
    )
    results = []
    for index, (weight, (quantized, statistics), start) in enumerate(zip(weights, rounded, first, strict=True)):
        columns = slice(start, start + weight.shape[0])
        out = workspace.tensor(f"rtn codes {index}", torch.int8, weight.shape[0], inputs)
        _transpose(team, codes[:, columns], out)
        mine = [sums[at] for at, part in enumerate(parts) if start <= part.start < start + heights[index]]
        sums_of_rows = [float(total) for total in np.sum(mine, axis=0)]
        makes_up = evidence.missing is not None
        told = final_statistics(statistics, sums_of_rows, weight.shape[0], mean, damping, powers[index], makes_up)
        results.append((replace(quantized, codes=out), told))
    return results


def final_statistics(
    rounded: QuantizationStatistics,
    sums: Sequence[float],
    rows: int,
    mean: float,
    damping: float,
    power: float,
    makes_up: bool,
) -> QuantizationStatistics:
    """What is told of a matrix once its codes are chosen.

    rounded: of rounding to the same scales.  sums: loss, squared error, clipped.  mean: of the Hessian's diagonal.  power: mean
    square of the outputs.  makes_up: whether they were asked to make up for something.
    """
    loss, squared, clipped = sums
    if not makes_up:
        loss = max(0.0, loss - damping * squared)  # what damping adds is no error of the outputs
    noise = loss * mean / rows
    error = (noise / power) ** 0.5 if power else 0.0
    return replace(rounded, squared_error=squared, clipped=int(clipped), output_error=error, damping=damping)


@dataclass(frozen=True)
class Lattice:
    """The numbers among which a matrix is rounded: ``(code - zero point) * scale - minimum``, or ``level * scale``.

    scale, zero_point, minimum: float32 ``[out, groups]``.  offset: zero point of all where there is none for each.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    minimum: torch.Tensor | None
    offset: float
    codes: tuple[int, int]
    levels: tuple[int, ...] | None


def lattices_of(
    weights: Sequence[torch.Tensor],
    scheme: Scheme,
    clip_search: bool,
    workspace: Workspace,
    evidence: Evidence,
    team: Team | None,
) -> tuple[list[tuple[QuantizedTensor, QuantizationStatistics]], list[Lattice]]:
    """Matrices rounded to nearest, and the lattices that their scales make."""
    if scheme.number != "ggml":
        rounded = rtn.quantize(weights, scheme, clip_search=clip_search, workspace=workspace)
        limits = grid.INT_RANGE[scheme.number]
        return rounded, [Lattice(each.scale, each.zero_point, None, 0.0, limits, None) for each, _ in rounded]
    kind = scheme.block_type
    assert not kind.codebook and not kind.floating
    rounded = blocks.quantize(weights, scheme, clip_search=clip_search, workspace=workspace, evidence=evidence, team=team)
    lattices = []
    for each, _ in rounded:
        step, minimum = grid.block_steps(each)
        lattices.append(Lattice(step, None, minimum, float(kind.offset), kind.codes, kind.levels))
    return rounded, lattices


def level_table(levels: tuple[int, ...] | None) -> Table:
    """Levels in rising order with their codes; of two codes for one level the first."""
    if levels is None:
        return Table(np.empty(0, np.float32), np.empty(0, np.float32), np.empty(0, np.int32))
    order = np.argsort(np.array(levels), kind="stable")
    rising = np.array(levels, np.float32)[order]
    return Table((rising[1:] + rising[:-1]) / 2, rising, order.astype(np.int32))


def _factor(evidence: Evidence, workspace: Workspace, team: Team) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
    """Factor the damped Hessian, inputs in order of falling diagonal and scaled so that the diagonal has mean 1.

    Returns (order int64 ``[in]``, U with its diagonal not yet divided out, D float64 ``[in]``, the mean, the damping).  Raises
    CalibrationError.
    """
    assert evidence.hessian is not None
    hessian, inputs = evidence.hessian, evidence.hessian.shape[0]
    usual = usual_damping(evidence)
    diagonal = hessian.diagonal().to(torch.float64)
    mean = float(diagonal.mean())
    if not 0 < mean < float("inf") or not bool(diagonal.isfinite().all()):
        raise CalibrationError(f"the mean square of the inputs is {mean}; GPTQ needs inputs that are finite and not all zero")
    order = torch.argsort(diagonal, descending=True, stable=True)
    factor = workspace.tensor("gptq factor", torch.float32, inputs, inputs)
    for damping in [usual * step for step in ESCALATION]:
        _permute(team, hessian, order, 1.0 / mean, factor)
        factor.diagonal().add_(damping)
        if factor_upper(team, factor):
            pivots = factor.diagonal().clone()
            factor.div_(pivots)
            return order, factor, pivots.to(torch.float64).square(), mean, damping
    raise CalibrationError(f"the Hessian of {inputs} inputs is not positive definite even with damping {usual * ESCALATION[-1]:g}")


def usual_damping(evidence: Evidence) -> float:
    """What is added to the diagonal of a Hessian at first, relative to its mean."""
    if not evidence.rows:
        return DAMPING
    scarce = evidence.mean_square.numel() / evidence.rows
    return DAMPING + DAMPING_OF_FEW * (scarce if evidence.missing is not None else max(0.0, scarce - 1.0))


def _permute(team: Team, hessian: torch.Tensor, order: torch.Tensor, factor: float, out: torch.Tensor) -> None:
    """The upper triangle of ``factor * hessian[order][:, order]``; of both matrices only that is looked at."""
    places, share = order.numpy(), np.float32(factor)
    matrix, permuted = (values.numpy().reshape(-1) for values in (hessian, out))

    def part(rows: slice) -> None:
        permute_rows(matrix, places, share, permuted, rows.start, rows.stop)

    team.run(part, spans(len(order), max(1, TILE // 16)))


def _round_all(
    team: Team,
    workspace: Workspace,
    lattice: Lattice,
    order: torch.Tensor,
    factor: torch.Tensor,
    variances: torch.Tensor,
    errors: torch.Tensor,
    numbers: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    codes: torch.Tensor,
    parts: Sequence[slice],
    shifts: torch.Tensor | None,
) -> NDArray[np.float64]:
    """Quantize all inputs, panel by panel and block by block.  ``errors`` holds the weights ``[in, rows]`` in order of work.

    numbers: scales, zero points and minimums, ``[groups, rows]``.  parts: the rows that threads take.  shifts: added to what is
    fed forward, ``[in, rows]``.  Returns float64 ``[parts, 3]``, the sums that ``quantize_block`` gives.
    """
    inputs, rows = errors.shape
    lowest, highest = lattice.codes
    groups, table = order // (inputs // numbers[0].shape[0]), level_table(lattice.levels)
    corrections = workspace.tensor("gptq corrections", torch.float32, min(PANEL, inputs), rows)
    flat_scales, flat_zero_points, flat_minimums, flat_codes = (values.numpy().reshape(-1) for values in (*numbers, codes))
    sums = np.zeros((len(parts), 3))

    def work(panel: slice, number: int) -> None:
        part = parts[number]
        wanted = corrections[: panel.stop - panel.start, part]
        if panel.start:
            torch.mm(factor[: panel.start, panel].t(), errors[: panel.start, part], out=wanted)
        else:
            wanted.zero_()
        if shifts is not None:
            wanted += shifts[panel, part]
        for block in spans(panel.stop - panel.start, BLOCK):
            inside = slice(panel.start + block.start, panel.start + block.stop)
            done = slice(panel.start, inside.start)
            if block.start:
                wanted[block].addmm_(factor[done, inside].t(), errors[done, part])
            sums[number] += quantize_block(
                errors[inside].numpy().reshape(-1),
                corrections[block].numpy().reshape(-1),
                factor[inside, inside].contiguous().numpy().reshape(-1),
                variances[inside].numpy(),
                flat_scales,
                flat_zero_points,
                flat_minimums,
                groups[inside].numpy(),
                order[inside].numpy(),
                float(lowest),
                float(highest),
                table,
                flat_codes,
                rows,
                part.start,
                part.stop,
            )

    for panel in spans(inputs, PANEL):
        team.run(functools.partial(work, panel), range(len(parts)))
    return sums


def _shifts(
    team: Team,
    workspace: Workspace,
    missing: torch.Tensor | None,
    order: torch.Tensor,
    factor: torch.Tensor,
    variances: torch.Tensor,
    rows: int,
    power: float,
) -> torch.Tensor | None:
    """``missing U^-T D^-1`` in order of work and transposed, ``[in, rows]``; None when nothing is missing.

    The outputs are asked for more than the weights give: for (w + delta) x with delta = missing H^-1, the least squares
    solution.  In the sum over k that is minimized, delta appears as this constant, one triangular solution instead of the two that
    delta itself takes.  variances: D for the Hessian as it was given.  power: mean square of the outputs.

    Outputs that are small beside what is missing, those of an expert with low scores, would be bent out of shape: its scales were
    chosen for the weights as they are, and other tokens come.  So delta is shortened until what it adds is at most MOST_MADE_UP of
    them.
    """
    if missing is None:
        return None
    divisors = variances.to(torch.float32)[:, None]
    shifts = workspace.tensor("gptq shifts", torch.float32, len(order), rows).zero_()
    parts = spans(missing.shape[0], max(1, TILE // 2))
    added = [0.0] * len(parts)

    def part(number: int) -> None:
        columns = parts[number]
        solved = torch.linalg.solve_triangular(factor, missing[columns][:, order].t(), upper=True, unitriangular=True)
        shifts[:, columns] = solved.div_(divisors)
        added[number] = float(torch.sum(solved.square_().mul_(divisors), dtype=torch.float64))

    team.run(part, range(len(parts)))
    share = (sum(added) / missing.shape[0]) ** 0.5
    if share > MOST_MADE_UP * power**0.5:
        shifts.mul_(MOST_MADE_UP * power**0.5 / share)
    return shifts


def _load(team: Team, weight: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
    """``out[k] = weight[:, order[k]]`` in float32."""
    by_input = weight.t()

    def part(rows: slice) -> None:
        out[rows] = by_input[order[rows]]

    team.run(part, spans(len(order), TILE // 4))


def _transpose(team: Team, codes: torch.Tensor, out: torch.Tensor) -> None:
    """``out[row, input] = codes[input, row]``."""

    source, target = codes.numpy(), out.numpy()

    def part(rows: slice) -> None:
        transpose_codes(source, target, rows.start, rows.stop)

    team.run(part, spans(out.shape[0], TILE // 4))
