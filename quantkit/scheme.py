"""Scheme: which numbers are stored for one weight matrix.  Data only.

A scheme says the number family (``int2`` to ``int8``, ``fp8``, ``fp4``), how many weights share a scale, how the scale itself is
stored, and what the client is asked to do with activations.  It says nothing of how the numbers are chosen (a *method*) or how
bytes are laid out (a *format*).

Names are canonical and parse back: ``int4-g128``, ``int2-g32-asym``, ``int8-channel``, ``int8-channel-dynamic`` (activations
quantized per token), ``fp8-channel-dynamic``, ``fp8-block-dynamic`` (128 x 128 blocks), ``fp8-tensor-static`` (one scale for
the matrices of a unit, activations quantized with a stored scale), ``nvfp4``, ``mxfp4`` and ``keep`` (stored as in the
source).  The tensor types of llama.cpp are schemes too, under their own names (``Q4_K``, ``IQ4_XS``, ``F16``; see
:mod:`quantkit.ggml`).  In every other scheme the stored value of a weight is

    value = (code - zero_point) * scale                          integers, fp8, mxfp4
    value = code * scale / global_scale                          nvfp4 (scale is itself FP8)

Number ranges: integers of b bits [-2^(b-1), 2^(b-1) - 1], so int4 [-8, 7]; fp8 E4M3 without infinity +-448; fp4 E2M1 {0, .5, 1,
1.5, 2, 3, 4, 6}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from quantkit import ggml
from quantkit.errors import RecipeError

Number = Literal["int2", "int3", "int4", "int5", "int6", "int8", "fp8", "fp4", "ggml"]
Granularity = Literal["tensor", "channel", "group", "block"]
ScaleNumber = Literal["bf16", "fp8", "e8m0", "f16"]

BLOCK_SIZE = 128  # rows and columns that share one scale in fp8-block; what every client's kernels expect
GROUP_SIZES = (32, 64, 128)
INTEGERS: tuple[Number, ...] = ("int2", "int3", "int4", "int5", "int6", "int8")
WITH_ZERO_POINTS: tuple[Number, ...] = ("int2", "int3", "int4")  # more bits gain next to nothing from one
IN_WORDS: tuple[Number, ...] = ("int4", "int8")  # those that fill 32-bit words, as most clients store them


@dataclass(frozen=True)
class Scheme:
    """The numbers stored for one weight matrix ``[out, in]``.

    number: family of the stored codes.
    granularity: ``tensor`` one scale per matrix, the same for matrices that a client fuses; ``channel`` one per output row;
        ``group`` one per ``group_size`` neighbouring inputs of a row; ``block`` one per ``BLOCK_SIZE`` x ``BLOCK_SIZE`` block.
    group_size: inputs per scale for ``group``, else 0.
    symmetric: False adds a zero point per scale (``WITH_ZERO_POINTS`` only).
    scale_number: dtype of the stored scale; ``e8m0`` is a power of two kept as exponent + 127.
    global_scale: a second FP32 scale per matrix, a divisor (nvfp4), shared by matrices that a client fuses.
    dynamic_activations: the client quantizes activations at run time, per token (per 128 inputs of a token for ``block``).
    static_activations: the client quantizes activations with one stored scale per matrix, which only calibration can tell.
    """

    name: str
    number: Number
    granularity: Granularity
    group_size: int = 0
    symmetric: bool = True
    scale_number: ScaleNumber = "bf16"
    global_scale: bool = False
    dynamic_activations: bool = False
    static_activations: bool = False

    @property
    def block_type(self) -> ggml.BlockType:
        """The type of llama.cpp that this scheme is; only for number ``ggml``."""
        return ggml.TYPES[self.name]

    @property
    def bits(self) -> int:
        """Bits per stored code, scales not counted; not for number ``ggml``."""
        return int(self.number[-1])  # as its name says

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scale tensor for a weight ``[out, in]``.  Dimensions must fit; see :meth:`misfit`."""
        if self.granularity == "tensor":
            return (1, 1)
        if self.granularity == "channel":
            return (out_features, 1)
        if self.granularity == "block":
            return (out_features // BLOCK_SIZE, in_features // BLOCK_SIZE)
        return (out_features, in_features // self.group_size)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why this scheme cannot hold a weight ``[out, in]``, or None when it can."""
        if self.number == "ggml":
            block = self.block_type.block
            return f"input size {in_features} is not a multiple of the block of {block}" if in_features % block else None
        if self.granularity == "group" and in_features % self.group_size:
            return f"input size {in_features} is not a multiple of the group size {self.group_size}"
        if self.granularity == "block" and (in_features % BLOCK_SIZE or out_features % BLOCK_SIZE):
            return f"shape [{out_features}, {in_features}] is not a multiple of {BLOCK_SIZE} x {BLOCK_SIZE} blocks"
        if self.number in INTEGERS and self.number not in IN_WORDS:
            return None
        if self.bits == 4 and in_features % 8:
            return f"input size {in_features} is not a multiple of 8, so 4-bit codes do not fill 32-bit words"
        if self.number == "int8" and not self.dynamic_activations and in_features % 4:
            return f"input size {in_features} is not a multiple of 4, so 8-bit codes do not fill 32-bit words"
        if not self.symmetric and out_features % 8:
            return f"output size {out_features} is not a multiple of 8, so zero points do not fill 32-bit words"
        return None


KEEP = "keep"  # the scheme name for "stored as in the source"

NVFP4 = Scheme("nvfp4", "fp4", "group", 16, scale_number="fp8", global_scale=True)
MXFP4 = Scheme("mxfp4", "fp4", "group", 32, scale_number="e8m0")
FP8_CHANNEL = Scheme("fp8-channel-dynamic", "fp8", "channel", dynamic_activations=True)
FP8_BLOCK = Scheme("fp8-block-dynamic", "fp8", "block", dynamic_activations=True)
FP8_TENSOR = Scheme("fp8-tensor-static", "fp8", "tensor", static_activations=True)
INT8_DYNAMIC = Scheme("int8-channel-dynamic", "int8", "channel", dynamic_activations=True)

_FIXED = {scheme.name: scheme for scheme in (NVFP4, MXFP4, FP8_CHANNEL, FP8_BLOCK, FP8_TENSOR, INT8_DYNAMIC)}
GGML = {
    kind.name: Scheme(kind.name, "ggml", "group", kind.block, scale_number="e8m0" if kind.name == "MXFP4" else "f16")
    for kind in ggml.TYPES.values()
}
_INTEGER = re.compile(rf"({'|'.join(INTEGERS)})-(?:g(\d+)|channel)(-asym)?")
_INTEGERS = {str(number): number for number in INTEGERS}


def parse_scheme(name: str) -> Scheme | None:
    """The scheme of that canonical name; None for ``keep``.

    Raises RecipeError for a name that is not a scheme.
    """
    if name == KEEP:
        return None
    if name in _FIXED or name in GGML:
        return _FIXED[name] if name in _FIXED else GGML[name]
    match = _INTEGER.fullmatch(name)
    if not match:
        raise RecipeError(f"unknown scheme {name!r}. Known schemes: {', '.join([*scheme_names(), *GGML])}")
    number, group, asymmetric = match.groups()
    if group and int(group) not in GROUP_SIZES:
        raise RecipeError(f"scheme {name!r}: group size {group} is not one of {', '.join(map(str, GROUP_SIZES))}")
    if asymmetric and number not in WITH_ZERO_POINTS:
        raise RecipeError(f"scheme {name!r}: a zero point is supported for {', '.join(WITH_ZERO_POINTS)} only")
    return Scheme(name, _INTEGERS[number], "group" if group else "channel", int(group or 0), symmetric=not asymmetric)


def scheme_names() -> list[str]:
    """Every canonical scheme name, ``keep`` included, but llama.cpp's types (``GGML``)."""
    sizes = [f"g{size}" for size in GROUP_SIZES] + ["channel"]
    integers = [
        f"{number}-{size}{asym}"
        for number in INTEGERS
        for size in sizes
        for asym in ("", "-asym")
        if not asym or number in WITH_ZERO_POINTS
    ]
    return [*integers, *_FIXED, KEEP]
