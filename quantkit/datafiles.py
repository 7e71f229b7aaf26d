"""The planned files of one artifact on disk: allocated at full size, filled at offsets by several threads, synced, read back.

Writes go straight from the caller's buffer to ``pwrite``, reads come unbuffered into one reused buffer; nothing is mapped,
because mapped pages count as resident memory.  Space is allocated before any work starts, so a full disk is found in the first
second and not in the last hour; a file system that cannot allocate gets sparse files instead.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import xxhash

from quantkit.errors import Interrupted, OutputError
from quantkit.formats.base import OutputFile
from quantkit.journal import output_errors, sync_directory, write_all

READ_BYTES = 8 << 20
CHECKSUM_BYTES = 8
STOPPED = "stopped while the artifact was checked and completed; nothing is lost: run the same command again to continue"


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes go: file name, absolute offset, size."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileCheck:
    """What reading a file back showed.

    wrong: names of tensors that differ from what was written; the empty name stands for header, padding or size of the file.
    stamp: that of the file (see ``DataFiles.stamp``) when reading began.
    """

    name: str
    size: int
    sha256: str
    wrong: tuple[str, ...]
    stamp: tuple[int, int, int]


class BackgroundChecks:
    """Runs checks one after the other in a daemon thread.

    A check waits for tensors that are yet to be written.  Python waits for the threads of a ThreadPoolExecutor when it ends, so a
    writer that nobody closed, say because a second Ctrl-C hit the closing, would keep the whole program from ending.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[FileCheck], Callable[[], FileCheck]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="quantkit-check", daemon=True)
        self._thread.start()

    def submit(self, check: Callable[[], FileCheck]) -> Future[FileCheck]:
        """Queue a check; its future can be cancelled until it begins."""
        future: Future[FileCheck] = Future()
        self._queue.put((future, check))
        return future

    def close(self) -> None:
        """Wait for what is queued, which has to end by itself.  Harmless when repeated."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, check = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(check())
                except Exception as error:  # raised to whoever asks for the result
                    future.set_exception(error)


class DataFiles:
    """The data files of one artifact in ``directory``.  Thread-safe once ``open`` and ``allocate`` are done."""

    def __init__(self, directory: Path, files: Sequence[OutputFile]) -> None:
        self.directory = directory
        self.files = {file.name: file for file in files}
        self.places = {
            tensor.name: Place(file.name, file.offsets[tensor.name], tensor.nbytes) for file in files for tensor in file.tensors
        }
        self._descriptors: dict[str, int] = {}

    def open(self) -> dict[str, str]:
        """Open all files, creating those that do not exist; returns what is wrong with which: name -> reason.

        A file with the planned size and header is right; what its tensors hold is not looked at.
        """
        faults: dict[str, str] = {}
        for name, file in self.files.items():
            path = self.directory / name
            with output_errors(f"open {path}"):
                existed = path.exists()
                descriptor = self._descriptors[name] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                size = os.fstat(descriptor).st_size
                if not existed:
                    faults[name] = "is missing"
                elif size != file.size:
                    faults[name] = f"has {size} bytes instead of {file.size}"
                elif os.pread(descriptor, len(file.header), 0) != file.header:
                    faults[name] = "has another header than planned"
        return faults

    def allocate(self, names: Collection[str]) -> None:
        """Give the named files their full size and their header, dropping what they held.  All is durable on return.

        Raises OutputError, before anything is allocated when the disk has too little room for all files.
        """
        with output_errors(f"measure the free space of {self.directory}"):
            needed = sum(max(0, self.files[name].size - os.fstat(fd).st_blocks * 512) for name, fd in self._descriptors.items())
            disk = os.statvfs(self.directory)
        free = disk.f_bavail * disk.f_frsize
        if disk.f_blocks and free < needed:  # some network file systems do not know their size
            raise OutputError(
                f"{self.directory} needs {needed / 1e9:.3f} GB more, but the disk has {free / 1e9:.3f} GB free: "
                "free some space, or choose an output directory on another disk"
            )
        for name in names:
            file, descriptor = self.files[name], self._descriptors[name]
            with output_errors(f"allocate {self.directory / name} ({file.size} bytes)"):
                os.ftruncate(descriptor, 0)
                allocate_file(descriptor, file.size)
                write_all(descriptor, file.header, 0)
                os.fsync(descriptor)
        with output_errors(f"prepare {self.directory}"):
            sync_directory(self.directory)

    def write(self, name: str, position: int, data: memoryview) -> None:
        """Write bytes of tensor ``name``, ``position`` bytes from its start."""
        place = self.places[name]
        if position < 0 or position + len(data) > place.nbytes:
            raise ValueError(f"{name}: bytes {position} to {position + len(data)} lie outside of its {place.nbytes} bytes")
        with output_errors(f"write {name} to {self.directory / place.file}", resumable=True):
            write_all(self._descriptors[place.file], data, place.offset + position)

    def write_checksums(self, digests: Mapping[str, str]) -> None:
        """Write the checksums of whole tensors, name -> xxh3_64, into the files of formats that store them."""
        for name, digest in digests.items():
            file = self.places[name].file
            if (offset := self.files[file].checksums.get(name)) is not None:
                with output_errors(f"write the checksum of {name} to {self.directory / file}", resumable=True):
                    write_all(self._descriptors[file], _stored(digest), offset)

    def read(self, name: str) -> bytes:
        """What stands at the place of tensor ``name``.  Raises OutputError."""
        place = self.places[name]
        with output_errors(f"read {name} from {self.directory / place.file}", resumable=True):
            return os.pread(self._descriptors[place.file], place.nbytes, place.offset)

    def sync(self, names: Collection[str]) -> None:
        """Make what was written to the named files durable.  Raises OSError."""
        for name in sorted(names):
            os.fdatasync(self._descriptors[name])

    def check(self, name: str, digest_of: Callable[[str], str], stop: threading.Event, checked: Callable[[int], None]) -> FileCheck:
        """Read a file back once: its sha256, and which tensors differ from the checksum they were written with.

        digest_of: waits until a tensor is written and returns its xxh3_64, so that reading may follow the writing.  checked:
        told the number of bytes after each read.  Raises Interrupted soon after ``stop`` is set.
        """
        file, path = self.files[name], self.directory / name
        whole, wrong = hashlib.sha256(), []
        buffer = memoryview(bytearray(min(READ_BYTES, file.size)))
        with output_errors(f"read back {path}", resumable=True), path.open("rb", buffering=0) as stream:
            for tensor_name, known, left, is_checksum in _segments(file):
                part = xxhash.xxh3_64()
                digest = xxhash.xxh3_64_hexdigest(known) if known is not None else digest_of(tensor_name)
                if is_checksum:
                    digest = xxhash.xxh3_64_hexdigest(_stored(digest))
                while left:
                    if stop.is_set():
                        raise Interrupted(STOPPED)
                    piece = buffer[: stream.readinto(buffer[:left])]  # not beyond this tensor: the next may not be written yet
                    if not piece:
                        break  # shorter than it was
                    whole.update(piece)
                    part.update(piece)
                    checked(len(piece))
                    left -= len(piece)
                if left or part.hexdigest() != digest:
                    wrong.append(tensor_name)
            status = os.fstat(stream.fileno())
            stamp, size = _stamp(status), status.st_size
        if size != file.size and not wrong:
            wrong.append("")
        return FileCheck(name, size, whole.hexdigest(), tuple(wrong), stamp)

    def stamp(self, name: str) -> tuple[int, int, int]:
        """Changes when somebody writes to the file or puts another in its place."""
        with output_errors(f"look at {self.directory / name}", resumable=True):
            return _stamp((self.directory / name).stat())

    def close(self) -> None:
        """Close all files.  Harmless when repeated."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _segments(file: OutputFile) -> Iterator[tuple[str, bytes | None, int, bool]]:
    """What follows what in a file: name of the tensor, content where that is known, size, whether it is the tensor's checksum.
    Header and padding have no name."""
    pieces = [(file.offsets[tensor.name], tensor.nbytes, tensor.name, False) for tensor in file.tensors]
    pieces += [(offset, CHECKSUM_BYTES, name, True) for name, offset in file.checksums.items()]
    yield "", file.header, len(file.header), False
    end = len(file.header)
    for offset, nbytes, name, is_checksum in sorted(pieces):
        if gap := offset - end:
            yield "", bytes(gap), gap, False
        yield name, None, nbytes, is_checksum
        end = offset + nbytes
    if gap := file.size - end:
        yield "", bytes(gap), gap, False


def _stored(digest: str) -> bytes:
    """A hexadecimal checksum as files hold it."""
    return int(digest, 16).to_bytes(CHECKSUM_BYTES, "little")


def allocate_file(descriptor: int, size: int) -> None:
    """Give a file that size and the space for it; a file system that cannot allocate makes it sparse.  Raises OSError."""
    if _can_allocate(descriptor):
        os.posix_fallocate(descriptor, 0, size)
    os.ftruncate(descriptor, size)


def _can_allocate(descriptor: int) -> bool:
    """Whether the file system allocates, asked of fallocate(2): glibc's posix_fallocate writes to every block where it does not."""
    failed = ctypes.CDLL(None, use_errno=True).fallocate(descriptor, 0, ctypes.c_longlong(0), ctypes.c_longlong(1))
    return not failed or ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
