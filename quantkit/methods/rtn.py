"""Round to nearest: the data-free method, with an optional search for the scale that clips best."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit import grid
from quantkit.errors import WeightError
from quantkit.grid import QuantizationStatistics, QuantizedTensor
from quantkit.scheme import Scheme
from quantkit.workspace import Workspace


def quantize(
    weights: Sequence[torch.Tensor], scheme: Scheme, *, clip_search: bool, workspace: Workspace
) -> list[tuple[QuantizedTensor, QuantizationStatistics]]:
    """Quantize matrices that share their input (gate and up; q, k and v).

    weights: ``[out, in]``, BF16, F16 or F32, of either stride order.  Results may live in ``workspace`` and are valid until the
    next call that uses it.  Raises WeightError, which says matrix, row, column and value, for a weight that is NaN or infinite.
    """
    for index, weight in enumerate(weights):
        finite = torch.isfinite(weight)
        if not finite.all():
            row, column = (int(i) for i in (~finite).nonzero()[0])
            raise WeightError(f"matrix {index}, row {row}, column {column}: weight is {weight[row, column].item()}")
    global_scale = grid.fit_global_scale(weights) if scheme.global_scale else None
    results = []
    for weight in weights:
        scale, zero_point = grid.fit(weight, scheme, global_scale)
        quantized = grid.snap(weight, scheme, scale, zero_point, global_scale)
        results.append((quantized, grid.measure(weight, quantized)))
    return results
