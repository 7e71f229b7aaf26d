"""What is done with one unit: copied as it is, or quantized, encoded and written for one artifact, with its ledger lines.

The two halves of a conversion meet here: units that need no calibration come from worker threads, the others from the pass of the
corpus through the model, with evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from quantkit import grid, ledger
from quantkit.assignment import Assignment
from quantkit.calibration import Seen
from quantkit.checkpoint import Checkpoint
from quantkit.embedding_metric import embedding_evidence
from quantkit.errors import CalibrationError, WeightError
from quantkit.evidence import Evidence
from quantkit.formats import FORMATS
from quantkit.formats.base import DTYPE_BYTES
from quantkit.llama4 import SourceTensor, Unit, WeightMatrix
from quantkit.methods import METHODS, gptq_gpu
from quantkit.plan import ArtifactPlan
from quantkit.recipe import METHODS_WITH_EVIDENCE
from quantkit.scheme import Scheme
from quantkit.smoothing import smooth
from quantkit.team import Team
from quantkit.tensor_files import TORCH_DTYPES
from quantkit.workspace import Workspace
from quantkit.writer import ArtifactWriter

STREAM_BYTES = 8 << 20  # of a tensor that is copied or quantized rows by rows
LEARNED_STREAM_BYTES = 80 << 20  # and of one that GPTQ rounds, which factors a matrix for each portion
STREAM_ROWS = 16  # a multiple of which are taken at once, whole vectors for the kernels
# Per source dtype: how to see its bits, all bits but the sign, and the bits of infinity.  Bits beyond infinity are NaN.
_BITS = {"BF16": (np.uint16, 0x7FFF, 0x7F80), "F16": (np.uint16, 0x7FFF, 0x7C00), "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000)}


@dataclass
class Run:
    """One artifact in the making."""

    plan: ArtifactPlan
    writer: ArtifactWriter


def source_bytes(checkpoint: Checkpoint, unit: Unit) -> int:
    items = [(copy.name, copy.shape) for copy in unit.copies] + [(matrix.tensor, matrix.shape) for matrix in unit.matrices]
    return sum(math.prod(shape) * DTYPE_BYTES[checkpoint.tensors[name].dtype] for name, shape in items)


def copy_unit(
    checkpoint: Checkpoint, unit: Unit, pending: Sequence[Run], workspace: Workspace, first_inputs: Unit | None = None
) -> None:
    """Tensors that are no matrices of a layer, rows by rows: byte for byte, widened, or quantized without calibration.

    first_inputs: queries, keys and values of the first layer, for an embedding that GPTQ rounds.  Raises WeightError, LedgerError,
    OutputError.
    """
    evidence = None
    if any(run.plan.assignments[copy.name].method == "gptq" for run in pending for copy in unit.copies):
        assert first_inputs is not None and unit.role == "embedding"
        norm = f"{first_inputs.key.removesuffix('self_attn.qkv')}input_layernorm.weight"
        with Team(1) as team:
            evidence = embedding_evidence(checkpoint, first_inputs, norm, team)
    streams = [[_Stream(checkpoint, copy, run, evidence) for run in pending] for copy in unit.copies]
    for copy, outputs in zip(unit.copies, streams, strict=True):
        dtype, columns = checkpoint.tensors[copy.name].dtype, copy.shape[-1]
        row_bytes = columns * DTYPE_BYTES[dtype]
        size = STREAM_BYTES if evidence is None else LEARNED_STREAM_BYTES
        portion = max(1, size // (row_bytes * STREAM_ROWS)) * STREAM_ROWS * row_bytes
        digest = xxhash.xxh3_64()
        for chunk in checkpoint.chunks(copy.name, portion):
            _check_finite(chunk, dtype, copy.name)
            digest.update(chunk)
            for stream in outputs:
                stream.put(chunk, workspace)
        for stream in outputs:
            stream.finish(digest.hexdigest())
    for number, run in enumerate(pending):
        done = [outputs[number] for outputs in streams]
        written = {stream.target.name: stream.digest.hexdigest() for stream in done}
        run.writer.commit(unit.key, written, [stream.entry.to_dict() for stream in done])


class _Stream:
    """One tensor on its way to one artifact, piece by piece.  target: what it becomes there."""

    def __init__(self, checkpoint: Checkpoint, copy: SourceTensor, run: Run, evidence: Evidence | None) -> None:
        self._evidence = evidence
        self._form, self._copy, self._run = FORMATS[run.plan.recipe.format], copy, run
        self._assignment = run.plan.assignments[copy.name]
        self._dtype = checkpoint.tensors[copy.name].dtype
        self.target = self._form.copied_tensor(copy, self._assignment.scheme, self._dtype)
        self.digest, self._position = xxhash.xxh3_64(), 0
        self._statistics: list[grid.QuantizationStatistics] = []
        self.entry: ledger.LedgerEntry

    def put(self, chunk: memoryview, workspace: Workspace) -> None:
        """The next rows, as the source stores them."""
        if self.target.dtype == self._dtype:
            data = chunk
        else:
            rows = torch.frombuffer(chunk, dtype=TORCH_DTYPES[self._dtype]).view(-1, self._copy.shape[-1])
            data = _raw(self._converted(rows, workspace))
        self._run.writer.write_part(self.target.name, self._position, data)
        self.digest.update(data)
        self._position += len(data)

    def _converted(self, rows: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        if self._assignment.scheme is None:
            return rows.to(TORCH_DTYPES[self.target.dtype])  # a wider type: nothing is lost
        learned = self._evidence if self._assignment.method == "gptq" else None
        try:
            if learned is None:
                found = apply_method(self._assignment, self._assignment.scheme, [rows], workspace, None, None)
            else:
                with Team(1) as team:  # one at a time: the only embedding of a run
                    found = apply_method(self._assignment, self._assignment.scheme, [rows], workspace, learned, team)
        except (WeightError, CalibrationError) as error:
            raise type(error)(f"{self._copy.name}: {error}") from error
        [(quantized, statistics)] = found
        self._statistics.append(statistics)
        encoded: list[torch.Tensor] = list(self._form.encode(self._copy.name, quantized, workspace).values())
        return encoded[0]

    def finish(self, source_digest: str) -> None:
        """All rows were put: make the ledger entry.  Raises LedgerError."""
        scheme, dtype = self._assignment.scheme, self._dtype
        if scheme is None:
            self.entry = ledger.kept_entry(self._copy, source_digest)
            return
        found = self._statistics
        if not found:  # the source has the scheme's own dtype already
            assert scheme.name == dtype
            found = [grid.QuantizationStatistics(0.0, 1.0, 0, 1.0, 1.0)]
        statistics = grid.QuantizationStatistics(
            sum(part.squared_error for part in found),
            sum(part.squared_weight for part in found),
            sum(part.clipped for part in found),
            min(part.scale_minimum for part in found),
            max(part.scale_maximum for part in found),
            max(part.output_error for part in found),
            max(part.damping for part in found),
        )
        self.entry = ledger.quantized_entry(self._copy, self._assignment, scheme.name, statistics, source_digest)
        ledger.check_entry(self.entry, self._assignment)


def quantize_unit(
    checkpoint: Checkpoint,
    unit: Unit,
    weights: Sequence[torch.Tensor],
    digests: Sequence[str],
    run: Run,
    workspace: Workspace,
    seen: Seen | None = None,
    team: Team | None = None,
) -> None:
    """Quantize, encode, write and commit a unit for one artifact.

    weights: as ``Checkpoint.read_unit`` gives them, with their digests.  seen: what calibration saw, if anything.  Raises
    WeightError, CalibrationError, LedgerError, OutputError.
    """
    form, assignments = FORMATS[run.plan.recipe.format], run.plan.assignments
    entries: dict[str, ledger.LedgerEntry] = {}
    written: dict[str, str] = {}
    for group in _same_treatment(unit.matrices, assignments):
        matrices = [unit.matrices[index] for index in group]
        assignment = assignments[matrices[0].name]
        if assignment.scheme is None:
            for index, matrix in zip(group, matrices, strict=True):
                dtype = checkpoint.tensors[matrix.tensor].dtype
                _check_finite(weights[index], dtype, matrix.name)
                [kept] = form.output_tensors(matrix, None, dtype)
                written[kept.name] = run.writer.write(kept.name, _raw(weights[index].contiguous()))
                entries[matrix.name] = ledger.kept_entry(matrix, digests[index])
            continue
        given, evidence = [weights[index] for index in group], None if seen is None else seen.evidence
        if assignment.smooth:
            assert seen is not None and seen.smoothing is not None  # recipes that could do without were refused
            given, evidence = smooth(given, [matrix.projection for matrix in matrices], seen.smoothing, seen.evidence)
        try:
            results = apply_method(assignment, assignment.scheme, given, workspace, evidence, team)
        except (WeightError, CalibrationError) as error:
            raise type(error)(f"{_describe(unit, matrices)}: {error}") from error
        learned = assignment.method in METHODS_WITH_EVIDENCE or assignment.scheme.static_activations or assignment.smooth
        for index, matrix, (quantized, statistics) in zip(group, matrices, results, strict=True):
            received = seen.received if seen is not None and learned else None
            entry = ledger.quantized_entry(
                matrix, assignments[matrix.name], quantized.scheme.name, statistics, digests[index], received
            )
            ledger.check_entry(entry, assignments[matrix.name])
            entries[matrix.name] = entry
            for name, tensor in form.encode(matrix.name, quantized, workspace).items():
                written[name] = run.writer.write(name, _raw(tensor))
    if seen is not None and form.kv_cache_tensors(unit, run.plan.recipe.kv_cache):
        for name, tensor in form.encode_kv_cache(unit, *seen.cache_peaks).items():
            written[name] = run.writer.write(name, _raw(tensor))
    run.writer.commit(unit.key, written, [entries[matrix.name].to_dict() for matrix in unit.matrices])


def apply_method(
    assignment: Assignment,
    scheme: Scheme,
    weights: Sequence[torch.Tensor],
    workspace: Workspace,
    evidence: Evidence | None,
    team: Team | None,
) -> list[tuple[grid.QuantizedTensor, grid.QuantizationStatistics]]:
    """What the method makes of these weights; GPTQ where the team has its GPU, if it has one."""
    device = team.device if team is not None else None
    if assignment.method == "gptq" and device is not None and evidence is not None:
        [found] = gptq_gpu.quantize_batch(
            [weights], scheme, [evidence], device, clip_search=assignment.clip_search, workspace=workspace, team=team
        )
        return found
    return METHODS[assignment.method](
        weights, scheme, clip_search=assignment.clip_search, workspace=workspace, evidence=evidence, team=team
    )


def _same_treatment(matrices: Sequence[WeightMatrix], assignments: dict[str, Assignment]) -> list[list[int]]:
    """Indices of the unit's matrices that a method takes together, in order; error bounds may differ."""
    groups: dict[object, list[int]] = {}
    for index, matrix in enumerate(matrices):
        assignment = assignments[matrix.name]
        groups.setdefault((assignment.scheme, assignment.method, assignment.clip_search, assignment.smooth), []).append(index)
    return list(groups.values())


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _check_finite(data: memoryview | torch.Tensor, dtype: str, name: str) -> None:
    kind, magnitude, infinity = _BITS[dtype]
    bits = np.frombuffer(_raw(data.contiguous()) if isinstance(data, torch.Tensor) else data, dtype=kind)
    if bits.size and (bits & kind(magnitude)).max() >= infinity:
        raise WeightError(f"{name}: the source holds a NaN or an infinite value; repair or re-download this shard")


def _describe(unit: Unit, matrices: Sequence[WeightMatrix]) -> str:
    where = matrices[0].tensor if unit.expert is not None else ", ".join(matrix.name for matrix in matrices)
    return f"{where}, expert {unit.expert}" if unit.expert is not None else where
