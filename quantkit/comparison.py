"""An artifact compared with the source it was made from, whatever its format; or, without the source, with itself.

What is kept must be equal, in the bytes that the format makes of it.  Of what is quantized a sample is decoded, matrix by matrix
or, where a tensor is no matrix of a layer and may be of any size, rows by rows; the distance to the source must be the one that
the ledger states.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Protocol

import torch
import xxhash

from quantkit.checkpoint import Checkpoint
from quantkit.errors import ArtifactError
from quantkit.formats.base import DTYPE_BYTES, OutputTensor
from quantkit.grid import dequantize
from quantkit.ledger import LedgerEntry
from quantkit.llama4 import SourceTensor, Unit, WeightMatrix
from quantkit.scheme import KEEP, Scheme
from quantkit.smoothing import found_factors
from quantkit.tensor_files import TORCH_DTYPES, OpenFiles
from quantkit.workspace import Workspace

CHUNK_ELEMENTS = 1 << 20  # of a tensor, compared at once in float64
ERROR_TOLERANCE = 1e-4  # the ledger's error, summed in another order, against the error measured here

Item = WeightMatrix | SourceTensor


class Artifact(Protocol):
    """An opened artifact of some format.

    form: the format's module.  files: its tensors, and parts of them under the names that ``form`` gives them.  checks: by name, in
    order; the first fills ``units`` and ``schemes`` (None: stored as in the source).
    """

    @property
    def form(self) -> ModuleType: ...
    @property
    def files(self) -> OpenFiles: ...
    @property
    def checks(self) -> Mapping[str, Callable[[], str]]: ...
    @property
    def units(self) -> list[Unit]: ...
    @property
    def schemes(self) -> Mapping[Item, Scheme | None]: ...

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Raise ArtifactError when the artifact cannot have been made from that checkpoint."""


def choose(schemes: Mapping[Item, Scheme | None], sample: int, seed: int) -> list[tuple[Item, Scheme]]:
    """A random sample of what is quantized; each pair of role and scheme is in it before one is in it twice."""
    quantized = [(item, scheme) for item, scheme in schemes.items() if scheme is not None]
    random.Random(seed).shuffle(quantized)
    first = {(item.role, scheme): item for item, scheme in reversed(quantized)}
    quantized.sort(key=lambda pair: first[pair[0].role, pair[1]] is not pair[0])
    return quantized[:sample]


def _stored_as(artifact: Artifact, item: Item, scheme: Scheme | None, dtype: str) -> list[OutputTensor]:
    """The tensors, or parts of them, that hold an item.  dtype: of the source, for what is kept."""
    if isinstance(item, WeightMatrix):
        return list(artifact.form.output_tensors(item, scheme, dtype))
    return [artifact.form.copied_tensor(item, scheme, dtype)]


def _decode(artifact: Artifact, matrix: WeightMatrix, scheme: Scheme) -> torch.Tensor:
    """The stored values of one matrix, float32 ``[out, in]``."""
    names = [tensor.name for tensor in _stored_as(artifact, matrix, scheme, "")]
    return dequantize(artifact.form.decode(matrix.name, {name: artifact.files.read(name) for name in names}, scheme))


def _decode_rows(artifact: Artifact, copy: SourceTensor, scheme: Scheme) -> Iterator[torch.Tensor]:
    """The stored values of a tensor of any size, some rows at a time."""
    [part] = _stored_as(artifact, copy, scheme, "")
    row_bytes = part.nbytes // math.prod(copy.shape[:-1])
    for chunk in artifact.files.chunks(part.name, _rows_at_once(copy) * row_bytes):
        rows = torch.frombuffer(chunk, dtype=torch.uint8).view(-1, row_bytes)
        yield dequantize(artifact.form.decode(copy.name, {part.name: rows}, scheme))


