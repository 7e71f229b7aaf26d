"""Verification: re-open an artifact and find out whether it is what it says it is.

Everything is read from the artifact's own bytes.  The checks, from cheap to dear:

* manifest: every listed file is there with its size and sha256, and beside them lies nothing that a loader would read;
* headers: every tensor file parses, the index agrees with the files;
* tensors: the config and its quantization section say which tensors must exist with which shape and dtype: exactly these do;
* scales: every scale is finite and positive;
* ledger: one entry for each tensor, each as the recipe asked;
* source: with the source at hand, kept tensors, routed experts included, are equal to it byte for byte and are as many as the
  ledger says, and a sample of quantized matrices, decoded, is as far from it as the ledger says; without it, the sample is decoded
  and must be finite.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from quantkit import ledger
from quantkit.checkpoint import Checkpoint, TensorFiles
from quantkit.errors import ArtifactError, CheckpointError, LedgerError, QuantkitError
from quantkit.estimate import available_cores
from quantkit.formats import compressed_tensors
from quantkit.formats.base import OutputTensor
from quantkit.grid import dequantize
from quantkit.llama4 import Llama4Config, Unit, WeightMatrix, parse_config, units
from quantkit.scheme import KEEP, Scheme
from quantkit.smoothing import found_factors
from quantkit.strict_json import brief, parse_object
from quantkit.tensor_files import listing
from quantkit.workspace import Workspace
from quantkit.writer import JOURNAL, MANIFEST

READ_BYTES = 8 << 20
CHUNK_ELEMENTS = 1 << 20  # of a matrix, compared at once in float64
ERROR_TOLERANCE = 1e-4  # the ledger's error, summed in another order, against the error measured here
CONFIG, LEDGER = "config.json", "ledger.json"
# Files that a loader would read although the manifest does not vouch for them.  What uploads and downloads leave is none of these.
_LOADED = re.compile(r".*\.(safetensors|bin|pt|pth|py|gguf|index\.json)|config\.json|ledger\.json", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Check:
    """One check and its outcome."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerifyResult:
    """All checks of one artifact.  sampled: number of matrices decoded."""

    directory: Path
    checks: tuple[Check, ...]
    tensors: int
    bytes: int
    sampled: int


def verify(
    directory: str | Path,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    sample: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyResult:
    """Verify the artifact in ``directory``, against its BF16 ``source`` if given.

    sample: how many quantized matrices to decode, chosen by ``seed``; kept tensors are all compared.  progress: told, while
    files are hashed, how many bytes of how many are done; one call at a time.  Raises ArtifactError that lists every failed
    check.
    """
    path = Path(directory)
    if not os.path.isfile(path / CONFIG):
        raise ArtifactError(f"{path} is not an artifact: it has no {CONFIG}")
    checks: list[Check] = []

    def run(name: str, check: Callable[[], str]) -> None:
        try:
            checks.append(Check(name, True, check()))
        except (QuantkitError, OSError) as error:
            checks.append(Check(name, False, str(error)))

    run("manifest", lambda: _check_manifest(path, progress))
    try:
        files = TensorFiles.open(path)
    except CheckpointError as error:
        checks.append(Check("headers", False, str(error)))
        raise _failure(path, checks) from error
    with files:
        checks.append(Check("headers", True, f"{len(files.tensors)} tensors, files: {len(files.paths)}"))
        chosen: list[tuple[WeightMatrix, Scheme]] = []
        artifact = _Artifact(path, files)
        run("tensors", lambda: _check_tensors(artifact))
        if checks[-1].ok:
            run("scales", lambda: _check_scales(artifact))
            entries: dict[str, ledger.LedgerEntry] = {}
            run("ledger", lambda: _check_ledger(artifact, entries))
            quantized = [(matrix, scheme) for matrix, scheme in artifact.schemes.items() if scheme is not None]
            chosen = random.Random(seed).sample(quantized, min(sample, len(quantized)))
            if source is None:
                run("sample", lambda: _check_decodes(artifact, chosen))
            else:
                run("source", lambda: _check_source(artifact, chosen, entries, source, revision))
        if not all(check.ok for check in checks):
            raise _failure(path, checks)
        size = sum(tensor.nbytes for tensor in files.tensors.values())
        return VerifyResult(path, tuple(checks), len(files.tensors), size, len(chosen))


def _failure(path: Path, checks: list[Check]) -> ArtifactError:
    failed = [check for check in checks if not check.ok]
    lines = "\n".join(f"  {check.name}: {check.detail}" for check in failed)
    advice = "Do not use it; convert again."
    if os.path.lexists(path / JOURNAL):
        advice = "Run the same convert command again, which completes it; then verify again."
    return ArtifactError(f"{path} fails {len(failed)} of {len(checks)} checks:\n{lines}\n{advice}")


class _Artifact:
    """An opened artifact with what its own config says of it."""

    def __init__(self, path: Path, files: TensorFiles):
        self.path, self.files = path, files
        self.config: Llama4Config
        self.units: list[Unit] = []
        self.schemes: dict[WeightMatrix, Scheme | None] = {}
        self.kv_cache: str | None = None

    def load(self) -> None:
        config = _read_json(self.path / CONFIG)
        quantization = config.pop("quantization_config", None)
        if not isinstance(quantization, Mapping):
            raise ArtifactError("config.json has no quantization_config: this is not a quantized artifact")
        self.config = parse_config(config)
        self.kv_cache = compressed_tensors.kv_cache_of(quantization)
        self.units = units(self.config)
        self.schemes = {
            matrix: compressed_tensors.scheme_of(quantization, matrix.name) for unit in self.units for matrix in unit.matrices
        }

    def decode(self, matrix: WeightMatrix, scheme: Scheme) -> torch.Tensor:
        """The stored values of one matrix, float32 ``[out, in]``."""
        names = [tensor.name for tensor in compressed_tensors.output_tensors(matrix, scheme, self.config.dtype)]
        tensors = {name: self.files.read(name) for name in names}
        return dequantize(compressed_tensors.decode(matrix.name, tensors, scheme))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path.name} cannot be read: {error.strerror}") from error
    return parse_object(data, path.name)


