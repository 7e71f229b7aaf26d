"""The journal of a partial output: which units are done, and the thread that makes them durable in batches.

A journal is a text file with one record per line, ``<xxh3_64 of the JSON, 16 hex digits> <JSON>\\n``.  It is only ever appended
to, by one process at a time (an exclusive ``flock`` on the file itself, which the kernel drops when the process dies, so a
stale lock cannot exist).  The first line that is torn or does not match its checksum ends the journal: it and all that follows
is cut off before the next line is appended, and the units it would have claimed are simply done again.

Order is what makes a claim true: ``GroupCommit`` first syncs the data files that a batch of units was written to, and only then
appends and syncs their lines.  A line on disk therefore implies data on disk, also across a power cut.  The sync runs in a
background thread, one batch while the next one gathers, so that workers never wait for the disk unless ``MAX_BACKLOG`` units
are waiting.  After a failed sync the kernel may have dropped the pages and would report success the next time, so a failure is
final: nothing is committed after it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from quantkit.errors import OutputError

Record = dict[str, Any]

MAX_BACKLOG = 256  # units written but not yet durable; more would only be lost work after a kill

_logger = logging.getLogger(__name__)

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space, or choose an output directory on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose an output directory on another disk",
    errno.EROFS: "the file system is read-only: choose another output directory",
    errno.EACCES: "permission denied: make the directory writable, or choose another output directory",
    errno.EPERM: "operation not permitted: make the directory writable, or choose another output directory",
    errno.EFBIG: "the file would pass the largest size allowed (ulimit -f, file system): raise the limit or choose smaller shards",
    errno.EIO: "the disk reported an input/output error: check the disk before using it again",
    errno.ENOENT: "there is no such directory, or none can be made there: choose another output directory",
    errno.ENOTDIR: "a part of this path is a file: choose another output directory",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n) or choose larger shards",
}
_RESUMABLE = ". Finished units are kept: run the same command again to continue"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # errors of file systems without them


@contextmanager
def output_errors(doing: str, *, resumable: bool = False) -> Iterator[None]:
    """Turn an OSError of the body into an OutputError that says what was being done and what to do now."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(f"cannot {doing}: {advice}{_RESUMABLE if resumable else ''}") from error


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, where the file system can sync directories at all.  Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """``pwrite`` all of ``data`` (bytes, or a flat byte view) at ``offset``, without copying it.  Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file at once: whoever reads it sees all of it, or what was there before.  Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        try:
            write_all(descriptor, data, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def encode_line(record: Mapping[str, Any]) -> bytes:
    """One journal line for a record."""
    payload = json.dumps(record, separators=(",", ":")).encode()
    return xxhash.xxh3_64_hexdigest(payload).encode() + b" " + payload + b"\n"


def decode_lines(data: bytes) -> tuple[list[Record], int]:
    """The records of all sound lines at the start of ``data``, and how many bytes those lines take."""
    records: list[Record] = []
    end = 0
    while (newline := data.find(b"\n", end)) >= 0:
        checksum, _, payload = data[end:newline].partition(b" ")
        if checksum != xxhash.xxh3_64_hexdigest(payload).encode():
            break
        records.append(json.loads(payload))
        end = newline + 1
    return records, end


class Journal:
    """An open, locked journal.  ``records``: what its sound lines held when it was opened, oldest first."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal, lock it and read it; nothing is written yet, since it may turn out to be another run's.

        Raises OutputError when another process holds the lock (its id is named) or the file cannot be opened.
        """
        self.path = path
        with output_errors(f"open {path}"):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            with output_errors(f"read {path}"):
                data = self._contents()
            self.records, self._end = decode_lines(data)
            self._torn = self._end < len(data)
            if self.records and b"\n" in data[self._end :]:
                _logger.warning("%s is damaged after line %d; what it listed from there on is done again", path, len(self.records))
        except BaseException:
            self.close()
            raise

    def _contents(self) -> bytes:
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holders = [record["run"] for record in decode_lines(self._contents())[0] if "run" in record]
            holder = f"process {holders[-1]['pid']} on {holders[-1]['host']}" if holders else "another process"
            raise OutputError(
                f"{self.path.parent} is being written by {holder}: wait until it has finished or stop it, then run again"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OutputError(f"cannot lock {self.path}: {error.strerror}") from error
            _logger.warning("%s: this file system has no locks; make sure that no other run writes there", self.path.parent)
        if not self.path.exists() or not os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
            raise OutputError(f"{self.path.parent} was finished or removed by another run just now: look at it, then run again")

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records, after cutting off a damaged end, and make them durable.  Raises OSError."""
        if self._torn:
            os.ftruncate(self._descriptor, self._end)
            self._torn = False
        data = b"".join(map(encode_line, records))
        write_all(self._descriptor, data, self._end)
        os.fsync(self._descriptor)
        self._end += len(data)

    def start(self, fingerprint: Mapping[str, Any]) -> None:
        """Begin anew: drop all records, write the fingerprint.  Raises OSError."""
        self.records, self._end, self._torn = [], 0, True
        self.append([{"fingerprint": fingerprint}])

    def sign(self) -> None:
        """Say which process works on the output now, for whoever finds it locked.  Raises OSError."""
        self.append([{"run": {"pid": os.getpid(), "host": socket.gethostname()}}])

    def close(self) -> None:
        """Give up the lock.  Harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class GroupCommit:
    """Makes records durable in batches from a background thread: data files first, then the journal.

    ``durable`` counts the records that are.  The first failure ends all commits; every later call raises it as OutputError.
    """

    def __init__(self, journal: Journal, sync: Callable[[set[str]], None]) -> None:
        """sync: makes the named data files durable; raises OSError when it cannot."""
        self.durable = 0
        self._journal = journal
        self._sync = sync
        self._waiting: list[tuple[Record, set[str]]] = []
        self._in_flight = 0
        self._failure: Exception | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="quantkit-commit", daemon=True)
        self._thread.start()

    def put(self, record: Record, files: set[str]) -> None:
        """Queue a record whose data was written to ``files``.  Waits only while the backlog is full."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._waiting) < MAX_BACKLOG)
            self._raise_failure()
            self._waiting.append((record, files))
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until all that was queued is durable."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not (self._waiting or self._in_flight))
            self._raise_failure()

    def close(self) -> None:
        """Make durable what is queued, if that is still possible, and end the thread.  Does not raise."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            with output_errors(f"make finished units durable in {self._journal.path.parent}", resumable=True):
                raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                batch, self._waiting = self._waiting, []
                self._in_flight = len(batch)
            failure: Exception | None = None
            try:
                self._sync(set().union(*(files for _, files in batch)))
                self._journal.append([record for record, _ in batch])
            except Exception as error:  # raised where the main thread next asks
                failure = error
            with self._changed:
                self._in_flight = 0
                self._failure = failure
                self.durable += 0 if failure else len(batch)
                self._changed.notify_all()
                if failure:
                    return
