"""What ``quantkit presets`` lists: the library's presets, each with a line for people who choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.scheme import Scheme

# The keys also serve shell completion, which cannot wait for the library to be imported; a test keeps them equal to the presets.
LINES = {
    "fp8-dynamic": "FP8, a scale per row, FP8 activations per token; half the size, for GPUs with FP8",
    "fp8-block": "FP8, a scale per 128 x 128 block, FP8 activations per 128 inputs",
    "fp8-static": "FP8, a scale per matrix, FP8 activations with a calibrated scale; the fastest FP8",
    "w8a16": "INT8 weights, groups of 128; nearest to the source",
    "w8a16-channel": "INT8 weights, a scale per row",
    "w8a8": "INT8, a scale per row, smoothed, INT8 activations per token; for GPUs without FP8",
    "w8a8-rtn": "the same without calibration",
    "w4a16-gptq": "INT4 weights, groups of 128, chosen by GPTQ on calibration text",
    "w4a16-awq": "INT4 weights, groups of 128, nearest codes with scales chosen on calibration text",
    "w4a16-rtn": "INT4 weights, groups of 128; a quarter of the size",
    "w4a16-rtn-g64": "INT4 weights, groups of 64",
    "w4a16-rtn-g32": "INT4 weights, groups of 32; the most exact INT4",
    "w4a16-rtn-channel": "INT4 weights, a scale per row; the smallest and the least exact",
    "w4a16-rtn-asym": "INT4 with zero points, groups of 128; not every client loads it",
    "nvfp4a16": "NVFP4 weights, groups of 16 with FP8 scales",
    "mxfp4a16": "MXFP4 weights, groups of 32 with power-of-two scales",
}
_SCALE_BITS = {"bf16": 16, "fp8": 8, "e8m0": 8}
_ROW = 8192  # inputs of the row that a per-row scale is spread over, as wide as the releases' down projections


@dataclass(frozen=True)
class PresetRow:
    """One preset.  bits_per_weight: of a quantized weight, scales and zero points included."""

    name: str
    scheme: str
    bits_per_weight: float
    what: str


def preset_rows() -> list[PresetRow]:
    """All presets in the library's order."""
    from quantkit.recipe import PRESETS
    from quantkit.scheme import parse_scheme

    rows = []
    for name, recipe in PRESETS.items():
        scheme = parse_scheme(recipe.rules[0].scheme)
        assert scheme is not None  # a preset begins with the rule that quantizes
        rows.append(PresetRow(name, scheme.name, _bits(scheme), LINES[name]))
    return rows


def _bits(scheme: Scheme) -> float:
    from quantkit.scheme import BLOCK_SIZE

    weights_per_scale = {"group": scheme.group_size, "block": BLOCK_SIZE**2, "channel": _ROW, "tensor": _ROW**2}[scheme.granularity]
    zero_point = 0 if scheme.symmetric else scheme.bits
    return scheme.bits + (_SCALE_BITS[scheme.scale_number] + zero_point) / weights_per_scale