def _check_manifest(path: Path, progress: Callable[[int, int], None] | None) -> str:
    listed = _read_json(path / MANIFEST).get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        raise ArtifactError(f"{MANIFEST} lists no files")
    strays = sorted(name for name in os.listdir(path) if name not in listed and name not in (MANIFEST, JOURNAL))
    problems = [f"{name} is not listed" for name in strays if _LOADED.fullmatch(name)]
    if os.path.lexists(path / JOURNAL):
        problems.append(f"{JOURNAL} is left: publishing was cut short")
    whole: list[Path] = []
    for name, entry in listed.items():
        file = path / name
        if Path(name).name != name or not name.isprintable():
            problems.append(f"{brief(name)} is listed, which is no file name")
        elif not os.path.isfile(file):
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry.get("size"):
            problems.append(f"{name} has {file.stat().st_size} bytes; the manifest says {entry.get('size')}")
        else:
            whole.append(file)
    size = sum(file.stat().st_size for file in whole)
    for file, digest in zip(whole, _hash_files(whole, size, progress), strict=True):
        if digest != listed[file.name].get("sha256"):
            problems.append(f"{file.name} has another sha256 than the manifest says: its content was changed or damaged")
    if problems:
        raise ArtifactError("; ".join(problems))
    others = f"; not listed, and not read by loaders: {listing(strays)}" if strays else ""
    return f"{len(listed)} files, {size:,} bytes, every sha256 as listed{others}"


def _hash_files(files: list[Path], total: int, progress: Callable[[int, int], None] | None) -> list[str]:
    """The sha256 of each file; several are read at once."""
    lock, done = threading.Lock(), 0

    def digest(file: Path) -> str:
        nonlocal done
        result = hashlib.sha256()
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


