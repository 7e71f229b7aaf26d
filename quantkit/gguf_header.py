"""The GGUF header, read and built side by side.

A file is ``GGUF``, a u32 version, two u64 counts, then so many typed key-value pairs, so many tensor entries, padding and the
data, all little-endian.  A tensor entry holds the name, the sizes (innermost first, the reverse of torch), the number of the type
and an offset relative to the data.  Each tensor begins where the one before it ends, rounded up to the alignment.

``build_header`` makes the bytes that the ``gguf`` package writes for the same content, before there is any data.  Value types are
strict, because llama.cpp refuses a file whose integers have another width than it expects.

``parse_header`` reads any file that llama.cpp reads, whatever the model and its types, and takes nothing on trust: each count and
length is compared with what is left of the file before anything is allocated for it, and a header has at most ``MAX_HEADER_BYTES``.
Whatever the bytes are, either a consistent header comes back or a CheckpointError that says what is wrong.  Types that are newer
than the ``gguf`` package are named by their number; the bytes up to the next tensor are then taken to be theirs.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
    Keys,
)

from quantkit.errors import CheckpointError, OutputError
from quantkit.strict_json import brief

__all__ = [
    "MAX_HEADER_BYTES",
    "TYPE_SIZES",
    "GGUFValueType",
    "GgufHeader",
    "GgufTensor",
    "MetadataEntry",
    "MetadataValue",
    "build_header",
    "parse_header",
    "parse_planned",
]

Scalar = str | int | float | bool
MetadataValue = Scalar | tuple[Scalar, ...]

MAX_HEADER_BYTES = 100_000_000  # the vocabulary of a large model takes a tenth of it
MAX_ELEMENTS = 2**23  # in all arrays of a header together; Python holds each in some 50 bytes
MAX_DIMENSIONS = 4  # of a ggml tensor
MAX_NAME_BYTES = 63  # of a tensor's name, as llama.cpp allows
MAX_ALIGNMENT = 2**20
_LIMIT = 2**63  # no count of elements or bytes reaches this
_BLOCK = 2**20  # bytes read at once
_MAGIC = GGUF_MAGIC.to_bytes(4, "little")
_VERSIONS = (2, GGUF_VERSION)  # they differ in what writers put in, not in layout
_ALIGNMENT_KEY = Keys.General.ALIGNMENT

# struct's letter for each value type of fixed size
_LETTERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_VALUE_TYPES: dict[int, GGUFValueType] = {kind.value: kind for kind in GGUFValueType}
_TYPE_NAMES: dict[int, str] = {kind.value: kind.name for kind in GGML_QUANT_SIZES}
_LENGTH = struct.Struct("<Q")
_FLOATS = (GGUFValueType.FLOAT32, GGUFValueType.FLOAT64)

# Name -> (weights in a block, bytes of a block), for every tensor type that the gguf package knows.
TYPE_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType({kind.name: size for kind, size in GGML_QUANT_SIZES.items()})


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """One key with its typed value.  items: the type of the elements where ``type`` is ARRAY (the value is then a tuple)."""

    key: str
    type: GGUFValueType
    value: MetadataValue
    items: GGUFValueType | None = None


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file.  type: ggml's name.  shape: in torch's order.  offset: absolute, in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """A checked header.

    metadata, tensors: in the order of the file.  data_start: absolute offset of the first tensor.  file_size: of the file as it is.
    digest: xxh3-64 of all bytes before the data.
    """

    version: int
    metadata: dict[str, MetadataEntry]
    tensors: dict[str, GgufTensor]
    alignment: int
    data_start: int
    file_size: int
    digest: str

    def value(self, key: str) -> MetadataValue | None:
        """The value of a key, None where the file has no such key."""
        entry = self.metadata.get(key)
        return None if entry is None else entry.value


# -------------------------------------------------------------------------------------------------------------- building


def build_header(
    metadata: Sequence[MetadataEntry], tensors: Sequence[tuple[str, str, tuple[int, ...]]], alignment: int = GGUF_DEFAULT_ALIGNMENT
) -> tuple[bytes, dict[str, int], int]:
    """Header bytes for tensors given as (name, type, shape in torch's order), in this order.

    An alignment other than 32 must stand in the metadata too, since readers find it there.
    Returns (bytes up to the start of the data, name -> absolute offset of its data, size of the whole file).  The last tensor is
    padded to the alignment like all others.
    Raises OutputError for anything that a reader would refuse.
    """
    _check_alignment(metadata, alignment)
    parts = [struct.pack("<4sIQQ", _MAGIC, GGUF_VERSION, len(tensors), len(metadata))]
    for entry in metadata:
        parts += [_pack_text(entry.key, f"key {brief(entry.key)}"), _pack_value(entry)]
    offsets: dict[str, int] = {}
    position = 0
    for name, kind, shape in tensors:
        parts.append(_pack_tensor(name, kind, shape, position))
        offsets[name] = position
        position += _padded(_tensor_bytes(name, kind, shape), alignment)
    for what, names in (("key", [entry.key for entry in metadata]), ("tensor", [name for name, _, _ in tensors])):
        if len(set(names)) < len(names):
            twice = next(name for number, name in enumerate(names) if name in names[:number])
            raise OutputError(f"a GGUF file cannot hold the {what} {brief(twice)} twice. Give each {what} once.")
    header = b"".join(parts)
    header += bytes(_padded(len(header), alignment) - len(header))
    if len(header) > MAX_HEADER_BYTES:
        raise OutputError(f"the GGUF header would have {len(header):,} bytes; readers refuse more than {MAX_HEADER_BYTES:,}.")
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + position


def _check_alignment(metadata: Sequence[MetadataEntry], alignment: int) -> None:
    told = next((entry for entry in metadata if entry.key == _ALIGNMENT_KEY), None)
    if not _is_alignment(alignment):
        raise OutputError(f"GGUF data cannot be aligned to {brief(alignment)} bytes. Choose a power of two, usually 32.")
    if told is None and alignment != GGUF_DEFAULT_ALIGNMENT:
        raise OutputError(
            f"readers align to {GGUF_DEFAULT_ALIGNMENT} bytes unless {_ALIGNMENT_KEY} says {alignment}. Add that key."
        )
    if told is not None and (told.type is not GGUFValueType.UINT32 or told.value != alignment):
        raise OutputError(
            f"{_ALIGNMENT_KEY} is {brief(told.value)} ({told.type.name}), but data is aligned to {alignment}. Correct it."
        )


def _is_alignment(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pack_text(text: Any, where: str) -> bytes:
    if not isinstance(text, str):
        raise OutputError(f"GGUF metadata: {where} is {brief(text)}; expected text.")
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OutputError(f"GGUF metadata: {where} holds {brief(text)}, which is no valid Unicode text.") from error
    return struct.pack("<Q", len(data)) + data


def _pack_value(entry: MetadataEntry) -> bytes:
    where = f"key {brief(entry.key)}"
    if entry.type is not GGUFValueType.ARRAY:
        if entry.items is not None:
            raise OutputError(f"GGUF metadata: {where} has a type for elements, but is no array. Leave it out.")
        return struct.pack("<I", entry.type) + _pack_items(entry.type, (entry.value,), where)
    if not isinstance(entry.value, tuple) or not entry.value:
        raise OutputError(
            f"GGUF metadata: {where} is {brief(entry.value)}; expected a tuple with elements. Leave empty arrays out."
        )
    if entry.items is None or entry.items is GGUFValueType.ARRAY:
        raise OutputError(f"GGUF metadata: {where} is an array without the type of its elements. Name a type that is no array.")
    return struct.pack("<IIQ", entry.type, entry.items, len(entry.value)) + _pack_items(entry.items, entry.value, where)


def _pack_items(kind: GGUFValueType, values: tuple[Any, ...], where: str) -> bytes:
    if kind is GGUFValueType.STRING:
        return b"".join(_pack_text(value, where) for value in values)
    expected: type = bool if kind is GGUFValueType.BOOL else float if kind in _FLOATS else int
    for value in values:
        if type(value) is not expected:
            raise OutputError(f"GGUF metadata: {where} is {brief(value)}; expected {expected.__name__} for {kind.name}.")
    try:
        return struct.pack(f"<{len(values)}{_LETTERS[kind]}", *values)
    except (struct.error, OverflowError) as error:
        raise OutputError(
            f"GGUF metadata: {where} does not fit {kind.name}: {brief(values if len(values) > 1 else values[0])}."
        ) from error


def _tensor_bytes(name: str, kind: str, shape: tuple[int, ...]) -> int:
    if kind not in TYPE_SIZES:
        raise OutputError(f"tensor {brief(name)}: GGUF has no type {brief(kind)}. Choose one of {', '.join(TYPE_SIZES)}.")
    block, nbytes = TYPE_SIZES[kind]
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < _LIMIT for size in shape):
        raise OutputError(f"tensor {brief(name)}: GGUF cannot hold the shape {brief(shape)}: at most {MAX_DIMENSIONS} sizes.")
    if (shape[-1] if shape else 1) % block:
        raise OutputError(
            f"tensor {brief(name)}: {kind} needs rows of a multiple of {block}, its shape is {brief(shape)}. Choose another type."
        )
    size = math.prod(shape) // block * nbytes
    if size >= _LIMIT:
        raise OutputError(f"tensor {brief(name)}: shape {brief(shape)} is impossibly large.")
    return size


def _pack_tensor(name: str, kind: str, shape: tuple[int, ...], offset: int) -> bytes:
    _tensor_bytes(name, kind, shape)
    text = _pack_text(name, f"tensor {brief(name)}")
    if len(text) - 8 > MAX_NAME_BYTES:
        raise OutputError(f"tensor {brief(name)}: its name has {len(text) - 8} bytes; llama.cpp allows {MAX_NAME_BYTES}.")
    number = GGMLQuantizationType[kind].value
    return text + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, offset)


# --------------------------------------------------------------------------------------------------------------- reading


class _Cursor:
    """The bytes of a header, read as far as they are needed.  Nothing is asked of the file beyond its size or the limit."""

    def __init__(self, descriptor: int, size: int, path: Path):
        self.descriptor, self.size, self.path = descriptor, size, path
        self.buffer = bytearray()
        self.position = 0
        self.elements = 0  # of arrays, so far

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}. Download the file again.")

    def need(self, count: int, what: str) -> None:
        """Have ``count`` more bytes in the buffer."""
        end = self.position + count
        if end > self.size:
            raise self.fault(
                f"truncated or damaged: {what} at byte {self.position:,} needs {count:,} bytes, the file has {self.size:,}"
            )
        if end > MAX_HEADER_BYTES:
            raise self.fault(f"{what} at byte {self.position:,} makes the header longer than {MAX_HEADER_BYTES:,} bytes")
        while len(self.buffer) < end:
            wanted = min(max(_BLOCK, end - len(self.buffer)), self.size - len(self.buffer))
            data = os.pread(self.descriptor, wanted, len(self.buffer))
            if not data:
                raise CheckpointError(f"{self.path}: became shorter while it was being read. Wait until its download has finished.")
            self.buffer += data

    def numbers(self, letters: str, what: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{letters}")
        self.need(layout.size, what)
        values = layout.unpack_from(self.buffer, self.position)
        self.position += layout.size
        return values

    def text(self, what: str, errors: str = "strict") -> str:
        start = self.position + _LENGTH.size
        if start > len(self.buffer):  # asked here too, because a vocabulary has hundreds of thousands of texts
            self.need(_LENGTH.size, what)
        (length,) = _LENGTH.unpack_from(self.buffer, self.position)
        self.position = start
        if start + length > len(self.buffer):
            self.need(length, what)
        self.position += length
        try:
            return self.buffer[start : self.position].decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise self.fault(f"{what} is not UTF-8 text at byte {start + error.start:,}") from error


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor entry as it stands in the file.  offset: relative to the data."""

    name: str
    number: int
    shape: tuple[int, ...]
    offset: int


def parse_header(path: str | Path) -> GgufHeader:
    """Read and check the header of a GGUF file of any model.

    Raises CheckpointError, and nothing else, when the file cannot be read, is no GGUF file of version 2 or 3, is truncated, or when
    its header contradicts itself.  Bytes after the last tensor are allowed, as in llama.cpp.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}. Check the path, or download the file again.") from error
    except ValueError as error:  # a path with a null character
        raise CheckpointError(f"{brief(str(path))}: cannot be opened: {error}. Check the path.") from error
    try:
        cursor = _Cursor(descriptor, os.fstat(descriptor).st_size, path)
        return _parse(cursor)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Check the disk, or download the file again.") from error
    finally:
        os.close(descriptor)


def parse_planned(data: bytes, size: int, name: str) -> GgufHeader:
    """The header that :func:`build_header` made, for a file of ``size`` bytes that is not there yet."""
    cursor = _Cursor(-1, size, Path(name))
    cursor.buffer += data
    return _parse(cursor)


def _parse(cursor: _Cursor) -> GgufHeader:
    version, tensor_count, key_count = _parse_counts(cursor)
    metadata: dict[str, MetadataEntry] = {}
    for _ in range(key_count):
        entry = _parse_value(cursor)
        if entry.key in metadata:
            raise cursor.fault(f"the key {brief(entry.key)} occurs twice")
        metadata[entry.key] = entry
    entries = [_parse_tensor(cursor) for _ in range(tensor_count)]
    told = metadata.get(_ALIGNMENT_KEY)
    alignment = GGUF_DEFAULT_ALIGNMENT if told is None else told.value
    if told is not None and (told.type is not GGUFValueType.UINT32 or not _is_alignment(alignment)):
        raise cursor.fault(f"{_ALIGNMENT_KEY} is {brief(told.value)} ({told.type.name}); expected a power of two as UINT32")
    assert isinstance(alignment, int)
    data_start = _padded(cursor.position, alignment)
    if not entries:
        data_start = min(data_start, cursor.size)  # a file of metadata alone may end without padding
    if cursor.size < data_start:
        raise cursor.fault(f"truncated: its data begins at byte {data_start:,}, the file has {cursor.size:,}")
    cursor.need(data_start - cursor.position, "the padding before the data")
    tensors = _place(cursor, entries, alignment, data_start)
    digest = xxhash.xxh3_64_hexdigest(cursor.buffer[:data_start])
    return GgufHeader(version, metadata, tensors, alignment, data_start, cursor.size, digest)


def _parse_counts(cursor: _Cursor) -> tuple[int, int, int]:
    if cursor.size < 24:
        raise cursor.fault(f"has only {cursor.size} bytes, too few for a GGUF file")
    magic, version = cursor.numbers("4sI", "the start of the file")
    if magic != _MAGIC:
        raise cursor.fault(f"no GGUF file: it begins with {brief(magic)}")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise CheckpointError(f"{cursor.path}: a big-endian GGUF file. Use a little-endian one, as nearly all are.")
        raise CheckpointError(
            f"{cursor.path}: GGUF version {version}; quantkit reads {_VERSIONS[0]} and {_VERSIONS[1]}. Convert it again."
        )
    tensor_count, key_count = cursor.numbers("QQ", "the counts")
    # The smallest tensor entry has 24 bytes, the smallest key-value pair 13.
    for what, count, smallest in (("tensors", tensor_count, 24), ("keys", key_count, 13)):
        if count * smallest > min(cursor.size, MAX_HEADER_BYTES) - cursor.position:
            raise cursor.fault(f"truncated or damaged: it declares {count:,} {what}, too many for a file of {cursor.size:,} bytes")
    return version, tensor_count, key_count


def _parse_value(cursor: _Cursor) -> MetadataEntry:
    key = cursor.text("the name of a key")
    where = f"the value of {brief(key)}"
    kind = _value_type(cursor, where)
    if kind is GGUFValueType.STRING:
        # llama-quantize cuts long strings at a fixed number of bytes, perhaps within a character: no reason to refuse a file
        return MetadataEntry(key, kind, cursor.text(where, errors="backslashreplace"))
    if kind is not GGUFValueType.ARRAY:
        (value,) = _parse_items(cursor, kind, 1, where)
        return MetadataEntry(key, kind, value)
    items = _value_type(cursor, where)
    if items is GGUFValueType.ARRAY:
        raise cursor.fault(f"{where} is an array of arrays, which GGUF does not know")
    (count,) = cursor.numbers("Q", where)
    smallest = 8 if items is GGUFValueType.STRING else struct.calcsize(f"<{_LETTERS[items]}")
    left = min(cursor.size, MAX_HEADER_BYTES) - cursor.position
    if count * smallest > left:
        raise cursor.fault(f"truncated or damaged: {where} declares {count:,} elements, more than the {left:,} bytes left can hold")
    cursor.elements += count
    if cursor.elements > MAX_ELEMENTS:
        raise cursor.fault(f"{where} makes {cursor.elements:,} elements of arrays; quantkit reads at most {MAX_ELEMENTS:,}")
    if items is GGUFValueType.STRING:
        return MetadataEntry(key, kind, tuple(cursor.text(where) for _ in range(count)), items)
    return MetadataEntry(key, kind, _parse_items(cursor, items, count, where), items)


def _value_type(cursor: _Cursor, where: str) -> GGUFValueType:
    (number,) = cursor.numbers("I", where)
    kind = _VALUE_TYPES.get(number)
    if kind is None:
        raise cursor.fault(f"{where} has the unknown type {number}")
    return kind


def _parse_items(cursor: _Cursor, kind: GGUFValueType, count: int, where: str) -> tuple[Any, ...]:
    if kind is GGUFValueType.BOOL:  # one byte, which must be 0 or 1
        flags = cursor.numbers(f"{count}B", where)
        if count and max(flags) > 1:
            raise cursor.fault(f"{where} holds {max(flags)} where only 0 and 1 can stand")
        return tuple(map(bool, flags))
    return cursor.numbers(f"{count}{_LETTERS[kind]}", where)


def _parse_tensor(cursor: _Cursor) -> _Entry:
    name = cursor.text("the name of a tensor")
    where = f"the entry of tensor {brief(name)}"
    if len(name.encode()) > MAX_NAME_BYTES:
        raise cursor.fault(f"the name of tensor {brief(name)} is longer than the {MAX_NAME_BYTES} bytes that llama.cpp allows")
    (dimensions,) = cursor.numbers("I", where)
    if dimensions > MAX_DIMENSIONS:
        raise cursor.fault(f"{where} has {dimensions} dimensions; ggml knows at most {MAX_DIMENSIONS}")
    *sizes, number, offset = cursor.numbers(f"{dimensions}QIQ", where)
    elements = 1
    for size in sizes:
        elements *= size
        if size >= _LIMIT or elements >= _LIMIT:
            raise cursor.fault(f"{where} has the impossibly large shape {brief(tuple(reversed(sizes)))}")
    return _Entry(name, number, tuple(reversed(sizes)), offset)


def _place(cursor: _Cursor, entries: list[_Entry], alignment: int, data_start: int) -> dict[str, GgufTensor]:
    """The tensors with their absolute place, after checking that they follow each other and end within the file."""
    tensors: dict[str, GgufTensor] = {}
    position = 0  # where the next tensor must begin; relative to the data
    for number, entry in enumerate(entries):
        where = f"tensor {brief(entry.name)}"
        if entry.name in tensors:
            raise cursor.fault(f"{where} occurs twice")
        if entry.offset != position:
            raise cursor.fault(
                f"{where} begins at byte {entry.offset:,} of the data; expected {position:,}, where the one before it ends"
            )
        kind = _type_name(entry.number)
        if kind in TYPE_SIZES:
            block, block_bytes = TYPE_SIZES[kind]
            if (entry.shape[-1] if entry.shape else 1) % block:
                raise cursor.fault(
                    f"{where} has the shape {brief(entry.shape)}, whose rows are no multiple of {kind}'s block of {block}"
                )
            nbytes = math.prod(entry.shape) // block * block_bytes
            position += _padded(nbytes, alignment)
        else:
            follower = entries[number + 1].offset if number + 1 < len(entries) else cursor.size - data_start
            if follower < position or (number + 1 < len(entries) and follower % alignment):
                raise cursor.fault(f"the tensor after {where} begins at byte {follower:,} of the data, which cannot be")
            nbytes, position = follower - position, follower
        if data_start + entry.offset + nbytes > cursor.size:
            missing = data_start + entry.offset + nbytes - cursor.size
            raise cursor.fault(f"truncated: {where} ends {missing:,} bytes beyond the end of the file")
        tensors[entry.name] = GgufTensor(entry.name, kind, entry.shape, data_start + entry.offset, nbytes)
    return tensors


def _type_name(number: int) -> str:
    return _TYPE_NAMES.get(number, f"type {number}")
