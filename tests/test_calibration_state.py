"""Hidden states on disk: what is kept, what is believed after a kill, what is refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from quantkit import datafiles
from quantkit.calibration_state import CalibrationState
from quantkit.errors import OutputError, ResumeError
from quantkit.llama4 import parse_config
from quantkit.statistics import Statistics, statistics_digest
from tests.sample_statistics import sample_statistics
from tests.tiny_models import tiny_config

CONFIG = parse_config(tiny_config("maverick"))  # four layers
FINGERPRINT = {"source": {"config": "00aa"}, "corpus": {"digest": "11bb", "samples": 3}, "version": "1"}
SHAPE = (24, 128)


def begin(directory: Path, fingerprint: dict[str, Any] | None = None, *, restart: bool = False) -> CalibrationState:
    return CalibrationState(directory, fingerprint or FINGERPRINT, SHAPE, restart=restart)


def values(layer: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(layer))


def measured(layer: int) -> Statistics:
    return sample_statistics(CONFIG, layers=(layer,))


def advance(state: CalibrationState, first: int, last: int) -> None:
    """Commit the inputs of the layers ``first .. last``."""
    for layer in range(first, last + 1):
        state.hidden(layer).copy_(values(layer))
        state.commit(layer, measured(layer - 1) if layer else None)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Left by a calibration that had come to the input of layer 3."""
    state = begin(tmp_path / "state")
    assert state.resume(4) == 0
    advance(state, 0, 3)
    state.close()
    return tmp_path / "state"


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -------------------------------------------------------------------------------------------------------- what is kept


def test_the_two_latest_inputs_are_kept_with_all_statistics(directory: Path) -> None:
    layers = [f"layer-{layer:05d}" for layer in range(3)]
    assert files(directory) == ["hidden-00002.bin", "hidden-00003.bin", "journal.jsonl", *layers]
    for layer in (2, 3):
        stored = torch.frombuffer(bytearray((directory / f"hidden-{layer:05d}.bin").read_bytes()), dtype=torch.float32)
        assert torch.equal(stored.view(SHAPE), values(layer))


def test_the_journal_names_layers_and_checksums(directory: Path) -> None:
    lines = [json.loads(line[17:]) for line in (directory / "journal.jsonl").read_bytes().splitlines()]
    assert lines[0] == {"fingerprint": FINGERPRINT}
    assert lines[1]["run"]["pid"] == os.getpid()
    expected = [xxhash.xxh3_64_hexdigest(values(layer).numpy().tobytes()) for layer in range(4)]
    assert lines[2:] == [{"layer": layer, "hidden": expected[layer]} for layer in range(4)]


def test_a_later_run_goes_on_at_the_last_layer(directory: Path) -> None:
    state = begin(directory)
    assert state.resume(4) == 3
    assert torch.equal(state.hidden(3), values(3))
    assert [statistics_digest(state.statistics(layer)) for layer in range(3)] == [
        statistics_digest(measured(layer)) for layer in range(3)
    ]
    advance(state, 4, 4)
    state.close()
    again = begin(directory)
    assert again.resume(4) == 4
    again.close()


@pytest.mark.parametrize(("wanted", "found"), [(4, 3), (3, 3), (2, 2), (1, 0), (0, 0)])
def test_no_layer_beyond_the_one_that_is_wanted(directory: Path, wanted: int, found: int) -> None:
    """A run with another target may have to begin before the layer that was reached; older inputs are gone."""
    state = begin(directory)
    assert state.resume(wanted) == found
    state.close()


def test_a_repeated_layer_replaces_the_one_before(directory: Path) -> None:
    state = begin(directory)
    state.hidden(3).copy_(values(99))
    state.commit(3, measured(2))
    state.close()
    state = begin(directory)
    assert state.resume(4) == 3
    assert torch.equal(state.hidden(3), values(99))
    state.close()


def test_scratch_does_not_survive(directory: Path) -> None:
    state = begin(directory)
    assert state.scratch("context", 64).shape == (24, 64)
    state.scratch("context", 64).fill_(7.0)
    assert torch.equal(state.scratch("context", 64), torch.full((24, 64), 7.0))
    assert "scratch-context.bin" in files(directory)
    state.close()
    begin(directory).close()
    assert "scratch-context.bin" not in files(directory)


def test_new_arrays_hold_zeros_and_have_their_full_size_at_once(tmp_path: Path) -> None:
    state = begin(tmp_path / "state")
    assert not state.hidden(0).any() and state.hidden(0).shape == SHAPE
    assert (tmp_path / "state" / "hidden-00000.bin").stat().st_size == 24 * 128 * 4
    state.close()


