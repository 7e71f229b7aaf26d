"""Weights and inputs that methods are tried on."""

from __future__ import annotations

import torch


def correlated(tokens: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Inputs with channels of different size that depend on each other, float32 ``[tokens, in]``."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, inputs, generator=generator)
    mixing = torch.eye(inputs) + torch.randn(inputs, inputs, generator=generator) * (2 / inputs) ** 0.5
    return hidden @ mixing * torch.exp(torch.randn(inputs, generator=generator) / 2)


def gaussian(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02).to(torch.bfloat16)


def heavy_tailed(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Student's t with 4 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    normal, squares = torch.randn(5, rows, inputs, generator=generator).tensor_split((1,))
    return (0.02 * normal[0] / squares.square().mean(0).sqrt()).to(torch.bfloat16)
