"""A small artifact for tests of the writer: files as the safetensors library writes them, units that straddle files.

The library's bytes are the plan (header, offsets) and the expected result at once, so the writer is checked against it and not
against quantkit's own header builder.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import xxhash

from quantkit.engine import run_units
from quantkit.formats.base import OutputFile, OutputTensor
from quantkit.workspace import Workspace
from quantkit.writer import ArtifactWriter, publish

FINGERPRINT: dict[str, Any] = {"version": "1", "source": {"shards": {"a": {"size": 5}}}, "recipe": {"name": "x", "rules": ["y"]}}
SIDECARS = {"config.json": b'{"quantization_config": {}}', "empty.txt": b""}
JOURNAL = "journal.jsonl"
UNITS = [f"unit {number}" for number in range(6)]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
# Memory, where there is some to write to: syncs cost nothing there, and neither kills nor errors care.
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass(frozen=True)
class Artifact:
    """files: the plan.  data: tensor name -> its bytes.  units: unit key -> names of the tensors it writes.  expected: file name ->
    content of every file of the finished directory."""

    files: tuple[OutputFile, ...]
    data: dict[str, bytes]
    units: dict[str, tuple[str, ...]]
    carried: tuple[Path, ...]
    expected: dict[str, bytes]

    def ledger(self, unit: str) -> list[dict[str, Any]]:
        return [{"name": name, "error": 0.1} for name in self.units[unit]]


def make_artifact(
    carried_directory: Path, *, seed: int = 0, unit_count: int = 6, mean_bytes: int = 300, checksums: bool = False
) -> Artifact:
    """Two files, three tensors to a unit (one may be empty), spread over both files.

    checksums: a third file with a fourth tensor of each unit, and behind all of them their checksums.
    """
    generator = np.random.default_rng(seed)
    contents: list[dict[str, Any]] = [{}, {}]
    units: dict[str, tuple[str, ...]] = {}
    for number in range(unit_count):
        names = (f"{number}.weight", f"{number}.scale", f"{number}.flag")
        units[f"unit {number}"] = names
        contents[number % 2][names[0]] = generator.integers(0, 256, (int(generator.integers(1, 2 * mean_bytes)), 3), dtype=np.uint8)
        contents[0][names[1]] = generator.standard_normal(int(generator.integers(0, 5))).astype(np.float32)
        contents[1][names[2]] = generator.integers(-9, 9, number % 3, dtype=np.int64)
    files, data, expected = [], {}, {}
    for index, tensors in enumerate(contents):
        name = f"model-{index + 1:05d}-of-00002.safetensors"
        blob = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        start = 8 + int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8:start])
        del header["__metadata__"]
        offsets = {tensor: start + entry["data_offsets"][0] for tensor, entry in header.items()}
        outputs = tuple(OutputTensor(tensor, entry["dtype"], tuple(entry["shape"])) for tensor, entry in header.items())
        files.append(OutputFile(name, blob[:start], outputs, offsets, len(blob)))
        data |= {tensor: array.tobytes() for tensor, array in tensors.items()}
        expected[name] = blob
    if checksums:
        header, names = b"with checksums", [f"{number}.sum" for number in range(unit_count)]
        data |= {name: generator.bytes(int(generator.integers(1, 100))) for name in names}
        offsets = {name: 100 * (number + 1) for number, name in enumerate(names)}
        places = {name: 100 * (unit_count + 1) + 8 * number for number, name in enumerate(reversed(names))}
        blob = bytearray(100 * (unit_count + 1) + 8 * unit_count + 7)
        blob[: len(header)] = header
        for name in names:
            blob[offsets[name] : offsets[name] + len(data[name])] = data[name]
            blob[places[name] : places[name] + 8] = xxhash.xxh3_64(data[name]).digest()[::-1]
            units[f"unit {name[:-4]}"] += (name,)
        outputs = tuple(OutputTensor(name, "U8", (len(data[name]),)) for name in names)
        files.append(OutputFile("sums.packed", header, outputs, offsets, len(blob), places))
        expected["sums.packed"] = bytes(blob)
    carried = carried_directory / "tokenizer.json"
    carried.write_bytes(b"carried" * 100)
    expected |= SIDECARS | {carried.name: carried.read_bytes()}
    expected["manifest.json"] = manifest(
        {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in expected.items()}
    )
    return Artifact(tuple(files), data, units, (carried,), expected)


def manifest(files: Mapping[str, Any]) -> bytes:
    return json.dumps(files, sort_keys=True).encode()


def write_units(writer: ArtifactWriter, artifact: Artifact, keys: Iterable[str]) -> None:
    """Do the given units, in order."""
    for key in keys:
        digests = {name: writer.write(name, artifact.data[name]) for name in artifact.units[key]}
        writer.commit(key, digests, artifact.ledger(key))


def write_rest(writer: ArtifactWriter, artifact: Artifact, workers: int = 1, stop: threading.Event | None = None) -> list[str]:
    """Do, through the engine, all units that the writer lacks; returns their keys."""
    todo = [key for key in artifact.units if key not in writer.completed]

    def work(key: str, workspace: Workspace) -> None:
        write_units(writer, artifact, [key])

    run_units(todo, work, workers=workers, stop=stop)
    return todo


def seal(writer: ArtifactWriter, artifact: Artifact, **options: Any) -> None:
    writer.seal(SIDECARS, artifact.carried, manifest, **options)


def contents(directory: Path) -> dict[str, bytes]:
    """File name -> content of a directory without subdirectories."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def journalled_units(directory: Path) -> list[str]:
    """Units that the journal in a directory claims; read independently, sound lines only."""
    claimed: list[str] = []
    path = directory / JOURNAL
    lines: Sequence[bytes] = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line[17:])
        except ValueError:
            break
        if "unit" in record:
            claimed.append(record["unit"])
    return claimed


def begin(final: Path, artifact: Artifact, **options: Any) -> ArtifactWriter:
    return ArtifactWriter(final, artifact.files, options.pop("fingerprint", FINGERPRINT), **options)


def finish(final: Path, artifact: Artifact, **options: Any) -> list[str]:
    """A run to the end; returns the units it did."""
    writer = begin(final, artifact, **options)
    try:
        done = write_rest(writer, artifact)
        seal(writer, artifact)
        publish([writer])
    finally:
        writer.close()
    return done


def run_partly(final: Path, artifact: Artifact, count: int, **options: Any) -> None:
    """A run that ends, in an orderly way, after ``count`` units."""
    writer = begin(final, artifact, **options)
    write_units(writer, artifact, UNITS[:count])
    writer.close()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
