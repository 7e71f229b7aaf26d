"""Importance files of llama.cpp ("imatrix"), read and written, and what they say in terms of our statistics.

For each weight such a file holds the mean square of every input, under the tensor's name in GGUF files; for stacked experts a row
for each expert.  There are two formats.  The GGUF one has two tensors, ``<name>.in_sum2`` (sums of squares, ``[experts, in]``) and
``<name>.counts`` (tokens, one for each expert), and three metadata keys.  The older one, ``.dat``, is a list of entries with means
times a number of chunks; it does not say how many tokens an expert received, and has ones where it received none.

An expert without tokens is no reason to quantize it as if all its inputs weighed the same: on import it is given the mean over the
layer's other experts, weighted by their tokens.  On export an expert that only received lent tokens states its estimate with a
count of 1, so that llama.cpp uses it.

An importance file does not say which model it was measured on: names and sizes must fit, the rest is up to whoever gives it.  Nor
does it hold peaks, so statistics from it have peaks of size 0 and no peaks of the cache (:func:`has_peaks`).

Reading takes nothing on trust: whatever the bytes, either a sound :class:`Imatrix` comes back or a CalibrationError, and no more is
allocated than the file has bytes.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import Keys

from quantkit.errors import CalibrationError, CheckpointError, OutputError, listed
from quantkit.evidence import Evidence
from quantkit.formats.gguf_names import meaning_of, place_of
from quantkit.gguf_header import GgufHeader, GGUFValueType, MetadataEntry, build_header, parse_header
from quantkit.journal import output_errors, sync_directory, write_all
from quantkit.llama4 import Llama4Config, Unit, units
from quantkit.statistics import ExpertCounts, Statistics
from quantkit.strict_json import brief
from quantkit.version import __version__

KIND = "imatrix"  # of general.type, and of the tokens of imported statistics
MAX_VALUES = 2**27  # over all entries; those of the largest Llama 4 have less than half of it
MAX_NAME_BYTES = 4096  # of an entry or a dataset in the older format
_MAX_COUNT = 2**62
_SUMS, _COUNTS = ".in_sum2", ".counts"
_AGAIN = "Make it again with llama-imatrix or quantkit, or restore it from a copy."
_UNCALIBRATED = ("router", "embedding", "lm_head")  # llama.cpp may measure these too; they are not quantized by what reaches them
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Importance:
    """What reached one tensor.

    mean_square: float32 ``[experts, in]``, 0 where nothing is known; one row for a tensor that is not stacked, and for a stacked
    one where the file does not tell experts apart.  counts: int64 ``[experts]``, tokens, 0 where nothing is known; chunks in the
    older format.
    """

    mean_square: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Imatrix:
    """An importance file.

    entries: by the tensor's name in GGUF files.  datasets: what was read to measure it, as its maker called it.  chunk_count,
    chunk_size: how much of it, in chunks of so many tokens; size 0 where that is unknown.
    """

    entries: dict[str, Importance]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0


def has_peaks(statistics: Statistics) -> bool:
    """Whether statistics tell how large inputs grew; those that were imported do not."""
    return bool(statistics.cache_peaks) and all(evidence.peak.numel() for evidence in statistics.inputs.values())


# ------------------------------------------------------------------------------------------------------------------ read


def read_imatrix(path: str | Path) -> Imatrix:
    """Read an importance file of either format.  Raises CalibrationError."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            if stream.read(4) == b"GGUF":
                return _read_gguf(path, stream)
            stream.seek(0)
            return _read_legacy(path, stream, os.fstat(stream.fileno()).st_size)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CalibrationError(f"{brief(str(path))}: cannot be read: {reason}. Give the path of an importance file.") from error


def _fault(path: Path, what: str) -> CalibrationError:
    return CalibrationError(f"{path}: {what}. {_AGAIN}")


