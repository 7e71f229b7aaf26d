"""Arrays that an evaluation keeps on disk: final hidden states, states of a run that goes on, scores of tokens.

An entry is one file with a header, arrays of one leading dimension each, and a checksum over all of it:

    8 bytes     magic
    8 bytes     length of the header
    header      JSON: dtypes and shapes of the arrays by name
    arrays      one after the other, row-major, little endian
    16 bytes    xxh3-128 of everything before

It is written under another name, synced and renamed, so that an entry is there as a whole or not at all; space is allocated first,
so that a full disk is an error before any work is lost.  An entry is opened by reading it through once and comparing the checksum:
what is damaged is told in a warning and counts as absent, so it is computed again.  What is opened stays readable when another run
removes or replaces the file.  Nothing here is worth keeping: the directory can be deleted at any time.

Entries lie in folders named by what they depend on, and a limit bounds the bytes of all of them.  Before an entry is written, and
once when an evaluation begins, the folders that have not been used for longest are removed until it fits.  An evaluation holds a
shared lock on each of its folders, and a folder is removed under an exclusive one, so what a running evaluation needs stays, also
another process's (on network file systems locks may hold on one machine only).  Files are removed one by one: a kill in between
leaves whole entries.  What is not named as ours, or does not begin as ours do, is neither counted nor touched.

Hidden states are kept as FP16 with a power of two for each row, so that the largest value of a row has all bits that FP16 has and
the smallest that count are not lost: half the bytes of float32.  Three artifacts of the demo, with divergences of 0.0026 to 0.0042,
were measured with float32 instead: the divergences differ by 1e-8 to 1.2e-7, ratios of perplexities by at most 1e-6.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xxhash

from quantkit.datafiles import allocate_file
from quantkit.errors import OutputError
from quantkit.journal import NO_LOCKS, output_errors, sync_directory, write_all

MAGIC = b"qkcache1"
LIMIT_BYTES = 20 * 10**9  # of all entries, unless told otherwise: those of six texts for a Scout
_READ_BYTES = 8 << 20
_STALE_SECONDS = 3600.0  # a file in the making that nobody has written to for so long is nobody's any more
_DIGEST_BYTES = 16
_LARGEST_POWER = 15  # values of a row are scaled to below 2 to this power, which FP16 holds
_FOLDER = re.compile(r"[0-9a-f]{16}(?:-[0-9a-f]{16})?")
_FILE = re.compile(r"(?:states|scores|unfinished)-\d{5,}(?P<making>\.\d+\.tmp)?")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEAST_EXPONENT = -100  # of the scale: beyond it the scale's inverse is no float32

_logger = logging.getLogger(__name__)


class Entry:
    """An entry that was found sound; a context manager."""

    def __init__(self, descriptor: int, begin: int, arrays: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._descriptor = descriptor
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        for name, (dtype, shape) in arrays.items():
            self._places[name] = begin, dtype, shape
            begin += math.prod(shape) * dtype.itemsize
        self.size = begin + _DIGEST_BYTES

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array."""
        return self._places[name][2]

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """An array, or some of its rows."""
        begin, dtype, shape = self._places[name]
        start, stop, _ = (rows or slice(None)).indices(shape[0])
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        result = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        _read_into(self._descriptor, result.numpy().reshape(-1).view(np.uint8).data, begin + start * row_bytes)
        return result

    def close(self) -> None:
        """Close the file.  Harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EvaluationCache:
    """The entries below ``directory``; a context manager.  Names may have one slash, for a folder.

    limit: bytes of all entries; what a running evaluation needs is kept even beyond it.
    """

    def __init__(self, directory: Path, limit: int = LIMIT_BYTES) -> None:
        """Raises OutputError when the directory cannot be made or written to."""
        self.directory, self._limit = directory, limit
        self._held: dict[str, int] = {}  # descriptors of the folders that this process has locked
        self._told = False  # that the running evaluation needs more than the limit
        with _cache_errors(f"write to the evaluation cache {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "not writable")

    def close(self) -> None:
        """Let go of the folders.  Harmless when repeated."""
        while self._held:
            os.close(self._held.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hold(self, folders: Iterable[str]) -> None:
        """Begin an evaluation that needs ``folders``: they count as used now and stay until :meth:`close`; others make room.

        Raises OutputError.
        """
        with _cache_errors(f"read the evaluation cache {self.directory}"):
            for folder in folders:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # nothing there yet, or nothing of ours
                    self._lock(folder)
            self._make_room(0)

    def open(self, name: str) -> Entry | None:
        """The entry, read through; None when there is none, or none that is sound.  Raises OutputError for a strange place."""
        path = self.directory / name
        for place, usual in ((path.parent, "directory"), (path, "file")):
            if os.path.lexists(place) and os.path.isdir(place) is (usual == "file"):  # nothing of ours
                raise OutputError(
                    f"{place} is no {usual}, as the cache needs. Remove it, or choose another cache directory (--cache)."
                )
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            _logger.warning("%s cannot be read (%s); what it held is computed again", path, error.strerror)
            return None
        try:
            entry = _checked(descriptor)
        except OSError as error:
            _logger.warning("%s cannot be read (%s); what it held is computed again", path, error.strerror)
            entry = None
        else:
            if entry is None:
                _logger.warning("%s is damaged; what it held is computed again", path)
        if entry is None:
            os.close(descriptor)
        return entry

    def save(self, name: str, arrays: Mapping[str, torch.Tensor]) -> None:
        """Write an entry, replacing any of that name.  Raises OutputError."""
        path = self.directory / name
        size = len(_header(arrays)) + sum(array.nbytes for array in arrays.values()) + _DIGEST_BYTES
        with _cache_errors(f"write {path}", resumable=True, full=lambda: self._what_may_go(size)):
            self._make_room(size)
            self._lock_made(name.rpartition("/")[0])
            _remove_stale(path.parent)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            try:
                _write(temporary, arrays)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
                raise
            sync_directory(path.parent)

    def remove(self, name: str) -> None:
        """Remove an entry, if it is there, and its folder when that is empty then.  Raises OutputError."""
        path = self.directory / name
        with _cache_errors(f"remove {path}"):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            if path.parent != self.directory:
                with contextlib.suppress(OSError):  # not empty, or not there: all the same
                    path.parent.rmdir()

    # --------------------------------------------------------------------------------------------------------------- room

    def _lock_made(self, folder: str) -> None:
        """Make a folder, if need be, and lock it."""
        while True:
            (self.directory / folder).mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process removed it at once
                return self._lock(folder)

    def _lock(self, folder: str) -> None:
        """Lock a folder against removal.  Raises OSError when it is not there."""
        path = self.directory / folder
        held = self._held.get(folder, -1)
        if held >= 0 and os.path.samestat(os.fstat(held), os.stat(path)):
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _flock(descriptor, fcntl.LOCK_SH)
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise FileNotFoundError(errno.ENOENT, "removed just now")
            with contextlib.suppress(PermissionError):  # another user's
                os.utime(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._held[folder] = descriptor
        if held >= 0:
            os.close(held)

    def _make_room(self, needed: int) -> None:
        """Remove the folders unused for longest until ``needed`` more bytes are within the limit; says what was removed."""
        folders = _folders(self.directory)
        excess = sum(folder.bytes for folder in folders) + needed - self._limit
        freed = [0]
        for folder in sorted(folders, key=lambda folder: folder.used):
            if excess > sum(freed) and folder.path.name not in self._held:
                freed.append(_remove_folder(folder))
        if any(freed):
            _logger.warning(
                "The evaluation cache %s may hold %.3f GB: %.3f GB that were not used for longest have been removed",
                *(self.directory, self._limit / 1e9, sum(freed) / 1e9),
            )
        excess -= sum(freed)
        if excess > 0 and not self._told:
            self._told = True
            _logger.warning(
                "The evaluation cache %s holds %.3f GB more than the limit: what is being evaluated needs them",
                *(self.directory, excess / 1e9),
            )

    def _what_may_go(self, needed: int) -> str:
        """When the disk is full."""
        sizes = {folder.path.name: folder.bytes for folder in _folders(self.directory)}
        others = sum(size for name, size in sizes.items() if name not in self._held)
        return (
            f". {needed / 1e9:.3f} GB are needed now; the cache {self.directory} holds {sum(sizes.values()) / 1e9:.3f} GB, "
            f"{others / 1e9:.3f} GB of them for other evaluations: a smaller --cache-limit removes those"
        )


@dataclass(frozen=True)
class _Folder:
    """A folder of the cache.  files: entries, and entries in the making.  used: when last, in nanoseconds."""

    path: Path
    files: tuple[Path, ...]
    bytes: int
    used: int


def _folders(directory: Path) -> list[_Folder]:
    """The folders in which something of ours lies.  What vanishes meanwhile or is not ours to read is left out."""
    found = []
    for path in directory.iterdir():
        if not _FOLDER.fullmatch(path.name) or path.is_symlink():
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            sizes = {file: size for file in path.iterdir() if (size := _own_bytes(file)) is not None}
            if sizes:
                found.append(_Folder(path, tuple(sizes), sum(sizes.values()), path.stat().st_mtime_ns))
    return found


def _own_bytes(path: Path) -> int | None:
    """The size of a file that this module wrote; None for any other."""
    named = _FILE.fullmatch(path.name)
    if not named:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            ours = stat.S_ISREG(status.st_mode) and (named["making"] or os.pread(descriptor, len(MAGIC), 0) == MAGIC)
        finally:
            os.close(descriptor)
    except OSError:  # a link, another user's, removed just now
        return None
    return status.st_size if ours else None


def _remove_folder(folder: _Folder) -> int:
    """Remove what is ours in a folder that no process has locked, and the folder when it is empty then; gives the bytes freed."""
    freed = 0
    try:
        descriptor = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return 0
            for path in folder.files:
                size = path.stat().st_size
                path.unlink()
                freed += size
            with contextlib.suppress(OSError):  # not empty
                folder.path.rmdir()
        finally:
            os.close(descriptor)
    except (BlockingIOError, FileNotFoundError):  # in use; or another process makes room as well
        return freed
    except OSError as error:
        _logger.warning("%s cannot be removed to make room in the evaluation cache (%s)", folder.path, error.strerror)
    return freed


def _flock(descriptor: int, operation: int) -> bool:
    """Lock; False where the file system has no locks.  Raises OSError."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


