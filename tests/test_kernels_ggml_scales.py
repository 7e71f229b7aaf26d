"""Quantizing to ggml's types without minimum and codebook: less error than ggml's for any weights, valid results for all."""

from __future__ import annotations

from typing import NamedTuple

import block_kernels
import numpy as np
import pytest
import torch

from quantkit.kernels import ggml_levels, ggml_symmetric

KERNELS = {
    "Q8_0": ggml_symmetric.quantize_q8_0,
    "Q4_0": ggml_symmetric.quantize_q4_0,
    "Q5_0": ggml_symmetric.quantize_q5_0,
    "Q3_K": ggml_symmetric.quantize_q3_k,
    "Q6_K": ggml_symmetric.quantize_q6_k,
    "IQ4_NL": ggml_levels.quantize_iq4_nl,
    "IQ4_XS": ggml_levels.quantize_iq4_xs,
    "MXFP4": ggml_levels.quantize_mxfp4,
}


class Limits(NamedTuple):
    """below: at most so much of ggml's error, without and with importance.  worst: relative error of ordinary rows.  small: of rows
    of small weights."""

    below: tuple[float, float]
    worst: float
    small: float


LIMITS = {
    "Q8_0": Limits((0.91, 0.84), 0.01, 0.007),
    "Q4_0": Limits((0.94, 0.97), 0.13, 0.08),
    "Q5_0": Limits((0.94, 0.96), 0.06, 0.045),
    "Q3_K": Limits((0.92, 0.975), 0.25, 0.14),
    "Q6_K": Limits((0.88, 0.85), 0.04, 0.02),
    "IQ4_NL": Limits((0.94, 0.94), 0.15, 0.12),
    "IQ4_XS": Limits((0.94, 0.94), 0.15, 0.12),
    "MXFP4": Limits((0.97, 0.97), 0.15, 0.12),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student", "real"])
@pytest.mark.parametrize("name", KERNELS)
def test_error_is_below_that_of_ggml(name: str, kind: str, weighted: bool) -> None:
    block_kernels.check_error_against_ggml(KERNELS[name], name, kind, weighted, LIMITS[name].below[weighted])


@pytest.mark.parametrize("name", KERNELS)
def test_search_lowers_the_error(name: str) -> None:
    block_kernels.check_search_helps(KERNELS[name], name)


@pytest.mark.parametrize("name", KERNELS)
def test_results_do_not_depend_on_how_weights_lie(name: str) -> None:
    block_kernels.check_layouts(KERNELS[name], name)


@pytest.mark.parametrize("searched", [0, 1])
@pytest.mark.parametrize("name", KERNELS)
def test_extreme_weights_and_importance_give_valid_blocks(name: str, searched: int) -> None:
    block_kernels.check_extremes(KERNELS[name], name, searched, LIMITS[name].worst)


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_not_finite_shows(name: str) -> None:
    block_kernels.check_what_is_not_finite_shows(KERNELS[name], name)


@pytest.mark.parametrize("name", KERNELS)
def test_small_weights_are_neither_clipped_nor_lost(name: str) -> None:
    block_kernels.check_small_weights(KERNELS[name], name, LIMITS[name].small)


@pytest.mark.parametrize("searched", [0, 1])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q3_K", "Q6_K"])
def test_weights_that_are_all_the_same_stay_exact(name: str, searched: int) -> None:
    weight = torch.full((16, 512), 0.02, dtype=torch.bfloat16)
    weight[8:] *= -3
    target, sums = block_kernels.run(KERNELS[name], name, weight, searched=searched)
    assert sums[0] == 0
    assert np.array_equal(block_kernels.values(name, target, 16), weight.float().numpy())


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_scale_is_near_the_best_of_all(name: str) -> None:
    """A fine grid of scales, each refitted, by brute force: the search is within 1 % of it, with importance too."""
    weight, importance = block_kernels.matrix("gaussian", 16, 256), block_kernels.importance_of(256)
    lowest = {"Q4_0": -8, "Q5_0": -16}[name]
    blocks, weighting = weight.reshape(-1, 32).astype(np.float64), np.tile(importance.reshape(-1, 32), (16, 1))
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    best = np.full(len(blocks), np.inf)
    for ratio in np.concatenate([np.linspace(0.4, 2.5, 600), np.linspace(-2.5, -0.4, 600)]):
        levels = np.clip(np.rint(blocks * (ratio * lowest) / extreme), lowest, -lowest - 1)
        scale = (weighting * blocks * levels).sum(1) / np.maximum((weighting * levels * levels).sum(1), 1e-30)
        best = np.minimum(best, (weighting * np.square(blocks - scale[:, None] * levels)).sum(1))
    _, sums = block_kernels.run(KERNELS[name], name, torch.from_numpy(weight), importance)
    assert best.sum() * 0.999 < sums[2] < best.sum() * 1.01
