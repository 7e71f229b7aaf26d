"""Gates: what may be written, what they are compared with, and that nothing unknown passes."""

from __future__ import annotations

import math
import operator
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import GateError
from quantkit.gates import METRICS, check_gates, failed_gates, failure, figure, parse_gate
from tests.sample_evaluations import sample, with_golden, without_anything

THREE = sample(3, 4, 4)
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@pytest.mark.parametrize(
    ("text", "artifact", "metric", "end", "comparison", "limit"),
    [
        ("kld > 0.02", None, "kld", "", ">", 0.02),
        ("  kld>.02 ", None, "kld", "", ">", 0.02),
        ("kld.high >= 2e-2", None, "kld", "high", ">=", 0.02),
        ("kld_99.9 > 1", None, "kld_99.9", "", ">", 1),
        ("kld_median<=1", None, "kld_median", "", "<=", 1),
        ("agreement < 95 %", None, "agreement", "", "<", 0.95),
        ("agreement.low < 0.95", None, "agreement", "low", "<", 0.95),
        ("size > 70GB", None, "size", "", ">", 70e9),
        ("size > 1.5 GiB", None, "size", "", ">", 1.5 * 2**30),
        ("size > 100", None, "size", "", ">", 100),
        ("w4a16-gptq: kld > 1", "w4a16-gptq", "kld", "", ">", 1),
        ("a name: with colons:ratio > 1.01", "a name: with colons", "ratio", "", ">", 1.01),
        ("golden < 90%", None, "golden", "", "<", 0.9),
    ],
)
def test_what_may_be_written(text: str, artifact: str | None, metric: str, end: str, comparison: str, limit: float) -> None:
    gate = parse_gate(text)
    assert (gate.artifact, gate.metric, gate.end, gate.comparison, gate.limit) == (artifact, metric, end, comparison, limit)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a gate"),
        ("kld", "is not a gate"),
        ("kld = 1", "is not a gate"),
        ("kld > high", "is not a gate"),
        ("kld > nan", "is not a gate"),
        ("kld > \u0661", "is not a gate"),
        ("kld > 1e\u0663", "is not a gate"),
        (5, "5 is not a gate"),
        (None, "None is not a gate"),
        ("klf > 1", "no metric 'klf'"),
        ("kld_98 > 1", "no metric 'kld_98'"),
        ("bits.high > 4", "no interval"),
        ("kld_99.high > 4", "no interval"),
        ("kld > 1 GB", "no unit"),
        ("size > 70 GX", "bytes, kB"),
        ("size > 70 %", "bytes, kB"),
        ("agreement < 95", "between 0 and 1"),
        ("kld > 1e999", "too large"),
    ],
)
def test_what_may_not(text: Any, says: str) -> None:
    for read in (parse_gate, lambda text: failed_gates(THREE, [text]), lambda text: check_gates(text, [], golden=True)):
        with pytest.raises(GateError) as caught:
            read(text)
    assert says in str(caught.value)
    assert caught.value.exit_code == 10


_SPACE = st.sampled_from(["", " ", "  ", "\t"])
_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "gib": 2**30, "KiB": 2**10, "TB": 10**12}


@given(
    st.none() | st.text(min_size=1).filter(lambda name: name == name.strip()),
    st.sampled_from(METRICS),
    st.sampled_from(["", "low", "high"]),
    st.sampled_from(sorted(COMPARISONS)),
    st.floats(0, 1e15),
    st.data(),
)
def test_every_gate_is_read_as_it_was_meant(
    artifact: str | None, metric: str, end: str, comparison: str, limit: float, data: st.DataObject
) -> None:
    share = "agreement" in metric or metric == "golden"
    unit = (
        data.draw(st.sampled_from(sorted(_UNITS))) if metric == "size" else data.draw(st.sampled_from(["", "%"])) if share else ""
    )
    limit = min(limit, 100.0 if unit == "%" else 1.0) if share else limit
    end = end if metric in ("perplexity", "ratio", "kld", "agreement", "golden") else ""
    parts = [*([] if artifact is None else [artifact, ":"]), f"{metric}.{end}" if end else metric, comparison, f"{limit!r}", unit]
    gate = parse_gate("".join(part + data.draw(_SPACE) for part in parts))
    expected = limit * _UNITS[unit] if metric == "size" else limit / 100 if unit else limit
    assert (gate.artifact, gate.metric, gate.end, gate.comparison, gate.limit) == (artifact, metric, end, comparison, expected)