def _check_tensors(artifact: _Artifact) -> str:
    artifact.load()
    expected: dict[str, OutputTensor] = {}
    for unit in artifact.units:
        for copy in unit.copies:
            stored = artifact.files.tensors.get(copy.name)
            expected[copy.name] = OutputTensor(copy.name, stored.dtype if stored else artifact.config.dtype, copy.shape)
        for matrix in unit.matrices:
            stored = artifact.files.tensors.get(f"{matrix.name}.weight")
            for tensor in compressed_tensors.output_tensors(
                matrix, artifact.schemes[matrix], stored.dtype if stored else artifact.config.dtype
            ):
                expected[tensor.name] = tensor
        expected |= {tensor.name: tensor for tensor in compressed_tensors.kv_cache_tensors(unit, artifact.kv_cache)}
    found = artifact.files.tensors
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    for name, tensor in expected.items():
        if name in found and (found[name].shape != tensor.shape or found[name].dtype != tensor.dtype):
            problems.append(
                f"{name} is {found[name].dtype} {list(found[name].shape)}; expected {tensor.dtype} {list(tensor.shape)}"
            )
    if problems:
        raise ArtifactError(f"{len(problems)} problems: " + "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else ""))
    return f"{len(expected)} tensors have the names, shapes and dtypes that config.json implies"


def _check_scales(artifact: _Artifact) -> str:
    count = 0
    for name in artifact.files.tensors:
        if name.endswith(("_scale", "_global_scale")):
            scale = artifact.files.read(name)
            if scale.dtype == torch.uint8:  # powers of two; 255 is the NaN of this number format
                bad = bool((scale == 255).any())
            else:
                values = scale.float()
                bad = not bool(torch.isfinite(values).all() and (values > 0).all())
            if bad:
                raise ArtifactError(f"{name} holds a scale that is not finite and positive")
            count += scale.numel()
    return f"{count:,} scales are finite and positive"


def _check_ledger(artifact: _Artifact, entries: dict[str, ledger.LedgerEntry]) -> str:
    try:
        data = (artifact.path / LEDGER).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{LEDGER} cannot be read: {error.strerror}") from error
    entries |= {entry.name: entry for entry in ledger.read_ledger(data)}
    wanted = {matrix.name: scheme.name if scheme else KEEP for matrix, scheme in artifact.schemes.items()}
    wanted |= {copy.name: KEEP for unit in artifact.units for copy in unit.copies}
    for name, scheme in wanted.items():
        if name not in entries:
            raise LedgerError(f"the ledger has no entry for {name}")
        entry = entries[name]
        if not entry.asked == entry.applied == scheme:
            raise LedgerError(f"{name}: asked {entry.asked}, applied {entry.applied}, but config.json says {scheme}")
    if len(entries) != len(wanted):
        raise LedgerError(f"the ledger has {len(entries)} entries; expected {len(wanted)}")
    quantized = [entry.relative_error for entry in entries.values() if entry.applied != KEEP]
    kept, worst = len(entries) - len(quantized), max(quantized, default=0.0)
    return f"{len(quantized)} matrices quantized as asked, {kept} tensors kept, worst error {worst:.4f}"


def _check_decodes(artifact: _Artifact, chosen: list[tuple[WeightMatrix, Scheme]]) -> str:
    for matrix, scheme in chosen:
        if not bool(torch.isfinite(artifact.decode(matrix, scheme)).all()):
            raise ArtifactError(f"{matrix.name}: a decoded value is not finite")
    return f"{len(chosen)} matrices decoded, all values finite (give the source to compare with it)"


def _check_source(
    artifact: _Artifact,
    chosen: list[tuple[WeightMatrix, Scheme]],
    entries: Mapping[str, ledger.LedgerEntry],
    source: str | Path,
    revision: str | None,
) -> str:
    with Checkpoint.open(source, revision) as checkpoint:
        if checkpoint.config != artifact.config:
            raise ArtifactError(f"{source} is not the source of this artifact: its config differs")
        kept = 0
        for name, dtype, stored, digest, source_digest in _kept(artifact, checkpoint):
            tensor = artifact.files.tensors[stored]
            if tensor.dtype != dtype or _digest(artifact.files.chunks(stored)) != digest:
                raise ArtifactError(f"{name} is kept but differs from the source")
            if name not in entries or entries[name].source_digest != source_digest:
                raise ArtifactError(
                    f"{name} is kept and equals the source, but the ledger does not say so: no digest {source_digest}"
                )
            kept += 1
        listed = sum(entry.applied == KEEP for entry in entries.values())
        if kept != listed:
            raise ArtifactError(f"{kept} tensors are kept, but the ledger lists {listed}")
        worst = 0.0
        for matrix, _ in chosen:
            smoothed = matrix.name in entries and entries[matrix.name].smooth
            for each in _with_partner(artifact, matrix) if smoothed else [matrix]:
                worst = max(worst, _compare(artifact, checkpoint, each, entries.get(each.name), smoothed))
        sampled = f"{len(chosen)} matrices are as far from it as the ledger says (worst {worst:.4f})"
        return f"{kept} kept tensors equal the source; {sampled}"


def _kept(artifact: _Artifact, checkpoint: Checkpoint) -> Iterator[tuple[str, str, str, str, str]]:
    """What is stored as in the source: name in the ledger, source dtype, name of the stored tensor, the digest of the bytes that
    must be stored, and the digest of the source bytes that the ledger must hold.

    The last two differ for experts: a fused slice is stored transposed and, gate and up, in two tensors.
    """
    workspace = Workspace()
    for unit in artifact.units:
        whole = {copy.name: copy.name for copy in unit.copies}
        matrices = [matrix for matrix in unit.matrices if artifact.schemes[matrix] is None]
        whole |= {matrix.name: matrix.tensor for matrix in matrices if matrix.expert is None}
        for name, tensor in whole.items():
            digest = _digest(checkpoint.chunks(tensor))
            yield name, checkpoint.tensors[tensor].dtype, tensor, digest, digest
        experts = [matrix for matrix in matrices if matrix.expert is not None]
        if experts:
            weights, digests = checkpoint.read_unit(unit, workspace)
            for matrix, weight, source_digest in zip(unit.matrices, weights, digests, strict=True):
                if matrix in experts:
                    stored = weight.contiguous().reshape(-1).view(torch.uint8).numpy().data
                    dtype = checkpoint.tensors[matrix.tensor].dtype
                    yield matrix.name, dtype, f"{matrix.name}.weight", _digest([stored]), source_digest


def _digest(pieces: Iterable[memoryview]) -> str:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _compare(
    artifact: _Artifact, checkpoint: Checkpoint, matrix: WeightMatrix, entry: ledger.LedgerEntry | None, smoothed: bool
) -> float:
    """The relative error of a matrix to the source.  Raises ArtifactError when the ledger says something else."""
    scheme = artifact.schemes[matrix]
    assert scheme is not None
    original, decoded = checkpoint.read_matrix(matrix), artifact.decode(matrix, scheme)
    if smoothed and matrix.projection in ("up_proj", "down_proj"):
        original = original.to(torch.float32) * _smoothing(artifact, checkpoint, matrix)
    error, stated = _relative_error(original, decoded), math.nan if entry is None else entry.relative_error
    if not abs(error - stated) <= ERROR_TOLERANCE * max(1.0, stated):
        raise ArtifactError(f"{matrix.name}: relative error to the source is {error:.6f}; the ledger says {stated:.6f}")
    return error


def _with_partner(artifact: _Artifact, matrix: WeightMatrix) -> list[WeightMatrix]:
    """A smoothed matrix, and the one that the same powers of two were taken from or put into."""
    if matrix.projection not in ("up_proj", "down_proj"):
        return [matrix]
    base = matrix.name.rpartition(".")[0]
    return [found for found in artifact.schemes if found.name in (f"{base}.up_proj", f"{base}.down_proj")]


def _smoothing(artifact: _Artifact, checkpoint: Checkpoint, matrix: WeightMatrix) -> torch.Tensor:
    """The powers of two that a smoothed up or down projection was multiplied with, to be multiplied with the source.

    Both are told by the up projection: each of its rows has scales of its own, so the size of a row survives rounding.
    """
    up = next(found for found in _with_partner(artifact, matrix) if found.projection == "up_proj")
    scheme = artifact.schemes[up]
    if scheme is None:
        raise ArtifactError(f"{up.name} is not quantized, so {matrix.name} cannot have been smoothed")
    factors = found_factors(checkpoint.read_matrix(up), artifact.decode(up, scheme))
    return factors[:, None] if matrix is up else 1 / factors


def _relative_error(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    """Relative L2 error, summed in float64 over chunks of rows, so that no float64 copy of a matrix is held."""
    squared_error = squared_weight = 0.0
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        exact = weight[start : start + rows].double()
        squared_weight += exact.square().sum().item()
        squared_error += (decoded[start : start + rows].double() - exact).square().sum().item()
    return math.sqrt(squared_error) / (math.sqrt(squared_weight) or 1.0)
