"""Evidence: what calibration saw at the input of one unit, as the methods receive it.

Matrices of a unit (gate and up; q, k and v) share their input, so they share one Evidence.  A Llama 4 expert's input already
carries the router's score, so weighting by it is built in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Evidence:
    """Statistics over the rows (tokens) x that reached one unit.

    tokens: rows that the router sent here.
    mean_square: mean of x^2, float32 ``[in]``.
    peak: largest magnitude, float32 ``[in]``.
    hessian: mean of x x^T, float32 ``[in, in]``, lent tokens included; None where no method asks for it.
    missing: mean of d x^T, float32 ``[out, in]``, where d is what the outputs should make up for beside their own error; None for
        nothing.
    rows: how many rows the means were formed from, lent ones counted by their weight.
    """

    tokens: int
    mean_square: torch.Tensor
    peak: torch.Tensor
    hessian: torch.Tensor | None = None
    missing: torch.Tensor | None = None
    rows: float = 0.0


@dataclass(frozen=True)
class Received:
    """What a unit received, for the ledger.

    tokens: its own.  borrowed: lent to an expert that received too few.  score_mass: sum of the router's scores for its own tokens.
    """

    tokens: int
    borrowed: int
    score_mass: float
