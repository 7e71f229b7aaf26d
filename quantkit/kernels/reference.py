"""The oracle of the kernels: dequantize with plain torch, multiply in float32 on whatever device the weights are.

It follows ``quantkit.grid`` and ``quantkit.forward`` word for word and is in no hurry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from quantkit import forward
from quantkit.grid import QuantizedTensor, dequantize
from quantkit.kernels.weights import Mlp, Weight

Rounded = Callable[[torch.Tensor, Weight], torch.Tensor]  # inputs of a weight as its client rounds them


def values(weight: Weight) -> torch.Tensor:
    """The stored values, float32 ``[out, in]``."""
    return dequantize(weight) if isinstance(weight, QuantizedTensor) else weight.to(torch.float32)


def dequant_matmul(x: torch.Tensor, weight: Weight, rounded: Rounded) -> torch.Tensor:
    """x: ``[tokens, in]``.  Returns float32 ``[tokens, out]``."""
    return rounded(x.to(torch.float32), weight) @ values(weight).t()


def mlp(x: torch.Tensor, weights: Mlp, rounded: Rounded) -> torch.Tensor:
    """silu(x gate^T) * (x up^T), times down^T: float32 ``[tokens, hidden]``."""
    inner = forward.gated(dequant_matmul(x, weights.gate, rounded), dequant_matmul(x, weights.up, rounded))
    return dequant_matmul(inner, weights.down, rounded)


def moe(x: torch.Tensor, routing: forward.Routing, experts: Sequence[Mlp], shared: Mlp, rounded: Rounded) -> torch.Tensor:
    """x: ``[tokens, hidden]``.  Returns float32 ``[tokens, hidden]``."""
    x = x.to(torch.float32)
    result = mlp(x, shared, rounded)
    for expert in torch.unique(routing.experts).tolist():
        tokens, slots = torch.eq(routing.experts, expert).nonzero(as_tuple=True)
        result[tokens] += mlp(x[tokens] * routing.scores[tokens, slots, None], experts[expert], rounded)
    return result
