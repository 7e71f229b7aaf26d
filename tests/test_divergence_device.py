"""Losses and divergences by torch's operations: against extended precision, against the kernel of the CPU, in any portions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from quantkit.errors import ArtifactError
from quantkit.kernels import divergence, divergence_device
from quantkit.kernels.divergence import ComparedRows
from tests.exact_divergence import COMPARISONS, exact_divergence, exact_figures, rows

FIGURES = ("divergence", "reference_loss", "loss", "reference_probability", "probability")


def compare(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> ComparedRows:
    return divergence_device.compare_rows(reference, divergence_device.reference_rows(reference), logits, targets)


@settings(max_examples=60, deadline=None)
@given(*COMPARISONS)
def test_equals_extended_precision_and_the_kernel_of_the_cpu(
    tokens: int, vocabulary: int, seed: int, spread: float, noise: float, shift: float
) -> None:
    reference = rows(tokens, vocabulary, seed, spread)
    logits = reference + rows(tokens, vocabulary, seed + 1, noise) + shift
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    found = compare(reference, logits, targets)
    expected = exact_figures(reference, logits, targets)
    for name in FIGURES:
        exact = 1e-17 if name == "divergence" else 1e-15
        np.testing.assert_allclose(getattr(found, name), expected[name].astype(float), 1e-11, exact + 1e-15 * abs(shift))
    cpu = divergence.compare_rows(reference, divergence.reference_rows(reference), logits, targets)
    for name in FIGURES:
        np.testing.assert_allclose(getattr(found, name), getattr(cpu, name), rtol=1e-5, atol=2e-7)
    assert np.array_equal(found.reference_top, cpu.reference_top) and np.array_equal(found.top, cpu.top)


@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-6])
def test_tiny_divergences_keep_their_digits(noise: float) -> None:
    reference = rows(4, 50_001, 1)
    logits = reference + rows(4, 50_001, 2, noise)
    wanted = exact_divergence(reference, logits)  # to 1e-19, beside 1e-13 and more
    assert (wanted < noise**2).all() and (wanted > 0.1 * noise**2).all()
    np.testing.assert_allclose(compare(reference, logits, torch.zeros(4, dtype=torch.int64)).divergence, wanted.astype(float), 3e-6)


def test_equal_models_have_no_divergence() -> None:
    reference = rows(3, 1000, 5)
    found = compare(reference, reference.clone(), torch.tensor([1, 2, 3]))
    assert (found.divergence == 0).all() and np.array_equal(found.loss, found.reference_loss)


def test_extreme_logits() -> None:
    largest = torch.finfo(torch.float32).max
    reference, logits = torch.full((4, 40), -1e4), torch.full((4, 40), -1e4)
    reference[:, 7], logits[:, 39] = 1e4, 1e4
    reference[1], logits[2] = 0.0, 0.0
    reference[3], logits[3] = largest, -largest
    reference[3, 5], logits[3, 5] = -largest, largest
    found = compare(reference, logits, torch.tensor([7, 0, 39, 5]))
    np.testing.assert_allclose(found.divergence, [2e4, 2e4 * 39 / 40 - np.log(40), np.log(40), 2.0 * largest])
    np.testing.assert_allclose(found.reference_loss, [0, np.log(40), 2e4, 2.0 * largest])
    np.testing.assert_allclose(found.probability, [0, 0, 1 / 40, 1])


@pytest.mark.parametrize("vocabulary", [1, 16, 17, 300])
def test_the_first_of_equal_logits_is_the_top(vocabulary: int) -> None:
    logits = torch.randint(-2, 3, (200, vocabulary), generator=torch.Generator().manual_seed(vocabulary)).float()
    assert np.array_equal(divergence_device.reference_rows(logits).top, logits.numpy().argmax(1))
    assert not divergence_device.reference_rows(torch.where(logits == 2, 0.0, -0.0)).top.any()  # equal as well


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 15, 20])
def test_logits_that_are_not_finite_are_the_same_error(value: float, place: int) -> None:
    reference, targets = rows(4, 21, 1), torch.zeros(4, dtype=torch.int64)
    broken = reference.clone()
    broken[2, place] = value
    messages = []
    for kernel in (divergence, divergence_device):
        with pytest.raises(ArtifactError, match=r"my\.gguf: position 2 of 4 has logits that are not finite") as caught:
            kernel.compare_rows(reference, kernel.reference_rows(reference), broken, targets, name="my.gguf")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    with pytest.raises(ArtifactError, match="the reference: position 2"):
        divergence_device.reference_rows(broken)


def test_positions_without_target_and_misuse() -> None:
    reference = rows(3, 50, 1)
    found = compare(reference, reference * 1.1, torch.tensor([4, -1, 0]))
    assert np.isnan(found.loss).tolist() == [False, True, False] and np.isnan(found.reference_probability[1])
    assert np.isfinite(found.divergence).all()
    with pytest.raises(ValueError, match=r"logits \[3, 40\] against \[3, 50\]"):
        compare(reference, rows(3, 40, 1), torch.zeros(3, dtype=torch.int64))
    assert compare(reference[:0], reference[:0], torch.zeros(0, dtype=torch.int64)).divergence.shape == (0,)


def test_portions_bound_the_memory_and_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, targets = rows(1100, 300, 1), torch.arange(1100) % 300
    logits = reference + rows(1100, 300, 2, 0.1)
    monkeypatch.setattr(divergence_device, "TEMPORARY_BYTES", 100 * 300 * 6 * 8)  # 100 rows: 64 are taken
    heights: list[int] = []
    diverge = divergence_device._diverge

    def counted(left: torch.Tensor, *rest: Any) -> torch.Tensor:
        heights.append(len(left))
        return diverge(left, *rest)

    monkeypatch.setattr(divergence_device, "_diverge", counted)
    whole = compare(reference, logits, targets)
    assert heights == [64] * 17 + [12]
    for first in (0, 512, 1024):
        part = slice(first, first + 512)
        found = compare(reference[part], logits[part], targets[part])
        assert all(np.array_equal(getattr(found, name), getattr(whole, name)[part]) for name in FIGURES)
