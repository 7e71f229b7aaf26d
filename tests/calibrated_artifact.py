"""Artifacts of recipes that need calibration, with made-up evidence: written by the safetensors library, in a few lines.

The plan says what belongs where, methods and formats give the bytes; writer, journal and engine have no part in it.  Peaks are
drawn at random, so that no two units have the same scales.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file

from quantkit import ledger
from quantkit.checkpoint import Checkpoint
from quantkit.convert import plan_checkpoint
from quantkit.evidence import Evidence
from quantkit.formats import FORMATS
from quantkit.llama4 import Unit
from quantkit.methods import METHODS
from quantkit.plan import manifest_text
from quantkit.recipe import Recipe
from quantkit.team import Team
from quantkit.workspace import Workspace


def peaks(unit: Unit) -> torch.Tensor:
    """Two made-up peaks of a unit: of its activations, or of its keys and of its values."""
    seed = int.from_bytes(hashlib.sha256(unit.key.encode()).digest()[:4], "little")
    return torch.rand(2, generator=torch.Generator().manual_seed(seed)) * 4 + 2


def write_calibrated(source: Path, recipe: Recipe, output: Path, max_shard_bytes: int = 4_000_000) -> Path:
    """Write the artifact of ``recipe`` below ``output``, ledger and manifest included."""
    directory = output / recipe.name
    directory.mkdir(parents=True)
    form = FORMATS[recipe.format]
    tensors: dict[str, torch.Tensor] = {}
    entries: list[ledger.LedgerEntry] = []
    with Checkpoint.open(source) as checkpoint:
        plan = plan_checkpoint(checkpoint, [recipe], max_shard_bytes)
        [artifact] = plan.artifacts
        for unit in plan.units:
            for copy in unit.copies:
                tensors[copy.name] = checkpoint.read_slice(copy.name)
                entries.append(ledger.kept_entry(copy, digest(tensors[copy.name])))
            if not unit.matrices:
                continue
            workspace = Workspace()
            weights, digests = checkpoint.read_unit(unit, workspace)
            assignment = artifact.assignments[unit.matrices[0].name]
            if assignment.scheme is None:
                for matrix, weight, source_digest in zip(unit.matrices, weights, digests, strict=True):
                    tensors[f"{matrix.name}.weight"] = weight.clone(memory_format=torch.contiguous_format)
                    entries.append(ledger.kept_entry(matrix, source_digest))
            else:
                seen = peaks(unit)
                width = weights[0].shape[1]
                rows = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(width)) * seen[0]
                evidence = Evidence(100, mean_square=seen[:1], peak=seen[:1].expand(width), hessian=rows.t() @ rows / len(rows))
                with Team(1) as team:
                    results = METHODS[assignment.method](
                        weights,
                        assignment.scheme,
                        clip_search=assignment.clip_search,
                        workspace=workspace,
                        evidence=evidence,
                        team=team,
                    )
                for matrix, source_digest, (quantized, statistics) in zip(unit.matrices, digests, results, strict=True):
                    encoded = form.encode(matrix.name, quantized)
                    tensors |= {name: tensor.clone() for name, tensor in encoded.items()}
                    entries.append(ledger.quantized_entry(matrix, assignment, quantized.scheme.name, statistics, source_digest))
            if form.kv_cache_tensors(unit, recipe.kv_cache):
                tensors |= form.encode_kv_cache(unit, *peaks(unit).tolist())
        for file in artifact.files:
            save_file({tensor.name: tensors.pop(tensor.name) for tensor in file.tensors}, directory / file.name, {"format": "pt"})
        assert not tensors
        for name, data in (artifact.sidecars | {"ledger.json": ledger.ledger_text(recipe.name, entries)}).items():
            (directory / name).write_bytes(data)
        for path in plan.carried:
            shutil.copy(path, directory)
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        listed = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
        (directory / "manifest.json").write_bytes(manifest_text(recipe, plan.provenance or {}, listed))
    return directory


def digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy())
