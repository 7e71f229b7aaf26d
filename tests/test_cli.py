"""The command line: options, results as tables and JSON, progress, exit codes, interruption.  Bad input: see test_failures."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from quantkit import PRESETS, Progress
from quantkit.methods import METHODS
from quantkit_cli import text
from quantkit_cli.app import app
from quantkit_cli.display import Display, Meter
from quantkit_cli.presets import LINES
from quantkit_cli.progress import conversion_view
from tests.tiny_models import tiny_config, write_tiny_model

TARGETS = ("fp8-dynamic", "w4a16-rtn")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))  # fails when there is anything beside one object


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "model"
    write_tiny_model(directory, "scout", seed=5)
    return directory


@pytest.fixture(scope="module")
def artifacts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The output directory of one conversion to both targets, and what ``--json`` said of it."""
    output = tmp_path_factory.mktemp("cli") / "out"
    return output, run_json("convert", source, "--to", TARGETS[0], "--to", TARGETS[1], "-o", output)


# --------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("written", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("4GiB", 4 << 30), ("1.5kb", 1500), ("7", 7), ("2tb", 2 * 10**12), ("10 b", 10)],
)
def test_sizes_that_people_write(written: str, size: int) -> None:
    assert text.parse_size(written) == size


@pytest.mark.parametrize("written", ["", "GB", "-5GB", "5XB", "0", "5ib", "1e9", "5 G B", "nan", "0.1b", "9" * 400])
def test_sizes_that_are_none(written: str) -> None:
    with pytest.raises(ValueError, match="is not a size") as caught:
        text.parse_size(written)
    assert len(str(caught.value)) < 160


@given(st.integers(min_value=1, max_value=10**15))
def test_a_printed_size_reads_back(count: int) -> None:
    printed = text.size(count).replace("bytes", "B")
    assert abs(text.parse_size(printed) - count) <= max(1, 0.06 * count)


@given(st.text(max_size=12))
def test_parse_size_fails_in_one_way_only(written: str) -> None:
    try:
        assert text.parse_size(written) >= 1
    except ValueError as error:
        assert "is not a size" in str(error)


def test_numbers_as_text() -> None:
    assert [text.size(count) for count in (0, 999, 1000, 64_876_544_906, 10**15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "64.9 GB",
        "1000.0 TB",
    ]
    assert text.size_of(13.2e9, 215.5e9) == "13.2/215.5 GB"
    assert [text.count(number) for number in (12, 1500, 107.8e9, 2e12)] == ["12", "1.5 k", "107.8 B", "2.0 T"]
    durations = [text.duration(seconds) for seconds in (0.84, 45, 59.7, 200, 4320, 183_600)]
    assert durations == ["0.8 s", "45 s", "1 min 0 s", "3 min 20 s", "1 h 12 min", "2 d 3 h"]
    assert [text.percent(done, 1000) for done in (0, 999.9, 1000)] == ["0 %", "99 %", "100 %"]


def test_places() -> None:
    expert = "language_model.model.layers.12.feed_forward.experts.7.gate_up_proj"
    assert text.place(expert) == "layer 12, expert 7, gate_up_proj"
    assert text.place("model.layers.3.self_attn.qkv") == "layer 3, qkv"
    assert text.place("vision_model.model.layers.1.mlp.fc1.weight") == "vision layer 1, mlp.fc1"
    assert text.place("language_model.lm_head.weight") == "language_model.lm_head"


# -------------------------------------------------------------------------------------------------------------- progress


def snapshot(done: int, seconds: float, phase: str = "convert", resumed: int = 0) -> Progress:
    current = "model.layers.2.feed_forward.experts.5.down_proj" if phase == "convert" else "w4a16-rtn"
    return Progress(phase, done, 100, resumed, done * 10**9, 100 * 10**9, done * 10**8, current, seconds)


def test_meter_measures_the_last_seconds_only() -> None:
    meter = Meter(window=10)
    for seconds in range(5):
        assert meter.rate() is None
        meter.add(seconds, 50_000 + 100 * seconds)  # resumed bytes are no speed
    assert meter.rate() == 100
    for seconds in range(5, 30):
        meter.add(seconds, 50_400 + 20 * (seconds - 4))
    assert meter.rate() == 20


def test_without_a_terminal_a_line_every_ten_seconds() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream), threading.Event(), conversion_view) as display:
        for step in range(1, 101):
            display.update(snapshot(step, seconds=step / 4))
        display.update(snapshot(100, 26, "check"))
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "Converting: 1 %",
        "Converting: 41 %",
        "Converting: 81 %",
        "Converting: 100 %",
        "Checking: 100 %",
    ]
    assert lines[1] == (
        "Converting: 41 %, 41.0/100.0 GB, 4.0 GB/s, 15 s left, unit 41/100, 4.1 GB written, layer 2, expert 5, down_proj"
    )
    assert "w4a16-rtn" in lines[-1]


