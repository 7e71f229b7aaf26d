"""TensorFiles: the safetensors files of one directory, headers checked against each other, tensors read piece by piece.

``OpenFiles`` is the part that does not depend on the format.

Opening reads headers and the index only.  Tensors are then read with ``preadv`` straight into a buffer of the caller: a fused
tensor of 21 GB is never held, only the expert asked for, and unlike a memory map the file's pages do not count as memory of this
process.  Reading releases the GIL and is thread-safe.  Each file is opened at its first read and kept; a file that changes or
shrinks while it is in use is noticed at the next read of it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit.errors import CheckpointError
from quantkit.safetensors_header import Header, read_header
from quantkit.strict_json import brief, parse_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CHUNK_BYTES = 8 << 20
LISTED = 20  # problems of one kind that an error message spells out
SIDECAR_BYTES = 1 << 30  # most of a small file beside the tensors; the ledger of a large artifact has 30 MB
_INDEX_LIMIT = 100_000_000  # bytes; the index of a model of 100,000 tensors has about 10 MB

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}

FileStates = dict[Path, tuple[int, int]]  # file -> (size, mtime in ns) at the time its header was read
AnyHeader = TypeVar("AnyHeader")


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where one tensor lies.  dtype: in the spelling of the format.  offset: of its first byte in the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class OpenFiles:
    """Files whose tensors are read piece by piece, whatever their format.

    paths: the files, in order of name.  tensors: name -> location, over all files.
    """

    def __init__(self, paths: tuple[Path, ...], tensors: dict[str, TensorLocation], states: FileStates):
        self.paths = paths
        self.tensors = tensors
        self._states = states
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def locate(self, name: str) -> TensorLocation:
        """Where a tensor lies, or a part of one that the format gives a name."""
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor, or a part of one that has a name, as it is stored."""
        raise NotImplementedError

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The bytes of a tensor in pieces of ``chunk_bytes`` (the last may be shorter), in order.

        Each piece is valid until the next one is asked for: all share one buffer.
        """
        location = self.locate(name)
        buffer = np.empty(min(chunk_bytes, location.nbytes), np.uint8).data
        for start in range(0, location.nbytes, chunk_bytes):
            piece = buffer[: min(chunk_bytes, location.nbytes - start)]
            self._fill(location, None, piece, location.offset + start)
            yield piece

    def modified(self, path: Path) -> int:
        """When the file was last changed before it was opened, in ns."""
        return self._states[path][1]

    def _fill(self, location: TensorLocation, expert: int | None, target: memoryview, offset: int) -> None:
        """Fill ``target`` from the absolute ``offset`` of the tensor's file."""
        try:
            descriptor = self._descriptor(location.path)
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != self._states[location.path]:
                raise CheckpointError(
                    f"{location.path} has changed since it was opened, found on reading {_what(location.name, expert)}. "
                    "Leave the source alone while it is in use, and start again."
                )
            done = 0
            while done < len(target):
                count = os.preadv(descriptor, [target[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{location.path} is truncated: {_what(location.name, expert)} lacks {len(target) - done:,} bytes. "
                        "Download this file again."
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{location.path} cannot be read: {error.strerror}, at {_what(location.name, expert)}. "
                "Check the disk, or download this file again."
            ) from error

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]

    def close(self) -> None:
        """Close the files.  No read may be under way."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class TensorFiles(OpenFiles):
    """The tensors of a directory of safetensors files, or of one such file.  headers: file -> its header."""

    def __init__(self, paths: tuple[Path, ...], headers: dict[Path, Header], states: FileStates):
        tensors = {
            name: TensorLocation(name, path, entry.dtype, entry.shape, header.data_start + entry.begin, entry.nbytes)
            for path, header in headers.items()
            for name, entry in header.tensors.items()
        }
        super().__init__(paths, tensors, states)
        self.headers = headers

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a ``.safetensors`` file, or a directory that holds ``model.safetensors`` or shards with an index.

        Raises CheckpointError that lists all that is wrong with files, headers or index.
        """
        path = Path(path)
        weight_map: dict[str, str] | None = None
        if path.is_dir():
            found = list_directory(path)
            names = [name for name in found if name.endswith(".safetensors") and not name.startswith(".")]
            if INDEX_NAME in found:
                weight_map = _read_index(path / INDEX_NAME)
                _check_names(path, names, weight_map)
            elif names != [SINGLE_NAME]:
                raise CheckpointError(_no_index(path, names))
            paths = tuple(path / name for name in names)
        else:
            paths = (path,)
        headers, states = read_headers(paths, read_header)
        _check_placement(path, headers, weight_map)
        return cls(paths, headers, states)

    def read(self, name: str, expert: int | None = None, buffer: NDArray[np.uint8] | None = None) -> torch.Tensor:
        """A tensor, or the slice ``expert`` of its first dimension, as it is stored.

        buffer: uint8, contiguous, at least as long as the data; the tensor is a view of it.  Without it a new one is allocated.
        Raises CheckpointError when the file is gone, has changed or is too short.
        """
        location = self.tensors[name]
        shape, nbytes, offset = location.shape, location.nbytes, location.offset
        if expert is not None:
            if not 0 <= expert < shape[0]:
                raise IndexError(f"{_what(name, expert)}: there are {shape[0]}")
            nbytes //= shape[0]
            offset += expert * nbytes
            shape = shape[1:]
        dtype = TORCH_DTYPES.get(location.dtype)
        if dtype is None:
            raise CheckpointError(f"{location.path}: {_what(name, expert)} is {location.dtype}, which quantkit does not read.")
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        data = np.empty(nbytes, np.uint8) if buffer is None else buffer[:nbytes]
        self._fill(location, expert, data.data, offset)
        return torch.from_numpy(data).view(dtype).view(shape)


def _what(name: str, expert: int | None) -> str:
    return f"tensor {name}" if expert is None else f"tensor {name}, expert {expert}"


def list_directory(directory: Path) -> list[str]:
    """The names of all entries, sorted.  Raises CheckpointError when the directory cannot be read."""
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}. Check the path and its permissions.") from error


