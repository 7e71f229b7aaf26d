"""The header of packed files, read and built side by side.  ``docs/packed-format.md`` is the specification.

A file is 64 bytes of prelude, a JSON object, and from the next page on blocks of tensors, one after the other and each a whole
number of pages.  Everything about the place of a tensor follows from the shapes before it, and the header states it all the same: a
reader need not compute anything, and what contradicts the rules is damage.

``read_header`` reads prelude and JSON and nothing more, and takes nothing on trust: whatever the bytes are, either a consistent
header comes back or a CheckpointError that says what is wrong.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import xxhash

from quantkit import ggml
from quantkit.errors import CheckpointError, OutputError
from quantkit.strict_json import brief, parse_object

MAGIC = b"QKPACKED"
VERSION = 1
BLOCK_ALIGNMENT = 4096  # of blocks, in the file and in size: a page, and what unbuffered reads ask for
TENSOR_ALIGNMENT = 256  # of tensors, in their block
CHECKSUM_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_FILES = 100_000
MAX_DIMENSIONS = 8
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I8": 1, "I32": 4}
_PRELUDE = struct.Struct("<8sIIQQQ16x8x")  # magic, version, size of this, of the JSON, start of the data, size, reserved, checksum
_LIMIT = 2**63  # no count of elements or bytes reaches this
_ADVICE = "Copy or download the file again."


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor of a file.  name: in full.  offset, checksum: absolute, of its first byte and of the checksum of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class PackedBlock:
    """What is read at once.

    name: the beginning of its tensors' names.  offset: absolute.  size: checksums and padding included.  schemes: name of a matrix
    or tensor -> name of its scheme, of those that have one.  tensors: in order; their checksums follow in the same order.
    """

    name: str
    offset: int
    size: int
    schemes: dict[str, str]
    tensors: tuple[PackedTensor, ...]


@dataclass(frozen=True)
class PackedHeader:
    """A checked header.

    number, count: which of how many files, from 0.  model: what the files of one model have in common.  digest: xxh3-64 of the
    header.
    """

    number: int
    count: int
    model: str
    blocks: dict[str, PackedBlock]
    file_size: int
    digest: str


@dataclass(frozen=True)
class BlockContent:
    """A block before it has a place.  schemes, tensors: as the JSON holds them, without the name of the block."""

    name: str
    schemes: Mapping[str, str]
    tensors: Sequence[tuple[str, str, tuple[int, ...]]]  # name, dtype, shape

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return _lay_out(self.tensors)[2]


@dataclass(frozen=True)
class BuiltHeader:
    """Header bytes, the absolute offset of every tensor and of its checksum by full name, and the size of the file."""

    data: bytes
    offsets: dict[str, int]
    checksums: dict[str, int]
    size: int


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size of a tensor's data; of llama.cpp's types rows are whole blocks."""
    if dtype in DTYPE_BYTES:
        return math.prod(shape) * DTYPE_BYTES[dtype]
    return math.prod(shape[:-1]) * ggml.TYPES[dtype].row_bytes(shape[-1])


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[list[int], int, int]:
    """Offsets of tensors and of the checksums in their block, and the size of the block."""
    offsets, end = [], 0
    for _, dtype, shape in tensors:
        offsets.append(_aligned(end, TENSOR_ALIGNMENT))
        end = offsets[-1] + tensor_bytes(dtype, shape)
    checksums = _aligned(end, CHECKSUM_BYTES)
    return offsets, checksums, _aligned(checksums + CHECKSUM_BYTES * len(offsets), BLOCK_ALIGNMENT)


# -------------------------------------------------------------------------------------------------------------- building


def model_of(files: Iterable[Sequence[BlockContent]]) -> str:
    """What files laid out together have in common, and files of another layout do not: a hash of all that their headers say."""
    whole = [[[block.name, dict(block.schemes), list(block.tensors)] for block in blocks] for blocks in files]
    return xxhash.xxh3_64_hexdigest(json.dumps(whole).encode())


