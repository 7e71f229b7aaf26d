"""Repack: a finished artifact in another format, with the same numbers.

Codes and scales are decoded and encoded again and never computed, so what comes out stands for exactly the same weights, and going
back gives the same bytes.  An artifact is verified before anything is made of it.  Ledger, recipe and provenance go along; the
manifest also says what it was repacked from.  Writing, resuming and publishing are those of a conversion.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import xxhash

from quantkit.assignment import Assignment
from quantkit.checkpoint import CONFIG_NAME
from quantkit.convert import Progress
from quantkit.engine import run_units
from quantkit.errors import ArtifactError, OutputError, RecipeError
from quantkit.estimate import available_cores
from quantkit.formats import FORMATS
from quantkit.formats.base import ClientNote, FileRequest, OutputTensor, PlannedFiles
from quantkit.gguf_artifact import GgufArtifact
from quantkit.ledger import read_ledger
from quantkit.llama4 import SourceTensor, Unit, WeightMatrix
from quantkit.packed_artifact import PackedArtifact
from quantkit.recipe import PACKED, WORKING_SUFFIXES, Recipe, recipe_from_dict
from quantkit.safetensors_artifact import SafetensorsArtifact
from quantkit.strict_json import brief, parse_object
from quantkit.tensor_files import SIDECAR_BYTES, read_small_file
from quantkit.verify import LEDGER, artifact_kind, verify
from quantkit.version import __version__
from quantkit.workspace import Workspace
from quantkit.writer import MANIFEST, ArtifactWriter, publish

COMPRESSED_TENSORS = "compressed-tensors"
TARGETS = (PACKED, COMPRESSED_TENSORS)


@dataclass(frozen=True)
class RepackResult:
    """A published artifact.  notes: which clients load it."""

    directory: Path
    format: str
    bytes: int
    tensors: int
    units_resumed: int
    seconds: float
    notes: tuple[ClientNote, ...]


def repack(
    artifact: str | Path,
    output: str | Path,
    to: str = PACKED,
    *,
    max_shard_bytes: int | None = None,
    workers: int | None = None,
    force: bool = False,
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> RepackResult:
    """Write the artifact in directory ``artifact`` once more, as directory ``output``, in the format ``to``.

    to: ``packed`` or ``compressed-tensors``.  max_shard_bytes: largest tensor file, by default 5 GB.  Other arguments as of
    ``convert``.  Raises RecipeError that lists what the format cannot hold; ArtifactError when the artifact fails verification; and
    what ``convert`` raises about its output.  Whatever is raised, nothing incomplete stands under the final name, and the same call
    resumes.
    """
    started = time.monotonic()
    path, final = Path(artifact), Path(output)
    if not final.name:
        raise OutputError(f"{str(output)!r} names no directory to make; choose another output directory")
    if to not in TARGETS:
        raise RecipeError(f"{to!r} is no format to repack to. Formats: {', '.join(TARGETS)}")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise RecipeError(f"workers is {workers!r}; expected an integer of at least 1")
    kind = _repackable(path, final, to)
    verify(path, sample=0)
    opened = kind(path, {})
    with opened.files:
        opened.checks["tensors"]()
        job = _Job(path, opened, to, max_shard_bytes)
        writer = ArtifactWriter(final, job.planned.files, job.fingerprint, force=force, restart=restart)
        try:
            report = _Report(job, writer, progress)
            todo = [unit for unit in opened.units if unit.key not in writer.completed]
            run_units(
                todo,
                lambda unit, space: report.done(unit, job.write(unit, writer, space)),
                workers=workers or available_cores(),
                stop=stop,
            )
            writer.seal(
                job.sidecars, job.carried, job.manifest, workers=workers or available_cores(), stop=stop, checked=report.checked
            )
            publish([writer])
        finally:
            writer.close()
    size = sum(found.stat().st_size for found in writer.final.iterdir())
    seconds = time.monotonic() - started
    return RepackResult(writer.final, to, size, len(opened.schemes), writer.resumed, seconds, job.notes)


def _repackable(path: Path, final: Path, to: str) -> type[SafetensorsArtifact | PackedArtifact]:
    """What an artifact is, when it can be repacked so.  Raises ArtifactError, OutputError, RecipeError."""
    advice = "Give the directory of an artifact that quantkit wrote."
    if not os.path.isdir(path):
        what = "is a file" if os.path.lexists(path) else "does not exist"
        raise ArtifactError(f"{path} {what}. {advice}")
    for taken in (final, *(final.with_name(final.name + suffix) for suffix in WORKING_SUFFIXES)):
        if path.resolve().is_relative_to(taken.resolve()):
            raise OutputError(f"{taken} holds the artifact; choose another output directory")
    if final.resolve().is_relative_to(path.resolve()):
        raise OutputError(f"{final} lies in the artifact, which must stay as it is; choose another output directory")
    kind = artifact_kind(path)
    if kind is GgufArtifact:
        raise RecipeError(f"{path} is in GGUF; there is nothing to repack to {to}")
    if not os.path.isfile(path / MANIFEST):
        raise ArtifactError(f"{path} is no artifact of quantkit: it has no {MANIFEST}. {advice}")
    stated = parse_object(read_small_file(path / MANIFEST, SIDECAR_BYTES), str(path / MANIFEST)).get("format")
    if stated not in TARGETS:
        raise ArtifactError(f"{path / MANIFEST} states the format {brief(stated)}; expected one of {', '.join(TARGETS)}. {advice}")
    if stated == to:
        raise RecipeError(f"{path} is {to} already; there is nothing to repack")
    assert issubclass(kind, (SafetensorsArtifact, PackedArtifact))
    return kind


class _Job:
    """What one artifact becomes in another format."""

    def __init__(self, path: Path, opened: SafetensorsArtifact | PackedArtifact, to: str, max_shard_bytes: int | None) -> None:
        """Raises RecipeError that lists what the format cannot hold."""
        self._opened, self._from, self.units = opened, opened.form, len(opened.units)
        self._to: ModuleType = FORMATS[to]
        stated = read_small_file(path / MANIFEST, SIDECAR_BYTES)
        self._stated = parse_object(stated, MANIFEST)
        self._digest = hashlib.sha256(stated).hexdigest()
        ledger = read_small_file(path / LEDGER, SIDECAR_BYTES)
        self._entries = {entry.name: entry for entry in read_ledger(ledger)}
        self._recipe = replace(_recipe(self._stated), format=to)
        schemes = {item.name: scheme for item, scheme in opened.schemes.items()}
        self.notes = tuple(self._check(path, to))
        self._tensors = {unit.key: self._tensors_of(unit) for unit in opened.units}
        self._caches = {unit.key: self._to.kv_cache_tensors(unit, self._recipe.kv_cache) for unit in opened.units}
        request = FileRequest(
            path.name,
            read_small_file(path / CONFIG_NAME, SIDECAR_BYTES).decode(),
            opened.config,
            self._recipe,
            {name: Assignment(scheme) for name, scheme in schemes.items()},
            [tensor for found in self._tensors.values() for tensor in found],
            [tensor for found in self._caches.values() for tensor in found],
            None,
            max_shard_bytes,
        )
        self.planned: PlannedFiles = self._to.plan_files(request)
        self.sidecars = {**self.planned.sidecars, LEDGER: ledger}
        replaced = {*(found.name for found in opened.files.paths), *self.sidecars, "model.safetensors.index.json"}
        self.carried = [path / name for name in self._stated["files"] if name not in replaced]
        self.fingerprint = {
            "version": __version__,
            "artifact": self._digest,
            "format": to,
            "max_shard_bytes": "usual" if max_shard_bytes is None else max_shard_bytes,
            "layout": xxhash.xxh3_64_hexdigest(b"".join(file.name.encode() + file.header for file in self.planned.files)),
        }

    @property
    def total_bytes(self) -> int:
        """Of the tensor files."""
        return sum(file.size for file in self.planned.files)

    def _check(self, path: Path, to: str) -> Sequence[ClientNote]:
        """Which clients load it.  Raises RecipeError."""
        problems, notes = [], []
        matrices = {item: scheme for item, scheme in self._opened.schemes.items() if isinstance(item, WeightMatrix)}
        try:
            notes = self._to.client_notes(matrices, self._opened.config, self._recipe.kv_cache)
        except RecipeError as error:
            problems.append(str(error))
        problems += [
            f"{item.name} has {scheme.name}; there it must stay as in the source"
            for item, scheme in self._opened.schemes.items()
            if scheme is not None and isinstance(item, SourceTensor) and to == COMPRESSED_TENSORS
        ]
        if problems:
            raise RecipeError(f"{path} does not fit the format {to} without loss:\n  " + "\n  ".join(problems))
        return notes

    def _tensors_of(self, unit: Unit) -> list[OutputTensor]:
        tensors = []
        for item in unit.items:
            scheme = self._opened.schemes[item]
            dtype = self._opened.files.tensors[_kept_name(item)].dtype if scheme is None else ""
            if isinstance(item, WeightMatrix):
                tensors += self._to.output_tensors(item, scheme, dtype)
            else:
                tensors.append(self._to.copied_tensor(item, scheme, dtype))
        return tensors

    def write(self, unit: Unit, writer: ArtifactWriter, workspace: Workspace) -> int:
        """Write a unit; returns its bytes.  Raises ArtifactError, CheckpointError, OutputError."""
        written: dict[str, str] = {}
        for item in unit.items:
            scheme = self._opened.schemes[item]
            if scheme is None or isinstance(item, SourceTensor):
                written[_kept_name(item)] = self._copy(_kept_name(item), writer)
                continue
            names = [tensor.name for tensor in self._from.output_tensors(item, scheme, "")]
            quantized = self._from.decode(item.name, {name: self._opened.files.read(name) for name in names}, scheme)
            for name, tensor in self._to.encode(item.name, quantized, workspace).items():
                written[name] = writer.write(name, tensor.reshape(-1).view(torch.uint8).numpy().data)
        for cache in self._caches[unit.key]:
            written[cache.name] = self._copy(cache.name, writer)
        writer.commit(unit.key, written, [self._entries[item.name].to_dict() for item in unit.items])
        return sum(tensor.nbytes for tensor in (*self._tensors[unit.key], *self._caches[unit.key]))

    def _copy(self, name: str, writer: ArtifactWriter) -> str:
        """A tensor as it is, piece by piece; returns the xxh3-64 of its bytes."""
        digest, position = xxhash.xxh3_64(), 0
        for piece in self._opened.files.chunks(name):
            digest.update(piece)
            writer.write_part(name, position, piece)
            position += len(piece)
        return digest.hexdigest()

    def manifest(self, files: Mapping[str, Mapping[str, Any]]) -> bytes:
        """The manifest of the new artifact: the former one's, with its own files and a line about where it comes from."""
        history = self._stated.get("repacked")
        former = {"format": self._stated.get("format"), "manifest": self._digest, "quantkit_version": __version__}
        content = self._stated | {
            "format": self._recipe.format,
            "recipe": self._recipe.to_dict(),
            "repacked": [*(history if isinstance(history, list) else ()), former],
            "files": {name: files[name] for name in sorted(files)},
        }
        return (json.dumps(content, indent=2) + "\n").encode()


