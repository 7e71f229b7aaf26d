"""Digests of whole files: what a file is, whatever its name and its times say.

Name, size and time of change do not tell files apart where times are made equal on purpose (image layers, reproducible archives,
package stores) or where a disk forgets a bit.  So files are read.  That takes minutes for a large model, and a model is looked at
again and again; :class:`RememberedDigests` therefore keeps what it found, under device, inode, size, time of the last write and
time of the last change of the inode.  Programs may set the time of writing, but whoever does changes the inode, at a time that the
file system alone decides.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import xxhash

from quantkit.estimate import available_cores
from quantkit.journal import replace_file

READ_BYTES = 8 << 20
Progress = Callable[[int, int], None]  # bytes hashed, of how many; one call at a time

_DIGEST = re.compile(r"[0-9a-f]{32}")
_MOST = 4096  # files remembered, the latest: a release has some hundred at most
_SETTLED_SECONDS = 2.0  # a file changed more recently may change again without a new time: clocks of file systems tick slowly

_logger = logging.getLogger(__name__)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def hash_files(files: Sequence[Path], progress: Progress | None = None, new: Callable[[], _Hash] = hashlib.sha256) -> list[str]:
    """The digest of each file, as hexadecimal; several are read at once.  Raises OSError."""
    total = sum(file.stat().st_size for file in files)
    lock, done = threading.Lock(), 0

    def digest(file: Path) -> str:
        nonlocal done
        result = new()
        with file.open("rb", buffering=0) as stream:
            while piece := stream.read(READ_BYTES):
                result.update(piece)
                with lock:
                    done += len(piece)
                    if progress is not None:
                        progress(done, total)
        return result.hexdigest()

    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(digest, files))


class RememberedDigests:
    """xxh3-128 of files, each read once.  path: a JSON file that keeps them; lost or damaged, files are read again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of(self, files: Sequence[Path], progress: Progress | None = None) -> list[str]:
        """The digest of each file.  Raises OSError for a file that cannot be read."""
        began = time.time_ns()
        before = [file.stat() for file in files]
        states = [_state(status) for status in before]
        known = self._read()
        unknown = [file for file, state in zip(files, states, strict=True) if state not in known]
        found = dict(zip(unknown, hash_files(unknown, progress, xxhash.xxh3_128), strict=True))
        result = [known[state] if state in known else found[file] for file, state in zip(files, states, strict=True)]
        settled = {
            state: found[file]
            for file, status, state in zip(files, before, states, strict=True)
            if file in found
            and state == _state(file.stat())
            and began - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_SECONDS * 1e9
        }
        if settled:
            self._write(settled)
        return result

    def _read(self) -> dict[str, str]:
        try:
            content: Any = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {state: digest for state, digest in content.items() if isinstance(digest, str) and _DIGEST.fullmatch(digest)}

    def _write(self, settled: dict[str, str]) -> None:
        """Add to what is kept.  Of two processes that write at once one may lose what it added, and reads its files again."""
        kept = {state: digest for state, digest in self._read().items() if state not in settled} | settled
        data = json.dumps(dict(list(kept.items())[-_MOST:]), indent=0).encode()
        try:
            replace_file(self._path, data)
        except OSError as error:  # costs only time
            _logger.warning("%s cannot be written (%s): files will be read again", self._path, error.strerror)


def _state(status: os.stat_result) -> str:
    return f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