@contextlib.contextmanager
def _cache_errors(doing: str, *, resumable: bool = False, full: Callable[[], str] = str) -> Iterator[None]:
    """As :func:`quantkit.journal.output_errors`, with the cache in place of an output.  full: says more of a full disk."""
    try:
        with output_errors(doing, resumable=resumable):
            yield
    except OutputError as error:
        text = str(error).replace("an output directory", "a cache directory (--cache)")
        text = text.replace("output directory", "cache directory (--cache)")
        more = full() if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL else ""
        raise OutputError(text + more) from error.__cause__


def _header(arrays: Mapping[str, torch.Tensor]) -> bytes:
    described = {name: [str(array.dtype).removeprefix("torch."), list(array.shape)] for name, array in arrays.items()}
    header = json.dumps(described, separators=(",", ":")).encode()
    return MAGIC + struct.pack("<Q", len(header)) + header


def _write(path: Path, arrays: Mapping[str, torch.Tensor]) -> None:
    header = _header(arrays)
    parts = [memoryview(header)]
    parts += [array.contiguous().numpy().reshape(-1).view(np.uint8).data for array in arrays.values()]
    digest = xxhash.xxh3_128()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        allocate_file(descriptor, sum(map(len, parts)) + _DIGEST_BYTES)
        offset = 0
        for part in parts:
            digest.update(part)
            write_all(descriptor, part, offset)
            offset += len(part)
        write_all(descriptor, digest.digest(), offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked(descriptor: int) -> Entry | None:
    """The entry in an open file; None when it is damaged.  Raises OSError."""
    size = os.fstat(descriptor).st_size
    if size < len(MAGIC) + 8 + _DIGEST_BYTES:
        return None
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_READ_BYTES, size)))
    offset, end = 0, size - _DIGEST_BYTES
    while offset < end:
        piece = buffer[: min(len(buffer), end - offset)]
        _read_into(descriptor, piece, offset)
        digest.update(piece)
        offset += len(piece)
    if os.pread(descriptor, _DIGEST_BYTES, end) != digest.digest() or os.pread(descriptor, len(MAGIC), 0) != MAGIC:
        return None
    # The checksum is right, so this is what was written.
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, len(MAGIC)))
    described: dict[str, Any] = json.loads(os.pread(descriptor, length, len(MAGIC) + 8))
    arrays = {name: (getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in described.items()}
    return Entry(descriptor, len(MAGIC) + 8 + length, arrays)


def _read_into(descriptor: int, target: memoryview, offset: int) -> None:
    while target:
        count = os.preadv(descriptor, [target], offset)
        if not count:
            raise OSError("the file is shorter than it was")
        target, offset = target[count:], offset + count


def _remove_stale(directory: Path) -> None:
    """Remove what killed runs left in the making."""
    for path in directory.glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


# ----------------------------------------------------------------------------------------------------------- hidden states


def encode_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite float32 ``[count, hidden]`` as FP16 of that shape and the exponents of their scales, int16 ``[count]``."""
    power = torch.frexp(rows.abs().amax(-1)).exponent  # every value is below 2 to this power
    exponents = (power - _LARGEST_POWER).clamp_(min=_LEAST_EXPONENT)
    return torch.ldexp(rows, -exponents[:, None]).to(torch.float16), exponents.to(torch.int16)


def decode_rows(halves: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """float32 ``[count, hidden]``."""
    return torch.ldexp(halves.to(torch.float32), exponents.to(torch.int32)[:, None])
