"""The other half of symmetric matrices."""

from __future__ import annotations

import torch


def mirror(total: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of a square matrix to the lower one, in place."""
    total.copy_(torch.triu(total) + torch.triu(total, 1).t())
    return total