def _read_gguf(path: Path, stream: BufferedReader) -> Imatrix:
    try:
        header = parse_header(path)
    except CheckpointError as error:
        raise CalibrationError(f"{str(error).removesuffix(' Download the file again.')} {_AGAIN}") from error
    _check_keys(path, header)
    sums = {name.removesuffix(_SUMS) for name in header.tensors if name.endswith(_SUMS)}
    counts = {name.removesuffix(_COUNTS) for name in header.tensors if name.endswith(_COUNTS)}
    if alone := sorted(sums ^ counts):
        raise _fault(path, f"{brief(alone[0])} has {'no counts' if alone[0] in sums else 'counts without sums of squares'}")
    if not sums:
        raise _fault(path, "holds no importance of any tensor")
    if sum(header.tensors[name + _SUMS].elements for name in sums) > MAX_VALUES:
        raise _fault(path, f"holds more than {MAX_VALUES:,} numbers, which no model of this kind needs")
    entries = {name: _gguf_entry(path, stream, header, name) for name in sorted(sums)}
    datasets, chunk_count, chunk_size = (header.value(key) for key in (Keys.IMatrix.DATASETS, *_NUMBERS))
    assert isinstance(datasets, tuple) and isinstance(chunk_count, int) and isinstance(chunk_size, int)
    return Imatrix(entries, tuple(map(str, datasets)), chunk_count, chunk_size)


_NUMBERS = (Keys.IMatrix.CHUNK_COUNT, Keys.IMatrix.CHUNK_SIZE)


def _check_keys(path: Path, header: GgufHeader) -> None:
    """Raise CalibrationError unless the metadata are those of an importance file."""
    kind = header.value(Keys.General.TYPE)
    if kind not in (None, KIND):
        raise CalibrationError(f"{path} is a GGUF file of type {brief(kind)}, not {KIND!r}. Give an importance file.")
    datasets = header.metadata.get(Keys.IMatrix.DATASETS)
    numbers = [header.metadata.get(key) for key in _NUMBERS]
    if datasets is None or None in numbers:
        lacking = [key for key in (Keys.IMatrix.DATASETS, *_NUMBERS) if key not in header.metadata]
        raise CalibrationError(f"{path} is no importance file: it has no key {lacking[0]}. Give one that llama-imatrix wrote.")
    if datasets.items is not GGUFValueType.STRING:
        raise _fault(path, f"{datasets.key} is {brief(datasets.value)}; expected an array of strings")
    for number in numbers:
        if number is not None and number.type is not GGUFValueType.UINT32:
            raise _fault(path, f"{number.key} is {brief(number.value)} ({number.type.name}); expected UINT32")


def _gguf_entry(path: Path, stream: BufferedReader, header: GgufHeader, name: str) -> Importance:
    sums, counts = (_floats(path, stream, header, name + suffix) for suffix in (_SUMS, _COUNTS))
    rounded = np.rint(counts).astype(np.int64)
    if not counts.size or not sums.size or sums.size % counts.size:
        raise _fault(path, f"{brief(name)} has {sums.size:,} sums and {counts.size:,} counts, which do not fit each other")
    if (stacked := header.tensors[name + _SUMS].shape[:-1]) and counts.size not in (1, np.prod(stacked)):
        raise _fault(path, f"{brief(name)} has sums of shape {list(stacked)} and {counts.size:,} counts")
    table = sums.reshape(counts.size, -1)
    if table[rounded == 0].any():
        raise _fault(path, f"{brief(name)} has sums of squares where it counts no tokens")
    table /= np.maximum(rounded, 1).astype(np.float32)[:, None]
    return Importance(torch.from_numpy(table), torch.from_numpy(rounded))


def _floats(path: Path, stream: BufferedReader, header: GgufHeader, name: str) -> Floats:
    """A tensor of a GGUF file, flat; its numbers are finite and not negative."""
    tensor = header.tensors[name]
    if tensor.type != "F32":
        raise _fault(path, f"{brief(name)} is {tensor.type}; expected F32")
    stream.seek(tensor.offset)
    return _numbers(path, stream, tensor.elements, name)


def _numbers(path: Path, stream: BufferedReader, count: int, name: str) -> Floats:
    """The next ``count`` numbers of a file that is known to be long enough for them."""
    data = np.empty(count, "<f4")
    if (found := stream.readinto(data.data.cast("B"))) < data.nbytes:
        raise _fault(path, f"truncated: {brief(name)} lacks {data.nbytes - found:,} bytes")
    values = data.astype(np.float32, copy=False)
    if not (values >= 0).all() or (values >= _MAX_COUNT).any():  # NaN is not >= 0
        raise _fault(path, f"{brief(name)} holds a number that is negative, not finite or impossibly large")
    return values


