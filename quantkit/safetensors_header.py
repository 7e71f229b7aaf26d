"""The safetensors header, read and built side by side.

A file is ``u64 little-endian N``, N bytes of JSON, then the data.  The JSON maps each tensor name to dtype, shape and the offsets
of its bytes relative to the start of the data, plus an optional ``__metadata__`` map of strings.  Offsets cover the data without
holes or overlap.

``read_header`` reads these N bytes and nothing more, so that a 400 GB checkpoint is checked in milliseconds, and takes nothing on
trust: whatever the bytes are, either a consistent header comes back or a CheckpointError that says what is wrong.  ``build_header``
makes the bytes that the reference library would write for the same tensors: ordered by dtype (the library's order, backwards), then
by name, so that larger elements come first and all are aligned; compact JSON, padded with spaces to 8 bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from quantkit.errors import CheckpointError, OutputError
from quantkit.strict_json import brief, parse_object

# Bits per element of every dtype the format knows, in the order the reference library declares them; it sorts by this order.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_ORDER = {dtype: position for position, dtype in enumerate(DTYPE_BITS)}
MAX_HEADER_BYTES = 100_000_000  # the reference library refuses larger ones
MAX_DIMENSIONS = 64  # of a torch tensor
SIZE_BYTES = 8
_LIMIT = 2**63  # no count of elements or bytes reaches this


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header.  begin, end: byte offsets relative to the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A checked header.  data_start: absolute offset of the data.  digest: xxh3-64 of the header bytes, size field included."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    digest: str

    @property
    def file_size(self) -> int:
        """Size that the file has, as the header says and ``read_header`` has checked."""
        return self.data_start + max((entry.end for entry in self.tensors.values()), default=0)


# --------------------------------------------------------------------------------------------------------------- reading


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises CheckpointError, and nothing else, when the file cannot be read, is no safetensors file, is truncated or too long, or
    when its header contradicts itself.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}. Check the path, or download the file again.") from error
    try:
        size = os.fstat(descriptor).st_size
        prefix = os.pread(descriptor, SIZE_BYTES, 0)
        if len(prefix) < SIZE_BYTES:
            raise CheckpointError(f"{path}: has only {size} bytes, too few for a safetensors file. Download it again.")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: not a safetensors file, or damaged at its start: it declares a header of {length:,} bytes "
                f"(at most {MAX_HEADER_BYTES:,} are allowed). Download it again."
            )
        if SIZE_BYTES + length > size:
            raise CheckpointError(
                f"{path}: truncated: its header needs {SIZE_BYTES + length:,} bytes, the file has {size:,}. Download it again."
            )
        text = os.pread(descriptor, length, SIZE_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Check the disk, or download the file again.") from error
    finally:
        os.close(descriptor)
    if len(text) < length:
        raise CheckpointError(f"{path}: became shorter while it was being read. Wait until its download has finished.")
    header = parse_header(text, str(path), xxhash.xxh3_64_hexdigest(prefix + text))
    if size < header.file_size:
        raise CheckpointError(
            f"{path}: truncated: {header.file_size - size:,} of {header.file_size:,} bytes are missing. Download it again."
        )
    if size > header.file_size:
        raise CheckpointError(
            f"{path}: {size - header.file_size:,} bytes follow after the last tensor; header and file do not belong together. "
            "Download it again."
        )
    return header


def parse_header(text: bytes, where: str, digest: str = "") -> Header:
    """Parse and check the JSON part of a header.  ``where`` begins the message of the CheckpointError raised for any fault."""
    if text[:1] != b"{":
        raise CheckpointError(f"{where}: no safetensors file, or damaged: its header does not begin with '{{'. Download it again.")
    content = parse_object(text, f"{where}: the safetensors header")
    metadata = content.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: the header's __metadata__ is not a map of strings. Download it again.")
    tensors = {name: _parse_entry(name, entry, where) for name, entry in content.items()}
    position = 0
    for tensor in sorted(tensors.values(), key=lambda entry: (entry.begin, entry.end)):
        if tensor.begin != position:
            fault = "overlaps the tensor before it" if tensor.begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{where}: tensor {brief(tensor.name)} begins at byte {tensor.begin}, which {fault}. Download the file again."
            )
        position = tensor.end
    return Header(tensors, metadata, SIZE_BYTES + len(text), digest)


def _parse_entry(name: str, entry: Any, where: str) -> TensorEntry:
    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{where}: tensor {brief(name)}: {what}. Download the file again.")

    if not isinstance(entry, dict):
        raise fault(f"its header entry is {brief(entry)}; expected an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fault(f"unknown dtype {brief(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise fault(f"shape is {brief(shape)}; expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise fault(f"data_offsets is {brief(offsets)}; expected two byte positions")
    elements = 1
    for size in shape:
        elements *= size
        if elements >= _LIMIT:
            raise fault(f"shape {brief(shape)} is impossibly large")
    begin, end = offsets
    if 8 * (end - begin) != elements * DTYPE_BITS[dtype]:
        raise fault(f"{dtype} {brief(shape)} does not fill the bytes {begin} to {end} that it is given")
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LIMIT  # a bool is not a count


# -------------------------------------------------------------------------------------------------------------- building


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None, *, keep_order: bool = False
) -> tuple[bytes, dict[str, int], int]:
    """Header bytes for tensors given as (name, dtype, shape), each name once.

    The data is laid out in the order of the safetensors library, large dtypes first, which aligns every tensor.  keep_order: in the
    given order instead, if that too puts every tensor at a multiple of its element size.
    metadata: default ``{"format": "pt"}``, what the ecosystem writes for torch tensors.
    Returns (header bytes with size field and padding, name -> absolute offset of its data, size of the whole file).
    Raises OutputError when the header is larger than readers accept.
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    ends: dict[str, int] = {}
    begin = 0
    if not (keep_order and _is_aligned(tensors)):
        tensors = sorted(tensors, key=lambda tensor: (-_ORDER[tensor[1]], tensor[0]))
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * DTYPE_BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        ends[name] = begin
        begin = end
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(
            f"{len(tensors):,} tensors need a header of {len(text):,} bytes; readers refuse more than {MAX_HEADER_BYTES:,}. "
            "Choose a smaller shard size."
        )
    header = len(text).to_bytes(SIZE_BYTES, "little") + text
    return header, {name: len(header) + offset for name, offset in ends.items()}, len(header) + begin


def _is_aligned(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bool:
    """Whether each tensor, one after the other, begins at a multiple of its element size."""
    position = 0  # in bits; data begins at a multiple of 8 bytes in the file
    for _, dtype, shape in tensors:
        if position % DTYPE_BITS[dtype]:
            return False
        position += math.prod(shape) * DTYPE_BITS[dtype]
    return position % 8 == 0
