"""Figures and intervals against the same in words: loops over float64, and a bootstrap that draws windows one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.evaluation import Estimate
from quantkit.metrics import Group, Summary, TokenScores, holm, same_routes, student_quantile, student_tail, summarize

POSITIONS = (7, 3, 0, 12, 5, 1)


def random_scores(count: int, seed: int, like: TokenScores | None = None) -> TokenScores:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.rand(count, generator=generator) * 6 if like is None else like.reference_loss
    loss = reference + 0.3 * torch.randn(count, generator=generator)
    return TokenScores(
        reference_loss=reference,
        loss=loss,
        divergence=torch.rand(count, generator=generator) ** 4,
        agreement=torch.rand(count, generator=generator) > 0.2,
        probability_shift=torch.exp(-loss) - torch.exp(-reference),
    )


def everything(positions: tuple[int, ...]) -> Group:
    return Group("", np.arange(len(positions)))


def one_summary(
    artifacts: Sequence[tuple[str, TokenScores]], positions: tuple[int, ...], group: Group, *, resamples: int, seed: int
) -> Summary:
    [found] = summarize(artifacts, positions, [group], resamples=resamples, seed=seed)
    return found


def chosen(values: torch.Tensor, windows: list[int], positions: tuple[int, ...]) -> list[float]:
    """The values of some windows, window by window; a window may come twice."""
    starts = [sum(positions[:number]) for number in range(len(positions))]
    return [float(values[starts[number] + place]) for number in windows for place in range(positions[number])]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def percentile(values: list[float], share: float) -> float:
    """Between the two nearest in order, linearly."""
    ordered = sorted(values)
    place = share / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_figures_are_those_of_loops() -> None:
    scores = random_scores(sum(POSITIONS), 1)
    for windows in ([0, 1, 2, 3, 4, 5], [1, 3, 4]):
        group = Group("some", np.array(windows))
        [found] = one_summary([("one", scores)], POSITIONS, group, resamples=0, seed=0).scores
        reference, loss, divergence, agreement, shift = (
            chosen(values, windows, POSITIONS)
            for values in (scores.reference_loss, scores.loss, scores.divergence, scores.agreement, scores.probability_shift)
        )
        assert found.positions == len(loss)
        perplexity = math.exp(mean(loss))
        # As llama.cpp has it: mean of squares less square of the mean, over one less than there are.
        error = perplexity * math.sqrt((mean([value * value for value in loss]) - mean(loss) ** 2) / (len(loss) - 1))
        expected = {
            "perplexity": perplexity,
            "reference_perplexity": math.exp(mean(reference)),
            "ratio": math.exp(mean(loss) - mean(reference)),
            "divergence": mean(divergence),
            "agreement": mean(agreement),
            "probability_shift": mean(shift),
            "perplexity_error": error,
            "probability_shift_square": math.sqrt(mean([value * value for value in shift])),
        }
        for name, value in expected.items():
            figure = getattr(found, name)
            assert (figure.value if isinstance(figure, Estimate) else figure) == pytest.approx(value, rel=1e-12), name
        assert list(found.divergence_percentiles) == ["50", "90", "99", "99.9", "100"]
        for name, value in found.divergence_percentiles.items():
            assert value == pytest.approx(percentile(divergence, float(name)), rel=1e-12)


def interval(drawn: list[float], figure: float, windows: int) -> tuple[float, float]:
    """Both ends: percentiles, stretched by Student's t of a table, the longer side by what skewed windows ask for."""
    student = {5: 2.7764}[windows]
    below, above = (
        math.sqrt(windows / (windows - 1)) * student / 1.96 * abs(percentile(drawn, share) - figure) for share in (2.5, 97.5)
    )
    longer = abs(above - below)
    return figure - below - longer * (below > above), figure + above + longer * (above > below)


def test_student_quantiles_are_those_of_tables() -> None:
    normal = 1.959964
    table = {2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582, 9: 2.262157, 19: 2.093024, 49: 2.009575, 10**4: 1.960201}
    for freedom, value in table.items():
        assert student_quantile(normal, freedom) == pytest.approx(value, rel=8e-3 / (freedom - 1) ** 2 + 1e-6)