_PIECES = st.sampled_from(
    [*METRICS, *COMPARISONS, ".low", ".high", ":", ".", "1", "-1", "1e9", "5.", "%", "GB", "\n", " ", "nan", "\u0663"]
)


@given(st.text(max_size=30) | st.lists(_PIECES, max_size=9).map("".join))
def test_any_other_text_is_refused(text: str) -> None:
    try:
        gate = parse_gate(text)
    except GateError as error:
        assert len(str(error)) < 400
        return
    assert gate.metric in METRICS and gate.comparison in COMPARISONS and math.isfinite(gate.limit)
    assert gate.artifact is None or (gate.artifact and text.strip().startswith(gate.artifact))
    assert failed_gates(with_golden(THREE), [replace(gate, artifact=None)]) is not None


@given(
    st.sampled_from([metric for metric in METRICS if metric != "golden"]),
    st.sampled_from(sorted(COMPARISONS)),
    st.floats(0, 1, allow_subnormal=False),
)
def test_a_gate_is_crossed_where_arithmetic_says_so(metric: str, comparison: str, share: float) -> None:
    evaluation = THREE
    values = [figure(evaluation, own, metric) for own in evaluation.artifacts]
    limit = min(1.0, share) if "agreement" in metric else min(values) + share * (max(values) - min(values))
    crossed = failed_gates(evaluation, [parse_gate(f"{metric} {comparison} {limit!r}")])
    expected = [own.name for own, value in zip(evaluation.artifacts, values, strict=True) if COMPARISONS[comparison](value, limit)]
    assert [one.artifact for one in crossed] == expected


def test_figures_are_those_of_the_evaluation() -> None:
    evaluation = with_golden(sample(2))
    own = evaluation.artifacts[1]
    known = [share for share in own.router_agreement if share is not None]
    expected = {
        "perplexity": own.scores.perplexity.value,
        "ratio": own.scores.ratio.value,
        "kld": own.scores.divergence.value,
        "kld_median": own.scores.divergence_percentiles["50"],
        "kld_90": own.scores.divergence_percentiles["90"],
        "kld_99": own.scores.divergence_percentiles["99"],
        "kld_99.9": own.scores.divergence_percentiles["99.9"],
        "kld_max": own.scores.divergence_percentiles["100"],
        "agreement": own.scores.agreement.value,
        "router_agreement": min(known),
        "router_agreement_mean": sum(known) / len(known),
        "bits": 8 * own.bytes / own.parameters,
        "size": own.bytes,
        "golden": evaluation.golden[2].accuracy.value,
    }
    assert set(expected) == set(METRICS)
    for metric, value in expected.items():
        assert figure(evaluation, own, metric) == value
    assert figure(evaluation, own, "kld", "high") == own.scores.divergence.high
    assert figure(evaluation, own, "agreement", "low") == own.scores.agreement.low


def test_the_reference_is_not_asked_for_an_artifact_called_like_it() -> None:
    evaluation = with_golden(sample(2))
    renamed = replace(evaluation.artifacts[1], name=evaluation.golden[0].name)
    answers = (*evaluation.golden[:2], replace(evaluation.golden[2], name=renamed.name))
    evaluation = replace(evaluation, artifacts=(evaluation.artifacts[0], renamed), golden=answers)
    wanted, other = answers[2].accuracy.value, answers[0].accuracy.value
    assert figure(evaluation, renamed, "golden") == wanted != other


def test_a_gate_may_name_one_artifact() -> None:
    evaluation = sample(2)
    one = failed_gates(evaluation, [parse_gate("Q6_K: bits > 1")])
    assert [failed.artifact for failed in one] == ["Q6_K"]
    assert len(failed_gates(evaluation, [parse_gate("bits > 1")])) == 2
    with pytest.raises(GateError, match=r"no artifact here is called 'Q9'.*fp8-dynamic, Q6_K"):
        failed_gates(evaluation, [parse_gate("Q9: bits > 1")])


def test_gates_may_be_texts_and_name_a_path_however_written() -> None:
    evaluation = sample(2)
    parsed = failed_gates(evaluation, [parse_gate("bits > 1"), parse_gate("Q6_K: bits > 1")])
    assert failed_gates(evaluation, ["bits > 1", "Q6_K: bits > 1"]) == parsed
    with pytest.raises(GateError, match="5 is not a gate"):
        failed_gates(evaluation, 5)  # type: ignore[arg-type]
    assert failed_gates(evaluation, "bits > 1") == failed_gates(evaluation, parse_gate("bits > 1")) == parsed[:2]
    here = replace(evaluation, artifacts=tuple(replace(own, path=f"out/{own.name}") for own in evaluation.artifacts))
    for name in ("./out/Q6_K", "out/Q6_K/", "out/./Q6_K", os.path.abspath("out/Q6_K")):
        assert [one.artifact for one in failed_gates(here, f"{name}: bits > 1")] == ["Q6_K"]


