"""The writer: the library's bytes come out, whatever was killed, damaged, refused or full on the way."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import datafiles
from quantkit.errors import CheckpointError, Interrupted, OutputError, ResumeError
from quantkit.writer import ArtifactWriter, publish
from tests.synthetic_artifact import (
    FINGERPRINT,
    JOURNAL,
    SIDECARS,
    Artifact,
    contents,
    journalled_units,
    make_artifact,
    manifest,
    seal,
    write_rest,
    write_units,
)

UNITS = [f"unit {number}" for number in range(6)]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# Memory, where there is some to write to: syncs cost nothing there, and neither kills nor errors care.
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("carried"))


def begin(final: Path, artifact: Artifact, **options: Any) -> ArtifactWriter:
    return ArtifactWriter(final, artifact.files, options.pop("fingerprint", FINGERPRINT), **options)


def finish(final: Path, artifact: Artifact, **options: Any) -> list[str]:
    """A run to the end; returns the units it did."""
    writer = begin(final, artifact, **options)
    try:
        done = write_rest(writer, artifact)
        seal(writer, artifact)
        publish([writer])
    finally:
        writer.close()
    return done


def run_partly(final: Path, artifact: Artifact, count: int, **options: Any) -> None:
    """A run that ends, in an orderly way, after ``count`` units."""
    writer = begin(final, artifact, **options)
    write_units(writer, artifact, UNITS[:count])
    writer.close()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ------------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("workers", [1, 4])
def test_the_librarys_files_come_out_and_nothing_else(workers: int, artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "out" / "x", artifact)
    assert writer.resumed == 0
    assert write_rest(writer, artifact, workers) == UNITS
    read = []
    seal(writer, artifact, workers=workers, checked=read.append)
    assert not (tmp_path / "out" / "x").exists()
    publish([writer])
    writer.close()
    assert contents(tmp_path / "out" / "x") == artifact.expected
    assert names(tmp_path / "out") == ["x"]
    assert sum(read) == sum(file.size for file in artifact.files)
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "x" / FIRST)
    assert tensors["0.weight"].tobytes() == artifact.data["0.weight"]


def test_the_manifest_is_told_size_and_sha256_of_every_other_file(artifact: Artifact, tmp_path: Path) -> None:
    finish(tmp_path / "x", artifact)
    listed = json.loads((tmp_path / "x" / "manifest.json").read_bytes())
    assert sorted([*listed, "manifest.json"]) == names(tmp_path / "x")
    for name, entry in listed.items():
        content = (tmp_path / "x" / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_tensor_can_be_written_in_pieces(artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "x", artifact)
    write_units(writer, artifact, UNITS[1:])
    digests = {}
    for name in artifact.units[UNITS[0]]:
        data = memoryview(artifact.data[name])
        for start in reversed(range(0, len(data), 7)):
            writer.write_part(name, start, data[start : start + 7])
        digests[name] = writer.write(name, data)
    writer.commit(UNITS[0], digests, [])
    seal(writer, artifact)
    publish([writer])
    writer.close()
    assert contents(tmp_path / "x") == artifact.expected


def test_a_write_outside_of_its_tensor_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "x", artifact)
    size = len(artifact.data["0.weight"])
    for position, count in [(0, size + 1), (size, 1), (-1, 1)]:
        with pytest.raises(ValueError, match=r"0\.weight"):
            writer.write_part("0.weight", position, bytes(count))
    with pytest.raises(ValueError, match=f"got {size - 1} bytes"):
        writer.write("0.weight", bytes(size - 1))
    writer.close()


def test_a_resumed_run_sees_the_ledger_exactly_as_the_run_that_wrote_it(artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "x", artifact)
    writer.commit("unit 0", {}, [{"error": 1 / 3, "shape": (2, 3), "none": None}])
    seen = writer.completed
    writer.close()
    again = begin(tmp_path / "x", artifact)
    assert again.completed == seen
    assert again.resumed == 1
    again.close()


def test_an_artifact_without_all_its_tensors_is_not_sealed(artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "x", artifact)
    write_units(writer, artifact, UNITS[:5])
    with pytest.raises(OutputError, match=r"3 tensors were never written, the first is 5\.flag"):
        seal(writer, artifact)
    writer.close()
    assert finish(tmp_path / "x", artifact) == UNITS[5:]


# ----------------------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("workers", ["1", "3"])
def test_a_kill_at_every_change_of_the_disk_is_survived(workers: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("crash_points.py")
    result = subprocess.run([sys.executable, str(script), str(tmp_path), workers], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    tried = json.loads(result.stdout)
    assert tried["kills"] > 80  # every file, header, unit, sidecar, sync and rename has its own
    assert tried["kills_while_resuming"] > 20


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_crashes_then_a_rerun_give_the_same_bytes(artifact: Artifact, choice: st.DataObject) -> None:
    """A crash leaves some journal prefix and, outside of the tensors it claims, any bytes at all."""
    with tempfile.TemporaryDirectory(dir=FAST) as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datafiles, "READ_BYTES", choice.draw(st.sampled_from([1, 7, 64, 1 << 20]), "read size"))
        final, partial = Path(directory) / "x", Path(directory) / "x.partial"
        claimed: list[str] = []
        for _ in range(choice.draw(st.integers(1, 3), "crashes")):
            writer = begin(final, artifact)
            assert sorted(writer.completed) == sorted(claimed)
            todo = choice.draw(st.permutations([key for key in UNITS if key not in claimed]), "order")
            write_units(writer, artifact, todo[: choice.draw(st.integers(0, len(todo)), "units done")])
            writer.close()
            if not partial.exists():
                continue
            journal = (partial / JOURNAL).read_bytes()
            (partial / JOURNAL).write_bytes(journal[: choice.draw(st.integers(0, len(journal)), "journal bytes left")])
            claimed = journalled_units(partial)
            kept = {name for key in claimed for name in artifact.units[key]}
            for file in artifact.files:
                blob = bytearray((partial / file.name).read_bytes())
                for tensor in file.tensors:
                    if tensor.name not in kept and choice.draw(st.booleans()):
                        start = file.offsets[tensor.name]
                        blob[start : start + tensor.nbytes] = os.urandom(tensor.nbytes)
                (partial / file.name).write_bytes(blob)
        assert sorted(finish(final, artifact)) == sorted(set(UNITS) - set(claimed))
        assert contents(final) == artifact.expected
        assert names(Path(directory)) == ["x"]


def test_several_artifacts_are_published_together(artifact: Artifact, tmp_path: Path) -> None:
    """When something came in the way of the second, the first stands; a rerun finishes without doing anything again."""
    writers = [begin(tmp_path / name, artifact) for name in "ab"]
    for writer in writers:
        write_rest(writer, artifact)
        seal(writer, artifact)
    (tmp_path / "b").write_text("in the way")
    with pytest.raises(OutputError, match="b is a file"):
        publish(writers)
    for writer in writers:
        writer.close()
    (tmp_path / "b").unlink()
    assert names(tmp_path) == ["a", "b.partial"]
    writers = [begin(tmp_path / name, artifact) for name in "ab"]
    for writer in writers:
        assert write_rest(writer, artifact) == []
        assert writer.resumed == len(UNITS)
        seal(writer, artifact)
    publish(writers)
    for writer in writers:
        writer.close()
    assert names(tmp_path) == ["a", "b"]
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == artifact.expected


def test_another_fingerprint_is_refused_with_what_differs(artifact: Artifact, tmp_path: Path) -> None:
    run_partly(tmp_path / "x", artifact, 2)
    other = {"version": "2", "source": {"shards": {"a": {"size": 6}}}, "recipe": {"name": "x", "rules": ["y"]}, "new": True}
    before = contents(tmp_path / "x.partial")
    with pytest.raises(ResumeError) as caught:
        begin(tmp_path / "x", artifact, fingerprint=other)
    message = str(caught.value)
    for line in ["version: was 1, is now 2", "source.shards.a.size: was 5, is now 6", "new: was absent, is now true", "--restart"]:
        assert line in message
    assert "recipe" not in message
    assert contents(tmp_path / "x.partial") == before
    assert finish(tmp_path / "x", artifact, fingerprint=other, restart=True) == UNITS
    assert contents(tmp_path / "x") == artifact.expected


def test_restart_discards_a_partial_run(artifact: Artifact, tmp_path: Path) -> None:
    run_partly(tmp_path / "x", artifact, 4)
    assert finish(tmp_path / "x", artifact, restart=True) == UNITS
    assert contents(tmp_path / "x") == artifact.expected


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


@pytest.mark.parametrize("change", ["header", "longer", "shorter", "gone"])
def test_a_file_that_changes_under_the_run_is_not_published(change: str, artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "x", artifact)
    write_units(writer, artifact, UNITS[:5])
    path = tmp_path / "x.partial" / SECOND
    if change == "gone":
        path.unlink()
    elif change == "header":
        with path.open("r+b") as stream:
            stream.write(b"\1")
    else:
        os.truncate(path, artifact.files[1].size + (1 if change == "longer" else -1))
    write_units(writer, artifact, UNITS[5:])
    if change == "shorter":
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


def test_stop_ends_the_check_and_the_run_is_resumed(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datafiles, "READ_BYTES", 1)
    writer = begin(tmp_path / "x", artifact)
    write_rest(writer, artifact)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match="run the same command again"):
        seal(writer, artifact, stop=stop)
    writer.close()
    assert finish(tmp_path / "x", artifact) == []
    assert contents(tmp_path / "x") == artifact.expected


def test_a_keyboard_interrupt_ends_the_check(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begin(tmp_path / "x", artifact)
    write_rest(writer, artifact)
    with monkeypatch.context() as patch:

        def interrupted(*arguments: Any, **options: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr("quantkit.writer.wait", interrupted)
        with pytest.raises(Interrupted):
            seal(writer, artifact)
    writer.close()
    assert finish(tmp_path / "x", artifact) == []


# -------------------------------------------------------------------------------------------- what is in the way already


def test_an_existing_artifact_is_refused_and_nothing_is_touched(artifact: Artifact, tmp_path: Path) -> None:
    finish(tmp_path / "x", artifact)
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        begin(tmp_path / "x", artifact)
    assert names(tmp_path) == ["x"]
    assert contents(tmp_path / "x") == artifact.expected


def test_force_replaces_an_artifact_and_keeps_it_until_the_new_one_stands(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "manifest.json").write_text("former")
    writer = begin(tmp_path / "x", artifact, force=True)
    write_rest(writer, artifact)
    seal(writer, artifact)
    assert contents(tmp_path / "x") == {"manifest.json": b"former"}
    publish([writer])
    writer.close()
    assert contents(tmp_path / "x") == artifact.expected
    assert names(tmp_path) == ["x"]


def test_without_force_an_output_that_came_meanwhile_is_not_replaced(artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "x", artifact)
    write_rest(writer, artifact)
    seal(writer, artifact)
    (tmp_path / "x").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        publish([writer])
    writer.close()
    (tmp_path / "x").rmdir()
    assert finish(tmp_path / "x", artifact) == []
    assert contents(tmp_path / "x") == artifact.expected


def test_force_does_not_replace_what_is_not_an_artifact(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"no manifest\.json.*not replaced"):
        begin(tmp_path / "x", artifact, force=True)
    assert names(tmp_path) == ["x"]


def test_a_replacement_cut_short_between_its_renames_is_undone_without_force_and_finished_with_it(
    artifact: Artifact, tmp_path: Path
) -> None:
    run_partly(tmp_path / "x", artifact, 6)
    (tmp_path / "x.replaced").mkdir()
    (tmp_path / "x.replaced" / "manifest.json").write_text("former")
    with pytest.raises(OutputError, match="exists already"):
        begin(tmp_path / "x", artifact)
    assert names(tmp_path) == ["x", "x.partial"]
    assert contents(tmp_path / "x") == {"manifest.json": b"former"}
    assert finish(tmp_path / "x", artifact, force=True) == []
    assert contents(tmp_path / "x") == artifact.expected
    assert names(tmp_path) == ["x"]


def test_a_directory_that_only_looks_like_a_replaced_artifact_is_left_alone(artifact: Artifact, tmp_path: Path) -> None:
    for name in ("x", "x.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
    with pytest.raises(OutputError, match=r"x\.replaced is in the way"):
        begin(tmp_path / "x", artifact, force=True)
    assert names(tmp_path) == ["x", "x.replaced"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_place_of_the_output_is_refused(force: bool, artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file")
    with pytest.raises(OutputError, match="x is a file"):
        begin(tmp_path / "x", artifact, force=force)
    assert contents(tmp_path) == {"x": b"a file"}


@pytest.mark.parametrize("where", ["x.partial", "."])
def test_a_file_in_place_of_a_directory_is_refused(where: str, artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if where == ".":
        out.write_text("a file")
    else:
        out.mkdir()
        (out / where).write_text("a file")
    with pytest.raises(OutputError):
        begin(out / "x", artifact)


def test_a_linked_output_is_written_where_the_link_leads(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "big disk" / "x")
    finish(tmp_path / "x", artifact)
    assert contents(tmp_path / "big disk" / "x") == artifact.expected
    assert names(tmp_path / "big disk") == ["x"]
    assert (tmp_path / "x").is_symlink()


def test_two_runs_on_one_output(artifact: Artifact, tmp_path: Path) -> None:
    first = begin(tmp_path / "x", artifact)
    for options in ({}, {"restart": True}, {"force": True}):
        with pytest.raises(OutputError, match=f"being written by process {os.getpid()} "):
            begin(tmp_path / "x", artifact, **options)
    write_rest(first, artifact)
    seal(first, artifact)
    publish([first])
    first.close()
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


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_allocate_gets_sparse_files(
    code: int, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*arguments: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    finish(tmp_path / "x", artifact)
    assert contents(tmp_path / "x") == artifact.expected


def nth_call_fails(patch: pytest.MonkeyPatch, module: Any, name: str, number: int, code: int) -> Callable[[], int]:
    """Make the ``number``-th call of ``module.name`` raise; returns a function that tells how many calls there were."""
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
    number, failures, module = 0, 0, fcntl if name == "flock" else os
    resume = True
    while True:
        number += 1
        out = tmp_path / f"{number}"
        before = UNITS[:2] if resume else []
        if resume:
            run_partly(out / "x", artifact, 2)
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.MonkeyPatch.context() as patch:
            calls = nth_call_fails(patch, module, name, number, CHANGES[name])
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
            nth_call_fails(patch, os, name, number, errno.ENOSPC)
            error = None
            try:
                writer = begin(tmp_path / "new" / "x", artifact)
            except OutputError as raised:
                error = str(raised)
                assert names(tmp_path) == []
        assert error is None or "disk is full" in error
    writer.close()
    assert number > 1


def test_an_unwritable_directory_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="permission denied"):
            begin(tmp_path / "x", artifact)
    finally:
        tmp_path.chmod(0o700)


def test_a_failure_with_progress_says_that_it_can_be_resumed(artifact: Artifact, tmp_path: Path) -> None:
    writer = begin(tmp_path / "x", artifact)
    write_units(writer, artifact, UNITS[:3])
    with pytest.MonkeyPatch.context() as patch:
        nth_call_fails(patch, os, "pwrite", 1, errno.ENOSPC)
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