def _read_legacy(path: Path, stream: BufferedReader, size: int) -> Imatrix:
    def integer(what: str, low: int, high: int) -> int:
        data = stream.read(4)
        value = struct.unpack("<i", data)[0] if len(data) == 4 else None
        if value is None or not low <= value <= high:
            found = "the end of the file" if value is None else f"{value:,}"
            raise CalibrationError(
                f"{path} is no sound importance file, neither GGUF nor of the older format: at byte {stream.tell() - len(data):,} "
                f"{what} is {found}, expected {low} to {high:,}. {_AGAIN}"
            )
        return int(value)

    def text(what: str, low: int) -> str:
        data = stream.read(integer(f"the length of {what}", low, min(MAX_NAME_BYTES, size - stream.tell() - 4)))
        return data.decode("utf-8", "backslashreplace")

    entries: dict[str, Importance] = {}
    left = MAX_VALUES
    for _ in range(integer("the number of entries", 1, max(size // 17, 1))):  # the smallest has 17 bytes
        name = text("a name", 1)
        if name in entries:
            raise _fault(path, f"{brief(name)} occurs twice")
        calls = integer(f"the number of chunks of {brief(name)}", 1, 2**31 - 1)
        count = integer(f"the number of values of {brief(name)}", 1, min(left, (size - stream.tell() - 4) // 4))
        left -= count
        mean_square = _numbers(path, stream, count, name)
        mean_square /= np.float32(calls)
        entries[name] = Importance(torch.from_numpy(mean_square)[None], torch.tensor([calls]))
    if stream.tell() == size:  # what follows is optional
        return Imatrix(entries)
    chunk_count = integer("the number of chunks", 0, 2**31 - 1)
    dataset = text("the dataset's name", 0) if stream.tell() < size else ""
    return Imatrix(entries, (dataset,) if dataset else (), chunk_count)


# ----------------------------------------------------------------------------------------------------------------- write


def write_imatrix(path: str | Path, imatrix: Imatrix, *, legacy: bool = False, force: bool = False) -> None:
    """Write an importance file: as GGUF, or in the older format.  Either the whole file gets its name, or nothing changes.

    Entries without any token are left out.  Raises OutputError when it cannot be written, or exists and ``force`` is not given;
    CalibrationError when there is nothing to write, or a number that such a file cannot hold.
    """
    path = Path(path)
    imatrix = replace(imatrix, entries={name: entry for name, entry in sorted(imatrix.entries.items()) if entry.counts.any()})
    if not imatrix.entries:
        raise CalibrationError(f"there is no importance to write to {path}: no tensor received a token. Calibrate first.")
    partial = path.with_name(f"{path.name}.partial")
    check_place(path, force)
    with output_errors(f"write {path}"):
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            try:
                position = 0
                for piece in _legacy_pieces(imatrix) if legacy else _gguf_pieces(imatrix):
                    write_all(descriptor, piece, position)
                    position += len(piece)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            _publish(partial, path, force)
        finally:
            partial.unlink(missing_ok=True)
        sync_directory(path.parent)


def check_place(path: Path, force: bool) -> None:
    """Raise OutputError when an importance file cannot get that name, as far as that is known before there is one."""
    if os.path.lexists(path) and not force:
        raise _exists(path)
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: {'it is a directory' if path.is_dir() else f'no such directory: {path.parent}'}")


def _exists(path: Path) -> OutputError:
    return OutputError(f"{path} exists already: choose another output file, or replace it with --force")


def _publish(partial: Path, path: Path, force: bool) -> None:
    """Give the file its name; a link fails where the name has been taken meanwhile, a rename replaces what has it."""
    if not force:
        try:
            os.link(partial, path)
            return
        except FileExistsError as error:
            raise _exists(path) from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(path):  # without links there is no better way to ask
                raise _exists(path) from error
    os.replace(partial, path)


def _gguf_pieces(imatrix: Imatrix) -> Iterator[bytes]:
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name, entry in imatrix.entries.items():
        experts, width = entry.mean_square.shape
        tensors.append((name + _SUMS, "F32", (experts, width) if experts > 1 else (width,)))
        tensors.append((name + _COUNTS, "F32", (experts, 1) if experts > 1 else (1,)))
    metadata = [
        MetadataEntry(Keys.General.TYPE, GGUFValueType.STRING, KIND),
        MetadataEntry(Keys.IMatrix.DATASETS, GGUFValueType.ARRAY, imatrix.datasets or ("unknown",), GGUFValueType.STRING),
        MetadataEntry(Keys.IMatrix.CHUNK_COUNT, GGUFValueType.UINT32, imatrix.chunk_count),
        MetadataEntry(Keys.IMatrix.CHUNK_SIZE, GGUFValueType.UINT32, imatrix.chunk_size),
    ]
    header, offsets, size = build_header(metadata, tensors)
    yield header
    position = len(header)
    for name, entry in imatrix.entries.items():
        counts = entry.counts.numpy().astype(np.float64)
        for suffix, values in ((_SUMS, entry.mean_square.numpy() * counts[:, None]), (_COUNTS, counts)):
            yield bytes(offsets[name + suffix] - position)
            data = _stored(values, name)
            yield data
            position = offsets[name + suffix] + len(data)
    yield bytes(size - position)


def _stored(values: npt.NDArray[np.float64], name: str) -> bytes:
    if not (values < _MAX_COUNT).all():
        raise CalibrationError(
            f"the importance of {brief(name)} is too large for a file: {values.max():g}. Look for damaged weights."
        )
    return values.astype("<f4").tobytes()


def _legacy_pieces(imatrix: Imatrix) -> Iterator[bytes]:
    yield struct.pack("<i", len(imatrix.entries))
    for name, entry in imatrix.entries.items():
        encoded = name.encode()
        calls = min(max(1, -(-int(entry.counts.max()) // max(imatrix.chunk_size, 1))), 2**31 - 1)
        values = _completed(entry).mean_square.numpy() * np.float64(calls)
        yield struct.pack(f"<i{len(encoded)}sii", len(encoded), encoded, calls, values.size)
        yield _stored(values, name)
    dataset = ", ".join(imatrix.datasets).encode()[:MAX_NAME_BYTES]
    yield struct.pack(f"<ii{len(dataset)}s", min(imatrix.chunk_count, 2**31 - 1), len(dataset), dataset)


# ------------------------------------------------------------------------------------------------------------ statistics


def statistics_from_imatrix(imatrix: Imatrix, config: Llama4Config, provenance: Mapping[str, Any]) -> Statistics:
    """Statistics for a model from an importance file: mean squares and counts, without peaks (:func:`has_peaks`).

    provenance: of the checkpoint that they are going to be used for.  Raises CalibrationError that lists all in which the file does
    not belong to such a model.
    """
    work = [unit for unit in units(config) if unit.matrices]
    tables, problems = _fitted(imatrix, config, work)
    inputs: dict[str, Evidence] = {}
    experts: dict[int, ExpertCounts] = {}
    for unit in work:
        entry = next((tables[name] for name in _names(unit) if name in tables), None)
        if entry is None:
            problems.append(f"no importance of {unit.key}, which GGUF calls {_names(unit)[0]}")
            continue
        row = unit.expert or 0
        inputs[unit.key] = Evidence(int(entry.counts[row]), entry.mean_square[row], torch.empty(0))
        if unit.layer is not None and unit.expert is not None and unit.layer not in experts:
            experts[unit.layer] = _expert_counts(unit.layer, entry.counts)
    if problems:
        raise CalibrationError(
            f"The importance file does not belong to this model, or lacks a part of it. Make one for this model.{listed(problems)}"
        )
    corpus = {
        "source": KIND,
        "datasets": list(imatrix.datasets),
        "samples": imatrix.chunk_count,
        "tokens": imatrix.chunk_count * imatrix.chunk_size,
        "sequence_length": imatrix.chunk_size,
    }
    description = {"corpus": corpus, "source": dict(provenance), "settings": {"sequential": False}, "version": __version__}
    return Statistics(inputs, experts, {}, (KIND,), description)


def _names(unit: Unit) -> list[str]:
    """The tensors of GGUF files that hold the matrices of a unit, all with the same input."""
    return [place_of(matrix.name).tensor for matrix in unit.matrices]


def _fitted(imatrix: Imatrix, config: Llama4Config, work: list[Unit]) -> tuple[dict[str, Importance], list[str]]:
    """The entries of the model's tensors, a row for each expert, none of them without importance; and what is wrong."""
    expected: dict[str, tuple[int, int]] = {}
    for unit in work:
        rows = 1 if unit.expert is None else config.num_experts
        expected |= dict.fromkeys(_names(unit), (rows, unit.matrices[0].shape[1]))
    tables: dict[str, Importance] = {}
    problems: list[str] = []
    for name, entry in imatrix.entries.items():
        meaning = meaning_of(name)
        if name not in expected:
            if meaning is None or meaning.role not in _UNCALIBRATED:
                problems.append(f"importance of {brief(name)}, which the model does not have")
            continue
        rows, width = expected[name]
        if entry.mean_square.numel() != rows * width or len(entry.counts) not in (1, rows):
            shape = list(entry.mean_square.shape)
            problems.append(f"{name} has importance of shape {shape} instead of {[rows, width]}")
            continue
        spread = _spread(entry, rows)
        if not spread.counts.any():
            problems.append(f"{name} received no token")
            continue
        tables[name] = _completed(spread)
    return tables, problems


def _spread(entry: Importance, rows: int) -> Importance:
    """An entry with a row for each expert, where the file did not tell them apart; ones then stand for an expert without tokens."""
    if len(entry.counts) == rows:
        return entry
    mean_square = entry.mean_square.reshape(rows, -1)
    unknown = (mean_square == 1).all(1)
    return Importance(
        mean_square.masked_fill(unknown[:, None], 0.0), entry.counts.expand(rows).masked_fill(unknown, 0).contiguous()
    )


def _completed(entry: Importance) -> Importance:
    """An entry whose rows without tokens have the mean of the others, weighted by tokens."""
    without = entry.counts == 0
    if not without.any() or without.all():
        return entry
    weights = entry.counts.to(torch.float64)
    mean = (weights @ entry.mean_square.to(torch.float64)) / weights.sum()
    return Importance(torch.where(without[:, None], mean.to(torch.float32), entry.mean_square), entry.counts)


def _expert_counts(layer: int, tokens: torch.Tensor) -> ExpertCounts:
    """What is known of a layer's routing: the tokens alone."""
    unknown = torch.zeros(len(tokens), dtype=torch.float64)
    return ExpertCounts(layer, tokens, unknown, unknown, tokens[:, None].contiguous(), torch.zeros_like(tokens))


def imatrix_from_statistics(statistics: Statistics, config: Llama4Config) -> Imatrix:
    """What an importance file says of statistics.  Raises CalibrationError when they lack a part of the model."""
    rows: dict[str, list[Evidence]] = {}
    for unit in units(config):
        if unit.matrices:
            if unit.key not in statistics.inputs:
                raise CalibrationError(f"there are no statistics of {unit.key}. Use those of this checkpoint, or calibrate it.")
            for name in _names(unit):
                rows.setdefault(name, []).append(statistics.inputs[unit.key])
    corpus = statistics.description.get("corpus")
    described: dict[str, Any] = corpus if isinstance(corpus, dict) else {}
    datasets = described.get("datasets") or [described.get("source", "unknown")]
    tokens, samples = (_whole(described.get(name)) for name in ("tokens", "samples"))
    length = _whole(described.get("sequence_length")) or -(-tokens // max(samples, 1)) or 1
    chunks = -(-tokens // length)  # samples may be shorter than a chunk
    return Imatrix({name: _entry(evidence) for name, evidence in rows.items()}, tuple(map(str, datasets)), chunks, length)


def _entry(rows: list[Evidence]) -> Importance:
    mean_square = torch.stack([evidence.mean_square for evidence in rows])
    counts = torch.tensor([evidence.tokens for evidence in rows])
    estimated = (counts == 0) & mean_square.any(1)  # from lent tokens; a count makes llama.cpp use it
    return Importance(mean_square, torch.where(estimated, 1, counts))


def _whole(value: object) -> int:
    """A number of samples or tokens as a file can hold it, 0 for anything else."""
    return min(value, 2**32 - 1) if type(value) is int and value > 0 else 0
