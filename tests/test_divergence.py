"""Losses and divergences against float64 numpy, for tiny and huge differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from quantkit.errors import ArtifactError
from quantkit.kernels.divergence import ComparedRows, compare_rows, reference_rows, target_loss
from quantkit.team import Team
from tests.exact_divergence import COMPARISONS, exact_divergence, exact_figures, rows


def compare(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> ComparedRows:
    return compare_rows(reference, reference_rows(reference), logits, targets)


@settings(max_examples=80, deadline=None)
@given(*COMPARISONS)
def test_equals_extended_precision(tokens: int, vocabulary: int, seed: int, spread: float, noise: float, shift: float) -> None:
    reference = rows(tokens, vocabulary, seed, spread)
    logits = reference + rows(tokens, vocabulary, seed + 1, noise) + shift
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    found = compare(reference, logits, targets)
    expected = {name: figure.astype(float) for name, figure in exact_figures(reference, logits, targets).items()}
    np.testing.assert_allclose(found.reference_loss, expected["reference_loss"], rtol=1e-6, atol=2e-7)
    np.testing.assert_allclose(found.loss, expected["loss"], rtol=1e-6, atol=2e-7)
    np.testing.assert_allclose(found.reference_probability, expected["reference_probability"], rtol=2e-6)
    np.testing.assert_allclose(found.probability, expected["probability"], rtol=2e-6, atol=1e-300)
    np.testing.assert_allclose(found.divergence, exact_divergence(reference, logits).astype(float), rtol=1e-5, atol=1e-15)
    assert np.array_equal(found.reference_top, reference.numpy().argmax(1)) and np.array_equal(found.top, logits.numpy().argmax(1))


@pytest.mark.parametrize("noise", [1e-3, 1e-4, 1e-5])
def test_tiny_divergences_keep_their_digits(noise: float) -> None:
    reference = rows(4, 50_001, 1)
    logits = reference + rows(4, 50_001, 2, noise)
    found, wanted = compare(reference, logits, torch.zeros(4, dtype=torch.int64)).divergence, exact_divergence(reference, logits)
    assert (wanted < noise**2).all() and (wanted > 0.1 * noise**2).all()
    np.testing.assert_allclose(found, wanted.astype(float), rtol=3e-6)


def test_equal_models_have_no_divergence() -> None:
    reference = rows(3, 1000, 5)
    found = compare(reference, reference.clone(), torch.tensor([1, 2, 3]))
    assert (found.divergence == 0).all() and np.array_equal(found.loss, found.reference_loss)
    shifted = compare(reference.round(), reference.round() + 64, torch.tensor([1, 2, 3]))  # exactly the same distribution
    assert (shifted.divergence == 0).all() and np.array_equal(shifted.loss, shifted.reference_loss)


def test_extreme_logits() -> None:
    reference, logits = torch.full((3, 40), -1e4), torch.full((3, 40), -1e4)
    reference[:, 7], logits[:, 39] = 1e4, 1e4
    reference[1], logits[2] = 0.0, 0.0
    found = compare(reference, logits, torch.tensor([7, 0, 39]))
    assert found.divergence[0] == pytest.approx(2e4)
    assert found.divergence[1] == pytest.approx(float(exact_divergence(reference, logits)[1]))
    assert found.divergence[2] == pytest.approx(np.log(40))
    np.testing.assert_allclose(found.reference_loss, [0, np.log(40), 2e4])
    np.testing.assert_allclose(found.probability, [0, 0, 1 / 40])
    assert found.top.tolist() == [39, 39, 0] and found.reference_top.tolist() == [7, 0, 7]


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 64, 300])
def test_the_first_of_equal_logits_is_the_top(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randint(-2, 3, (200, vocabulary), generator=generator).float()
    assert np.array_equal(reference_rows(logits).top, logits.numpy().argmax(1))
    logits = torch.where(logits == 2, 0.0, -0.0)  # equal as well
    assert (reference_rows(logits).top == 0).all()
    assert (reference_rows(torch.full((2, vocabulary), torch.finfo(torch.float32).min)).top == 0).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 15, 16, 20])
def test_logits_that_are_not_finite_are_an_error(value: float, place: int) -> None:
    reference, targets = rows(4, 21, 1), torch.zeros(4, dtype=torch.int64)
    broken = reference.clone()
    broken[2, place] = value
    with pytest.raises(ArtifactError, match=r"my\.gguf: position 2 of 4 has logits that are not finite"):
        compare_rows(reference, reference_rows(reference), broken, targets, name="my.gguf")
    with pytest.raises(ArtifactError, match="the reference: position 2"):
        reference_rows(broken)


def test_positions_without_target() -> None:
    reference = rows(3, 50, 1)
    found = compare(reference, reference * 1.1, torch.tensor([4, -1, 0]))
    assert np.isnan(found.loss).tolist() == [False, True, False] and np.isnan(found.reference_probability[1])
    assert np.isfinite(found.divergence).all()
    assert np.array_equal(target_loss(reference, reference_rows(reference), torch.tensor([4, -1, 0])), found.reference_loss, True)


def test_any_number_of_threads_and_any_portion_give_the_same_bits() -> None:
    reference, targets = rows(70, 5000, 1), torch.arange(70)
    logits = reference + rows(70, 5000, 2, 0.1)
    alone = compare(reference, logits, targets)
    with Team(3) as team:
        together = compare_rows(reference, reference_rows(reference, team), logits, targets, team)
    assert all(np.array_equal(getattr(alone, name), getattr(together, name)) for name in ComparedRows.__dataclass_fields__)
    one = compare(reference[5:6], logits[5:6], targets[5:6])
    assert one.divergence[0] == alone.divergence[5] and one.loss[0] == alone.loss[5]


def test_misuse() -> None:
    reference = rows(3, 50, 1)
    with pytest.raises(ValueError, match=r"logits \[3, 40\] against \[3, 50\]"):
        compare(reference, rows(3, 40, 1), torch.zeros(3, dtype=torch.int64))
    empty = compare(reference[:0], reference[:0], torch.zeros(0, dtype=torch.int64))
    assert empty.loss.shape == empty.divergence.shape == (0,)
