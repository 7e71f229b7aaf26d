"""What methods have in common: a weight as kernels read it, and the check that all of it is finite."""

from __future__ import annotations

import numpy as np
import torch

from quantkit.errors import WeightError
from quantkit.kernels import tiles
from quantkit.kernels.tiles import Source

_STORED = {torch.bfloat16: tiles.BFLOAT16, torch.float16: tiles.FLOAT16, torch.float32: tiles.FLOAT32}
_FINITE_BITS = 0x7F800000  # float32 bits from here on are infinity and NaN


def kernel_source(weight: torch.Tensor, rows_needed: int, columns_needed: int) -> Source:
    """The weight as a kernel reads it: in place where its shape and strides allow, else a copy padded with zeros to multiples of
    ``rows_needed`` and ``columns_needed``."""
    out_features, in_features = weight.shape
    if weight.dtype not in _STORED:
        weight = weight.to(torch.float32)
    missing_rows, missing_columns = -out_features % rows_needed, -in_features % columns_needed
    if missing_rows or missing_columns:
        weight = torch.nn.functional.pad(weight, (0, missing_columns, 0, missing_rows))
    if 1 not in weight.stride():
        weight = weight.contiguous()
    row_stride, input_stride = weight.stride()
    span = (weight.shape[0] - 1) * row_stride + (weight.shape[1] - 1) * input_stride + 1
    data = weight.as_strided((span,), (1,)).view(torch.uint8).numpy()
    return Source(data, _STORED[weight.dtype], row_stride, input_stride, *weight.shape)


def checked_peak(peak: int, weight: torch.Tensor, index: int) -> float:
    """The largest magnitude, given as float32 bits; WeightError naming the first weight that is not finite, if there is one."""
    if peak < _FINITE_BITS:
        return float(np.int32(peak).view(np.float32))
    row, column = (int(i) for i in torch.isfinite(weight).logical_not_().nonzero()[0])
    raise WeightError(
        f"matrix {index}, row {row}, column {column}: weight is {weight[row, column].item()}, not a finite number; "
        "the source checkpoint is damaged or was trained to divergence"
    )