def test_intervals_are_those_of_windows_drawn_one_by_one() -> None:
    scores = random_scores(sum(POSITIONS), 2)
    artifacts = [("one", scores), ("other", random_scores(sum(POSITIONS), 3, scores))]
    resamples, seed = 200, 5
    summary = one_summary(artifacts, POSITIONS, replace(everything(POSITIONS), name="all"), resamples=resamples, seed=seed)
    present = [number for number, count in enumerate(POSITIONS) if count]  # a window without predictions is never drawn
    generator = np.random.default_rng([seed, xxhash.xxh3_64_intdigest(b"all")])
    draws = [[present[index] for index in row] for row in generator.integers(len(present), size=(resamples, len(present))).tolist()]
    for number, (_, values) in enumerate(artifacts):
        found = summary.scores[number]
        for name, column in (("divergence", values.divergence), ("agreement", values.agreement)):
            drawn = [mean(chosen(column, windows, POSITIONS)) for windows in draws]
            estimate = getattr(found, name)
            low, high = interval(drawn, estimate.value, len(present))
            assert estimate.low == pytest.approx(max(low, 0), rel=1e-3)
            assert estimate.high == pytest.approx(min(high, 1), rel=1e-3)
        apart = values.loss.double() - values.reference_loss.double()
        low, high = interval([mean(chosen(apart, windows, POSITIONS)) for windows in draws], mean(apart.tolist()), len(present))
        assert found.ratio.low == pytest.approx(math.exp(low), rel=1e-3)
        assert found.ratio.high == pytest.approx(math.exp(high), rel=1e-3)
    apart = artifacts[0][1].loss.double() - artifacts[1][1].loss.double()
    drawn = [mean(chosen(apart, windows, POSITIONS)) for windows in draws]
    difference = summary.differences[0, 1]
    assert (difference.first, difference.second) == ("one", "other")
    assert difference.log_perplexity.value == pytest.approx(mean(apart.tolist()), rel=1e-9)
    low, high = interval(drawn, mean(apart.tolist()), len(present))
    assert difference.log_perplexity.low == pytest.approx(low, rel=1e-3)
    assert difference.log_perplexity.high == pytest.approx(high, rel=1e-3)


def test_intervals_cover_what_they_promise() -> None:
    """Windows of unlike difficulty: of 95 % intervals about that many hold the truth, where tokens are far from independent."""
    generator = np.random.default_rng(1)
    windows, length, truth, trials = 80, 20, 3.0, 250
    covered = naive = 0
    for trial in range(trials):
        level = truth + 0.7 * generator.standard_normal((windows, 1))
        losses = torch.from_numpy((level + 0.5 * generator.standard_normal((windows, length))).astype(np.float32).reshape(-1))
        scores = replace(random_scores(windows * length, trial), loss=losses)
        positions = (length,) * windows
        [found] = one_summary([("one", scores)], positions, everything(positions), resamples=400, seed=trial).scores
        covered += found.perplexity.low <= math.exp(truth) <= found.perplexity.high
        naive += abs(found.perplexity.value - math.exp(truth)) <= 1.96 * found.perplexity_error
    assert 0.90 <= covered / trials <= 0.98
    assert naive / trials < 0.8  # what tokens taken as independent would promise


