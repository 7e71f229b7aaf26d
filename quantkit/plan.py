"""Plan: every tensor, its scheme, its place in the output and what it costs, before any weight is read.

From the config and the recipes follow names, shapes and dtypes of all outputs, hence every header, offset and file size.  The
same plan is what ``quantkit plan`` prints, what the writer preallocates, and what the ledger is checked against; so the
prediction cannot drift from the run.  A plan needs no weights; given an opened checkpoint it also knows the files that are
carried along and the true source dtypes, and then the size of every single output file is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import ledger
from quantkit.assignment import Assignment, assign
from quantkit.errors import RecipeError
from quantkit.formats import FORMATS
from quantkit.formats.base import ClientNote, FileRequest, OutputFile, OutputTensor
from quantkit.grid import QuantizationStatistics
from quantkit.llama4 import Llama4Config, Role, Unit, units
from quantkit.recipe import Recipe
from quantkit.version import __version__

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class ArtifactPlan:
    """One artifact: what each tensor gets and where its bytes go.

    assignments: matrix or tensor name -> Assignment.  outputs: unit key -> the tensors that the unit writes.  files: tensor files
    with headers and offsets.  sidecars: small files known in full (config, index).  file_sizes: every file of the finished artifact
    with its exact size; ledger and manifest among them, the manifest only when the source is known.
    """

    recipe: Recipe
    assignments: dict[str, Assignment]
    outputs: dict[str, tuple[OutputTensor, ...]]
    files: tuple[OutputFile, ...]
    sidecars: dict[str, bytes]
    file_sizes: dict[str, int]
    notes: tuple[ClientNote, ...]

    @property
    def name(self) -> str:
        """Directory name of the artifact."""
        return self.recipe.name

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensor files, headers included."""
        return sum(file.size for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.file_sizes.values())


@dataclass(frozen=True)
class Plan:
    """All artifacts of one run over one source.

    provenance: None when planned from a config alone.  calibration: what calibrated artifacts learn from, once that is known.
    """

    config: Llama4Config
    units: tuple[Unit, ...]
    artifacts: tuple[ArtifactPlan, ...]
    provenance: dict[str, Any] | None
    carried: tuple[Path, ...]
    calibration: dict[str, Any] | None = None


