"""``quantkit eval`` and ``quantkit compare``: what reaches the library, what is shown and written, and how they end."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from quantkit.errors import CheckpointError, Interrupted
from quantkit.evaluate import EvaluationProgress, evaluate
from quantkit.evaluation import Evaluation
from quantkit.report.golden_words import gained_and_lost, golden_findings, p_value, time_spread
from quantkit.report.words import interval, number, percent, percent_interval, ratio, signed, size, summary, verdict
from quantkit_cli.display import Display
from quantkit_cli.evaluation import compare_command, evaluate_command
from quantkit_cli.evaluation_progress import evaluation_view
from quantkit_cli.evaluation_tables import print_evaluation
from tests.sample_evaluations import sample, with_golden, without_anything

MODULE = sys.modules[evaluate.__module__]  # as an attribute of the package, the name is the function

app = typer.Typer()
app.command("eval")(evaluate_command)
app.command("compare")(compare_command)


class Stub:
    """Stands for ``evaluate``: keeps what it was called with."""

    def __init__(self, answer: Evaluation | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[list[str], str, dict[str, Any]]] = []

    def __call__(self, artifacts: list[str], reference: str, **options: Any) -> Evaluation:
        self.calls.append((artifacts, reference, options))
        if options["progress"] is not None:
            options["progress"](EvaluationProgress("artifact", "w4a16-rtn", 3, 48, 400, 1000, 2.0))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub(sample(1))
    monkeypatch.setattr(MODULE, "evaluate", made)
    return made


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_options_reach_the_library(stub: Stub, tmp_path: Path) -> None:
    options = [
        "--text",
        "t.jsonl",
        "--revision",
        "r",
        "--window",
        64,
        "--windows",
        7,
        "--convention",
        "llama.cpp",
        "--golden",
        "g.jsonl",
    ]
    options += [
        "--device",
        "cuda",
        "--workers",
        3,
        "--cache",
        "c",
        "--cache-limit",
        "1.5GB",
        "--batch-tokens",
        99,
        "--seed",
        5,
        "--resamples",
        11,
    ]
    result = run("eval", "out/a", "--reference", "model", *options, "--float-activations")
    assert result.exit_code == 0, result.output
    ((artifacts, reference, given),) = stub.calls
    assert (artifacts, reference) == (["out/a"], "model")
    given = {name: value for name, value in given.items() if name not in ("progress", "stop")}
    assert given == {
        "text": "t.jsonl",
        "revision": "r",
        "window": 64,
        "windows": 7,
        "convention": "llama.cpp",
        "seed": 5,
        "device": "cuda",
        "workers": 3,
        "batch_tokens": 99,
        "cache": Path("c"),
        "cache_limit": 1_500_000_000,
        "resamples": 11,
        "round_activations": False,
        "golden": Path("g.jsonl"),
    }


def test_defaults(stub: Stub) -> None:
    assert run("eval", "~/a", "--reference", "~/m").exit_code == 0
    artifacts, reference, given = stub.calls[0]
    assert artifacts == [str(Path.home() / "a")]
    assert reference == str(Path.home() / "m")
    assert (given["window"], given["windows"], given["convention"], given["resamples"]) == (512, None, "full", 1000)
    assert (given["round_activations"], given["cache"], given["golden"], given["text"]) == (True, None, None, None)
    assert isinstance(given["stop"], threading.Event)


def test_one_artifact_is_shown(stub: Stub, tmp_path: Path) -> None:
    result = run("eval", "out/fp8-dynamic", "--reference", "model", "--save", tmp_path / "saved.json")
    assert result.exit_code == 0, result.output
    for piece in ("fp8-dynamic beside Llama-4-Scout", "0.00184", "98.46 %", "Router agreement, lowest", "Most divergent kinds"):
        assert piece in result.stdout
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert saved["artifacts"][0]["name"] == "fp8-dynamic"
    again = run("eval", "out/fp8-dynamic", "--reference", "model", "--save", tmp_path / "saved.json")
    assert again.exit_code == 5
    assert "exists already" in again.output
    assert len(stub.calls) == 1, "the place is checked before anything is measured"
    assert run("eval", "out/fp8-dynamic", "--reference", "model", "--save", tmp_path / "saved.json", "--force").exit_code == 0


def test_several_are_compared_and_reported(stub: Stub, tmp_path: Path) -> None:
    stub.answer = with_golden(sample())
    result = run("compare", *(f"out/{own.name}" for own in stub.answer.artifacts), "--reference", "m", "-o", tmp_path / "r")
    assert result.exit_code == 0, result.output
    for own in stub.answer.artifacts:
        assert own.name in result.stdout
    assert "Golden set" in result.stdout
    assert "Findings" in result.stdout
    assert "Q5_0 instead of Q4_K" in result.stdout
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["report.html", "report.json", "report.md"]
    assert len(stub.calls[0][0]) == 5
    assert run("compare", "a", "b", "--reference", "m", "-o", tmp_path / "r").exit_code == 5
    assert len(stub.calls) == 1
    quiet = run("compare", "a", "b", "--reference", "m", "-o", tmp_path / "r", "--force", "--quiet", "--title", "My <title>")
    assert quiet.stdout.split() == [str(tmp_path / "r" / name) for name in ("report.html", "report.md", "report.json")]
    assert "<title>My &lt;title&gt;</title>" in (tmp_path / "r" / "report.html").read_text()


def test_json_is_one_object(stub: Stub) -> None:
    stub.answer = without_anything(sample(1))
    result = run("eval", "out/a", "--reference", "m", "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content["artifacts"][0]["scores"]["divergence"]["low"] is None
    assert "failed_gates" not in content
    stub.answer = CheckpointError("bad shard")
    failed = run("eval", "out/a", "--reference", "m", "--json")
    assert failed.exit_code == 3
    assert json.loads(failed.stdout) == {"error": {"type": "CheckpointError", "message": "bad shard", "exit_code": 3}}


def test_a_crossed_gate_ends_with_its_own_code_after_the_report(stub: Stub, tmp_path: Path) -> None:
    stub.answer = sample(2)
    gates = ["--fail-if", "kld > 0.002", "--fail-if", "Q6_K: size > 1TB"]
    result = run("compare", "o/fp8-dynamic", "o/Q6_K", "--reference", "m", "-o", tmp_path, *gates)
    assert result.exit_code == 10
    assert "Q6_K: kld is 0.00271, and the gate says > 0.002: beyond it by 0.00071 (35.5 % of the limit)" in result.output
    assert (tmp_path / "report.html").exists()
    as_json = run("compare", "o/fp8-dynamic", "o/Q6_K", "--reference", "m", "-o", tmp_path / "again", *gates, "--json")
    assert as_json.exit_code == 10
    content = json.loads(as_json.stdout)
    assert [one["artifact"] for one in content["failed_gates"]] == ["Q6_K"]
    assert content["error"]["exit_code"] == 10
    assert len(content["artifacts"]) == 2
    passed = run(
        "compare", "o/fp8-dynamic", "o/Q6_K", "--reference", "m", "-o", tmp_path, "--force", "--fail-if", "kld > 1", "--json"
    )
    assert passed.exit_code == 0
    assert json.loads(passed.stdout)["failed_gates"] == []


@pytest.mark.parametrize(
    ("gate", "says"),
    [("klx > 1", "no metric"), ("kld", "not a gate"), ("zzz: kld > 1", "called 'zzz'"), ("golden < 1", "--golden")],
)
def test_a_wrong_gate_is_wrong_usage(stub: Stub, gate: str, says: str) -> None:
    result = run("eval", "out/a", "--reference", "m", "--fail-if", gate)
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())
    assert not stub.calls


def test_an_interruption_says_how_to_go_on(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quantkit", "eval", "out/a", "--reference", "my model"])
    for error in (Interrupted("stopped"), KeyboardInterrupt()):
        stub.answer = error  # type: ignore[assignment]
        monkeypatch.setattr(MODULE, "evaluate", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        result = run("eval", "out/a", "--reference", "my model")
        assert result.exit_code == 130
        assert "quantkit eval out/a --reference 'my model'" in result.output
        assert "resumes" in result.output


def test_wrong_options_are_wrong_usage(stub: Stub) -> None:
    assert run("eval", "a").exit_code == 2
    assert run("compare", "--reference", "m").exit_code == 2
    assert run("eval", "a", "--reference", "m", "--convention", "half").exit_code == 2
    assert run("eval", "a", "--reference", "m", "--window", "1").exit_code == 2
    assert not stub.calls


def test_the_commands_start_without_the_library() -> None:
    wanted = "('quantkit', 'torch', 'numba', 'numpy')"
    code = f"import quantkit_cli.evaluation, sys; print([name for name in {wanted} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------------- tables, progress


def shown(evaluation: Evaluation, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_evaluation(console, evaluation)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_tables_fit_a_terminal(count: int) -> None:
    text = shown(sample(count, 4, 4))
    table = [line for line in text.splitlines() if not line.startswith(("Note:", "Most divergent", "Compared", "512 windows"))]
    assert max(map(len, table)) <= 80
    for own in sample(count, 4, 4).artifacts:
        assert own.name in text


LONG = "the-name-of-an-artifact-that-says-how-it-was-made-with-all-its-options-" + "x" * 60


def renamed(evaluation: Evaluation, name: str) -> Evaluation:
    """With the name before that of every artifact."""
    artifacts = tuple(replace(own, name=name + own.name) for own in evaluation.artifacts)
    pairs = tuple(replace(pair, first=name + pair.first, second=name + pair.second) for pair in evaluation.differences)
    golden = tuple(replace(one, name=name + one.name) for one in evaluation.golden)
    return replace(evaluation, artifacts=artifacts, differences=pairs, golden=golden)


def all_figures(evaluation: Evaluation) -> list[str]:
    """What a comparison shows at least."""
    figures = []
    for own in evaluation.artifacts:
        figures += [
            size(own.bytes),
            f"{own.bits_per_weight:.2f}",
            ratio(own.scores.ratio.value),
            percent(own.scores.agreement.value, 1),
        ]
        figures += [number(own.scores.divergence.value), interval(own.scores.divergence)]
    for pair in evaluation.differences:
        figures += [signed(pair.divergence.value), interval(pair.divergence)]
        figures.append(verdict(pair.divergence, pair.divergence_p_value))
    for one in evaluation.golden:
        figures += [percent(one.accuracy.value, 1), percent_interval(one.accuracy, 1), gained_and_lost(one), p_value(one)]
        figures += [time_spread(one.latency), number(one.tokens_per_second.value), interval(one.tokens_per_second)]
    return [*figures, "mean KLD", "interval", "top-1", "verdict", "tokens/s"]


def test_without_a_terminal_nothing_is_cut_or_broken(stub: Stub, tmp_path: Path) -> None:
    evaluation = renamed(with_golden(sample()), LONG)
    stub.answer = evaluation
    result = run("compare", "a", "b", "--reference", "m", "-o", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    lines = result.stdout.splitlines()
    for own in evaluation.artifacts:
        row = next(line for line in lines if line.startswith((own.name, f" {own.name}")))
        assert size(own.bytes) in row
        assert all(figure in row for figure in (ratio(own.scores.ratio.value), interval(own.scores.divergence)))
    for figure in (*all_figures(evaluation), "perplexity", "99 %"):
        assert figure in result.stdout, figure
    said = [line[2:] for line in lines if line.startswith("- ")]
    assert said == golden_findings(evaluation) + summary(evaluation)
    stub.answer = renamed(sample(1), LONG)
    one = run("eval", "a", "--reference", "m").stdout
    assert f"{LONG}fp8-dynamic beside" in one and "…" not in one


@pytest.mark.parametrize("width", [40, 80, 120])
def test_on_a_terminal_names_are_broken_and_figures_are_not(width: int) -> None:
    evaluation = renamed(with_golden(sample()), LONG)
    text = shown(evaluation, width)
    assert "…" not in text
    for figure in all_figures(evaluation):
        assert figure in text, figure
    rows = text.split("Golden set")[1].split("\n-")[0]
    assert rows.count(LONG[:8]) == 2 * len(evaluation.golden), "every row of both tables has its name, or the beginning of it"


def test_names_with_control_characters_keep_lines_whole() -> None:
    evaluation = renamed(with_golden(sample(3, 4, 4)), "two\nlines\r\x1b[31m\u2028")
    for text in (shown(evaluation, 300), shown(renamed(sample(1, 4, 4), "two\nlines\x1b"), 300)):
        assert "two lines" in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u2028]", text)
        assert all("two lines" in line for line in text.splitlines() if "two" in line)


def test_tables_of_what_is_not_known() -> None:
    text = shown(without_anything(sample(2)))
    assert "no interval" in text
    assert "nan" not in text.replace("dynamic", "")
    assert "router" not in shown(without_anything(sample(1))).lower()
    odd = sample(2, 4, 4)
    named = replace(odd, artifacts=tuple(replace(own, name=f"[bold]{own.name}[/]") for own in odd.artifacts))
    assert "[bold]" in shown(named, 160)


def test_progress_without_a_terminal_is_plain_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with Display(console, threading.Event(), evaluation_view) as display:
        for step in range(40):
            display.update(EvaluationProgress("artifact", "w4a16", step // 10, 4, 100 * step, 4000, float(step)))
        display.update(EvaluationProgress("scores", "w4a16", 0, 0, 100, 400, 41.0))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "Artifact: 0 %, w4a16, layer 1 of 4"
    assert lines[1] == "Artifact: 25 %, 100 token-layers/s, 30 s left, w4a16, layer 2 of 4"
    assert lines[-1] == "Scoring: 25 %, w4a16"
    assert len(lines) == 5


def test_many_short_jobs_print_few_lines() -> None:
    """Twelve artifacts in six sweeps, two minutes in all."""
    console = Console(file=io.StringIO(), force_terminal=False)
    seconds = 0.0
    with Display(console, threading.Event(), evaluation_view) as display:
        for _ in range(6):
            for number in range(12):
                for done in range(5):
                    display.update(EvaluationProgress("artifact", f"artifact {number}", done, 4, done, 4, seconds))
                    seconds += 120 / (6 * 12 * 5)
        display.update(EvaluationProgress("intervals", "", 0, 0, 1, 4, seconds + 10))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert 10 <= len(lines) <= 13
    assert lines[0] == "Artifact: 0 %, artifact 0, layer 1 of 4"
    assert lines[-1] == "Intervals: 25 %"


def test_progress_keeps_to_its_line_whatever_the_name() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with Display(console, threading.Event(), evaluation_view) as display:
        display.update(EvaluationProgress("artifact", "two\nlines\x1b[2J", 0, 4, 100, 4000, 0.0))
        display.update(EvaluationProgress("scores", "two\nlines", 0, 0, 100, 400, 41.0))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "Artifact: 2 %, two lines\N{REPLACEMENT CHARACTER}[2J, layer 1 of 4",
        "Scoring: 25 %, two lines",
    ]


def test_progress_on_a_terminal_is_live() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    stop = threading.Event()
    with Display(console, stop, evaluation_view) as display:
        for step in range(8):
            display.update(EvaluationProgress("check", "w4a16", 0, 0, 10**9 * step, 2 * 10**10, float(step)))
        first = Console(file=io.StringIO(), width=100)
        first.print(display)
        stop.set()
        second = Console(file=io.StringIO(), width=100)
        second.print(display)
    assert isinstance(first.file, io.StringIO) and isinstance(second.file, io.StringIO)
    assert "Checking" in first.file.getvalue()
    assert "1.0 GB/s" in first.file.getvalue()
    assert "w4a16" in first.file.getvalue()
    assert "Stopping" in second.file.getvalue()
