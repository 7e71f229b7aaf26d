"""What ``quantkit presets`` lists: the library's presets, each with a line for people who choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.scheme import Scheme

# These tables also serve shell completion, which cannot wait for the library to be imported; tests keep them equal to the presets.
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

PACKED_LINES = {
    "packed-int8": "INT8 weights, groups of 128",
    "packed-int4": "INT4 weights, groups of 128",
    "packed-int4-gptq": "INT4 weights, groups of 128, chosen by GPTQ on calibration text",
    "packed-int3-gptq": "INT3 weights, groups of 64, chosen by GPTQ on calibration text",
    "packed-int2-gptq": "INT2 weights with zero points, groups of 64, chosen by GPTQ on calibration text; the smallest",
    "packed-mixed-gptq": "INT3 for routed experts, chosen by GPTQ on calibration text; 8 bits for what every token meets",
}

_NONE: tuple[str, ...] = ()
_IMPORTANCE = ("importance",)
_BOTH = ("importance", "gptq")


@dataclass(frozen=True)
class GgufRow:
    """One file type, with its presets.

    bits_per_weight: of the text model of Scout, under the plain name.  methods: the suffixes that the name takes.  calibrated: the
    plain name takes calibration, too.
    """

    name: str
    bits_per_weight: float
    methods: tuple[str, ...]
    what: str
    calibrated: bool = False

    @property
    def presets(self) -> list[str]:
        """The names that ``--to`` takes."""
        return [self.name, *(f"{self.name}-{method}" for method in self.methods)]


GGUF_ROWS = (
    GgufRow("F32", 32.00, _NONE, "all in full; for comparisons"),
    GgufRow("BF16", 16.00, _NONE, "the source's numbers"),
    GgufRow("F16", 16.00, _NONE, "half precision"),
    GgufRow("Q8_0", 8.50, _BOTH, "8 bits; hardly to be told from the source"),
    GgufRow("Q6_K", 6.56, _BOTH, "6 bits"),
    GgufRow("Q5_1", 6.01, _BOTH, "5 bits, older type; also for rows that are no multiple of 256"),
    GgufRow("Q5_K_M", 5.68, _BOTH, "5 bits, 6 for some layers"),
    GgufRow("QK5_MOE", 5.61, _BOTH, "5 bits for routed experts, 6 for what every token meets"),
    GgufRow("Q5_0", 5.51, _BOTH, "5 bits, older type"),
    GgufRow("Q5_K_S", 5.51, _BOTH, "5 bits throughout"),
    GgufRow("Q4_1", 5.02, _BOTH, "4 bits, older type"),
    GgufRow("Q4_K_M", 4.85, _BOTH, "4 bits, 6 for some layers; the usual choice"),
    GgufRow("QK4_MOE", 4.71, _BOTH, "4 bits for routed experts, 6 for what every token meets"),
    GgufRow("MXFP4_MOE", 4.69, _BOTH, "MXFP4 for routed experts, 8 bits for the rest"),
    GgufRow("IQ4_NL", 4.56, _BOTH, "4 bits from a table; also for rows that are no multiple of 256"),
    GgufRow("Q4_K_S", 4.56, _BOTH, "4 bits, 5 for some layers"),
    GgufRow("Q4_0", 4.52, _BOTH, "4 bits, older type"),
    GgufRow("IQ4_XS", 4.33, _BOTH, "4 bits from a table; the smallest with 4"),
    GgufRow("Q3_K_L", 4.15, _BOTH, "3 bits, 5 for parts"),
    GgufRow("QK3_MOE_L", 4.08, _BOTH, "3 and 4 bits for routed experts, 6 for what every token meets"),
    GgufRow("Q3_K_M", 3.84, _BOTH, "3 bits, 4 and 5 for parts"),
    GgufRow("QK3_MOE", 3.67, _BOTH, "3 bits for routed experts, 5 for what every token meets"),
    GgufRow("IQ3_M", 3.53, _IMPORTANCE, "3 bits from a codebook, 4 for parts"),
    GgufRow("IQ3_S", 3.47, _IMPORTANCE, "3 bits from a codebook"),
    GgufRow("Q3_K_S", 3.47, _BOTH, "3 bits throughout"),
    GgufRow("IQ3_XS", 3.29, _IMPORTANCE, "3 bits from codebooks", calibrated=True),
    GgufRow("IQ3_XXS", 3.09, _IMPORTANCE, "3 bits from smaller codebooks", calibrated=True),
    GgufRow("Q2_K", 2.94, _BOTH, "2 bits, 3 and 4 for parts"),
    GgufRow("QK2_MOE", 2.77, _BOTH, "2 bits for routed experts, 3 for what every token meets"),
    GgufRow("Q2_K_S", 2.74, _BOTH, "2 bits, 4 for parts", calibrated=True),
    GgufRow("IQ2_M", 2.63, _IMPORTANCE, "2 bits from a codebook, 3 for parts", calibrated=True),
    GgufRow("IQ2_S", 2.40, _IMPORTANCE, "2 bits from a smaller codebook, 3 for parts", calibrated=True),
    GgufRow("IQ2_XS", 2.36, _IMPORTANCE, "2 bits from a smaller codebook", calibrated=True),
    GgufRow("IQ2_XXS", 2.12, _IMPORTANCE, "2 bits from the smallest codebook", calibrated=True),
    GgufRow("IQ1_M", 1.82, _IMPORTANCE, "less than 2 bits", calibrated=True),
    GgufRow("IQ1_S", 1.65, _IMPORTANCE, "the smallest", calibrated=True),
)


def complete_target(incomplete: str) -> list[str]:
    """Presets that begin so, in any case; those with a suffix only when the file type is there in full."""
    begun = incomplete.lower()
    found = [name for name in (*LINES, *PACKED_LINES) if name.startswith(begun)]
    for row in GGUF_ROWS:
        offered = row.presets if begun.startswith(row.name.lower()) else [row.name]
        found += [name for name in offered if name.lower().startswith(begun)]
    return [_spelled(name, incomplete) for name in found]


def _spelled(name: str, incomplete: str) -> str:
    """The name as a continuation of what was typed: shells drop what does not begin so."""
    rest = name[len(incomplete) :]
    return name if name.startswith(incomplete) else incomplete + (rest.lower() if incomplete.islower() else rest)


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


def packed_rows() -> list[PresetRow]:
    """The presets of quantkit's own format; bits and scheme are those of routed experts."""
    from quantkit.recipe import PACKED_PRESETS
    from quantkit.scheme import parse_scheme

    rows = []
    for name, recipe in PACKED_PRESETS.items():
        scheme = parse_scheme(recipe.rules[0].scheme)
        assert scheme is not None
        rows.append(PresetRow(name, scheme.name, _bits(scheme, zero_point_bits=8), PACKED_LINES[name]))
    return rows


def _bits(scheme: Scheme, zero_point_bits: int | None = None) -> float:
    """Bits of a quantized weight.  zero_point_bits: as stored, by default as many as those of a code."""
    from quantkit.scheme import BLOCK_SIZE

    weights_per_scale = {"group": scheme.group_size, "block": BLOCK_SIZE**2, "channel": _ROW, "tensor": _ROW**2}[scheme.granularity]
    zero_point = 0 if scheme.symmetric else zero_point_bits or scheme.bits
    return scheme.bits + (_SCALE_BITS[scheme.scale_number] + zero_point) / weights_per_scale
