"""Bad input and bad luck, through the command line: one clear error, a non-zero exit code, nothing under a final name."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit_cli.app import app
from tests.tiny_models import write_tiny_model

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"
SHARD = "model-00002-of-00003.safetensors"
COMMAND = [sys.executable, "-m", "quantkit_cli", "convert"]


def run(source: Path, output: Path, *options: str) -> tuple[int, str]:
    """Exit code and error message of ``quantkit convert``; the output must hold no artifact unless the code is 0."""
    result = CliRunner().invoke(app, ["convert", str(source), "--to", "w4a16-rtn", "-o", str(output), "--json", *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    answer = json.loads(result.stdout)
    if result.exit_code:
        assert list(answer) == ["error"]
        assert answer["error"]["exit_code"] == result.exit_code
        assert "Traceback" not in result.output
        return result.exit_code, answer["error"]["message"]
    return 0, ""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "source"))


def _truncate(source: Path) -> None:
    os.truncate(source / SHARD, (source / SHARD).stat().st_size - 1000)


def _flip_header(source: Path) -> None:
    with (source / SHARD).open("r+b") as file:
        file.seek(8 + 40)
        file.write(b"\xff\x00\xff")


def _header_size(source: Path) -> None:
    with (source / SHARD).open("r+b") as file:
        file.write((1 << 60).to_bytes(8, "little"))


def _lying_index(source: Path) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(name for name, shard in index["weight_map"].items() if shard == SHARD)
    index["weight_map"][name] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def _index_without_a_tensor(source: Path) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].popitem()
    path.write_text(json.dumps(index))


def _change_shard(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(source / SHARD)
    change(tensors)
    save_file(tensors, source / SHARD, metadata={"format": "pt"})


def _nan(source: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("experts.down_proj"))
        tensors[name][3, 1, 2] = float("nan")

    _change_shard(source, change)


def _wrong_shape(source: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("experts.gate_up_proj"))
        tensors[name] = tensors[name].transpose(1, 2).contiguous()

    _change_shard(source, change)


def _wrong_dtype(source: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("experts.gate_up_proj"))
        tensors[name] = tensors[name].to(torch.int32)

    _change_shard(source, change)


def _quantized(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    (source / "config.json").write_text(json.dumps(config))


def _other_model(source: Path) -> None:
    (source / "config.json").write_text('{"model_type": "mixtral"}')


@pytest.mark.parametrize(
    ("damage", "code", "expected"),
    [
        (lambda s: (s / SHARD).unlink(), 3, SHARD),
        (_truncate, 3, SHARD),
        (_flip_header, 3, SHARD),
        (_header_size, 3, SHARD),
        (_lying_index, 3, "index"),
        (_index_without_a_tensor, 3, "index"),
        (_nan, 3, "expert 3"),
        (_wrong_shape, 3, "gate_up_proj"),
        (_wrong_dtype, 3, "gate_up_proj"),
        (_quantized, 3, "fbgemm_fp8"),
        (_other_model, 3, "mixtral"),
        (lambda s: (s / "config.json").unlink(), 3, "config.json"),
        (lambda s: (s / "config.json").write_text("{"), 3, "config.json"),
        (lambda s: shutil.rmtree(s), 3, "source"),
    ],
)
def test_damaged_sources(source: Path, tmp_path: Path, damage: Callable[[Path], object], code: int, expected: str) -> None:
    damage(source)
    exit_code, message = run(source, tmp_path / "out")
    assert exit_code == code
    assert expected in message, message
    assert not (tmp_path / "out" / "w4a16-rtn").exists()
    if damage is not _nan:  # all else is found before any output is made
        assert not (tmp_path / "out").exists()


def test_source_that_is_cut_while_it_is_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.preadv

    def cut(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(source / SHARD, 5000)
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", cut)
    code, message = run(source, tmp_path / "out")
    assert code == 3
    assert SHARD in message, message
    assert not (tmp_path / "out" / "w4a16-rtn").exists()


def test_existing_output(tmp_path: Path) -> None:
    assert run(DEMO, tmp_path)[0] == 0
    before = (tmp_path / "w4a16-rtn" / "manifest.json").read_bytes()
    code, message = run(DEMO, tmp_path)
    assert code == 5
    assert "--force" in message
    assert (tmp_path / "w4a16-rtn" / "manifest.json").read_bytes() == before
    assert run(DEMO, tmp_path, "--force") == (0, "")


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "w4a16-rtn").write_text("mine")
    code, message = run(DEMO, tmp_path)
    assert code == 5
    assert "w4a16-rtn" in message
    assert run(DEMO, tmp_path, "--force")[0] == 5
    assert (tmp_path / "w4a16-rtn").read_text() == "mine"


@pytest.mark.parametrize("failing", ["posix_fallocate", "pwrite", "fdatasync"])
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, reason: int) -> None:
    original = getattr(os, failing)
    calls = 0

    def refuse(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > (0 if failing == "posix_fallocate" else 60):
            raise OSError(reason, os.strerror(reason))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, refuse)
        code, message = run(DEMO, tmp_path)
    if code == 0:  # fewer group commits than calls allowed: the fault never came
        assert failing == "fdatasync"
        assert calls <= 60
        return
    assert (
        code == 5
        and {errno.ENOSPC: "the disk is full", errno.EROFS: "read-only", errno.EIO: "nput/output error"}[reason] in message
    ), message
    assert not (tmp_path / "w4a16-rtn").exists()
    assert run(DEMO, tmp_path) == (0, "")  # with room made, the same command completes


def test_file_size_limit(tmp_path: Path) -> None:
    """A real limit of the operating system, in a process of its own."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))

    command = [*COMMAND, str(DEMO), "--to", "w4a16-rtn", "-o", str(tmp_path), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert result.returncode == 5, result.stderr
    assert "large" in json.loads(result.stdout)["error"]["message"]
    assert not (tmp_path / "w4a16-rtn").exists()


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_read_only_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    original = os.mkdir

    def refuse(path: str | Path, *arguments: int) -> None:
        if Path(path).is_relative_to(tmp_path / "out"):
            raise OSError(reason, os.strerror(reason), str(path))
        original(path, *arguments)

    monkeypatch.setattr(os, "mkdir", refuse)
    code, message = run(DEMO, tmp_path / "out")
    assert code == 5
    assert str(tmp_path / "out") in message
    assert not (tmp_path / "out").exists()


def test_output_where_no_directory_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, message = run(DEMO, tmp_path / "file" / "out")
    assert code == 5
    assert "file" in message
    code, message = run(DEMO, Path("/proc/quantkit-out"))
    assert code == 5
    assert "/proc/quantkit-out" in message


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_tiny_model(source, "scout", seed=3, num_hidden_layers=12)
    command = [*COMMAND, str(source), "--to", "w4a16-rtn", "-o", str(tmp_path / "out"), "--workers", "1", "--quiet"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    journal = tmp_path / "out" / "w4a16-rtn.partial" / "journal.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (journal.is_file() and journal.stat().st_size > 2000) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(first.pid, signal.SIGSTOP)
        code, message = run(source, tmp_path / "out")
        assert code == 5
        assert str(first.pid) in message, message
    finally:
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(60) == 0
    assert (tmp_path / "out" / "w4a16-rtn" / "manifest.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_says_how_to_resume(tmp_path: Path, number: int) -> None:
    source = tmp_path / "source"
    write_tiny_model(source, "scout", seed=3, num_hidden_layers=12)
    command = [*COMMAND, str(source), "--to", "w4a16-rtn", "-o", str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "out" / "w4a16-rtn.partial" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.is_file() and journal.stat().st_size > 2000) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "resume" in errors
    assert "quantkit convert" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "w4a16-rtn").exists()
    assert run(source, tmp_path / "out") == (0, "")


@pytest.mark.parametrize(
    ("option", "value", "code", "expected"),
    [
        ("--to", "w4a61", 4, "unknown preset"),
        ("--to", "absent.toml", 4, "absent.toml"),
        ("--to", "w4a16-rtn", 4, "same name"),
        ("--max-shard-size", "0GB", 2, "shard"),
        ("--workers", "0", 2, "workers"),
    ],
)
def test_wrong_options(tmp_path: Path, option: str, value: str, code: int, expected: str) -> None:
    arguments = ["convert", str(DEMO), "--to", "w4a16-rtn", "-o", str(tmp_path / "out"), option, value]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code and expected in result.output, result.output
    assert not (tmp_path / "out").exists()
