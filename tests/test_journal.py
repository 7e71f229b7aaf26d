"""The journal: torn and damaged ends are cut off, one process at a time, nothing is claimed before its data is synced."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import OutputError
from quantkit.journal import MAX_BACKLOG, GroupCommit, Journal, decode_lines, encode_line, output_errors

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
records = st.lists(st.dictionaries(st.text(min_size=1), values, max_size=4), max_size=6)


def journal_lines(path: Path) -> list[Any]:
    """An independent reader."""
    return [json.loads(line.split(b" ", 1)[1]) for line in path.read_bytes().splitlines()]


@given(records)
def test_lines_give_back_their_records(written: list[dict[str, Any]]) -> None:
    data = b"".join(map(encode_line, written))
    assert decode_lines(data) == (written, len(data))
    assert data.count(b"\n") == len(written)


@given(records, st.data())
def test_a_torn_end_is_recognised_at_every_byte(written: list[dict[str, Any]], choice: st.DataObject) -> None:
    lines = list(map(encode_line, written))
    data = b"".join(lines)
    cut = choice.draw(st.integers(0, len(data)))
    whole = [index for index in range(len(lines) + 1) if len(b"".join(lines[:index])) <= cut][-1]
    assert decode_lines(data[:cut]) == (written[:whole], len(b"".join(lines[:whole])))


@given(records.filter(bool), st.data())
def test_a_damaged_byte_ends_the_journal_before_its_line(written: list[dict[str, Any]], choice: st.DataObject) -> None:
    lines = list(map(encode_line, written))
    data = bytearray(b"".join(lines))
    position = choice.draw(st.integers(0, len(data) - 1))
    data[position] ^= choice.draw(st.integers(1, 255))
    hit = [index for index in range(len(lines)) if len(b"".join(lines[:index])) <= position][-1]
    assert decode_lines(bytes(data)) == (written[:hit], len(b"".join(lines[:hit])))


@given(st.binary(max_size=200))
def test_garbage_is_an_empty_journal(data: bytes) -> None:
    assert decode_lines(data) == ([], 0)


def test_what_is_appended_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.start({"recipe": "x"})
    journal.append([{"unit": "a"}, {"unit": "b"}])
    journal.close()
    journal.close()
    again = Journal(path)
    assert again.records == [{"fingerprint": {"recipe": "x"}}, {"unit": "a"}, {"unit": "b"}]
    again.start({"recipe": "y"})
    again.close()
    assert journal_lines(path) == [{"fingerprint": {"recipe": "y"}}]


@pytest.mark.parametrize(
    ("tail", "warns"),
    [(b"0123456789abcdef {", False), (b"\0" * 4096, False), (b"x\n" + encode_line({"unit": "late"}), True), (b"\n", True)],
    ids=["torn", "zeros", "damage before a sound line", "empty line"],
)
def test_a_damaged_end_is_ignored_and_appending_replaces_it(
    tail: bytes, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal"
    path.write_bytes(encode_line({"unit": "a"}) + tail)
    journal = Journal(path)
    assert journal.records == [{"unit": "a"}]
    assert path.read_bytes() == encode_line({"unit": "a"}) + tail  # it might be somebody else's
    journal.append([{"unit": "b"}])
    journal.close()
    assert journal_lines(path) == [{"unit": "a"}, {"unit": "b"}]
    assert bool(caplog.records) == warns  # one torn line is what a kill leaves; more is worth a word


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    script = """
import sys, time, pathlib, quantkit.journal
journal = quantkit.journal.Journal(pathlib.Path(sys.argv[1]))
journal.start({})
journal.sign()
print('ready', flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(OutputError, match=f"process {holder.pid} "):
            Journal(path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    Journal(path).close()  # the lock died with its process


def test_a_directory_that_is_published_while_the_lock_is_taken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.partial").mkdir()
    lock = fcntl.flock

    def renamed_just_before(descriptor: int, operation: int) -> None:
        (tmp_path / "a.partial").rename(tmp_path / "a")
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", renamed_just_before)
    with pytest.raises(OutputError, match="by another run just now"):
        Journal(tmp_path / "a.partial" / "journal")


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    Journal(tmp_path / "journal").close()
    assert "no other run" in caplog.text


def test_errors_say_what_to_do() -> None:
    with pytest.raises(OutputError, match="cannot write x: the disk is full: free some space"), output_errors("write x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    resumable = output_errors("write x", resumable=True)
    with pytest.raises(OutputError, match=r"cannot write x: Broken pipe.*run the same command again"), resumable:
        raise OSError(errno.EPIPE, "Broken pipe")


class Events:
    """Records the order of data syncs and journal appends, and can hold or fail the syncs."""

    def __init__(self, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[Any] = []
        self.proceed = threading.Event()
        self.proceed.set()
        self.failure: Exception | None = None
        append = journal.append

        def recording(records: list[dict[str, Any]]) -> None:
            append(records)
            self.log.append(("journal", [record["unit"] for record in records]))

        monkeypatch.setattr(journal, "append", recording)

    def sync(self, files: set[str]) -> None:
        self.proceed.wait()
        if self.failure is not None:
            raise self.failure
        self.log.append(("data", sorted(files)))


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    opened = Journal(tmp_path / "journal")
    yield opened
    opened.close()


def test_data_is_synced_before_the_journal_claims_it_and_batches_gather_meanwhile(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events(journal, monkeypatch)
    commits = GroupCommit(journal, events.sync)
    events.proceed.clear()
    commits.put({"unit": "0"}, {"a"})
    while commits._waiting:  # the first batch is now in flight and held in its sync
        pass
    for number in range(1, 6):
        commits.put({"unit": str(number)}, {"a", f"file{number}"})
    assert commits.durable == 0
    assert not events.log
    events.proceed.set()
    commits.drain()
    assert events.log == [
        ("data", ["a"]),
        ("journal", ["0"]),
        ("data", ["a", "file1", "file2", "file3", "file4", "file5"]),
        ("journal", ["1", "2", "3", "4", "5"]),
    ]
    assert commits.durable == 6
    commits.close()
    assert len(journal_lines(journal.path)) == 6


def test_closing_makes_durable_what_is_queued(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(journal, monkeypatch)
    events.proceed.clear()
    commits = GroupCommit(journal, events.sync)
    for number in range(10):
        commits.put({"unit": str(number)}, {"a"})
    threading.Timer(0.05, events.proceed.set).start()
    commits.close()
    assert [line["unit"] for line in journal_lines(journal.path)] == [str(number) for number in range(10)]


@pytest.mark.parametrize("where", ["sync", "append", "fsync"])
def test_a_failure_is_final_and_raised_to_whoever_asks(where: str, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(journal, monkeypatch)
    commits = GroupCommit(journal, events.sync)
    commits.put({"unit": "good"}, {"a"})
    commits.drain()
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*arguments: Any) -> int:
        raise full

    with monkeypatch.context() as patch:
        if where == "sync":
            events.failure = full
        else:
            patch.setattr(os, {"append": "pwrite", "fsync": "fsync"}[where], fail)
        commits.put({"unit": "bad"}, {"a"})
        with pytest.raises(OutputError, match="disk is full"):
            commits.drain()
    events.failure = None
    with pytest.raises(OutputError, match="disk is full"):  # a sync after a failed sync proves nothing
        commits.put({"unit": "later"}, {"a"})
    commits.close()
    assert commits.durable == 1
    assert ("journal", ["later"]) not in events.log


def test_a_full_backlog_waits_and_a_failure_wakes_the_waiting(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(journal, monkeypatch)
    events.proceed.clear()
    commits = GroupCommit(journal, events.sync)
    commits.put({"unit": "in flight"}, {"a"})
    while commits._waiting:
        pass
    for number in range(MAX_BACKLOG):
        commits.put({"unit": str(number)}, {"a"})
    raised: list[BaseException] = []

    def one_too_many() -> None:
        try:
            commits.put({"unit": "over"}, {"a"})
        except OutputError as error:
            raised.append(error)

    thread = threading.Thread(target=one_too_many)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    events.failure = OSError(errno.EIO, "Input/output error")
    events.proceed.set()
    thread.join(20)
    assert not thread.is_alive()
    assert "check the disk" in str(raised[0])
    commits.close()


def test_an_error_that_is_not_the_disks_surfaces_as_itself(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(journal, monkeypatch)
    events.failure = KeyError("no such file planned")
    commits = GroupCommit(journal, events.sync)
    commits.put({"unit": "a"}, {"a"})
    with pytest.raises(KeyError):
        commits.drain()
    commits.close()
