"""Smoothing: moving the range of activations into weights, where Llama 4 allows it exactly.

Between ``up`` and ``down`` of one MLP nothing but a product lies: with s > 0, row j of up divided by s_j and column j of down
multiplied by s_j leave the outputs what they are, and divide the input j of down by s_j.  A client that quantizes activations with
one scale per token then loses less to the largest of them.  Every expert has its own s, which costs nothing: each row of up has
its own scales.  (SmoothQuant, arXiv 2211.10438, with the peaks of the inputs to the power of one half.)

Only powers of two are used.  They change no mantissa, so a smoothed weight is exactly the source's, and ``verify`` finds s again
from artifact and source.  The norms before the MLP, where SmoothQuant folds too, feed the router and all experts of a layer at
once and are kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from quantkit.errors import ArtifactError
from quantkit.evidence import Evidence

STRENGTH = 0.5  # the power of an input's peak that moves into the weights
LARGEST = 8  # exponents lie between -8 and 8


def inner_unit(key: str) -> str | None:
    """Key of the unit whose inputs decide how the MLP of unit ``key`` is smoothed: its down projection; None outside of MLPs."""
    base, _, name = key.rpartition(".")
    return f"{base}.down_proj" if name in ("gate_up_proj", "down_proj") else None


def smoothing_factors(peak: torch.Tensor) -> torch.Tensor:
    """s for one MLP, float32 ``[width]``, powers of two; peak: of the inputs of its down projection, ``[width]``.

    An input that was never active counts as the least active one.
    """
    active = peak[peak > 0]
    if not len(active):
        return torch.ones_like(peak)
    exponents = torch.log2(peak.clamp(min=float(active.min())))
    return torch.exp2((STRENGTH * (exponents - exponents.mean())).round().clamp(-LARGEST, LARGEST))


def smooth(
    weights: Sequence[torch.Tensor], projections: Sequence[str], factors: torch.Tensor, evidence: Evidence
) -> tuple[list[torch.Tensor], Evidence]:
    """Weights and evidence of one unit of the MLP after smoothing; ``up_proj`` and ``down_proj`` change."""
    changed = []
    for weight, projection in zip(weights, projections, strict=True):
        exact = weight.to(torch.float32) if weight.dtype == torch.float16 else weight  # float16 has few exponents
        if projection == "up_proj":
            weight = exact / factors.to(exact.dtype)[:, None]
        elif projection == "down_proj":
            weight = exact * factors.to(exact.dtype)
        changed.append(weight)
    if "down_proj" not in projections:
        return changed, evidence
    inverse = 1 / factors
    return changed, replace(
        evidence,
        mean_square=evidence.mean_square * inverse.square(),
        peak=evidence.peak * inverse,
        hessian=None if evidence.hessian is None else evidence.hessian * inverse[:, None] * inverse,
        missing=None if evidence.missing is None else evidence.missing * inverse,
    )


def found_factors(source: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """The power of two between each row of an up projection ``[width, in]`` and what is stored of it: ``1 / s``, float32.

    1 where the source is zero.  Raises ArtifactError when the two are so far apart that no power of two can be told.
    """
    norms = [weight.to(torch.float64).square().sum(1).sqrt() for weight in (source, stored)]
    exponents = torch.where(norms[0] > 0, torch.log2(norms[1] / norms[0]), 0.0)
    if not bool((exponents.abs() <= LARGEST + 0.5).all()):
        raise ArtifactError("a smoothed up projection is no power of two away from the source")
    return torch.exp2(exponents.round()).to(torch.float32)