def test_remove_leaves_nothing(directory: Path) -> None:
    state = begin(directory)
    state.remove()
    state.close()
    assert not directory.exists()


# ------------------------------------------------------------------------------------------------------ what is believed


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def _lengthen(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 4)


@pytest.mark.parametrize("damage", [_flip, _shorten, _lengthen, Path.unlink])
@pytest.mark.parametrize(("layers", "found"), [((3,), 2), ((2,), 3), ((2, 3), 0)])
def test_a_damaged_input_is_not_used(directory: Path, damage: Any, layers: tuple[int, ...], found: int) -> None:
    for layer in layers:
        damage(directory / f"hidden-{layer:05d}.bin")
    state = begin(directory)
    assert state.resume(4) == found
    advance(state, found, 4)
    state.close()
    state = begin(directory)
    assert state.resume(4) == 4
    assert torch.equal(state.hidden(4), values(4))
    assert torch.equal(state.hidden(3), values(3))
    state.close()


@pytest.mark.parametrize("damage", [_flip, _shorten, Path.unlink])
@pytest.mark.parametrize("name", ["statistics.json", "statistics.safetensors"])
@pytest.mark.parametrize(("layer", "found"), [(0, 0), (2, 2)])
def test_without_sound_statistics_a_layer_is_done_again(directory: Path, damage: Any, name: str, layer: int, found: int) -> None:
    damage(directory / f"layer-{layer:05d}" / name)
    state = begin(directory)
    assert state.resume(4) == found
    advance(state, found, 4)
    assert [statistics_digest(state.statistics(layer)) for layer in range(4)] == [
        statistics_digest(measured(layer)) for layer in range(4)
    ]
    state.close()


@pytest.mark.parametrize("cut", [1, 10, 50])
def test_a_torn_line_is_forgotten(directory: Path, cut: int) -> None:
    journal = directory / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - cut)
    state = begin(directory)
    assert state.resume(4) == 2
    state.close()


def test_a_kill_before_the_first_line_is_a_new_beginning(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "journal.jsonl").touch()
    state = begin(tmp_path / "state")
    assert state.resume(4) == 0
    state.close()


# ------------------------------------------------------------------------------------------------------- what is refused


def test_another_calibration_is_not_resumed(directory: Path) -> None:
    other = FINGERPRINT | {"corpus": {"digest": "22cc", "samples": 3}, "sequential": True}
    with pytest.raises(ResumeError, match=r"different: corpus, sequential.*--restart"):
        begin(directory, other)
    state = begin(directory, other, restart=True)
    assert state.resume(4) == 0
    state.close()
    with pytest.raises(ResumeError, match="different: corpus, sequential"):
        begin(directory)
    begin(directory, other).close()


def test_a_restart_begins_anew_whatever_is_there(directory: Path) -> None:
    state = CalibrationState(directory, FINGERPRINT, (7, 128), restart=True)
    assert state.resume(4) == 0
    assert state.hidden(3).shape == (7, 128)
    state.hidden(0).fill_(1.0)
    state.commit(0, None)
    assert "hidden-00003.bin" not in files(directory), "what the former run left goes with the first layer"
    state.close()


def test_two_runs_exclude_each_other(directory: Path) -> None:
    state = begin(directory)
    with pytest.raises(OutputError, match=f"is being written by process {os.getpid()}"):
        begin(directory)
    state.close()
    begin(directory).close()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "letter.txt").write_text("dear reader")
    with pytest.raises(OutputError, match="not known to be an unfinished calibration"):
        begin(tmp_path / "state", restart=True)
    assert files(tmp_path / "state") == ["letter.txt"]


def test_a_full_disk_is_an_error_and_not_a_signal(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.posix_fallocate

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = begin(directory)
    monkeypatch.setattr(datafiles.os, "posix_fallocate", full)
    monkeypatch.setattr(datafiles, "_can_allocate", lambda descriptor: True)
    for make in (lambda: state.hidden(4), lambda: state.scratch("context", 64)):
        with pytest.raises(OutputError, match=r"disk is full.*run the same command again"):
            make()
    monkeypatch.setattr(datafiles.os, "posix_fallocate", original)
    advance(state, 4, 4)
    assert state.resume(3) == 3
    state.close()


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot begin"):
        begin(tmp_path / "file" / "state")
