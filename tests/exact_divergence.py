"""Losses and divergences in extended precision, and logits to compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

Floats = NDArray[np.longdouble]

# tokens, vocabulary, seed, spread of the reference's logits, noise of the other's, and what all of the other's are shifted by
COMPARISONS: tuple[st.SearchStrategy[Any], ...] = (
    st.integers(1, 5),
    st.integers(1, 100) | st.integers(1000, 3000),
    st.integers(0, 2**31),
    st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    st.sampled_from([1e-5, 1e-3, 0.1, 1.0, 10.0]),
    st.sampled_from([0.0, 50.0, -900.0]),
)


def rows(tokens: int, vocabulary: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def log_probabilities(logits: torch.Tensor) -> Floats:
    values = logits.numpy().astype(np.longdouble)
    values -= values.max(1, keepdims=True)
    result: Floats = values - np.log(np.exp(values).sum(1, keepdims=True))
    return result


def exact_divergence(reference: torch.Tensor, logits: torch.Tensor) -> Floats:
    """sum p (log p - log q)."""
    left, right = log_probabilities(reference), log_probabilities(logits)
    result: Floats = (np.exp(left) * (left - right)).sum(1)
    return result


def exact_figures(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, Floats]:
    """By the names that ``ComparedRows`` has for them."""
    places = np.arange(len(targets)), targets.numpy()
    left, right = log_probabilities(reference)[places], log_probabilities(logits)[places]
    return {
        "divergence": exact_divergence(reference, logits),
        "reference_loss": -left,
        "loss": -right,
        "reference_probability": np.exp(left),
        "probability": np.exp(right),
    }
