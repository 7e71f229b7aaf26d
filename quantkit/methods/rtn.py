"""Round to nearest: the data-free method, with an optional search for the scale that clips best.

Without a search a scale just reaches the largest weight of its group, as compressed-tensors does, and codes are equal to its own.
With a search the neighbouring stored scales at the offsets below are tried as well, and for integers the least-squares scale of the
best one; the scale with the least squared error wins, so the error is never above that of the plain rounding.

Candidates come in rounds, each around the best scale of the round before.  Offsets count codes of stored scales, which follow each
other in order of size: 48 codes below a BF16 scale is a scale smaller by a fifth to a third, 128 codes one of half the size.  The
fewer codes there are, the more of the largest weights are better cut off, so the further down the search goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit import grid
from quantkit.errors import RecipeError
from quantkit.evidence import Evidence
from quantkit.grid import QuantizationStatistics, QuantizedTensor
from quantkit.kernels import blocks, groups, rows, tiles
from quantkit.kernels.numbers import SCALE_BF16, SCALE_E8M0, SCALE_FP8, SMALLEST_SEARCHED, Numbers
from quantkit.kernels.tiles import Scratch, Search, Source, Target
from quantkit.methods import blocks as ggml_blocks
from quantkit.methods.sources import checked_peak, kernel_source
from quantkit.scheme import Scheme
from quantkit.team import Team
from quantkit.workspace import Workspace

# Rounds of offsets.  Lists with twice as many candidates gain less than a thousandth of the error.
Rounds = tuple[tuple[int | tuple[int, int], ...], ...]  # offsets, or pairs of offset and shift
ZERO_POINTS = ((0, -1), (0, 1))  # a round for zero points alone
SEARCH: dict[tuple[str, str], Rounds] = {
    ("int2", "group"): ((-256, -192, -128, -64), (-32, 32), (-16, 16), (-8, 8)),
    ("int2", "channel"): ((-512, -384, -256, -128), (-64, 64), (-32, 32), (-16, 16), (-8, 8)),
    ("int3", "group"): ((-96, -64, -32, 16), (-16, 16), (-8, 8), (-4, 4)),
    ("int3", "channel"): ((-512, -384, -256, -128), (-64, 64), (-32, 32), (-16, 16), (-8, 8)),
    ("int4", "group"): ((-48, -32, -16, 16), (-8, 8), (-4, 4)),
    ("int4", "channel"): ((-320, -256, -192, -128, -64), (-32, 32), (-16, 16), (-8, 8)),
    ("int5", "group"): ((-16, -8, 8, 16, 24, 32), (-4, 4), (-2, 2)),
    ("int5", "channel"): ((-240, -160, -80), (-40, 40), (-20, 20), (-10, 10), (-5, 5)),
    ("int6", "group"): ((-6, -3, 3, 6, 9, 12, 15, 18, 21, 24), (-1, 1)),
    ("int6", "channel"): ((-80, -40), (-20, 20), (-10, 10), (-5, 5), (-2, 2)),
    ("int8", "group"): ((-2, -1, 1, 2, 3, 4, 5, 6, 7, 8),),
    ("int8", "channel"): ((-6, -5, -4, -3, -2, -1),),
    ("fp8", "channel"): ((-48, -36, -24, -12, 12, 24, 36, 48), (-6, 6), (-3, 3)),
    ("fp8", "tensor"): ((-48, -36, -24, -12, 12, 24, 36, 48), (-6, 6), (-3, 3)),
    ("fp8", "block"): ((-48, -36, -24, -12, 12, 24, 36, 48), (-6, 6), (-3, 3)),
    ("nvfp4", "group"): ((-2, -1, 1, 3, 4, 5, 6),),
    ("mxfp4", "group"): ((-1,),),
}


def _joint(rounds: Rounds) -> Rounds:
    """Rounds whose first one tries each of its scales with the zero points on either side too."""
    return tuple((offset, shift) for offset in rounds[0] for shift in (-1, 0, 1) if isinstance(offset, int)), *rounds[1:]


# With zero points.  Where codes are few and a range is cut to half of it or less, its ends say little of where its middle belongs.
SEARCH_ZERO_POINTS: dict[tuple[str, str], Rounds] = {
    ("int2", "group"): (*_joint(SEARCH["int2", "group"]), ZERO_POINTS),
    ("int2", "channel"): (*_joint(SEARCH["int2", "channel"]), ZERO_POINTS),
    ("int3", "group"): (*_joint(SEARCH["int3", "group"]), ZERO_POINTS),
    ("int3", "channel"): (*_joint(SEARCH["int3", "channel"]), ZERO_POINTS),
    ("int4", "group"): (*SEARCH["int4", "group"], ZERO_POINTS),
    ("int4", "channel"): SEARCH["int4", "channel"],
}
_MOST_CANDIDATES = max(len(each) for table in (SEARCH, SEARCH_ZERO_POINTS) for rounds in table.values() for each in rounds)
_NO_SEARCH = Search(*(np.empty(0, np.int64) for _ in range(3)))


def quantize(
    weights: Sequence[torch.Tensor],
    scheme: Scheme,
    *,
    clip_search: bool,
    workspace: Workspace,
    evidence: Evidence | None = None,
    team: Team | None = None,
) -> list[tuple[QuantizedTensor, QuantizationStatistics]]:
    """Quantize matrices that share their input (gate and up; q, k and v).

    weights: ``[out, in]``, BF16, F16 or F32, of either stride order.  Results live in ``workspace`` and are valid until the next
    call that uses it.  evidence: only looked at for a scheme with static activations, whose scale must reach its peak.  team: only
    for llama.cpp's types.

    Raises WeightError, which says matrix, row, column and value, for a weight that is NaN or infinite; RecipeError for static
    activations without evidence.
    """
    if scheme.number == "ggml":
        return ggml_blocks.quantize(weights, scheme, clip_search=clip_search, workspace=workspace, team=team)
    input_scale = _input_scale(scheme, evidence)
    scratch = _scratch(workspace)
    rows_needed = tiles.STRIP_ROWS if scheme.granularity == "block" else 16
    sources = [kernel_source(weight, rows_needed, tiles.TILE_INPUTS) for weight in weights]
    global_scale = None
    if scheme.global_scale:
        peaks = (tiles.largest_bits(source, scratch) for source in sources)
        global_scale = grid.fit_global_scale(max(checked_peak(peak, weights[index], index) for index, peak in enumerate(peaks)))
    numbers = numbers_of(scheme)
    search = search_of(_rounds(scheme)) if clip_search else _NO_SEARCH
    shared = _shared_scale(numbers, scheme, weights, sources, scratch, search) if scheme.granularity == "tensor" else 0
    results = []
    for index, (weight, source) in enumerate(zip(weights, sources, strict=True)):
        target = _target(scheme, source, workspace, index)
        if scheme.granularity == "group":
            divisor = 1.0 if global_scale is None else float(global_scale)
            sums = groups.quantize_groups(numbers, source, target, scratch, scheme.group_size, divisor, search)
        elif scheme.granularity == "tensor":
            sums = rows.quantize_rows(numbers, source, target, scratch, _NO_SEARCH, shared)
        elif scheme.granularity == "channel":
            sums = rows.quantize_rows(numbers, source, target, scratch, search, 0)
        else:
            sums = blocks.quantize_blocks(numbers, source, target, scratch, search)
        squared_error, squared_weight, clipped, peak = sums
        checked_peak(peak, weight, index)
        quantized = _assemble(weight.shape, scheme, source, target, global_scale, input_scale)
        scale = grid.effective_scale(scheme, _extremes(quantized.scale), global_scale)
        statistics = QuantizationStatistics(squared_error, squared_weight, clipped, float(scale[0]), float(scale[1]))
        results.append((quantized, statistics))
    return results


def _input_scale(scheme: Scheme, evidence: Evidence | None) -> torch.Tensor | None:
    if not scheme.static_activations:
        return None
    if evidence is None:
        raise RecipeError(
            f"{scheme.name} stores the range of activations and needs calibration to know it; calibrate, or take a scheme with "
            "dynamic activations"
        )
    return grid.cover_peak(float(evidence.peak.max()))


def _shared_scale(
    numbers: Numbers, scheme: Scheme, weights: Sequence[torch.Tensor], sources: Sequence[Source], scratch: Scratch, search: Search
) -> int:
    """The code of the one scale that matrices share: just reaching the largest weight, or searched around that, as in blocks."""
    peaks = (tiles.largest_bits(source, scratch) for source in sources)
    largest = max(checked_peak(peak, weights[index], index) for index, peak in enumerate(peaks))
    scale, _ = grid.fit(torch.tensor([[largest]]), scheme)
    code = int(scale.view(torch.int16))
    if float(scale) <= SMALLEST_SEARCHED:
        return code

    def squared_errors(codes: NDArray[np.int64]) -> NDArray[np.float64]:
        errors = np.zeros(codes.size)
        for source in sources:
            rows.candidate_errors(numbers, source, scratch, codes, errors)
        return errors

    first = 0
    for end in search.ends:
        # The scale that is to be improved comes first, so it stays where nothing is better.
        codes = np.append(0, search.offsets[first:end]) + code
        codes = codes.clip(numbers.scale_lowest, numbers.scale_highest)
        code, first = int(codes[squared_errors(codes).argmin()]), int(end)
    return code


def numbers_of(scheme: Scheme) -> Numbers:
    half_range = grid.HALF_RANGE[scheme.number]
    lowest, highest = grid.INT_RANGE.get(scheme.number, (-half_range, half_range))
    sign_bit, mantissa_bits, smallest_normal = {"fp8": (7, 3, 2.0**-6), "fp4": (3, 1, 1.0)}.get(scheme.number, (0, 0, 1.0))
    if scheme.scale_number == "fp8":
        scale_kind, (scale_lowest, scale_highest) = SCALE_FP8, grid.FP8_SCALE_CODES
    elif scheme.scale_number == "e8m0":
        scale_kind, (scale_lowest, scale_highest) = SCALE_E8M0, grid.E8M0_CODES
    else:
        limits = torch.tensor(grid.bf16_scale_limits(scheme), dtype=torch.bfloat16).view(torch.int16)
        scale_kind, (scale_lowest, scale_highest) = SCALE_BF16, limits.tolist()
    return Numbers(
        whole=int(scheme.number in grid.INT_RANGE),
        lowest=float(lowest),
        highest=float(highest),
        half_range=half_range,
        sign_bit=sign_bit,
        mantissa_bits=mantissa_bits,
        smallest_normal=smallest_normal,
        symmetric=int(scheme.symmetric),
        scale_kind=scale_kind,
        scale_lowest=scale_lowest,
        scale_highest=scale_highest,
        scale_of_zeros=grid.SCALE_OF_ZEROS[scheme.scale_number],
    )


def _rounds(scheme: Scheme) -> Rounds:
    table = SEARCH if scheme.symmetric else SEARCH_ZERO_POINTS
    return table[scheme.name if scheme.number == "fp4" else scheme.number, scheme.granularity]


def search_of(rounds: Rounds) -> Search:
    """The candidates of all rounds as kernels take them."""
    pairs = [each if isinstance(each, tuple) else (each, 0) for candidates in rounds for each in candidates]
    offsets, shifts = np.array(pairs, np.int64).T
    return Search(np.ascontiguousarray(offsets), np.ascontiguousarray(shifts), np.cumsum([len(each) for each in rounds]))


def _scratch(workspace: Workspace) -> Scratch:
    def take(name: str, elements: int) -> NDArray[np.float32]:
        return workspace.take(f"rtn {name}", 4 * elements).view(np.float32)

    strip = tiles.STRIP_ROWS
    return Scratch(
        tile=take("tile", tiles.STRIP_ROWS * tiles.TILE_INPUTS),
        words=take("words", tiles.TILE_INPUTS // 4 * 16),
        scale_codes=take("scale codes", strip),
        largest=take("largest", strip),
        low=take("low", strip),
        high=take("high", strip),
        errors=take("errors", (_MOST_CANDIDATES + 1) * strip),
    )


def _target(scheme: Scheme, source: Source, workspace: Workspace, index: int) -> Target:
    scale_rows, scale_columns = scheme.scale_shape(source.rows, source.columns)
    scales = source.rows if scheme.granularity == "tensor" else scale_rows * scale_columns  # the shared one, repeated
    return Target(
        codes=workspace.take(f"rtn codes {index}", source.rows * source.columns),
        scales=workspace.take(f"rtn scales {index}", scales * (2 if scheme.scale_number == "bf16" else 1)),
        zero_points=workspace.take(f"rtn zero points {index}", 0 if scheme.symmetric else scales),
    )


def _assemble(
    shape: torch.Size,
    scheme: Scheme,
    source: Source,
    target: Target,
    global_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
) -> QuantizedTensor:
    """Results as tensors, without the padding."""
    codes_dtype = {"fp8": torch.float8_e4m3fn, "fp4": torch.uint8}.get(scheme.number, torch.int8)
    scale_dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "e8m0": torch.uint8}[scheme.scale_number]
    scale_rows, scale_columns = scheme.scale_shape(*shape)
    padded = (source.rows, 1) if scheme.granularity == "tensor" else scheme.scale_shape(source.rows, source.columns)

    def tensor(data: NDArray[np.uint8], dtype: torch.dtype, padded: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
        return torch.from_numpy(data).view(dtype).reshape(padded)[:rows, :columns].contiguous()

    return QuantizedTensor(
        scheme,
        codes=tensor(target.codes, codes_dtype, (source.rows, source.columns), *shape),
        scale=tensor(target.scales, scale_dtype, padded, scale_rows, scale_columns),
        zero_point=None if scheme.symmetric else tensor(target.zero_points, torch.int8, padded, scale_rows, scale_columns),
        global_scale=global_scale,
        input_scale=input_scale,
    )


def _extremes(scale: torch.Tensor) -> torch.Tensor:
    """Smallest and largest scale ``[2]``, found by their codes, which order like the positive numbers they stand for.

    By numpy, because torch would start threads of its own inside every worker.
    """
    codes = scale.view(torch.int16 if scale.dtype == torch.bfloat16 else torch.uint8).numpy()
    return torch.from_numpy(np.array([codes.min(), codes.max()])).view(scale.dtype)