@pytest.mark.parametrize("windows", [3, 4, 10, 20])
@pytest.mark.parametrize(("kind", "least"), [("normal", 0.93), ("lognormal", 0.90)])
def test_intervals_of_few_windows_cover_what_they_promise(windows: int, kind: str, least: float) -> None:
    """Of 95 % intervals at least so many hold the truth; percentiles alone hold it in 75 % of cases from three windows."""
    trials = 800
    draws = np.random.default_rng(2).standard_normal((2, trials * windows))
    first, second = 3 + 0.5 * draws if kind == "normal" else np.exp(0.5 * draws)
    truth = 3.0 if kind == "normal" else math.exp(0.125)
    scores = random_scores(trials * windows, 1)
    artifacts = [(name, replace(scores, divergence=torch.from_numpy(own))) for name, own in (("one", first), ("other", second))]
    groups = [Group(str(trial), np.arange(trial * windows, (trial + 1) * windows)) for trial in range(trials)]
    found = summarize(artifacts, (1,) * (trials * windows), groups, resamples=300, seed=0)
    alone = sum(one.scores[0].divergence.low <= truth <= one.scores[0].divergence.high for one in found)
    apart = sum(one.differences[0, 1].divergence.low <= 0 <= one.differences[0, 1].divergence.high for one in found)
    assert least <= alone / trials <= 0.98
    assert 0.93 <= apart / trials <= 0.985


def test_student_tails_are_those_of_tables() -> None:
    five = {2: 4.302653, 3: 3.182446, 4: 2.776445, 9: 2.262157, 49: 2.009575, 10**4: 1.960201}
    one_in_a_thousand = {2: 31.599055, 3: 12.923979, 10: 4.586894, 30: 3.645959}
    for share, table in ((0.05, five), (0.001, one_in_a_thousand)):
        for freedom, distance in table.items():
            assert student_tail(distance, freedom) == pytest.approx(share, rel=1e-6)
    assert student_tail(0, 5) == 1 and student_tail(1e9, 5) == pytest.approx(0, abs=1e-12)


@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=9), st.floats(0.001, 0.999))
def test_holm_rejects_step_by_step(p_values: list[float], level: float) -> None:
    """The smallest against level / n, the next one against level / (n - 1), until one is too large."""
    known = sorted((value, place) for place, value in enumerate(p_values) if not math.isnan(value))
    rejected = set()
    for number, (value, place) in enumerate(known):
        if not (len(known) - number) * value < level:
            break
        rejected.add(place)
    adjusted = holm(p_values)
    assert {place for place, value in enumerate(adjusted) if value < level} == rejected
    assert [math.isnan(value) for value in adjusted] == [math.isnan(value) for value in p_values]


def test_many_differences_are_judged_together() -> None:
    """Of 28 differences that are none, some interval leaves out zero in most evaluations; some verdict is wrong in one of 20."""
    trials, windows, artifacts = 120, 12, 8
    draws = np.random.default_rng(3).lognormal(0, 0.5, (artifacts, trials * windows))
    scores = random_scores(trials * windows, 1)
    named = [(str(number), replace(scores, divergence=torch.from_numpy(own))) for number, own in enumerate(draws)]
    groups = [Group(str(trial), np.arange(trial * windows, (trial + 1) * windows)) for trial in range(trials)]
    found = [list(one.differences.values()) for one in summarize(named, (1,) * (trials * windows), groups, resamples=200, seed=0)]
    alone = sum(any(pair.divergence.low > 0 or pair.divergence.high < 0 for pair in pairs) for pairs in found)
    together = sum(any(pair.divergence_p_value < 0.05 for pair in pairs) for pairs in found)
    assert alone / trials > 0.4
    assert together / trials <= 0.07


def test_a_single_pair_is_judged_by_its_interval() -> None:
    trials, windows = 200, 8
    draws = np.random.default_rng(4).standard_normal((2, trials * windows))
    scores = random_scores(trials * windows, 1)
    named = [("one", replace(scores, divergence=torch.from_numpy(2 + draws[0])))]
    named.append(("other", replace(scores, divergence=torch.from_numpy(3 + draws[1]))))
    groups = [Group(str(trial), np.arange(trial * windows, (trial + 1) * windows)) for trial in range(trials)]
    pairs = [one.differences[0, 1] for one in summarize(named, (1,) * (trials * windows), groups, resamples=100, seed=0)]
    verdicts = [pair.divergence_p_value < 0.05 for pair in pairs]
    assert verdicts == [pair.divergence.low > 0 or pair.divergence.high < 0 for pair in pairs]
    assert 0.2 < sum(verdicts) / trials < 0.8


