"""The writer when the disk refuses or forgets: one clear error, nothing incomplete under a final name, and a rerun succeeds."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import CheckpointError, OutputError, ResumeError
from tests.synthetic_artifact import (
    FAST,
    FIRST,
    JOURNAL,
    SECOND,
    SIDECARS,
    UNITS,
    Artifact,
    begin,
    contents,
    finish,
    make_artifact,
    manifest,
    names,
    run_partly,
    seal,
    write_rest,
    write_units,
)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("carried"))


# --------------------------------------------------------------------------------------------------- damage between runs


@pytest.mark.parametrize("damage", ["missing", "short", "long", "header", "link"])
def test_a_damaged_file_is_made_anew_and_its_units_are_done_again(
    damage: str, artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_partly(tmp_path / "x", artifact, 4)
    path = tmp_path / "x.partial" / FIRST
    if damage in ("missing", "link"):
        path.rename(tmp_path / "elsewhere")
    if damage == "link":
        path.symlink_to(tmp_path / "elsewhere")
    if damage in ("short", "long"):
        os.truncate(path, path.stat().st_size + (5 if damage == "long" else -5))
    if damage == "header":
        with path.open("r+b") as stream:
            stream.seek(12)
            stream.write(b"#")
    done = finish(tmp_path / "x", artifact)
    assert set(done) == set(UNITS)  # each unit has its scale in the first file
    assert f"{FIRST}" in caplog.text
    assert "4 finished units are done again" in caplog.text
    assert contents(tmp_path / "x") == artifact.expected
    assert not (tmp_path / "x" / FIRST).is_symlink()


def test_units_in_other_files_survive_the_loss_of_a_file(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path)
    apart = dict(artifact.units)
    apart["unit 1"] = ("1.weight", "1.flag")  # both in the second file
    apart["unit 5"] = (*apart["unit 5"], "1.scale")
    artifact = Artifact(artifact.files, artifact.data, apart, artifact.carried, artifact.expected)
    run_partly(tmp_path / "x", artifact, 3)
    (tmp_path / "x.partial" / FIRST).unlink()
    assert finish(tmp_path / "x", artifact) == ["unit 0", "unit 2", "unit 3", "unit 4", "unit 5"]
    assert contents(tmp_path / "x") == artifact.expected


def test_damaged_data_is_found_before_publishing_and_done_again(artifact: Artifact, tmp_path: Path) -> None:
    run_partly(tmp_path / "x", artifact, 3)
    place = artifact.files[0].offsets["2.weight"]
    with (tmp_path / "x.partial" / FIRST).open("r+b") as stream:
        stream.seek(place)
        flipped = bytes([stream.read(1)[0] ^ 1])
        stream.seek(place)
        stream.write(flipped)
    with pytest.raises(OutputError, match=rf"1 tensors read back different .*2\.weight in {FIRST}"):
        finish(tmp_path / "x", artifact)
    assert not (tmp_path / "x").exists()
    assert finish(tmp_path / "x", artifact) == ["unit 2"]
    assert contents(tmp_path / "x") == artifact.expected


@pytest.mark.parametrize("late", [False, True], ids=["before it is checked", "after it was checked"])
@pytest.mark.parametrize("change", ["header", "data", "longer", "shorter", "gone"])
def test_a_file_that_changes_under_the_run_is_not_published(change: str, late: bool, artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "x", artifact)
    write_units(writer, artifact, UNITS if late else UNITS[:5])
    while late and not all(check.done() for check in writer._checks.values()):
        pass
    path = tmp_path / "x.partial" / SECOND
    if change == "gone":
        path.unlink()
    elif change in ("header", "data"):
        with path.open("r+b") as stream:
            stream.seek(0 if change == "header" else artifact.files[1].offsets["1.weight"])
            stream.write(bytes([artifact.data["1.weight"][0] ^ 1]))
        os.utime(path, (2e9, 2e9))  # a test is faster than some clocks
    else:
        os.truncate(path, artifact.files[1].size + (1 if change == "longer" else -1))
    if not late:
        write_units(writer, artifact, UNITS[5:])
    if change == "shorter":  # again: the last tensor has made it long again
        os.truncate(path, artifact.files[1].size - 1)
    with pytest.raises(OutputError, match=SECOND):
        seal(writer, artifact)
    writer.close()
    assert not (tmp_path / "x").exists()
    finish(tmp_path / "x", artifact)
    assert contents(tmp_path / "x") == artifact.expected


def test_leftovers_in_a_partial_directory_are_not_published(artifact: Artifact, tmp_path: Path) -> None:
    run_partly(tmp_path / "x", artifact, 3)
    (tmp_path / "x.partial" / "old-sidecar.json").write_text("{}")
    (tmp_path / "x.partial" / "cache").mkdir()
    (tmp_path / "x.partial" / "cache" / "file").write_text("x")
    finish(tmp_path / "x", artifact)
    assert contents(tmp_path / "x") == artifact.expected


def test_a_partial_directory_without_journal_is_left_alone(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ResumeError, match=r"has no journal\.jsonl"):
        begin(tmp_path / "x", artifact)
    assert contents(tmp_path / "x.partial") == {"thesis.txt": b"mine"}


def test_a_journal_without_its_beginning_starts_over(artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_partly(tmp_path / "x", artifact, 3)
    path = tmp_path / "x.partial" / JOURNAL
    path.write_bytes(b"?" + path.read_bytes())
    assert finish(tmp_path / "x", artifact) == UNITS
    assert "damaged from its beginning" in caplog.text
    assert contents(tmp_path / "x") == artifact.expected


# ------------------------------------------------------------------------------------------------- a disk that refuses


def test_a_disk_without_room_is_found_before_anything_is_written(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real[:4], 0, *real[5:])))
    with pytest.raises(OutputError, match=r"needs 0\.\d+ GB more, but the disk has 0\.000 GB free"):
        begin(tmp_path / "new" / "x", artifact)
    assert names(tmp_path) == []


def test_a_resumed_run_needs_no_room_for_what_it_has(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_partly(tmp_path / "x", artifact, 2)
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real[:4], 0, *real[5:])))
    assert finish(tmp_path / "x", artifact) == UNITS[2:]


def test_space_is_taken_at_the_beginning(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, mean_bytes=100_000)
    writer = begin(tmp_path / "x", artifact)
    for file in artifact.files:
        assert (tmp_path / "x.partial" / file.name).stat().st_blocks * 512 >= file.size
    writer.close()


def test_a_file_system_that_does_not_know_its_size_is_believed_to_have_room(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real[:2], 0, 0, 0, *real[5:])))
    finish(tmp_path / "x", artifact)
    assert contents(tmp_path / "x") == artifact.expected


def test_a_file_system_that_cannot_sync_directories_is_used(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    finish(tmp_path / "x", artifact)
    assert contents(tmp_path / "x") == artifact.expected


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_a_file_system_that_cannot_allocate_gets_sparse_files(
    code: int, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def fallocate(self, *arguments: Any) -> int:
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Library())
    monkeypatch.setattr(ctypes, "get_errno", lambda: code)
    calls = nth_call_fails(monkeypatch, "posix_fallocate", 0, 0)
    finish(tmp_path / "x", artifact)
    assert contents(tmp_path / "x") == artifact.expected
    assert calls() == (0 if code == errno.EOPNOTSUPP else len(artifact.files))


def nth_call_fails(patch: pytest.MonkeyPatch, name: str, number: int, code: int) -> Callable[[], int]:
    """Make the ``number``-th call of a function of ``os`` raise; returns a function that tells how many calls there were."""
    module: Any = fcntl if name == "flock" else os
    original, lock, count = getattr(module, name), threading.Lock(), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        with lock:
            count += 1
            hit = count == number
        if hit:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **options)

    patch.setattr(module, name, failing)
    return lambda: count


CHANGES = {
    "open": errno.EACCES,
    "pwrite": errno.ENOSPC,
    "pread": errno.EIO,
    "fsync": errno.EIO,
    "fdatasync": errno.ENOSPC,
    "posix_fallocate": errno.ENOSPC,
    "ftruncate": errno.EFBIG,
    "rename": errno.EROFS,
    "mkdir": errno.EROFS,
    "unlink": errno.EACCES,
    "statvfs": errno.EIO,
    "stat": errno.EACCES,
    "flock": errno.EIO,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_refused_call_ends_in_one_clear_error_and_a_rerun_succeeds(name: str, artifact: Artifact, tmp_path: Path) -> None:
    """Both in a fresh run and in one that resumes; the units done before are never lost."""
    number, failures = 0, 0
    resume = True
    while True:
        number += 1
        out = tmp_path / f"{number}"
        before = UNITS[:2] if resume else []
        if resume:
            run_partly(out / "x", artifact, 2)
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.MonkeyPatch.context() as patch:
            calls = nth_call_fails(patch, name, number, CHANGES[name])
            error = None
            try:
                finish(out / "x", artifact)
            except OutputError as raised:
                error = str(raised)
            reached = calls() >= number
        assert len(os.listdir("/proc/self/fd")) == descriptors
        if error is not None:
            failures += 1
            assert error.startswith("cannot ")
            if (out / "x").exists():  # only the clean-up failed
                assert contents(out / "x").items() >= artifact.expected.items()
            if not (out / "x").exists() or (out / "x" / JOURNAL).exists():
                assert not set(before).intersection(finish(out / "x", artifact))
        assert contents(out / "x") == artifact.expected
        assert names(out) == ["x"]
        shutil.rmtree(out)
        if not reached and not resume:
            break
        if not reached:
            number, resume = 0, False
    assert failures


@pytest.mark.parametrize("name", ["open", "pwrite", "fsync", "posix_fallocate", "ftruncate", "mkdir", "statvfs"])
def test_a_beginning_that_fails_leaves_no_junk(name: str, artifact: Artifact, tmp_path: Path) -> None:
    number, error = 0, ""
    while error is not None:
        number += 1
        with pytest.MonkeyPatch.context() as patch:
            nth_call_fails(patch, name, number, errno.ENOSPC)
            error = None
            try:
                writer = begin(tmp_path / "new" / "x", artifact)
            except OutputError as raised:
                error = str(raised)
                assert names(tmp_path) == []
        assert error is None or "disk is full" in error
    writer.close()
    assert number > 1


def test_a_failure_with_progress_says_that_it_can_be_resumed(artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "x", artifact)
    write_units(writer, artifact, UNITS[:3])
    with pytest.MonkeyPatch.context() as patch:
        nth_call_fails(patch, "pwrite", 1, errno.ENOSPC)
        with pytest.raises(OutputError, match=r"disk is full.*run the same command again"):
            writer.write("4.weight", artifact.data["4.weight"])
    writer.close()
    assert finish(tmp_path / "x", artifact) == UNITS[3:]


def test_a_limit_on_file_sizes_is_named(tmp_path: Path) -> None:
    """A real one, in a process of its own."""
    script = """