@dataclass(frozen=True)
class RoleSummary:
    """Totals of one role in one artifact; bits per weight count scales and all else stored for it.

    role: one of ``ROLES``, or what else the tensors of a file were grouped by.
    """

    role: str
    schemes: tuple[str, ...]
    tensors: int
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each source parameter."""
        return 8 * self.bytes / max(1, self.parameters)  # of a foreign file none may be known


def make_plan(
    config_text: str,
    config: Llama4Config,
    recipes: Sequence[Recipe],
    *,
    max_shard_bytes: int | None = None,
    dtypes: Mapping[str, str] | None = None,
    provenance: dict[str, Any] | None = None,
    carried: Sequence[Path] = (),
    calibration: dict[str, Any] | None = None,
    model_name: str = "model",
    source: Path | None = None,
) -> Plan:
    """Plan all artifacts of a run.

    max_shard_bytes: largest tensor file; None: 5 GB for safetensors, GGUF files whole.
    dtypes: source tensor name -> safetensors dtype, from an opened checkpoint; without it the config's dtype is assumed.
    calibration: what calibrated artifacts learn from; their manifests say it, and are that much shorter in a plan without it.
    model_name: which GGUF files carry, in their names too.  source: directory with the tokenizer that they hold; without it they
    are planned without one.
    Raises RecipeError when a recipe does not fit the model or a format cannot hold it.
    """
    names = [recipe.name for recipe in recipes]
    if not recipes:
        raise RecipeError("nothing to make: name at least one target")
    if len(set(names)) < len(names):
        raise RecipeError(f"two targets have the same name ({', '.join(names)}); their artifacts would share one directory")
    if max_shard_bytes is not None and (type(max_shard_bytes) is not int or max_shard_bytes < 1):
        raise RecipeError(f"the largest shard size is {max_shard_bytes}; expected a positive whole number of bytes")
    work = units(config)
    artifacts = tuple(
        _plan_artifact(
            config_text, config, work, recipe, max_shard_bytes, dtypes, provenance, carried, calibration, model_name, source
        )
        for recipe in recipes
    )
    return Plan(config, tuple(work), artifacts, provenance, tuple(carried), calibration)


def _plan_artifact(
    config_text: str,
    config: Llama4Config,
    work: list[Unit],
    recipe: Recipe,
    max_shard_bytes: int | None,
    dtypes: Mapping[str, str] | None,
    provenance: dict[str, Any] | None,
    carried: Sequence[Path],
    calibration: dict[str, Any] | None,
    model_name: str,
    source: Path | None,
) -> ArtifactPlan:
    if recipe.format not in FORMATS:
        raise RecipeError(f"recipe {recipe.name!r}: unknown format {recipe.format!r}. Formats: {', '.join(FORMATS)}")
    form = FORMATS[recipe.format]
    assignments = assign(recipe, work, config, form.aliases(work))
    if all(assignment.scheme is None for assignment in assignments.values()):
        raise RecipeError(f"recipe {recipe.name!r} quantizes nothing: every rule says keep")
    schemes = {matrix: assignments[matrix.name].scheme for unit in work for matrix in unit.matrices}
    notes = form.client_notes(schemes, config, recipe.kv_cache)
    outputs: dict[str, tuple[OutputTensor, ...]] = {}
    weights: list[OutputTensor] = []
    caches: list[OutputTensor] = []
    for unit in work:
        tensors: list[OutputTensor] = []
        for copy in unit.copies:
            tensors.append(form.copied_tensor(copy, assignments[copy.name].scheme, _dtype(dtypes, copy.name, config)))
        for matrix in unit.matrices:
            tensors.extend(form.output_tensors(matrix, assignments[matrix.name].scheme, _dtype(dtypes, matrix.tensor, config)))
        cache = form.kv_cache_tensors(unit, recipe.kv_cache)
        outputs[unit.key] = (*tensors, *cache)
        weights += tensors
        caches += cache
    planned = form.plan_files(
        FileRequest(model_name, config_text, config, recipe, assignments, weights, caches, source, max_shard_bytes)
    )
    files, sidecars = planned.files, planned.sidecars
    sizes = {file.name: file.size for file in files} | {name: len(data) for name, data in sidecars.items()}
    sizes |= {path.name: path.stat().st_size for path in carried if form.carries(path.name)}
    sizes["ledger.json"] = len(ledger.ledger_text(recipe.name, _blank_entries(work, assignments)))
    if provenance is not None:
        blank = {name: {"size": size, "sha256": "0" * 64} for name, size in sizes.items()}
        sizes["manifest.json"] = len(manifest_text(recipe, provenance, blank, calibration))
    return ArtifactPlan(recipe, assignments, outputs, files, sidecars, sizes, tuple(notes))


def _dtype(dtypes: Mapping[str, str] | None, name: str, config: Llama4Config) -> str:
    return dtypes[name] if dtypes is not None else config.dtype


def _blank_entries(work: list[Unit], assignments: Mapping[str, Assignment]) -> list[ledger.LedgerEntry]:
    blank = QuantizationStatistics(0.0, 0.0, 0, 0.0, 0.0)
    entries = []
    for unit in work:
        for item in unit.items:
            assignment = assignments[item.name]
            if assignment.scheme is None:
                entries.append(ledger.kept_entry(item, "0" * 16))
            else:
                entries.append(ledger.quantized_entry(item, assignment, assignment.scheme.name, blank, "0" * 16))
    return entries


def manifest_text(
    recipe: Recipe,
    provenance: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    calibration: Mapping[str, Any] | None = None,
) -> bytes:
    """``manifest.json``: which source and recipe, by which version, and the size and sha256 of every other file."""
    ordered = json.loads(json.dumps(calibration, sort_keys=True))  # the same wherever it was read from
    content = {
        "quantkit_manifest": MANIFEST_VERSION,
        "quantkit_version": __version__,
        "artifact": recipe.name,
        "format": recipe.format,
        "recipe": recipe.to_dict(),
        "source": provenance,
        **({"calibration": ordered} if calibration and recipe.needs_calibration else {}),
        "files": {name: files[name] for name in sorted(files)},
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def summarize_roles(plan: Plan, artifact: ArtifactPlan) -> list[RoleSummary]:
    """Per role: schemes, tensors, parameters and bytes, in the order of the model."""
    rows: dict[Role, tuple[set[str], int, int, int]] = {}
    for unit in plan.units:
        items = unit.items
        schemes, tensors, parameters, size = rows.get(unit.role, (set(), 0, 0, 0))
        for item in items:
            scheme = artifact.assignments[item.name].scheme
            schemes = schemes | {scheme.name if scheme else "keep"}
        rows[unit.role] = (
            schemes,
            tensors + len(items),
            parameters + sum(math.prod(item.shape) for item in items),
            size + sum(tensor.nbytes for tensor in artifact.outputs[unit.key]),
        )
    return [RoleSummary(role, tuple(sorted(schemes)), *rest) for role, (schemes, *rest) in rows.items()]
