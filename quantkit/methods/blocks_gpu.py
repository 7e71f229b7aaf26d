"""llama.cpp's tensor types on a CUDA GPU: which of them have a Triton kernel, what it tries, and its launch.

Without a kernel are Q4_1, Q5_1 and MXFP4, for which the CPU takes no time, and the types with codebooks; they stay on the CPU.
Results differ from the CPU's as sums in another order and other candidates make them; they are no worse.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit import ggml
from quantkit.errors import RecipeError
from quantkit.grid import QuantizedTensor
from quantkit.scheme import Scheme

ROWS = 4  # rows of a program
TILE = 256  # inputs of a program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
LEAST_SHARE = 2.0**-20  # of the largest importance in a tile, so that every group has a solution


@dataclass(frozen=True)
class Grid:
    """What is tried for one of the types without a minimum.

    spanning: the level that the extreme weight of a group becomes.  narrow, wide, count: multiples of that which are tried instead.
    signs: 2 to try them with the other sign too.  commons: how many multiples of the lowest group scale the extreme group scale may
    become, of either sign.
    """

    spanning: float
    narrow: float
    wide: float
    count: int
    signs: int
    commons: int = 0


@dataclass(frozen=True)
class Starts:
    """What is tried for one of the types with a minimum.

    places: either end of the range starts at that many places from ``outermost`` to ``innermost``, in steps inwards.  trials,
    spread: how many scales of the block, and as many minimums, within 1 -+ spread of those that reach the extreme group.  reach:
    how far around the nearest multiple of the scale.
    """

    places: int
    outermost: float
    innermost: float
    trials: int
    spread: float
    reach: int


SYMMETRIC = {
    "Q8_0": Grid(127.0, 0.94, 1.0, 16, 1),
    "Q4_0": Grid(-8.0, 0.6, 1.8, 32, 2),
    "Q5_0": Grid(-16.0, 0.7, 1.4, 32, 2),
    "Q3_K": Grid(-4.0, 0.5, 2.1, 32, 2, 8),
    "Q6_K": Grid(-32.0, 0.6, 1.06, 32, 1, 20),
    "IQ4_NL": Grid(-127.0, 0.65, 1.6, 32, 2),
    "IQ4_XS": Grid(-127.0, 0.65, 1.6, 32, 2, 10),
}
MINIMUM = {
    "Q2_K": Starts(7, -0.25, 0.75, 9, 0.1, 1),
    "Q4_K": Starts(6, -0.5, 0.75, 9, 0.03, 2),
    "Q5_K": Starts(6, -0.5, 0.75, 9, 0.03, 3),
}


def constants(kind: ggml.BlockType) -> dict[str, Any]:
    """What the kernel of a type is compiled for."""
    if kind.name in MINIMUM:
        starts = MINIMUM[kind.name]
        return {
            "GROUP": kind.group,
            "HIGHEST": float(kind.codes[1]),
            "MOST": float(kind.group_scales[1]),
            "PLACES": starts.places,
            "OUTERMOST": starts.outermost,
            "INNERMOST": starts.innermost,
            "TRIALS": starts.trials,
            "SPREAD": starts.spread,
            "REACH": starts.reach,
        }
    grid = SYMMETRIC[kind.name]
    return {
        "GROUP": kind.group or kind.block,
        "LOWEST": float(kind.codes[0] - kind.offset),
        "HIGHEST": float(kind.codes[1] - kind.offset),
        "OFFSET": kind.offset,
        "LEVELS": None if kind.levels is None else tuple(float(level) for level in kind.levels),
        "LEAST": float(kind.group_scales[0]),
        "MOST": float(kind.group_scales[1]),
        "SPANNING": grid.spanning,
        "NARROW": grid.narrow,
        "WIDE": grid.wide,
        "COUNT": grid.count,
        "SIGNS": grid.signs,
        "COMMONS": grid.commons,
    }


def searched_on_gpu(kind: ggml.BlockType) -> bool:
    """Whether the type has a kernel."""
    return kind.name in SYMMETRIC or kind.name in MINIMUM


def quantize(
    weight: torch.Tensor, scheme: Scheme, importance: NDArray[np.float32], device: torch.device
) -> tuple[QuantizedTensor, tuple[float, ...]]:
    """Search for one matrix ``[out, in]``; ``in`` is a multiple of the type's block.  importance: of each input, mean about 1.

    Returns what it stores, on the CPU, and the sums that a kernel of ``methods.blocks`` returns: the last says whether a weight was
    not finite, and then the rest means nothing.  Raises RecipeError without Triton.
    """
    symmetric, minimum = _kernels()
    kind, (rows, columns) = scheme.block_type, weight.shape
    there = weight.to(device).contiguous()
    peak = int(there.abs().max().to(torch.float32).cpu().view(torch.int32)) & 0x7FFFFFFF  # NaN may have a sign
    exact = torch.from_numpy(importance[:columns].copy())

    def empty(dtype: torch.dtype, share: int) -> torch.Tensor:
        return torch.zeros(rows, columns // share, dtype=dtype, device=device)

    codes, scale = empty(torch.int8, 1), empty(torch.float16, kind.block)
    group_scale = empty(torch.int8, kind.group) if kind.group else None
    lows = (empty(torch.float16, kind.block), empty(torch.int8, kind.group)) if kind.minimum else None
    sums = torch.zeros(rows, -(-columns // TILE), 4, dtype=torch.float64, device=device)
    launched = (-(-rows // ROWS), sums.shape[1])
    inputs = there, _shares(exact).to(device), exact.to(device)
    settings = constants(kind) | {"ROWS": ROWS} | OPTIONS
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    if lows is not None:
        outputs = codes, scale, lows[0], group_scale, lows[1], sums
        with current:
            minimum.quantize_minimum[launched](*inputs, *outputs, rows, columns, **settings)
    else:
        outputs_of = codes, scale, codes if group_scale is None else group_scale, sums
        with current:
            symmetric.quantize_symmetric[launched](*inputs, *outputs_of, rows, columns, **settings)
    found = QuantizedTensor(
        scheme,
        codes.cpu(),
        scale.cpu(),
        group_scale=None if group_scale is None else group_scale.cpu(),
        minimum=None if lows is None else lows[0].cpu(),
        group_minimum=None if lows is None else lows[1].cpu(),
    )
    squared, power, weighted, weighted_power = sums.sum((0, 1)).tolist()
    return found, (squared, power, weighted, weighted_power, peak)


def _shares(importance: torch.Tensor) -> torch.Tensor:
    """Importance beside the largest in the same tile, never nothing; ones where nothing is important."""
    padded = torch.nn.functional.pad(importance, (0, -importance.numel() % TILE)).view(-1, TILE)
    largest = padded.amax(1, keepdim=True)
    shares = torch.where(largest > 0, padded / largest, 1.0).clamp(min=LEAST_SHARE)
    return shares.reshape(-1)[: importance.numel()].contiguous()


def _kernels() -> tuple[ModuleType, ModuleType]:
    """The modules with the Triton kernels.  Raises RecipeError without Triton."""
    try:
        from quantkit.kernels import ggml_triton, ggml_triton_minimum
    except ImportError as error:
        raise RecipeError(f"searching on a GPU needs Triton ({error}); install it with: pip install 'quantkit[cuda]'") from error
    return ggml_triton, ggml_triton_minimum