def build_header(blocks: Sequence[BlockContent], number: int, count: int, model: str) -> BuiltHeader:
    """The header of file ``number`` of ``count``.  Raises OutputError when it is larger than readers accept."""
    listed: dict[str, Any] = {}
    places: list[tuple[str, int, int]] = []  # of tensors: name, offset and checksum, relative to the data
    position = 0
    for block in blocks:
        offsets, checksums, size = _lay_out(block.tensors)
        listed[block.name] = {
            "offset": position,
            "size": size,
            "checksums": checksums,
            "schemes": dict(block.schemes),
            "tensors": {name: [dtype, list(shape), at] for (name, dtype, shape), at in zip(block.tensors, offsets, strict=True)},
        }
        for index, (name, _, _) in enumerate(block.tensors):
            checksum = position + checksums + CHECKSUM_BYTES * index
            places.append((f"{block.name}.{name}", position + offsets[index], checksum))
        position += size
    content = {"file": number, "files": count, "model": model, "blocks": listed}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(f"a header of {len(text):,} bytes is larger than the {MAX_HEADER_BYTES:,} that readers take; split more")
    start = _aligned(_PRELUDE.size + len(text), BLOCK_ALIGNMENT)
    size = start + position
    prelude = _prelude(VERSION, len(text), start, size, text)
    offsets_by_name = {name: start + offset for name, offset, _ in places}
    return BuiltHeader(prelude + text, offsets_by_name, {name: start + checksum for name, _, checksum in places}, size)


def _prelude(version: int, length: int, start: int, size: int, text: bytes) -> bytes:
    blank = _PRELUDE.pack(MAGIC, version, _PRELUDE.size, length, start, size)[:-CHECKSUM_BYTES]
    return blank + xxhash.xxh3_64_intdigest(blank + text).to_bytes(CHECKSUM_BYTES, "little")


# --------------------------------------------------------------------------------------------------------------- reading