def test_the_end_of_the_interval_is_stricter() -> None:
    evaluation = sample(1)
    divergence = evaluation.artifacts[0].scores.divergence
    between = (divergence.value + divergence.high) / 2
    assert not failed_gates(evaluation, [parse_gate(f"kld > {between}")])
    assert failed_gates(evaluation, [parse_gate(f"kld.high > {between}")])


@pytest.mark.parametrize("text", ["kld.high > 1", "kld.low < 0", "router_agreement < 0", "router_agreement_mean < 0", "golden < 0"])
def test_what_is_not_known_fails(text: str) -> None:
    failed = failed_gates(without_anything(sample(1)), [parse_gate(text)])
    assert len(failed) == 1
    assert math.isnan(failed[0].value)
    assert "not known" in failed[0].message


def test_a_figure_that_is_not_a_number_fails() -> None:
    evaluation = sample(1)
    own = evaluation.artifacts[0]
    scores = replace(own.scores, divergence=replace(own.scores.divergence, value=math.nan), divergence_percentiles={})
    broken = replace(evaluation, artifacts=(replace(own, scores=scores, router_agreement=(math.nan,)),))
    for text in ("kld > 1", "kld < 0", "kld_max > 1", "router_agreement < 0", "router_agreement_mean < 0"):
        assert failed_gates(broken, [parse_gate(text)])


def test_the_message_says_what_where_and_by_how_much() -> None:
    evaluation = sample(5)
    failed = failed_gates(evaluation, [parse_gate("w4a16-rtn: kld > 0.02"), parse_gate("w4a16-rtn: size > 60GB")])
    text = str(failure(failed))
    assert text.startswith("2 gates are crossed:")
    assert "w4a16-rtn: kld is 0.0342, and the gate says > 0.02: beyond it by 0.0142 (71 % of the limit)" in text
    assert "size is 61.0248 GB, and the gate says > 60 GB: beyond it by 1.02476 GB (1.71 % of the limit)" in text
    near_zero = failed_gates(evaluation, ["w4a16-rtn: kld > 1e-12", "w4a16-rtn: kld > 0.0001", "w4a16-rtn: kld > 0.01"])
    assert [one.message.partition("beyond it by ")[2] for one in near_zero] == ["0.0342", "0.0341", "0.0242 (242 % of the limit)"]
    exact = failed_gates(evaluation, [parse_gate("w4a16-rtn: kld >= 0.0342")])
    assert "exactly at the limit" in str(failure(exact))
    assert failure(exact).exit_code == 10


def test_mistakes_are_found_before_anything_is_measured() -> None:
    paths = ["out/w4a16-gptq", "files/model-Q4_K_M.gguf"]
    for name in ("w4a16-gptq", "model-Q4_K_M", "model-Q4_K_M.gguf", "out/w4a16-gptq"):
        check_gates([parse_gate(f"{name}: kld > 1")], paths, golden=False)
    for name in ("./out/w4a16-gptq", "out/w4a16-gptq/", "out//w4a16-gptq", "out/x/../w4a16-gptq", os.path.abspath(paths[0])):
        check_gates([f"{name}: kld > 1"], paths, golden=False)
        check_gates("./out/w4a16-gptq/: kld > 1", [name], golden=False)
    check_gates("~/out/w4a16-gptq: kld > 1", [Path.home() / "out/w4a16-gptq"], golden=False)
    for name in ("gptq", "out", "other/w4a16-gptq", "./", "~nobody\0/w4a16-gptq"):
        with pytest.raises(GateError, match="no artifact here is called"):
            check_gates(f"{name}: kld > 1", paths, golden=False)
    with pytest.raises(GateError, match="no artifact here is called 'Q6_K'"):
        check_gates([parse_gate("Q6_K: kld > 1")], paths, golden=False)
    with pytest.raises(GateError, match="--golden"):
        check_gates([parse_gate("golden < 0.5")], paths, golden=False)
    check_gates([parse_gate("golden < 0.5")], paths, golden=True)