def _rows_at_once(item: Item) -> int:
    return max(1, CHUNK_ELEMENTS // item.shape[-1])


def check_decodes(artifact: Artifact, chosen: list[tuple[Item, Scheme]]) -> str:
    """Decode a sample; every value must be finite.  Raises ArtifactError."""
    for item, scheme in chosen:
        for values in [_decode(artifact, item, scheme)] if isinstance(item, WeightMatrix) else _decode_rows(artifact, item, scheme):
            if not bool(torch.isfinite(values).all()):
                raise ArtifactError(f"{item.name}: a decoded value is not finite")
    return f"{len(chosen)} tensors decoded, all values finite (give the source to compare with it)"


def check_source(
    artifact: Artifact, chosen: list[tuple[Item, Scheme]], entries: Mapping[str, LedgerEntry], checkpoint: Checkpoint
) -> str:
    """Compare all that is kept, and a sample of what is quantized, with the source.  Raises ArtifactError, CheckpointError."""
    artifact.check_source(checkpoint)
    kept = 0
    for name, target, digest, source_digest in _kept(artifact, checkpoint):
        tensor = artifact.files.locate(target.name)
        if tensor.dtype != target.dtype or _digest(artifact.files.chunks(target.name)) != digest:
            raise ArtifactError(f"{name} is kept but differs from the source")
        if name not in entries or entries[name].source_digest != source_digest:
            raise ArtifactError(f"{name} is kept and equals the source, but the ledger does not say so: no digest {source_digest}")
        kept += 1
    listed = sum(entry.applied == KEEP for entry in entries.values())
    if kept != listed:
        raise ArtifactError(f"{kept} tensors are kept, but the ledger lists {listed}")
    worst = 0.0
    for item, _ in chosen:
        smoothed = item.name in entries and entries[item.name].smooth
        for each in _with_partner(artifact, item) if smoothed and isinstance(item, WeightMatrix) else [item]:
            worst = max(worst, _compare(artifact, checkpoint, each, entries.get(each.name), smoothed))
    sampled = f"{len(chosen)} quantized ones are as far from it as the ledger says (worst {worst:.4f})"
    return f"{kept} kept tensors equal the source; {sampled}"


def _kept(artifact: Artifact, checkpoint: Checkpoint) -> Iterator[tuple[str, OutputTensor, str, str]]:
    """What is stored as in the source: name in the ledger, what it is stored as, the digest of the bytes that must be stored, and
    the digest of the source bytes that the ledger must hold.

    The last two differ where a tensor is widened, and for experts: a fused slice is stored transposed and, gate and up, in two
    tensors.
    """
    workspace = Workspace()
    for unit in artifact.units:
        kept = [item for item in unit.items if artifact.schemes[item] is None]
        experts = [item for item in kept if isinstance(item, WeightMatrix) and item.expert is not None]
        for item in kept:
            if item in experts:
                continue
            tensor = item.tensor if isinstance(item, WeightMatrix) else item.name
            dtype = checkpoint.tensors[tensor].dtype
            [target] = _stored_as(artifact, item, None, dtype)
            digest = stored = _digest(checkpoint.chunks(tensor))
            if target.dtype != dtype:
                stored = _digest(_widened(checkpoint.chunks(tensor), dtype, target.dtype))
            yield item.name, target, stored, digest
        if experts:
            weights, digests = checkpoint.read_unit(unit, workspace)
            for matrix, weight, source_digest in zip(unit.matrices, weights, digests, strict=True):
                if matrix in experts:
                    [target] = _stored_as(artifact, matrix, None, checkpoint.tensors[matrix.tensor].dtype)
                    yield matrix.name, target, _digest([_raw(weight)]), source_digest


def _widened(pieces: Iterable[memoryview], dtype: str, target: str) -> Iterator[memoryview]:
    for piece in pieces:
        yield _raw(torch.frombuffer(piece, dtype=TORCH_DTYPES[dtype]).to(TORCH_DTYPES[target]))


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(pieces: Iterable[memoryview]) -> str:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _compare(artifact: Artifact, checkpoint: Checkpoint, item: Item, entry: LedgerEntry | None, smoothed: bool) -> float:
    """The relative error of a quantized tensor to the source.  Raises ArtifactError when the ledger says something else."""
    scheme = artifact.schemes[item]
    assert scheme is not None
    if isinstance(item, WeightMatrix):
        original, decoded = checkpoint.read_matrix(item), _decode(artifact, item, scheme)
        if smoothed and item.projection in ("up_proj", "down_proj"):
            original = original.to(torch.float32) * _smoothing(artifact, checkpoint, item)
        rows = _rows_at_once(item)
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]] = zip(_split(original, rows), _split(decoded, rows), strict=True)
    else:
        pairs = zip(_source_rows(checkpoint, item), _decode_rows(artifact, item, scheme), strict=True)
    error, stated = _relative_error(pairs), math.nan if entry is None else entry.relative_error
    if not abs(error - stated) <= ERROR_TOLERANCE * max(1.0, stated):
        raise ArtifactError(f"{item.name}: relative error to the source is {error:.6f}; the ledger says {stated:.6f}")
    return error


def _split(matrix: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
    return (matrix[start : start + rows] for start in range(0, matrix.shape[0], rows))


def _source_rows(checkpoint: Checkpoint, copy: SourceTensor) -> Iterator[torch.Tensor]:
    """A tensor of the source, as many rows at a time as :func:`_decode_rows` gives."""
    dtype = checkpoint.tensors[copy.name].dtype
    for chunk in checkpoint.chunks(copy.name, _rows_at_once(copy) * copy.shape[-1] * DTYPE_BYTES[dtype]):
        yield torch.frombuffer(chunk, dtype=TORCH_DTYPES[dtype]).view(-1, copy.shape[-1])


def _with_partner(artifact: Artifact, matrix: WeightMatrix) -> list[WeightMatrix]:
    """A smoothed matrix, and the one that the same powers of two were taken from or put into."""
    if matrix.projection not in ("up_proj", "down_proj"):
        return [matrix]
    base = matrix.name.rpartition(".")[0]
    wanted = (f"{base}.up_proj", f"{base}.down_proj")
    return [found for found in artifact.schemes if isinstance(found, WeightMatrix) and found.name in wanted]


def _smoothing(artifact: Artifact, checkpoint: Checkpoint, matrix: WeightMatrix) -> torch.Tensor:
    """The powers of two that a smoothed up or down projection was multiplied with, to be multiplied with the source.

    Both are told by the up projection: each of its rows has scales of its own, so the size of a row survives rounding.
    """
    up = next(found for found in _with_partner(artifact, matrix) if found.projection == "up_proj")
    scheme = artifact.schemes[up]
    if scheme is None:
        raise ArtifactError(f"{up.name} is not quantized, so {matrix.name} cannot have been smoothed")
    factors = found_factors(checkpoint.read_matrix(up), _decode(artifact, up, scheme))
    return factors[:, None] if matrix is up else 1 / factors


def _relative_error(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Relative L2 error over pairs of (original, decoded) rows, summed in float64; no float64 copy of a matrix is held."""
    squared_error = squared_weight = 0.0
    for original, decoded in pairs:
        exact = original.double()
        squared_weight += exact.square().sum().item()
        squared_error += (decoded.double() - exact).square().sum().item()
    return math.sqrt(squared_error) / (math.sqrt(squared_weight) or 1.0)
