"""The command line around calibration: what options become, what is shown and written, exit codes, interruption.

Calibration itself is replaced here: these are tests of the layer above it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from quantkit import CalibrationOptions, Progress
from quantkit.coverage import check_coverage
from quantkit.errors import CalibrationError
from quantkit.llama4 import parse_config
from quantkit.statistics import Statistics, save_statistics
from quantkit_cli.app import app
from quantkit_cli.display import Display
from quantkit_cli.progress import conversion_view, unit_progress
from tests.sample_statistics import sample_statistics
from tests.tiny_models import tiny_config

MAVERICK = parse_config(tiny_config("maverick"))
GIVEN = ("--calibration", "text.jsonl", "--samples", 9, "--sequence-length", 64, "--seed", 3, "--packing", "documents")
OPTIONS = CalibrationOptions("text.jsonl", 9, 64, 3, "documents", 5)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Library:
    """Stands for ``quantkit.calibrate`` and ``quantkit.convert``: notes how it was called, saves made-up statistics."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.raises: BaseException | None = None

    def calibrate(self, source: str, output: Path, **options: Any) -> Any:
        self.calls.append(((source, output), options))
        if options["progress"] is not None:
            for done in range(1, 9):
                options["progress"](done, 8, f"model.layers.{done // 4}.feed_forward.experts.{done}.down_proj")
        if self.raises is not None:
            raise self.raises
        output.mkdir()
        save_statistics(output, self.statistics)
        return SimpleNamespace(directory=output, statistics=self.statistics, seconds=1.5, imatrix=options["imatrix"])

    def convert(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append((arguments, options))
        return SimpleNamespace(artifacts=(), source_bytes=0, seconds=1.0, statistics=None)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library(sample_statistics(MAVERICK))
    monkeypatch.setattr("quantkit.calibrate", library.calibrate)
    monkeypatch.setattr("quantkit.convert", library.convert)
    return library


# ------------------------------------------------------------------------------------------------------------- calibrate


def test_calibrate_passes_its_options_on(library: Library, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = (*GIVEN, "--min-expert-tokens", 5, "--workers", 2, "--revision", "main", "--force", "--restart", "--quiet")
    result = run("calibrate", "owner/model", "-o", out, *options)
    assert result.exit_code == 0, result.output
    [((source, output), given)] = library.calls
    assert (source, output) == ("owner/model", out)
    assert isinstance(given.pop("stop"), threading.Event)
    expected = {"revision": "main", "workers": 2, "force": True, "restart": True, "progress": None, "calibration": OPTIONS}
    assert given == expected | {"imatrix": None, "legacy_imatrix": False}
    assert (result.stdout, result.stderr) == (f"{out}\n", "")


def test_without_options_the_library_s_defaults_hold(library: Library, tmp_path: Path) -> None:
    assert run("calibrate", "source", "-o", tmp_path / "out").exit_code == 0
    assert run("convert", "source", "--to", "w4a16-rtn", "-o", tmp_path).exit_code == 0
    assert [options["calibration"] for _, options in library.calls] == [CalibrationOptions()] * 2
    assert not any(options["force"] or options["restart"] for _, options in library.calls)


def test_calibrate_shows_the_coverage(library: Library, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("calibrate", "source", "-o", out)
    assert result.exit_code == 0, result.output
    for words in ("Tokens of an expert, by layer", "Heat map", "Coldest experts", "code.python", "by language", "samples 7"):
        assert words in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0] == str(out)
    assert max(len(line) for line in lines[1:]) <= 80
    assert "Calibrating: 100 %" in result.stderr and "Calibrating" not in result.stdout


def test_cold_experts_are_warned_of(library: Library, tmp_path: Path) -> None:
    counts = library.statistics.experts[1]
    cold = counts.kinds.clone()
    cold[2] = 0
    warmer = dataclasses.replace(counts, kinds=cold, tokens=cold.sum(1))
    library.statistics = dataclasses.replace(library.statistics, experts=library.statistics.experts | {1: warmer})
    assert check_coverage(library.statistics) == [(1, 2, 0)]
    result = run("calibrate", "source", "-o", tmp_path / "out", "--quiet")
    assert result.exit_code == 0 and result.stdout == f"{tmp_path / 'out'}\n"
    assert "Warning: 1 expert got less than 1/16" in result.stderr and "layer 1, expert 2 the fewest: 0" in result.stderr
    assert "Warning" in run("inspect", tmp_path / "out").stderr
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["cold"] == [{"layer": 1, "expert": 2, "tokens": 0}]


def test_calibrate_as_json(library: Library, tmp_path: Path) -> None:
    result = run("calibrate", "source", "-o", tmp_path / "out", "--json")
    answer = json.loads(result.stdout)
    assert result.stderr == "" and library.calls[0][1]["progress"] is None
    assert answer["directory"] == str(tmp_path / "out") and answer["seconds"] == 1.5
    assert [(row["layer"], row["expert"], row["tokens"]) for row in answer["experts"]] == [
        (layer, expert, tokens)
        for layer, counts in library.statistics.experts.items()
        for expert, tokens in enumerate(counts.tokens.tolist())
    ]
    assert answer["description"] == library.statistics.description
    assert {row["name"] for row in answer["languages"]} == {"python", "de", "en"}
    assert answer["cache_peaks"]["3"] == {"key": 2.5, "value": pytest.approx(0.3)}
    assert [row["layer"] for row in answer["layers"]] == [1, 3]
    both = run("calibrate", "source", "-o", tmp_path / "quiet", "--json", "--quiet")
    assert json.loads(both.stdout)["directory"] == str(tmp_path / "quiet")


def test_calibrate_says_where_the_importance_file_is(library: Library, tmp_path: Path) -> None:
    file = tmp_path / "importance [1].gguf"
    result = run("calibrate", "source", "-o", tmp_path / "first", "--imatrix", file)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"Importance for llama.cpp: {file}"
    answer = json.loads(
        run("calibrate", "source", "-o", tmp_path / "second", "--imatrix", file, "--imatrix-legacy", "--json").stdout
    )
    assert answer["imatrix"] == str(file)
    assert [(options["imatrix"], options["legacy_imatrix"]) for _, options in library.calls] == [(file, False), (file, True)]
    refused = run("calibrate", "source", "-o", tmp_path / "third", "--imatrix-legacy")
    assert refused.exit_code == 2 and len(library.calls) == 2


@pytest.mark.parametrize("as_json", [False, True])
def test_too_few_tokens_end_with_code_9(library: Library, tmp_path: Path, as_json: bool) -> None:
    library.raises = CalibrationError("layer 1: 3 experts received fewer than 64 tokens")
    result = run("calibrate", "source", "-o", tmp_path / "out", "--min-expert-tokens", 64, *(["--json"] if as_json else []))
    assert result.exit_code == 9
    message = json.loads(result.stdout)["error"]["message"] if as_json else result.stderr.splitlines()[-1]
    assert message.removeprefix("Error: ") == str(library.raises)


def test_an_interrupted_calibration_names_the_command_that_resumes_it(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(source: str, output: Path, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    command = ["calibrate", "source", "-o", str(tmp_path / "out")]
    monkeypatch.setattr("quantkit.calibrate", stopped)
    monkeypatch.setattr(sys, "argv", ["quantkit", *command, "--restart"])
    nothing = run(*command, "--restart")
    assert nothing.exit_code == 130 and f"nothing unfinished is left in {tmp_path}" in nothing.stderr
    (tmp_path / "out.partial").mkdir()
    kept = run(*command, "--restart")
    assert kept.exit_code == 130 and "finished work is kept" in kept.stderr
    assert kept.stderr.splitlines()[-1].strip() == f"quantkit {' '.join(command)}"


# ------------------------------------------------------------------------------------------------------- inspect, convert


def test_inspect_shows_statistics(tmp_path: Path) -> None:
    save_statistics(tmp_path, sample_statistics(MAVERICK))
    result = run("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(str(tmp_path)) and "Coldest experts" in result.stdout
    answer = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert answer["kind"] == "statistics" and len(answer["experts"]) == 16
    (tmp_path / "statistics.safetensors").write_bytes(b"")
    damaged = run("inspect", tmp_path)
    assert damaged.exit_code == 9 and "Calibrate again" in damaged.stderr


def test_convert_passes_its_options_on(library: Library, tmp_path: Path) -> None:
    common = ("convert", "source", "--to", "fp8-static", "-o", tmp_path)
    assert run(*common, *GIVEN, "--min-expert-tokens", 5, "--sequential").exit_code == 0
    assert run(*common, "--statistics", tmp_path / "statistics", "--no-sequential", "--min-expert-tokens", 2).exit_code == 0
    first, second = (options["calibration"] for _, options in library.calls)
    assert first == dataclasses.replace(OPTIONS, sequential=True)
    assert second == CalibrationOptions(statistics=tmp_path / "statistics", minimum_expert_tokens=2)


@pytest.mark.parametrize("options", [["--calibration", "x.txt"], ["--samples", "3"], ["--sequential"]])
def test_saved_statistics_and_a_calibration_exclude_each_other(library: Library, options: list[str]) -> None:
    result = run("convert", "source", "--to", "fp8-static", "-o", "out", "--statistics", "somewhere", *options)
    assert result.exit_code == 2 and "--statistics" in result.stderr and library.calls == []


@pytest.mark.parametrize(
    "options", [["--samples", "0"], ["--sequence-length", "1"], ["--packing", "both"], ["--min-expert-tokens", "-1"]]
)
@pytest.mark.parametrize("command", [["calibrate", "m", "-o", "x"], ["convert", "m", "--to", "w8a8", "-o", "x"]])
def test_options_out_of_range_are_wrong_usage(library: Library, command: list[str], options: list[str]) -> None:
    assert run(*command, *options).exit_code == 2
    assert library.calls == []


def test_help() -> None:
    shown = run("calibrate", "--help")
    assert shown.exit_code == 0 and "quantkit calibrate " in shown.stdout.split("Examples")[1]
    shown = run("convert", "--help")
    for option in (
        "--calibration",
        "--samples",
        "--sequence-length",
        "--packing",
        "--min-expert-tokens",
        "--sequential",
        "--statistics",
    ):
        assert option in shown.stdout


# -------------------------------------------------------------------------------------------------------------- progress


def test_progress_without_bytes_counts_units() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream), threading.Event(), conversion_view) as display:
        for done in range(1, 101):
            key = f"model.layers.2.feed_forward.experts.{done}.down_proj"
            display.update(Progress("calibrate", done, 100, 0, 0, 0, 0, key, seconds=done / 4))
    lines = stream.getvalue().splitlines()
    assert lines[1] == "Calibrating: 41 %, 4.0 units/s, 15 s left, unit 41/100, layer 2, expert 41, down_proj"
    assert lines[-1].startswith("Calibrating: 100 %, unit 100/100")


def test_progress_with_bytes() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream), threading.Event(), conversion_view) as display:
        for done in range(1, 101):
            snapshot = Progress("calibrate", done, 100, 0, done * 10**9, 10**11, 0, "model.layers.2.self_attn.qkv", done / 4)
            display.update(snapshot)
    assert stream.getvalue().splitlines()[1] == ("Calibrating: 41 %, 41.0/100.0 GB, 4.0 GB/s, 15 s left, unit 41/100, layer 2, qkv")


def test_calibrate_s_own_progress_becomes_snapshots() -> None:
    received: list[Progress] = []
    report = unit_progress(received.append)
    report(3, 8, "a")
    report(4, 8, "b")
    assert [(at.phase, at.units_done, at.units_total, at.bytes_total, at.current) for at in received] == [
        ("calibrate", 3, 8, 0, "a"),
        ("calibrate", 4, 8, 0, "b"),
    ]
    assert 0 <= received[0].seconds <= received[1].seconds
