"""llama.cpp's tensor types: scales and codes with the least squared error, each input weighted by its importance.

The same function serves two methods.  ``rtn`` takes all inputs to be equally important; ``importance`` takes the mean square of
what calibration saw at each input: if inputs are uncorrelated, that is how much an error there costs the outputs.  (``gptq`` takes
its scales from here and chooses the codes with the whole Hessian.)

Where a team has a GPU it searches, for the types that :mod:`quantkit.methods.blocks_gpu` has a kernel for.  On the CPU the
kernels work on 16 rows at a time and treat each row for itself, so rows can be cut into portions for threads wherever one
likes; the portions are fixed, so sums do not depend on the threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit import ggml
from quantkit.errors import RecipeError, WeightError
from quantkit.evidence import Evidence
from quantkit.grid import FLOATING, QuantizationStatistics, QuantizedTensor, level_steps
from quantkit.kernels import ggml_codebook, ggml_levels, ggml_minimum, ggml_symmetric, tiles
from quantkit.kernels.block_target import BlockTarget
from quantkit.methods import blocks_gpu
from quantkit.methods.sources import checked_peak, kernel_source
from quantkit.scheme import Scheme
from quantkit.team import Team, spans
from quantkit.workspace import Workspace

PORTION_ROWS = 256  # rows of one call of a kernel

# By type; see kernels/block_target for what they fill.
KERNELS: dict[str, Callable[..., tuple[float, float, float, float, int]]] = {
    "Q2_K": ggml_minimum.quantize_q2_k,
    "Q4_1": ggml_minimum.quantize_q4_1,
    "Q4_K": ggml_minimum.quantize_q4_k,
    "Q5_1": ggml_minimum.quantize_q5_1,
    "Q5_K": ggml_minimum.quantize_q5_k,
    "Q3_K": ggml_symmetric.quantize_q3_k,
    "Q4_0": ggml_symmetric.quantize_q4_0,
    "Q5_0": ggml_symmetric.quantize_q5_0,
    "Q6_K": ggml_symmetric.quantize_q6_k,
    "Q8_0": ggml_symmetric.quantize_q8_0,
    "IQ4_NL": ggml_levels.quantize_iq4_nl,
    "IQ4_XS": ggml_levels.quantize_iq4_xs,
    "MXFP4": ggml_levels.quantize_mxfp4,
    **ggml_codebook.KERNELS,
}


def quantize(
    weights: Sequence[torch.Tensor],
    scheme: Scheme,
    *,
    clip_search: bool,
    workspace: Workspace,
    evidence: Evidence | None = None,
    team: Team | None = None,
) -> list[tuple[QuantizedTensor, QuantizationStatistics]]:
    """Quantize matrices to a type of llama.cpp, all inputs weighted by ``evidence.mean_square`` where there is evidence.

    weights: ``[out, in]``, BF16, F16 or F32, of either stride order.  clip_search: search for scales; else they just span the
    range.  team: its threads, or its GPU, do the work.  Results live in ``workspace`` and are valid until the next call that uses
    it.  Raises WeightError for a weight that is NaN or infinite.
    """
    kind = scheme.block_type
    if kind.floating:
        return [_cast(weight, scheme, index, workspace) for index, weight in enumerate(weights)]
    results = []
    device = team.device if team is not None and clip_search and blocks_gpu.searched_on_gpu(kind) else None
    for index, weight in enumerate(weights):
        if device is not None:
            quantized, sums = blocks_gpu.quantize(weight, scheme, _importance(evidence, weight.shape[1]), device)
        else:
            quantized, sums = _on_cpu(weight, scheme, clip_search, workspace, evidence, team, index)
        checked_peak(int(sums[4]), weight, index)
        results.append((quantized, _statistics(quantized, sums, evidence is not None)))
    return results


def quantize_weighted(
    weights: Sequence[torch.Tensor],
    scheme: Scheme,
    *,
    clip_search: bool,
    workspace: Workspace,
    evidence: Evidence | None = None,
    team: Team | None = None,
) -> list[tuple[QuantizedTensor, QuantizationStatistics]]:
    """:func:`quantize`, which insists on evidence."""
    if evidence is None:
        raise RecipeError("method importance needs calibration: the mean square of what reaches these weights")
    return quantize(weights, scheme, clip_search=clip_search, workspace=workspace, evidence=evidence, team=team)


def _on_cpu(
    weight: torch.Tensor,
    scheme: Scheme,
    search: bool,
    workspace: Workspace,
    evidence: Evidence | None,
    team: Team | None,
    index: int,
) -> tuple[QuantizedTensor, tuple[float, ...]]:
    """One matrix and the sums of its kernel; where these say that a weight is not finite, the rest means nothing."""
    kind = scheme.block_type
    source = kernel_source(weight, rows_needed=16, columns_needed=math.lcm(tiles.TILE_INPUTS, kind.block))
    target = _target(kind, source, workspace, index)
    sums = _run(scheme, source, target, _importance(evidence, source.columns), search, team)
    return _assemble(weight.shape, scheme, source, target), sums


def _run(
    scheme: Scheme, source: tiles.Source, target: BlockTarget, importance: NDArray[np.float32], search: bool, team: Team | None
) -> tuple[float, ...]:
    kernel, parts = KERNELS[scheme.name], spans(source.rows, PORTION_ROWS)
    sums: list[tuple[float, ...]] = [()] * len(parts)

    def part(number: int) -> None:
        rows = parts[number]
        sums[number] = kernel(source, target, importance, int(search), rows.start, rows.stop)

    if team is None:
        for number in range(len(parts)):
            part(number)
    else:
        team.run(part, range(len(parts)))
    return (*(sum(each[place] for each in sums) for place in range(4)), max(each[4] for each in sums))


def _importance(evidence: Evidence | None, columns: int) -> NDArray[np.float32]:
    """Weights of the inputs with mean 1, padded: nothing depends on their size, but sums of extreme ones would overflow."""
    importance = np.ones(columns, np.float32)
    if evidence is not None:
        given = evidence.mean_square.numpy().astype(np.float64)
        mean = given.mean()
        if mean > 0:
            importance[: given.size] = given / mean
    return importance


def _target(kind: ggml.BlockType, source: tiles.Source, workspace: Workspace, index: int) -> BlockTarget:
    blocks = source.rows * source.columns // kind.block
    groups = source.rows * source.columns // kind.group if kind.group else 0
    scales = workspace.take(f"block scales {index}", blocks * (1 if kind.name == "MXFP4" else 2))
    return BlockTarget(
        codes=workspace.take(f"rtn codes {index}", source.rows * source.columns).view(np.int8),
        scales=scales if kind.name == "MXFP4" else scales.view(np.uint16),
        minimums=workspace.take(f"block minimums {index}", 2 * blocks if kind.minimum else 0).view(np.uint16),
        group_scales=workspace.take(f"group scales {index}", groups).view(np.int8),
        group_minimums=workspace.take(f"group minimums {index}", groups if kind.minimum else 0).view(np.int8),
    )


def _assemble(shape: torch.Size, scheme: Scheme, source: tiles.Source, target: BlockTarget) -> QuantizedTensor:
    """Results as tensors, without the padding."""
    kind = scheme.block_type
    rows, columns = shape

    def tensor(data: NDArray[np.generic], dtype: torch.dtype, share: int) -> torch.Tensor:
        whole = torch.from_numpy(data.view(np.uint8)).view(dtype).reshape(source.rows, source.columns // share)
        return whole[:rows, : columns // share]

    return QuantizedTensor(
        scheme,
        codes=tensor(target.codes, torch.int8, 1),
        scale=tensor(target.scales, torch.uint8 if scheme.scale_number == "e8m0" else torch.float16, kind.block),
        group_scale=tensor(target.group_scales, torch.int8, kind.group) if kind.group else None,
        minimum=tensor(target.minimums, torch.float16, kind.block) if kind.minimum else None,
        group_minimum=tensor(target.group_minimums, torch.int8, kind.group) if kind.group and kind.minimum else None,
    )


def _statistics(quantized: QuantizedTensor, sums: tuple[float, ...], weighted: bool) -> QuantizationStatistics:
    squared_error, squared_weight, weighted_error, power, _ = sums
    low, high = _scale_range(quantized)
    return QuantizationStatistics(
        squared_error,
        squared_weight,
        clipped=0,
        scale_minimum=low,
        scale_maximum=high,
        output_error=(weighted_error / power) ** 0.5 if weighted and power else 0.0,
    )


def _scale_range(quantized: QuantizedTensor) -> tuple[float, float]:
    """Smallest and largest magnitude of what one level is worth."""
    codebook = quantized.scheme.block_type.codebook
    steps = quantized.scale.to(torch.float32) if codebook else level_steps(quantized)
    magnitudes = np.abs(steps.numpy())
    return float(magnitudes.min()), float(magnitudes.max())


def _cast(weight: torch.Tensor, scheme: Scheme, index: int, workspace: Workspace) -> tuple[QuantizedTensor, QuantizationStatistics]:
    """A floating type: the nearest number that it has.  What is too large for it is an error, not infinity."""
    values = workspace.tensor(f"cast {index}", FLOATING[scheme.name], *weight.shape)
    squared_error = squared_weight = 0.0
    for part in spans(weight.shape[0], PORTION_ROWS):
        exact = weight[part].to(torch.float32)
        peak = float(exact.abs().max()) if exact.numel() else 0.0
        checked_peak(int(np.float32(peak).view(np.int32)), weight, index)
        values[part] = exact
        if not bool(torch.isfinite(values[part]).all()):
            raise WeightError(f"matrix {index} holds {peak:g}, which is too large for {scheme.name}; store it as BF16 or F32")
        squared_error += float((values[part].to(torch.float32) - exact).square_().sum(dtype=torch.float64))
        squared_weight += float(exact.square_().sum(dtype=torch.float64))
    statistics = QuantizationStatistics(squared_error, squared_weight, 0, 1.0, 1.0)
    return QuantizedTensor(scheme, values, torch.empty(0, dtype=torch.float16)), statistics
