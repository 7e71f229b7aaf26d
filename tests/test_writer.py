"""The writer: the library's bytes come out, whatever was killed, damaged, refused or full on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import datafiles
from quantkit.errors import Interrupted, OutputError, ResumeError
from quantkit.writer import publish
from tests.synthetic_artifact import (
    FAST,
    FIRST,
    JOURNAL,
    UNITS,
    Artifact,
    begin,
    contents,
    finish,
    journalled_units,
    make_artifact,
    names,
    run_partly,
    seal,
    write_rest,
    write_units,
)

FORMER = '{"quantkit_manifest": 1}'  # of an artifact that stands where the new one goes


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("carried"))


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


def test_a_kill_at_every_change_of_the_disk_is_survived(tmp_path: Path) -> None:
    script = Path(__file__).with_name("crash_points.py")
    result = subprocess.run([sys.executable, str(script), str(tmp_path), "2"], capture_output=True, text=True, check=False)
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
            with contextlib.closing(begin(final, artifact)) as writer:  # a draw may end the example by an exception
                assert sorted(writer.completed) == sorted(claimed)
                todo = choice.draw(st.permutations([key for key in UNITS if key not in claimed]), "order")
                write_units(writer, artifact, todo[: choice.draw(st.integers(0, len(todo)), "units done")])
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


def test_a_writer_that_nobody_closed_does_not_keep_the_program_from_ending(tmp_path: Path) -> None:
    script = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from tests.synthetic_artifact import *
artifact = make_artifact(pathlib.Path(sys.argv[1]))
writer = begin(pathlib.Path(sys.argv[1]) / "x", artifact)
write_units(writer, artifact, UNITS[:2])
"""
    root = str(Path(__file__).parent.parent)
    subprocess.run([sys.executable, "-c", script, str(tmp_path), root], check=True, timeout=60)  # it would wait for ever
    assert set(finish(tmp_path / "x", artifact := make_artifact(tmp_path))) <= set(UNITS)
    assert contents(tmp_path / "x") == artifact.expected


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
    (tmp_path / "x" / "manifest.json").write_text(FORMER)
    writer = begin(tmp_path / "x", artifact, force=True)
    write_rest(writer, artifact)
    seal(writer, artifact)
    assert contents(tmp_path / "x") == {"manifest.json": FORMER.encode()}
    publish([writer])
    writer.close()
    assert contents(tmp_path / "x") == artifact.expected
    assert names(tmp_path) == ["x"]


def test_a_directory_with_a_journal_of_something_else_is_left_alone(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / JOURNAL).write_text("Dear diary,\n")
    with pytest.raises(OutputError, match="exists already"):
        begin(tmp_path / "x", artifact)
    assert contents(tmp_path / "x") == {JOURNAL: b"Dear diary,\n"}
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
    (tmp_path / "x" / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match=r"no manifest\.json of quantkit.*not replaced"):
        begin(tmp_path / "x", artifact, force=True)
    assert names(tmp_path / "x") == ["manifest.json", "thesis.txt"]
    assert names(tmp_path) == ["x"]


def test_a_replacement_cut_short_between_its_renames_is_undone_without_force_and_finished_with_it(
    artifact: Artifact, tmp_path: Path
) -> None:
    run_partly(tmp_path / "x", artifact, 6)
    (tmp_path / "x.replaced").mkdir()
    (tmp_path / "x.replaced" / "manifest.json").write_text(FORMER)
    with pytest.raises(OutputError, match="exists already"):
        begin(tmp_path / "x", artifact)
    assert names(tmp_path) == ["x", "x.partial"]
    assert contents(tmp_path / "x") == {"manifest.json": FORMER.encode()}
    assert finish(tmp_path / "x", artifact, force=True) == []
    assert contents(tmp_path / "x") == artifact.expected
    assert names(tmp_path) == ["x"]


def test_a_directory_that_only_looks_like_a_replaced_artifact_is_left_alone(artifact: Artifact, tmp_path: Path) -> None:
    for name in ("x", "x.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(FORMER)
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