def read_small_file(path: Path, limit: int) -> bytes:
    """The content of a file of at most ``limit`` bytes.  Raises CheckpointError when it cannot be read or is larger."""
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check the path, or download the file again.") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than {limit:,} bytes; no such file of a model is. Download it again.")
    return data


def listing(items: list[str]) -> str:
    """The first of many items in one line, and how many more there are."""
    return ", ".join(items[:LISTED]) + (f" and {len(items) - LISTED:,} more" if len(items) > LISTED else "")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index says."""
    weight_map = parse_object(read_small_file(path, _INDEX_LIMIT), str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is damaged: it holds no weight_map. Download it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} is damaged: it puts tensor {brief(name)} into {brief(file)}, which is no shard's name.")
    return weight_map


def _check_names(directory: Path, names: list[str], weight_map: dict[str, str]) -> None:
    listed = set(weight_map.values())
    problems = []
    if missing := sorted(listed.difference(names)):
        problems.append(f"missing ({len(missing)} of {len(listed)}): {listing(missing)}. Download them again.")
    if extra := sorted(set(names) - listed):
        problems.append(f"not listed ({len(extra)}): {listing(extra)}. Remove them, or download the index again.")
    if problems:
        raise CheckpointError(f"{directory}: safetensors files are not as {INDEX_NAME} lists them.\n  " + "\n  ".join(problems))


def _no_index(directory: Path, names: list[str]) -> str:
    if not names:
        return f"{directory} holds no safetensors files. Download the model's safetensors shards and {INDEX_NAME}."
    return (
        f"{directory} holds {listing(names)} but no {INDEX_NAME}, which says which shard holds which tensor. "
        f"Download the index; a model in one file must be named {SINGLE_NAME}."
    )


def read_headers(paths: tuple[Path, ...], read: Callable[[Path], AnyHeader]) -> tuple[dict[Path, AnyHeader], FileStates]:
    """The header of each file, and the state of the file before.  Raises CheckpointError that names every damaged file."""
    headers: dict[Path, AnyHeader] = {}
    states: FileStates = {}
    faults: list[str] = []
    for path in paths:
        try:
            status = path.stat()
            headers[path] = read(path)
            states[path] = (status.st_size, status.st_mtime_ns)
        except CheckpointError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{path} cannot be read: {error.strerror}")
    if len(faults) == 1:
        raise CheckpointError(faults[0])
    if faults:
        raise CheckpointError(
            f"{len(faults)} of {len(paths)} {paths[0].suffix[1:]} files are damaged:\n  " + "\n  ".join(faults[:LISTED])
        )
    return headers, states


def _check_placement(path: Path, headers: dict[Path, Header], weight_map: dict[str, str] | None) -> None:
    """No tensor twice; and with an index, each tensor exactly where the index puts it."""
    placed: dict[str, str] = {}
    twice, misplaced = [], []
    for file, header in headers.items():
        for name in header.tensors:
            if name in placed:
                twice.append(f"{name} (in {placed[name]} and {file.name})")
            elif weight_map is not None and weight_map.get(name) != file.name:
                misplaced.append(f"{name} (in {file.name}; index: {weight_map.get(name, 'not listed')})")
            placed[name] = file.name
    absent = [f"{name} (index: {file})" for name, file in (weight_map or {}).items() if name not in placed]
    problems = [
        f"{what} ({len(items)}): {listing(items)}"
        for what, items in (("stored twice", twice), ("not where the index says", misplaced), ("in no shard", absent))
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{path}: the shards and {INDEX_NAME} contradict each other. Download them again, from one revision.\n  "
            + "\n  ".join(problems)
        )