def read_header(path: str | Path) -> PackedHeader:
    """Read and check the header of a packed file.

    Raises CheckpointError, and nothing else, when the file cannot be read, is none, is truncated or too long, is of another
    version, or when its header contradicts itself.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}. Check the path, or download the file again.") from error
    try:
        size = os.fstat(descriptor).st_size
        prelude = os.pread(descriptor, _PRELUDE.size, 0)
        length, start = _check_prelude(prelude, size, str(path))
        rest = os.pread(descriptor, start - _PRELUDE.size, _PRELUDE.size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Check the disk, or download the file again.") from error
    finally:
        os.close(descriptor)
    if len(rest) < start - _PRELUDE.size or any(rest[length:]):
        raise CheckpointError(f"{path}: damaged between header and data. {_ADVICE}")
    return parse_header(prelude, rest[:length], str(path))


def _check_prelude(prelude: bytes, size: int, where: str) -> tuple[int, int]:
    """Length of the JSON, and where the data starts."""
    if len(prelude) < _PRELUDE.size or prelude[: len(MAGIC)] != MAGIC:
        raise CheckpointError(
            f"{where}: no packed file of quantkit, or damaged: it does not begin with {MAGIC.decode()}. {_ADVICE}"
        )
    _, version, prelude_size, length, start, stated = _PRELUDE.unpack(prelude)
    if version != VERSION:
        raise CheckpointError(f"{where}: version {version} of the packed format; this quantkit reads version {VERSION}. Update it.")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{where}: damaged at its start: it declares a header of {length:,} bytes. {_ADVICE}")
    if prelude_size != _PRELUDE.size or start != _aligned(_PRELUDE.size + length, BLOCK_ALIGNMENT):
        raise CheckpointError(
            f"{where}: damaged at its start: it declares a prelude of {prelude_size:,} bytes, a header of {length:,} and data from "
            f"byte {start:,} on, which do not go together. {_ADVICE}"
        )
    if stated < start:
        raise CheckpointError(f"{where}: damaged at its start: it declares {stated:,} bytes in all. {_ADVICE}")
    if size < stated:
        raise CheckpointError(f"{where}: truncated: {stated - size:,} of {stated:,} bytes are missing. {_ADVICE}")
    if size > stated:
        raise CheckpointError(f"{where}: {size - stated:,} bytes follow after the last block. {_ADVICE}")
    return length, start


def parse_header(prelude: bytes, text: bytes, where: str) -> PackedHeader:
    """Parse and check the JSON of a file with that prelude, which is sound.  ``where`` begins the message of a CheckpointError."""
    stored = prelude[-CHECKSUM_BYTES:]
    digest = xxhash.xxh3_64_intdigest(prelude[:-CHECKSUM_BYTES] + text)
    if digest.to_bytes(CHECKSUM_BYTES, "little") != stored:
        raise CheckpointError(f"{where}: its header does not have the checksum that was stored with it. {_ADVICE}")
    _, _, _, _, start, size = _PRELUDE.unpack(prelude)
    content = parse_object(text, f"{where}: the header")
    model, blocks = content.get("model"), content.get("blocks")
    number, count = content.get("file"), content.get("files")
    if not _is_count(count) or not 1 <= count <= MAX_FILES or not _is_count(number) or number >= count:
        raise CheckpointError(f"{where}: its header says file {brief(number)} of {brief(count)}. {_ADVICE}")
    if not isinstance(model, str) or not model.isprintable() or not isinstance(blocks, dict) or not blocks:
        raise CheckpointError(f"{where}: its header holds no blocks, or says of no model. {_ADVICE}")
    found: dict[str, PackedBlock] = {}
    names: set[str] = set()
    position = start
    for name, entry in blocks.items():
        block = found[name] = _parse_block(name, entry, start, position, where)
        position += block.size
        for tensor in block.tensors:
            if tensor.name in names:
                raise CheckpointError(f"{where}: tensor {brief(tensor.name)} is in two blocks. {_ADVICE}")
            names.add(tensor.name)
    if position != size:
        raise CheckpointError(f"{where}: its blocks end at byte {position:,} and the file at {size:,}. {_ADVICE}")
    return PackedHeader(number, count, model, found, size, f"{digest:016x}")


def _parse_block(name: str, entry: Any, start: int, position: int, where: str) -> PackedBlock:
    """start: of the data.  position: where the block has to begin, absolute."""

    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{where}: block {brief(name)}: {what}. {_ADVICE}")

    keys = ("offset", "size", "checksums", "schemes", "tensors")
    if not isinstance(entry, dict) or set(entry) != set(keys):
        raise fault(f"its entry is {brief(entry)}; expected an object of {', '.join(keys)}")
    if not name or not name.isprintable():
        raise fault("its name is empty or cannot be printed")
    schemes, tensors = entry["schemes"], entry["tensors"]
    if not isinstance(schemes, dict) or not all(isinstance(scheme, str) for scheme in schemes.values()):
        raise fault(f"schemes is {brief(schemes)}; expected an object of names")
    if not isinstance(tensors, dict) or not tensors:
        raise fault(f"tensors is {brief(tensors)}; expected an object of at least one")
    if any(type(entry[key]) is not int for key in keys[:3]):
        raise fault(f"offset, size and checksums are {brief([entry[key] for key in keys[:3]])}; expected positions")
    parsed = [(key, *_parse_tensor(key, value, fault)) for key, value in tensors.items()]
    offsets, checksums, size = _lay_out([(key, dtype, shape) for key, dtype, shape, _ in parsed])
    stated = [offset for _, _, _, offset in parsed]
    if stated != offsets:
        index = next(index for index, offset in enumerate(offsets) if stated[index] != offset)
        raise fault(f"tensor {brief(parsed[index][0])} is at {brief(stated[index])}; it has to follow at {offsets[index]}")
    if entry["offset"] != position - start or entry["size"] != size or entry["checksums"] != checksums:
        found = [entry[key] for key in keys[:3]]
        raise fault(f"offset, size and checksums are {brief(found)}; they have to be {[position - start, size, checksums]}")
    at = position + checksums
    members = tuple(
        PackedTensor(f"{name}.{key}", dtype, shape, position + offset, tensor_bytes(dtype, shape), at + CHECKSUM_BYTES * index)
        for index, (key, dtype, shape, offset) in enumerate(parsed)
    )
    return PackedBlock(name, position, size, {f"{name}.{key}": scheme for key, scheme in schemes.items()}, members)


def _parse_tensor(key: str, value: Any, fault: Callable[[str], CheckpointError]) -> tuple[str, tuple[int, ...], int]:
    """(dtype, shape, offset) of a tensor.  fault: makes the error of a text."""
    name = brief(key)
    if not isinstance(value, list) or len(value) != 3:
        raise fault(f"the entry of tensor {name} is {brief(value)}; expected dtype, shape and offset")
    dtype, shape, offset = value
    if not isinstance(dtype, str) or (dtype not in DTYPE_BYTES and dtype not in ggml.TYPES):
        raise fault(f"tensor {name} is of the unknown dtype {brief(dtype)}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_DIMENSIONS or not all(_is_count(size) and size for size in shape):
        raise fault(f"tensor {name} has the shape {brief(shape)}; expected sizes")
    if math.prod(shape) >= _LIMIT:
        raise fault(f"tensor {name} has the shape {brief(shape)}, which is impossibly large")
    if dtype not in DTYPE_BYTES and shape[-1] % ggml.TYPES[dtype].block:
        raise fault(f"tensor {name} has rows of {shape[-1]}, which are no whole blocks of {dtype}")
    if not _is_count(offset):
        raise fault(f"tensor {name} is at {brief(offset)}; expected a position")
    return dtype, tuple(shape), offset


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _LIMIT  # a bool is not a count
