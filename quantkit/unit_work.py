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
from quantkit.errors import CalibrationError, WeightError
from quantkit.evidence import Evidence
from quantkit.formats import FORMATS
from quantkit.formats.base import DTYPE_BYTES
from quantkit.llama4 import Unit, WeightMatrix
from quantkit.methods import METHODS, gptq_gpu
from quantkit.plan import ArtifactPlan
from quantkit.recipe import METHODS_WITH_EVIDENCE
from quantkit.scheme import Scheme
from quantkit.smoothing import smooth
from quantkit.team import Team
from quantkit.workspace import Workspace
from quantkit.writer import ArtifactWriter

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


def copy_unit(checkpoint: Checkpoint, unit: Unit, pending: Sequence[Run]) -> None:
    """Tensors that no recipe quantizes pass through byte for byte, chunk by chunk."""
    digests: dict[str, str] = {}
    for copy in unit.copies:
        digest, position = xxhash.xxh3_64(), 0
        for chunk in checkpoint.chunks(copy.name):
            _check_finite(chunk, checkpoint.tensors[copy.name].dtype, copy.name)
            digest.update(chunk)
            for run in pending:
                run.writer.write_part(copy.name, position, chunk)
            position += len(chunk)
        digests[copy.name] = digest.hexdigest()
    entries = [ledger.kept_entry(copy, digests[copy.name]) for copy in unit.copies]
    for run in pending:
        run.writer.commit(unit.key, digests, [entry.to_dict() for entry in entries])


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
                _check_finite(weights[index], checkpoint.tensors[matrix.tensor].dtype, matrix.name)
                written[f"{matrix.name}.weight"] = run.writer.write(f"{matrix.name}.weight", _raw(weights[index].contiguous()))
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
    if assignment.method == "gptq" and team is not None and team.device is not None and evidence is not None:
        [found] = gptq_gpu.quantize_batch(
            [weights], scheme, [evidence], team.device, clip_search=assignment.clip_search, workspace=workspace
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