@pytest.mark.parametrize("width", [80, 140])
def test_the_live_lines_fit_the_terminal(width: int) -> None:
    stream, stop = io.StringIO(), threading.Event()
    display = Display(Console(file=stream, force_terminal=True, width=width, color_system=None), stop, conversion_view)
    with display:
        for step in range(11):
            display.update(snapshot(10 + step, 1 + step, resumed=9))
        drawn = Console(file=io.StringIO(), width=width)
        drawn.print(display)
        stop.set()
        drawn.print(display)
    lines = drawn.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 4 and all(len(line) <= width for line in lines)
    assert all(word in lines[0] for word in ("Converting", "20 %", "20.0/100.0 GB", "1.0 GB/s", "left"))
    assert lines[1].startswith("unit 20/100 (9 resumed), 2.0 GB written, layer 2, expert 5, down_proj")
    assert "Stopping" in lines[3]


# --------------------------------------------------------------------------------------------------------------- convert


def test_convert_as_json_states_what_lies_on_disk(artifacts: tuple[Path, dict[str, Any]]) -> None:
    output, answer = artifacts
    assert [artifact["name"] for artifact in answer["artifacts"]] == list(TARGETS)
    for artifact in answer["artifacts"]:
        directory = Path(artifact["directory"])
        assert directory == (output / artifact["name"]).resolve()
        assert artifact["bytes"] == sum(path.stat().st_size for path in directory.iterdir())
        ledger = json.loads((directory / "ledger.json").read_bytes())["tensors"]
        for role, errors in artifact["relative_errors"].items():
            entries = [entry["relative_error"] for entry in ledger if entry["role"] == role and entry["applied"] != "keep"]
            assert errors["worst"] == pytest.approx(max(entries), rel=1e-5)
            assert errors["mean"] == pytest.approx(sum(entries) / len(entries), rel=1e-5)
    assert answer["seconds"] > 0


