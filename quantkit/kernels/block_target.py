"""Where the kernels for ggml's types put their results."""

from __future__ import annotations

from typing import Any, NamedTuple


class BlockTarget(NamedTuple):
    """One-dimensional arrays, each row-major: of weights, of blocks, or of groups.

    codes: int8 ``[rows * columns]``.  scales, minimums: FP16 bits as uint16 ``[rows * columns / block]`` (scales of MXFP4: uint8).
    group_scales, group_minimums: int8 ``[rows * columns / group]``.  What a type does not have is an empty array.
    """

    codes: Any
    scales: Any
    minimums: Any
    group_scales: Any
    group_minimums: Any
