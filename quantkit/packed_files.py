"""PackedFiles: the packed files of one directory, or one such file, headers checked against each other, every read checked.

What is read from a packed file is compared with the checksum that was stored with it, so damage is told where it is met and never
computed with.  A tensor is read by itself, in pieces, or with its whole block: ``read_block`` is one read of whole pages at the
start of a page, which is what paging single experts from a disk wants, and ``map_block`` maps the same pages.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from quantkit.errors import ArtifactError, CheckpointError
from quantkit.packed_header import CHECKSUM_BYTES, PackedBlock, PackedHeader, PackedTensor, read_header
from quantkit.strict_json import brief
from quantkit.tensor_files import (
    CHUNK_BYTES,
    TORCH_DTYPES,
    FileStates,
    OpenFiles,
    TensorLocation,
    list_directory,
    listing,
    read_headers,
)

SUFFIX = ".packed"
_EXPERT = re.compile(r"layers\.(\d+)\.feed_forward\.experts\.(\d+)\.")


@dataclass(frozen=True)
class BlockLocation:
    """A block and the file that holds it."""

    path: Path
    block: PackedBlock


class PackedFiles(OpenFiles):
    """The tensors of packed files that belong together.

    headers: file -> its header.  blocks: name -> where it is, in order.  schemes: name of a matrix or tensor -> name of its scheme,
    of those that have one.
    """

    def __init__(self, headers: dict[Path, PackedHeader], states: FileStates):
        self.headers = headers
        self.blocks = {
            name: BlockLocation(path, block) for path, header in headers.items() for name, block in header.blocks.items()
        }
        self.schemes = {name: scheme for found in self.blocks.values() for name, scheme in found.block.schemes.items()}
        self._entries = {tensor.name: tensor for found in self.blocks.values() for tensor in found.block.tensors}
        tensors = {
            tensor.name: TensorLocation(tensor.name, found.path, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes)
            for found in self.blocks.values()
            for tensor in found.block.tensors
        }
        super().__init__(tuple(headers), tensors, states)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a packed file, or all of a directory as one model.

        Raises CheckpointError that lists all that is wrong with headers, or with the files together.
        """
        path = Path(path)
        paths: tuple[Path, ...] = (path,)
        if path.is_dir():
            paths = tuple(path / name for name in list_directory(path) if name.endswith(SUFFIX) and not name.startswith("."))
            if not paths:
                raise CheckpointError(f"{path} holds no packed files ({SUFFIX}). Give the directory or the file of a model.")
        headers, states = read_headers(paths, read_header)
        if path.is_dir():
            _check_set(path, headers)
        return cls(headers, states)

    def locate(self, name: str) -> TensorLocation:
        """Where a tensor lies.  Raises CheckpointError for what no file holds."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.paths[0].parent}: no file holds {brief(name)}. Copy or download the files again.")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored; of llama.cpp's types the bytes of its rows, uint8 ``[rows, row bytes]``.

        Raises ArtifactError when it is not what was written; CheckpointError when the file is gone, has changed or is too short.
        """
        location = self.locate(name)
        data = np.empty(location.nbytes, np.uint8)
        self._fill(location, None, data.data, location.offset)
        self._compare(location.path, self._entries[name], xxhash.xxh3_64_intdigest(data.data), self._stored(name))
        return _typed(self._entries[name], data)

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The bytes of a tensor in pieces; see :meth:`OpenFiles.chunks`.  After the last one ArtifactError is raised when they were
        not what was written."""
        digest = xxhash.xxh3_64()
        for piece in super().chunks(name, chunk_bytes):
            digest.update(piece)
            yield piece
        self._compare(self.locate(name).path, self._entries[name], digest.intdigest(), self._stored(name))

    def read_block(self, name: str, buffer: NDArray[np.uint8] | None = None) -> dict[str, torch.Tensor]:
        """All tensors of a block, by full name, from one read of whole pages; every byte is checked.

        buffer: uint8, contiguous, at least as long as the block; the tensors are views of it.  Raises as :meth:`read`.
        """
        found = self._block(name)
        data = np.empty(found.block.size, np.uint8) if buffer is None else buffer[: found.block.size]
        self._fill(
            TensorLocation(name, found.path, "U8", (data.size,), found.block.offset, data.size), None, data.data, found.block.offset
        )
        self._check_bytes(found, data)
        return _views(found.block, data)

    def map_block(self, name: str, *, check: bool = True) -> dict[str, torch.Tensor]:
        """The same as views of a private memory map of the file, which live as long as one does; writing to them changes no file.

        check: read it all now and compare checksums; without it pages come as they are touched, and nothing is checked.  As with
        any map, a file that is cut while it is mapped ends the process at the next touch.
        """
        found = self._block(name)
        self._check_state(found.path, name)
        try:
            mapped = mmap.mmap(self._descriptor(found.path), found.block.size, access=mmap.ACCESS_COPY, offset=found.block.offset)
        except (OSError, ValueError) as error:  # ValueError: the file became shorter just now
            raise CheckpointError(f"{found.path} cannot be mapped at block {name}: {error}. Use read_block instead.") from error
        data = np.frombuffer(mapped, np.uint8)
        if check:
            self._check_bytes(found, data)
        return _views(found.block, data)

    def check_block(self, name: str) -> None:
        """Read a block in pieces and compare every byte with what must be there.  Raises as :meth:`read`."""
        found = self._block(name)
        for tensor in found.block.tensors:
            for _ in self.chunks(tensor.name):
                pass
        for start, stop in _gaps(found.block):
            data = np.empty(stop - start, np.uint8)
            self._fill(TensorLocation(name, found.path, "U8", data.shape, start, data.size), None, data.data, start)
            _check_gap(found, data)

    def _block(self, name: str) -> BlockLocation:
        if name not in self.blocks:
            raise CheckpointError(f"{self.paths[0].parent}: no file holds a block {brief(name)}. Copy or download the files again.")
        return self.blocks[name]

    def _check_state(self, path: Path, name: str) -> None:
        """Raise CheckpointError when a file is not the one that was opened."""
        self._fill(TensorLocation(name, path, "U8", (0,), 0, 0), None, memoryview(b""), 0)

    def _stored(self, name: str) -> int:
        """The checksum in the file."""
        location, data = self.tensors[name], memoryview(bytearray(CHECKSUM_BYTES))
        self._fill(location, None, data, self._entries[name].checksum)
        return int.from_bytes(data, "little")

    def _check_bytes(self, found: BlockLocation, data: NDArray[np.uint8]) -> None:
        block = found.block
        for tensor in block.tensors:
            begin, at = tensor.offset - block.offset, tensor.checksum - block.offset
            stored = int.from_bytes(data[at : at + CHECKSUM_BYTES].tobytes(), "little")
            self._compare(found.path, tensor, xxhash.xxh3_64_intdigest(data[begin : begin + tensor.nbytes].data), stored)
        for start, stop in _gaps(block):
            _check_gap(found, data[start - block.offset : stop - block.offset])

    @staticmethod
    def _compare(path: Path, tensor: PackedTensor, digest: int, stored: int) -> None:
        if digest != stored:
            expert = _EXPERT.search(tensor.name)
            where = f" (layer {expert[1]}, expert {expert[2]})" if expert else ""
            raise ArtifactError(
                f"{path}: {tensor.name}{where} does not have the checksum that was stored with it: {tensor.nbytes:,} bytes from "
                f"{tensor.offset:,} on, or the checksum itself, are damaged. Copy or download this file again."
            )


def _gaps(block: PackedBlock) -> Iterator[tuple[int, int]]:
    """Where a block holds nothing: absolute offsets of padding, begin and end."""
    position = block.offset
    for tensor in block.tensors:
        yield position, tensor.offset
        position = tensor.offset + tensor.nbytes
    yield position, block.tensors[0].checksum
    yield block.tensors[-1].checksum + CHECKSUM_BYTES, block.offset + block.size


def _check_gap(found: BlockLocation, data: NDArray[np.uint8]) -> None:
    if data.any():
        raise ArtifactError(
            f"{found.path}: the padding in block {found.block.name} is not zero: the file was damaged. Copy or download it again."
        )


def _views(block: PackedBlock, data: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
    starts = {tensor: tensor.offset - block.offset for tensor in block.tensors}
    return {tensor.name: _typed(tensor, data[start : start + tensor.nbytes]) for tensor, start in starts.items()}


def _typed(tensor: PackedTensor, data: NDArray[np.uint8]) -> torch.Tensor:
    """The bytes of a tensor as what they are."""
    raw = torch.from_numpy(data)
    if tensor.dtype in TORCH_DTYPES:
        return raw.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
    return raw.view(math.prod(tensor.shape[:-1]), -1)


def is_packed(path: Path) -> bool:
    """Whether a file is named as packed files are, or a directory holds one."""
    if os.path.isdir(path):
        return any(name.endswith(SUFFIX) and not name.startswith(".") for name in list_directory(path))
    return path.suffix == SUFFIX and os.path.isfile(path)


def _check_set(directory: Path, headers: dict[Path, PackedHeader]) -> None:
    """All files of one model, each once.  Raises CheckpointError that lists what is wrong."""
    first = next(iter(headers.values()))
    problems, numbers, owners = [], dict[int, Path](), dict[str, Path]()
    for path, header in headers.items():
        if (header.count, header.model) != (first.count, first.model):
            problems.append(f"{path.name} belongs to another model than {next(iter(headers)).name}")
            continue
        if header.number in numbers:
            problems.append(f"{path.name} and {numbers[header.number].name} are both file {header.number + 1} of {header.count}")
        numbers[header.number] = path
        twice = [name for name in header.blocks if name in owners]
        if twice:
            problems.append(f"{path.name} and {owners[twice[0]].name} both hold {listing(twice)}")
        owners |= dict.fromkeys(header.blocks, path)
    if missing := [str(number + 1) for number in range(first.count) if number not in numbers]:
        problems.append(f"missing: file {listing(missing)} of {first.count}")
    if problems:
        raise CheckpointError(
            f"{directory}: the packed files are not those of one model. Copy or download them again, together.\n  "
            + "\n  ".join(problems)
        )