def test_convert_prints_sizes_and_errors(source: Path, artifacts: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    result = run("convert", source, "--to", "w4a16-rtn", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    errors = artifacts[1]["artifacts"][1]["relative_errors"]["routed_expert"]
    [row] = [line for line in result.stdout.splitlines() if "routed expert" in line]
    assert "int4-g128" in row and f"{errors['mean']:.4f}" in row and f"{errors['worst']:.4f}" in row
    assert str(tmp_path / "w4a16-rtn") in result.stdout
    assert "Converting" not in result.stdout and "Converting: 100 %" in result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80 + len(str(tmp_path))


def test_quiet_prints_the_directories_and_nothing_else(source: Path, tmp_path: Path) -> None:
    result = run("convert", source, "--to", "w8a16", "--to", "w8a8-rtn", "-o", tmp_path, "--quiet")
    assert result.stdout.splitlines() == [str(tmp_path / "w8a16"), str(tmp_path / "w8a8-rtn")]
    assert result.stderr == ""


def test_dry_run_predicts_every_file_and_writes_none(source: Path, artifacts: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    answer = run_json("convert", source, "--to", TARGETS[0], "--to", TARGETS[1], "-o", tmp_path / "out", "--dry-run")
    assert not (tmp_path / "out").exists()
    assert answer["complete"]
    for artifact in answer["artifacts"]:
        real = {path.name: path.stat().st_size for path in (artifacts[0] / artifact["name"]).iterdir()}
        assert artifact["files"] == real
        assert artifact["bytes"] == sum(real.values())


def test_shards_are_no_larger_than_asked(source: Path, tmp_path: Path) -> None:
    run_json("convert", source, "--to", "fp8-dynamic", "-o", tmp_path, "--max-shard-size", "300kB", "--workers", "2")
    shards = list((tmp_path / "fp8-dynamic").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert max(shard.stat().st_size for shard in shards) <= 300_000


def test_existing_output_needs_force(source: Path, tmp_path: Path) -> None:
    arguments = ("convert", source, "--to", "fp8-block", "-o", tmp_path)
    assert run(*arguments, "-q").exit_code == 0
    refused = run(*arguments)
    assert refused.exit_code == 5
    assert refused.stdout == "" and refused.stderr.startswith("Error: ") and "exists" in refused.stderr
    assert run(*arguments, "-q", "--force").exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_resumed_by_the_command_it_names(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    quantize, calls = METHODS["rtn"], []

    def interrupt_amid(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return quantize(*arguments, **options)

    command = ["convert", str(source), "--to", "w4a16-rtn", "-o", str(tmp_path / "with space"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["quantkit", *command, "--restart"])
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "rtn", interrupt_amid)
        stopped = run(*command, "--restart")
    assert stopped.exit_code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "Interrupted: " in stopped.stderr and "Traceback" not in stopped.output
    assert stopped.stderr.splitlines()[-1].strip() == f"quantkit {' '.join(command[:-3])} '{tmp_path}/with space' --workers 1"
    assert not (tmp_path / "with space" / "w4a16-rtn").exists()
    [artifact] = run_json(*command)["artifacts"]
    assert artifact["units_resumed"] >= 4


def test_an_interruption_that_leaves_nothing_does_not_promise_any(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.convert", interrupt)
    command = ("convert", source, "--to", "w4a16-rtn", "-o", tmp_path)
    assert f"nothing unfinished is left in {tmp_path}" in run(*command).stderr
    (tmp_path / "w4a16-rtn.partial").mkdir()
    assert "finished work is kept" in run(*command).stderr


def test_interruption_as_json(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "rtn", interrupt)
    result = run("convert", source, "--to", "w4a16-rtn", "-o", tmp_path, "--json")
    assert result.exit_code == 130
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "Interrupted" and error["exit_code"] == 130


# ------------------------------------------------------------------------------------------------- plan, inspect, verify


@pytest.mark.parametrize("spelling", ["directory", "file"])
def test_plan_from_a_config_alone(source: Path, artifacts: tuple[Path, dict[str, Any]], tmp_path: Path, spelling: str) -> None:
    shutil.copy(source / "config.json", tmp_path)
    place = tmp_path if spelling == "directory" else tmp_path / "config.json"
    answer = run_json("plan", place, "--to", "w4a16-rtn", "--context", 1000, "-o", tmp_path)
    [artifact] = answer["artifacts"]
    real = artifacts[0] / "w4a16-rtn"
    weights = {name: size for name, size in artifact["files"].items() if name.endswith(".safetensors")}
    assert weights == {path.name: path.stat().st_size for path in real.glob("*.safetensors")}
    assert artifact["files"]["config.json"] == (real / "config.json").stat().st_size
    assert not answer["complete"]
    assert answer["context"] == 1000
    assert {(fit["gigabytes"], fit["count"]) for fit in artifact["gpus"]} == {
        (g, n) for g in (24, 48, 80, 141, 192) for n in (1, 2, 4, 8)
    }
    assert answer["cost"]["peak_memory_bytes"] > 0 and answer["cost"]["seconds"] > 0


def test_plan_prints_roles_files_gpus_and_cost(source: Path, tmp_path: Path) -> None:
    result = run("plan", source, "--to", "fp8-dynamic", "--to", "w4a16-rtn", "-o", tmp_path, "--context", "4096")
    assert result.exit_code == 0, result.output
    for words in (
        "fp8-channel-dynamic",
        "int4-g128",
        "routed expert",
        "total",
        "model.safetensors",
        "4,096 tokens",
        "192 GB",
        "workers",
    ):
        assert words in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_plan_where_nothing_can_be_written(source: Path) -> None:
    answer = run_json("plan", source, "--to", "w4a16-rtn", "-o", "/proc/x")
    assert answer["cost"]["seconds"] is None and "write" not in answer["cost"]["rates"]
    assert "unknown: the output cannot be written to" in run("plan", source, "--to", "w4a16-rtn", "-o", "/proc/x").stdout


def test_plan_says_which_clients_load_the_artifact(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "attention.toml"
    recipe.write_text('[[rules]]\nroles = ["attention"]\nscheme = "int8-g128"\n[[rules]]\nscheme = "keep"\n')
    answer = run_json("plan", source, "--to", recipe, "-o", tmp_path)
    clients = answer["artifacts"][0]["clients"]
    assert any(not note["loads"] and note["why"] for note in clients)
    printed = run("plan", source, "--to", recipe, "-o", tmp_path).stdout
    assert all(note["client"] in printed for note in clients)


def test_inspect_source_and_artifact(source: Path, artifacts: tuple[Path, dict[str, Any]]) -> None:
    before, after = run_json("inspect", source), run_json("inspect", artifacts[0] / "w4a16-rtn")
    assert (before["kind"], after["kind"]) == ("source", "artifact")
    assert before["parameters"] == after["parameters"]
    assert before["bytes"] == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    schemes = {row["role"]: row["schemes"] for row in after["roles"]}
    assert schemes["routed_expert"] == ["int4-g128"] and schemes["attention"] == ["BF16"]
    printed = run("inspect", artifacts[0] / "w4a16-rtn").stdout
    assert "int4-g128" in printed and "routed expert" in printed
    assert max(len(line) for line in printed.splitlines()[1:]) <= 80  # the first line is the path


def test_on_a_narrow_terminal_no_table_is_cut(
    source: Path, artifacts: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too wide goes on beyond the edge: every cell stands there in full."""
    artifact = artifacts[0] / "w4a16-rtn"
    commands = (("plan", source, "--to", "w4a16-rtn", "-o", tmp_path), ("inspect", artifact), ("verify", artifact), ("presets",))
    wide, narrow = [], []
    for shown, columns in ((wide, "400"), (narrow, "40")):
        monkeypatch.setenv("COLUMNS", columns)
        for command in commands:
            result = run(*command)
            assert result.exit_code == 0 and "…" not in result.stdout
            text = result.stdout.split("The run")[0]  # the speeds of the machine differ each time
            shown.append(sorted(word for word in text.split() if "─" not in word))
    assert narrow == wide


def test_verify_passes_and_fails(source: Path, artifacts: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    artifact = artifacts[0] / "w4a16-rtn"
    answer = run_json("verify", artifact, "--source", source, "--sample", 3)
    assert answer["sampled"] == 3 and all(check["ok"] for check in answer["checks"])
    printed = run("verify", artifact)
    assert printed.exit_code == 0 and "manifest" in printed.stdout
    damaged = Path(shutil.copytree(artifact, tmp_path / "damaged"))
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    failed = run("verify", damaged)
    assert failed.exit_code == 7 and failed.stdout == "" and "manifest" in failed.stderr
    assert json.loads(run("verify", damaged, "--json").stdout)["error"]["type"] == "ArtifactError"


# -------------------------------------------------------------------------------------------------------- presets, start


def test_presets_are_the_library_s() -> None:
    assert list(LINES) == list(PRESETS)
    answer = run_json("presets")
    assert list(answer)[: len(PRESETS)] == list(PRESETS)
    printed = run("presets").stdout
    assert all(name in printed for name in PRESETS)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_stated_bits_are_those_of_a_plan(preset: str, tmp_path: Path) -> None:
    widths = {"hidden_size": 8192, "intermediate_size": 8192, "num_hidden_layers": 1, "head_dim": 2048}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("text", **widths)))
    [artifact] = run_json("plan", tmp_path, "--to", preset, "-o", tmp_path)["artifacts"]
    [row] = [row for row in artifact["roles"] if row["role"] == "routed_expert"]
    assert row["bits_per_weight"] == pytest.approx(run_json("presets")[preset]["bits_per_weight"], abs=1e-4)


@pytest.mark.parametrize("command", ["convert", "plan", "inspect", "verify"])
def test_help_shows_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout and f"quantkit {command} " in result.stdout.split("Examples")[1]


def test_the_script_s_version_completion_and_usage_errors() -> None:
    script = Path(sys.executable).with_name("quantkit")

    def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, *arguments], capture_output=True, text=True, check=False, env=os.environ | environment)

    assert start("--version").stdout.startswith("quantkit ")
    completion = start(_QUANTKIT_COMPLETE="complete_bash", COMP_WORDS="quantkit convert m --to fp8", COMP_CWORD="4")
    assert completion.stdout.split() == ["fp8-dynamic", "fp8-block", "fp8-static"]
    completion = start(_QUANTKIT_COMPLETE="complete_bash", COMP_WORDS="quantkit convert m --to q4_k", COMP_CWORD="4")
    assert completion.stdout.split() == ["q4_k_m", "q4_k_s"]
    wrong = start("convert", "--too", "x", "--json")
    assert wrong.returncode == 2 and "--too" in wrong.stderr
    error = json.loads(wrong.stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("UsageError", 2)
    assert "No such option" in error["message"] and "--too" in error["message"]
    assert start("presets", "--json").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_signal_amid_the_imports_ends_the_command_without_a_traceback(
    tmp_path: Path, number: signal.Signals, options: list[str]
) -> None:
    """A stand-in for torch sends the signal while it is being imported, and turns any exception into another one."""
    (tmp_path / "torch.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\n    for _ in range(1000): pass\n"
        "except BaseException as error:\n    raise ImportError('no torch') from error\n"
    )
    command = [sys.executable, "-m", "quantkit_cli", "plan", "nowhere", "--to", "w4a16-rtn", *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 130, ended.stderr
    message = json.loads(ended.stdout)["error"]["message"] if options else ended.stderr
    assert "before it began any work" in message and "Traceback" not in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_command_ends_by_both_signals(source: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    monkeypatch.setattr("quantkit.inspect", lambda *_: os.kill(os.getpid(), number))
    ended = run("inspect", source, "--json")
    assert ended.exit_code == 130
    assert json.loads(ended.stdout)["error"]["message"] == "the command was stopped"


def test_an_unexpected_error_is_an_object_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr("quantkit.inspect", fail)
    ended = run("inspect", source, "--json")
    assert ended.exit_code == 1 and "Traceback" in ended.stderr
    error = json.loads(ended.stdout)["error"]
    assert error == {"type": "InternalError", "message": "ZeroDivisionError: by nought", "exit_code": 1}
    assert isinstance(run("inspect", source).exception, ZeroDivisionError)  # without --json the traceback is all there is
