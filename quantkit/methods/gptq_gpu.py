"""GPTQ on a CUDA GPU: the algorithm of ``methods.gptq``, experts of equal shape side by side.

What takes the time on a CPU core is here a handful of batched calls: one Cholesky factorization, one triangular solution where
something is to be made up for, products that feed errors forward panel by panel, and one launch of a Triton kernel per block of 128
inputs for all experts.  Scales, zero points and minimums are those of round to nearest and are computed as for the CPU.

Everything is float32, and TF32 is switched off: the Hessian decides which of two codes is nearer, and its small eigenvalues are
what rounding to ten bits would destroy.  The block kernel gives the CPU's bits; products and factorization sum in another order, so
that codes differ from the CPU's where rounding was nearly a tie.  On one GPU the same input gives the same codes.

A batch takes as many experts as fit in memory.  Several GPUs share the experts out, the largest first; each has a thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from quantkit.errors import CalibrationError, RecipeError
from quantkit.evidence import Evidence
from quantkit.grid import QuantizationStatistics, QuantizedTensor
from quantkit.kernels.gptq import BLOCK, Table
from quantkit.methods.gptq import ESCALATION, MOST_MADE_UP, final_statistics, lattices_of, level_table, usual_damping
from quantkit.scheme import Scheme
from quantkit.team import Team, spans
from quantkit.workspace import Workspace

PANEL = 4  # blocks for which the errors of all earlier inputs are fed forward in one product
SPARE = 0.1  # share of the free memory that is left for libraries and fragmentation

Result = list[tuple[QuantizedTensor, QuantizationStatistics]]


@dataclass(frozen=True)
class _Factored:
    """Hessians of a batch, inputs in order of falling diagonal; padded inputs come last and stand alone.

    order: int64 ``[experts, in]``.  factor: U, ``[experts, padded in, padded in]``, ones on its diagonal.  variances: D,
    ``[experts, padded in]``.  means: of the diagonals as given.  powers: per expert and matrix, mean square of the outputs.
    makes_up: whether something is missing beside the outputs.
    """

    order: torch.Tensor
    factor: torch.Tensor
    variances: torch.Tensor
    means: list[float]
    dampings: list[float]
    powers: list[list[float]]
    makes_up: list[bool]


@dataclass(frozen=True)
class _Numbers:
    """The numbers among which a batch is rounded; see ``methods.gptq.Lattice``.

    scales, zero_points, minimums: float32 ``[experts, groups, rows]``.  table: of tensors; None where codes are numbers.
    """

    scales: torch.Tensor
    zero_points: torch.Tensor | None
    minimums: torch.Tensor | None
    offset: float
    codes: tuple[int, int]
    table: Table | None


def quantize_batch(
    weights: Sequence[Sequence[torch.Tensor]],
    scheme: Scheme,
    evidence: Sequence[Evidence],
    device: torch.device,
    *,
    clip_search: bool,
    workspace: Workspace,
    team: Team | None = None,
    budget: int | None = None,
    block: int = BLOCK,
) -> Iterator[Result]:
    """Quantize experts of equal shape; yields, in their order, what ``methods.gptq.quantize`` returns for each.

    weights: for each expert its matrices that share their input, ``[out, in]``, BF16, F16 or F32.  evidence: for each expert;
    Hessians may lie on any device.  Results lie on the CPU and are the caller's to keep.  team: searches for scales of llama.cpp's
    types.  budget: bytes of the device that may be used; None for what is free on a GPU.  block: inputs of one kernel launch.

    Raises WeightError, CalibrationError, and RecipeError without Triton or without Hessians.
    """
    assert len(weights) == len(evidence)
    if not weights:
        return
    shapes = [weight.shape for weight in weights[0]]
    assert all([weight.shape for weight in expert] == shapes for expert in weights), "experts of one batch have equal shapes"
    if any(seen.hessian is None for seen in evidence):
        raise RecipeError("GPTQ needs calibration: the Hessian of what reaches these weights")
    need = bytes_per_expert(
        shapes[0][1], sum(shape[0] for shape in shapes), scheme, makes_up=any(seen.missing is not None for seen in evidence)
    )
    at_once = experts_at_once(need, len(weights), free_bytes(device) if budget is None else budget)
    for chunk in spans(len(weights), at_once):
        with full_precision(), _current(device):
            results = _quantize_chunk(weights[chunk], scheme, evidence[chunk], device, clip_search, workspace, team, block)
        yield from results


# ----------------------------------------------------------------------------------------------------------------- memory


def bytes_per_expert(inputs: int, rows: int, scheme: Scheme, *, makes_up: bool) -> int:
    """Bytes of the device that one more expert of a batch takes, ``rows`` over all its matrices: at the larger of two peaks.

    While Hessians are factored there are three copies of them; while inputs are rounded there are U, the errors, what one panel is
    fed, codes twice, scales, and what is to be made up for with its source and its solution.
    """
    square, weights = 4 * inputs * inputs, 4 * inputs * rows
    group = scheme.block_type.group if scheme.number == "ggml" else 0  # smaller than the block that a stored scale belongs to
    scales = 8 * rows * (inputs // group if group else scheme.scale_shape(rows, inputs)[1])
    rounding = square + weights + 4 * PANEL * BLOCK * rows + weights // 2 + scales + (3 * weights if makes_up else 0)
    return max(3 * square, rounding)


def experts_at_once(need: int, experts: int, budget: int | None) -> int:
    """How many experts that need so many bytes each fit in the budget, beside what preparing one takes once more.

    Raises CalibrationError when not even one does.
    """
    if budget is None:
        return experts
    fitting = budget // need - 1
    if fitting < 1:
        raise CalibrationError(
            f"one expert takes {2 * need / 2**30:.1f} GiB on the GPU and {budget / 2**30:.1f} GiB are free; end other programs "
            "that use the GPU, or calibrate on the CPU"
        )
    return min(experts, fitting)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that may be taken on a GPU; None for a device whose memory is not ours to ration."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + cached) * (1 - SPARE))


# -------------------------------------------------------------------------------------------------------------- precision


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products with all their bits while the context lasts; then the caller's setting again.

    The setting belongs to the process: where threads use it, whoever starts them enters first.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The device that kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------------------------ chunk


def _quantize_chunk(
    weights: Sequence[Sequence[torch.Tensor]],
    scheme: Scheme,
    evidence: Sequence[Evidence],
    device: torch.device,
    clip_search: bool,
    workspace: Workspace,
    team: Team | None,
    block: int,
) -> list[Result]:
    """Quantize the experts that fit in memory together."""
    gptq_triton = _kernels()
    heights = [weight.shape[0] for weight in weights[0]]
    rows = sum(heights) + -sum(heights) % gptq_triton.ROWS
    columns = [slice(sum(heights[:index]), sum(heights[: index + 1])) for index in range(len(heights))]
    rounded, numbers = _numbers(weights, scheme, evidence, clip_search, workspace, team, columns, rows, device)
    factored = _factor(weights, evidence, device, gptq_triton.STEP)
    shifts = _shifts(evidence, factored, rows, device)
    errors = torch.zeros(len(weights), factored.factor.shape[1], rows, device=device)
    for number, expert_weights in enumerate(weights):
        for weight, part in zip(expert_weights, columns, strict=True):
            errors[number, : weight.shape[1], part] = weight.to(device).t()[factored.order[number]]
    codes, sums = _round_all(factored, errors, shifts, numbers, block)
    results = []
    for number, expert in enumerate(rounded):
        totals = [sums[number, :, part].sum(1).tolist() for part in columns]
        results.append(
            [
                _result(
                    quantized, statistics, codes[number, : factored.order.shape[1], part], totals[index], factored, number, index
                )
                for index, ((quantized, statistics), part) in enumerate(zip(expert, columns, strict=True))
            ]
        )
    return results


def _kernels() -> ModuleType:
    """The module with the Triton kernels.  Raises RecipeError without Triton."""
    try:
        from quantkit.kernels import gptq_triton
    except ImportError as error:
        raise RecipeError(f"GPTQ on a GPU needs Triton ({error}); install it with: pip install 'quantkit[cuda]'") from error
    return gptq_triton


def _numbers(
    weights: Sequence[Sequence[torch.Tensor]],
    scheme: Scheme,
    evidence: Sequence[Evidence],
    clip_search: bool,
    workspace: Workspace,
    team: Team | None,
    columns: Sequence[slice],
    rows: int,
    device: torch.device,
) -> tuple[list[Result], _Numbers]:
    """Round to nearest, for what it finds beside codes: as results without codes, and as numbers on the device, side by side.

    columns: where each matrix stands among the ``rows`` of its expert.
    """
    results, found = [], []
    for expert, seen in zip(weights, evidence, strict=True):
        rounded, lattices = lattices_of([weight.cpu() for weight in expert], scheme, clip_search, workspace, seen, team)
        results.append([(_without_codes(quantized), statistics) for quantized, statistics in rounded])
        kind, groups = lattices[0], lattices[0].scale.shape[1]
        scales, zero_points, minimums = torch.ones(groups, rows), torch.full((groups, rows), kind.offset), torch.zeros(groups, rows)
        for lattice, part in zip(lattices, columns, strict=True):
            scales[:, part] = lattice.scale.t()
            if lattice.zero_point is not None:
                zero_points[:, part] = lattice.zero_point.t()
            if lattice.minimum is not None:
                minimums[:, part] = lattice.minimum.t()
        found.append((scales, zero_points, minimums))
    scales, zero_points, minimums = (torch.stack(each) for each in zip(*found, strict=True))
    table = None if kind.levels is None else Table(*(torch.from_numpy(each).to(device) for each in level_table(kind.levels)))
    return results, _Numbers(
        scales.to(device),
        None if kind.zero_point is None else zero_points.to(device),
        None if kind.minimum is None else minimums.to(device),
        kind.offset,
        kind.codes,
        table,
    )


def _without_codes(quantized: QuantizedTensor) -> QuantizedTensor:
    """A result of which only the scales stay, no longer in the workspace."""

    def kept(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone()

    return replace(
        quantized,
        codes=torch.empty(0, dtype=torch.int8),
        scale=quantized.scale.clone(),
        zero_point=kept(quantized.zero_point),
        group_scale=kept(quantized.group_scale),
        minimum=kept(quantized.minimum),
        group_minimum=kept(quantized.group_minimum),
    )


def _factor(weights: Sequence[Sequence[torch.Tensor]], evidence: Sequence[Evidence], device: torch.device, step: int) -> _Factored:
    """Factor the damped Hessians; see ``methods.gptq``.  step: inputs are padded to a multiple of it.  Raises CalibrationError."""
    experts, inputs = len(weights), weights[0][0].shape[1]
    padded = inputs + -inputs % step
    factor = torch.zeros(experts, padded, padded, device=device)
    factor.diagonal(dim1=1, dim2=2)[:, inputs:] = 1.0
    orders, means, powers, usual = [], [], [], []
    for number, seen in enumerate(evidence):
        assert seen.hessian is not None
        hessian = seen.hessian.to(device, torch.float32).triu()
        hessian += hessian.triu(1).t()
        diagonal = hessian.diagonal().to(torch.float64)
        mean = float(diagonal.mean())
        if not 0 < mean < float("inf") or not bool(diagonal.isfinite().all()):
            raise CalibrationError(
                f"expert {number} of {experts}: the mean square of the inputs is {mean}; GPTQ needs inputs that are "
                "finite and not all zero"
            )
        order = torch.argsort(diagonal, descending=True, stable=True)
        factor[number, :inputs, :inputs] = hessian[order][:, order].mul_(1.0 / mean)
        orders.append(order)
        means.append(mean)
        powers.append([_output_power(weight, hessian) for weight in weights[number]])
        usual.append(usual_damping(seen))
    dampings = _factor_upper(factor, inputs, usual)
    pivots = factor.diagonal(dim1=1, dim2=2).clone()
    factor.div_(pivots[:, None, :])
    return _Factored(
        torch.stack(orders), factor, pivots.square(), means, dampings, powers, [seen.missing is not None for seen in evidence]
    )


def _factor_upper(matrices: torch.Tensor, inputs: int, usual: Sequence[float]) -> list[float]:
    """Replace symmetric matrices, once damped, by upper triangular U with ``matrix = U U^T``; returns the damping of each.

    Turned over in both directions, the Cholesky factor of the turned matrix is U.  Those that are not positive definite are tried
    again with more damping.  Raises CalibrationError.
    """
    dampings = [0.0] * len(usual)
    remaining = list(range(len(usual)))
    for more in ESCALATION:
        turned = torch.flip(matrices if len(remaining) == len(usual) else matrices[remaining], (1, 2))
        added = torch.tensor([usual[number] * more for number in remaining], dtype=torch.float32, device=matrices.device)
        turned.diagonal(dim1=1, dim2=2)[:, matrices.shape[1] - inputs :] += added[:, None]  # the padding is left alone
        lower, failures = torch.linalg.cholesky_ex(turned)
        del turned
        failed = [bool(failure) for failure in failures.tolist()]
        for place, number in enumerate(remaining):
            if not failed[place]:
                matrices[number] = torch.flip(lower[place], (0, 1))
                dampings[number] = usual[number] * more
        del lower
        remaining = [number for number, again in zip(remaining, failed, strict=True) if again]
        if not remaining:
            return dampings
    raise CalibrationError(
        f"expert {remaining[0]} of {len(usual)}: the Hessian of {inputs} inputs is not positive definite even with damping "
        f"{usual[remaining[0]] * ESCALATION[-1]:g}"
    )


def _shifts(evidence: Sequence[Evidence], factored: _Factored, rows: int, device: torch.device) -> torch.Tensor | None:
    """What is added to the weights for the outputs to make up for something, ``[experts, padded in, rows]``; see methods.gptq."""
    if all(seen.missing is None for seen in evidence):
        return None
    inputs = factored.order.shape[1]
    shifts = torch.zeros(len(evidence), factored.factor.shape[1], rows, device=device)
    for number, seen in enumerate(evidence):
        if seen.missing is None:
            continue
        wanted = seen.missing.to(device, torch.float32)
        factor = factored.factor[number, :inputs, :inputs]
        solved = torch.linalg.solve_triangular(factor, wanted.t()[factored.order[number]], upper=True, unitriangular=True)
        divisors = (factored.variances[number, :inputs].to(torch.float64) * factored.means[number]).to(torch.float32)[:, None]
        solved.div_(divisors)
        shifts[number, :inputs, : wanted.shape[0]] = solved
        added = float(torch.sum(solved.square_().mul_(divisors), dtype=torch.float64))
        share, most = (added / wanted.shape[0]) ** 0.5, MOST_MADE_UP * factored.powers[number][0] ** 0.5
        if share > most:
            shifts[number].mul_(most / share)
    return shifts


def _round_all(
    factored: _Factored, errors: torch.Tensor, shifts: torch.Tensor | None, numbers: _Numbers, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize all inputs, panel by panel and block by block.  ``errors`` holds the weights in order of work, with padding.

    Returns (codes int8 ``[experts, padded in, rows]``, inputs in their own order; float64 ``[experts, 3, rows]``, sums).
    """
    gptq_triton = _kernels()
    experts, padded, rows = errors.shape
    inputs = factored.order.shape[1]
    lowest, highest = numbers.codes
    scale_groups = numbers.scales.shape[1]
    own = torch.arange(inputs, padded, device=errors.device).expand(experts, -1)
    places = torch.cat([factored.order, own], 1)
    groups = (places // (inputs // scale_groups)).clamp_(max=scale_groups - 1)
    codes = torch.zeros(errors.shape, dtype=torch.int8, device=errors.device)
    sums = torch.zeros(experts, 3, rows, dtype=torch.float64, device=errors.device)
    corrections = torch.zeros(experts, min(PANEL * block, padded), rows, device=errors.device)
    for panel in spans(padded, PANEL * block):
        wanted = corrections[:, : panel.stop - panel.start]
        if shifts is None:
            wanted.zero_()
        else:
            wanted.copy_(shifts[:, panel])
        _feed(wanted, factored.factor, errors, slice(0, panel.start), panel)
        for part in spans(panel.stop - panel.start, block):
            inside = slice(panel.start + part.start, panel.start + part.stop)
            _feed(wanted[:, part], factored.factor, errors, slice(panel.start, inside.start), inside)
            gptq_triton.launch(
                errors,
                corrections,
                factored.factor,
                factored.variances,
                numbers.scales,
                numbers.zero_points,
                groups,
                places,
                codes,
                sums,
                block=inside,
                panel_first=panel.start,
                lowest=lowest,
                highest=highest,
                offset=numbers.offset,
                minimums=numbers.minimums,
                table=numbers.table,
            )
    return codes, sums


def _feed(wanted: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor, done: slice, later: slice) -> None:
    """Add to ``wanted`` what the errors at the inputs ``done`` feed forward to the inputs ``later``."""
    if done.stop > done.start:
        wanted.baddbmm_(factor[:, done, later].transpose(1, 2), errors[:, done])


def _output_power(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Mean over (a sample of) the rows w of w H w^T, the mean square of the outputs.  H: whole."""
    rows = weight[:: max(1, weight.shape[0] // 128)].to(hessian.device, torch.float32)
    return float(torch.sum(torch.mm(rows, hessian) * rows, dtype=torch.float64)) / rows.shape[0]


def _result(
    rounded: QuantizedTensor,
    statistics: QuantizationStatistics,
    codes: torch.Tensor,
    sums: Sequence[float],
    factored: _Factored,
    number: int,
    index: int,
) -> tuple[QuantizedTensor, QuantizationStatistics]:
    """One matrix of one expert.  codes: ``[in, out]``.  sums: loss, squared error, clipped."""
    mean, damping, power = factored.means[number], factored.dampings[number], factored.powers[number][index]
    told = final_statistics(statistics, sums, codes.shape[1], mean, damping, power, factored.makes_up[number])
    return replace(rounded, codes=codes.t().contiguous().cpu()), told


# ---------------------------------------------------------------------------------------------------------------- devices


def share_out(costs: Sequence[float], shares: int) -> list[list[int]]:
    """Items for each share, the costliest first, each to the share that has least so far; ties to the first."""
    loads, items = [0.0] * shares, [list[int]() for _ in range(shares)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        least = loads.index(min(loads))
        items[least].append(item)
        loads[least] += costs[item]
    return items


def run_on_devices(
    devices: Sequence[torch.device], costs: Sequence[float], work: Callable[[torch.device, Sequence[int]], None]
) -> None:
    """Call ``work(device, items)`` once for every device that gets items, each in a thread of its own.

    Raises, when all have ended, what the first failing one raised.
    """
    shares = share_out(costs, len(devices))
    with full_precision(), ThreadPoolExecutor(len(devices), thread_name_prefix="quantkit-gpu") as pool:
        futures = [pool.submit(work, device, items) for device, items in zip(devices, shares, strict=True) if items]
    for future in futures:
        future.result()