def test_pairs_share_their_draws() -> None:
    """An artifact that is a hair worse everywhere differs by a sharp amount, although each figure is uncertain."""
    positions = (10,) * 40
    scores = random_scores(400, 4)
    worse = replace(scores, loss=scores.loss + 0.01, divergence=scores.divergence + 0.001)
    summary = one_summary([("one", scores), ("worse", worse)], positions, everything(positions), resamples=300, seed=0)
    difference = summary.differences[0, 1]
    assert difference.divergence.low == pytest.approx(-0.001, rel=1e-3) == difference.divergence.high
    assert difference.log_perplexity.low == pytest.approx(-0.01, rel=1e-3) == difference.log_perplexity.high
    assert summary.scores[0].divergence.high - summary.scores[0].divergence.low > 0.01
    same = one_summary([("one", scores), ("copy", scores)], positions, everything(positions), resamples=50, seed=0)
    assert same.differences[0, 1].divergence == Estimate(0.0, 0.0, 0.0)
    assert difference.divergence_p_value < 1e-9
    assert same.differences[0, 1].divergence_p_value == 1


@pytest.mark.parametrize(("positions", "resamples"), [((9,), 100), ((9, 0), 100), ((5, 4), 100), ((5, 3, 1), 0)])
def test_without_resamples_or_windows_there_is_no_interval(positions: tuple[int, ...], resamples: int) -> None:
    scores = random_scores(9, 6)
    summary = one_summary(
        [("a", scores), ("b", random_scores(9, 7, scores))], positions, everything(positions), resamples=resamples, seed=0
    )
    found = summary.scores[0]
    for estimate in (found.perplexity, found.ratio, found.divergence, found.agreement, summary.differences[0, 1].divergence):
        assert math.isfinite(estimate.value) and math.isnan(estimate.low) and math.isnan(estimate.high)
    assert math.isnan(summary.differences[0, 1].divergence_p_value)
    assert math.isfinite(found.perplexity_error)


def test_one_position_has_no_standard_error() -> None:
    [found] = one_summary([("a", random_scores(1, 8))], (1,), everything((1,)), resamples=10, seed=0).scores
    assert math.isnan(found.perplexity_error) and math.isfinite(found.perplexity.value)


@settings(max_examples=30, deadline=None)
@given(
    positions=st.lists(st.integers(0, 6), min_size=3, max_size=8).filter(lambda counts: sum(map(bool, counts)) > 2),
    seed=st.integers(0, 99),
)
def test_intervals_lie_around_figures_within_what_these_can_be(positions: list[int], seed: int) -> None:
    counts = tuple(positions)
    scores = random_scores(sum(counts), seed)
    [found] = one_summary([("a", scores)], counts, everything(counts), resamples=40, seed=seed).scores
    assert 0 <= found.divergence.low <= found.divergence.value <= found.divergence.high
    assert 0 <= found.agreement.low <= found.agreement.value <= found.agreement.high <= 1
    assert -1 <= found.probability_shift.low <= found.probability_shift.high <= 1
    assert 0 < found.ratio.low <= found.ratio.value <= found.ratio.high
    again = one_summary([("a", scores)], counts, everything(counts), resamples=40, seed=seed).scores[0]
    assert again == found


def test_groups_are_by_label() -> None:
    groups = Group.by(["b.de", "a", "", "b.de", "a"])
    assert {group.name: group.windows.tolist() for group in groups} == {"a": [1, 4], "b.de": [0, 3]}


def test_routes_agree_when_the_experts_are_the_same_in_any_order() -> None:
    reference = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[1, 2], [3, 4]]], dtype=torch.int16)  # [3 tokens, 2 layers, 2]
    other = torch.tensor([[[1, 0], [2, 4]], [[4, 5], [7, 6]], [[1, 3], [0, 4]]], dtype=torch.int16)
    assert same_routes(reference, other).tolist() == [2, 1]
    assert same_routes(reference, reference).tolist() == [3, 3]
    assert same_routes(reference[:, :0], other[:, :0]).tolist() == []