class _Report:
    """Finished units and bytes read back as snapshots, one call at a time."""

    def __init__(self, job: _Job, writer: ArtifactWriter, progress: Callable[[Progress], None] | None) -> None:
        self._writer, self._progress = writer, progress
        self._total, self._units = job.total_bytes, writer.resumed
        self._units_total = job.units
        self._written = self._checked = 0
        self._started, self._lock = time.monotonic(), threading.Lock()

    def done(self, unit: Unit, written: int) -> None:
        with self._lock:
            self._units += 1
            self._written += written
            self._tell("convert", self._written, unit.key)

    def checked(self, count: int) -> None:
        with self._lock:
            self._checked += count
            self._tell("check", self._checked, self._writer.final.name)

    def _tell(self, phase: str, done: int, current: str) -> None:
        if self._progress is not None:
            seconds, resumed = time.monotonic() - self._started, self._writer.resumed
            self._progress(
                Progress(phase, self._units, self._units_total, resumed, done, self._total, self._written, current, seconds)
            )


def _kept_name(item: WeightMatrix | SourceTensor) -> str:
    """What a kept item is called in both formats."""
    return f"{item.name}.weight" if isinstance(item, WeightMatrix) else item.name


def _recipe(stated: Mapping[str, Any]) -> Recipe:
    """The recipe in a manifest.  Raises ArtifactError."""
    content = stated.get("recipe")
    if not isinstance(content, Mapping):
        raise ArtifactError(f"{MANIFEST} holds no recipe")
    try:
        return recipe_from_dict(content, f"in {MANIFEST}")
    except RecipeError as error:
        raise ArtifactError(str(error)) from error