import pathlib, resource, sys
sys.path.insert(0, sys.argv[2])
from tests.synthetic_artifact import *
from quantkit.errors import OutputError
out = pathlib.Path(sys.argv[1])
artifact = make_artifact(out, mean_bytes=20_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    ArtifactWriter(out / "x", artifact.files, FINGERPRINT)
except OutputError as error:
    print(error)
print(sorted(path.name for path in out.iterdir()))
"""
    root = str(Path(__file__).parent.parent)
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path), root], capture_output=True, text=True, check=True)
    error, left = result.stdout.splitlines()
    assert "ulimit -f" in error
    assert left == "['tokenizer.json']"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 40_000


def test_a_carried_file_that_cannot_be_read_is_the_sources_fault(artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "x", artifact)
    write_rest(writer, artifact)
    with pytest.raises(CheckpointError, match=r"gone\.json"):
        writer.seal(SIDECARS, [tmp_path / "gone.json"], manifest)
    writer.close()
    assert finish(tmp_path / "x", artifact) == []


def test_an_end_without_any_unit_leaves_nothing(artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    writer = begin(tmp_path / "deep" / "er" / "x", artifact)
    writer.write("0.weight", artifact.data["0.weight"])
    writer.close()
    writer.close()
    assert names(tmp_path) == []
    assert not caplog.records
