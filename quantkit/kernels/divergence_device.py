"""The figures of :mod:`quantkit.kernels.divergence` from logits on a device, with torch's own operations.

Everything behind the logits is float64.  The terms are those of the CPU, p (exp(d) - 1 - d), whose sum has no cancellation.  A few
rows are taken at a time: beside the logits it takes at most ``TEMPORARY_BYTES``, or what one row needs.  How many rows these are
follows from the vocabulary alone and divides 512, so sums have the same order, and figures the same bits, whichever multiple of
512 positions the caller takes at a time.  Only results of the size of the positions leave the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quantkit.kernels.divergence import ComparedRows, check_shapes, not_finite
from quantkit.team import spans

TEMPORARY_BYTES = 1 << 30
MOST_ROWS = 512  # at a time
_TEMPORARIES = 6  # as large as the logits of these rows, in float64
_SERIES = 1 / 16  # up to this distance exp(d) - 1 - d comes from its series, which is exact to float64 there
_TERMS = 10  # d^2 / 2! to d^10 / 10!


@dataclass(frozen=True)
class DeviceRows:
    """As :class:`quantkit.kernels.divergence.ReferenceRows`, on a device: float64, float64 and int64 ``[tokens]``."""

    largest: torch.Tensor
    log_sum: torch.Tensor
    top: torch.Tensor


def reference_rows(logits: torch.Tensor, name: str = "the reference") -> DeviceRows:
    """logits: float32 ``[tokens, vocabulary]``.

    Raises ArtifactError, with ``name`` and the row, for a logit that is not finite.
    """
    least, largest = torch.aminmax(logits, dim=-1)  # a NaN is both
    finite = torch.isfinite(least) & torch.isfinite(largest)
    if not bool(finite.all()):
        raise not_finite(name, int(finite.to(torch.int8).argmin()), len(logits))
    highest = largest.to(torch.float64)
    log_sum = torch.empty_like(highest)
    for part in _portions(logits):
        log_sum[part] = logits[part].to(torch.float64).sub_(highest[part, None]).exp_().sum(-1).log_()
    return DeviceRows(highest, log_sum, logits.argmax(-1))


def compare_rows(
    reference_logits: torch.Tensor,
    reference: DeviceRows,
    logits: torch.Tensor,
    targets: torch.Tensor,
    name: str = "the artifact",
) -> ComparedRows:
    """As :func:`quantkit.kernels.divergence.compare_rows`; all tensors lie on the device."""
    check_shapes(reference_logits, logits, targets, len(reference.top))
    own = reference_rows(logits, name)
    divergence = torch.empty_like(own.largest)
    for part in _portions(logits):
        divergence[part] = _diverge(
            reference_logits[part],
            logits[part],
            (reference.largest[part], reference.log_sum[part]),
            (own.largest[part], own.log_sum[part]),
        )
    before, after = _target_loss(reference_logits, reference, targets), _target_loss(logits, own, targets)
    found = torch.stack([divergence, before, after, torch.exp(-before), torch.exp(-after)]).cpu().numpy()
    tops = torch.stack([reference.top, own.top]).cpu().numpy()
    return ComparedRows(*found, *tops)


def _portions(logits: torch.Tensor) -> list[slice]:
    tokens, vocabulary = logits.shape
    fitting = max(1, TEMPORARY_BYTES // (8 * _TEMPORARIES * vocabulary))
    return spans(tokens, min(MOST_ROWS, 1 << (fitting.bit_length() - 1)))


def _target_loss(logits: torch.Tensor, rows: DeviceRows, targets: torch.Tensor) -> torch.Tensor:
    at_target = torch.gather(logits, 1, targets.clamp(min=0)[:, None])[:, 0].to(torch.float64)
    return torch.where(targets < 0, math.nan, rows.log_sum - (at_target - rows.largest))


def _diverge(
    left: torch.Tensor,
    right: torch.Tensor,
    left_rows: tuple[torch.Tensor, torch.Tensor],
    right_rows: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """float64 ``[rows]``; ``left_rows``, ``right_rows``: largest logit and log of the sum of each row."""
    apart = (right_rows[0] + right_rows[1]) - (left_rows[0] + left_rows[1])
    distance = right.to(torch.float64).sub_(left).sub_(apart[:, None])
    likely = left.to(torch.float64).sub_(left_rows[0][:, None]).sub_(left_rows[1][:, None]).exp_()
    terms = right.to(torch.float64).sub_(right_rows[0][:, None]).sub_(right_rows[1][:, None]).exp_()
    terms.sub_(likely).addcmul_(likely, distance, value=-1)
    series = torch.full_like(distance, 1 / math.factorial(_TERMS))
    for power in range(_TERMS - 1, 1, -1):
        series.mul_(distance).add_(1 / math.factorial(power))
    series.mul_(distance).mul_(distance).mul_(likely)
    return torch.where(distance.abs() < _SERIES, series, terms).sum(-1)
