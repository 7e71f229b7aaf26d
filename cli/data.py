"""Results as JSON-able dictionaries: what ``--json`` prints.  Bytes are exact integers, nothing is rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit import ConvertResult, CostEstimate, GpuFit, Inspection, Plan, RoleSummary, VerifyResult
    from quantkit.statistics import Statistics

    from .presets import GgufRow, PresetRow


def role_data(rows: Iterable[RoleSummary]) -> list[dict[str, Any]]:
    """Rows of the role table."""
    return [
        {
            "role": row.role,
            "schemes": list(row.schemes),
            "tensors": row.tensors,
            "parameters": row.parameters,
            "bits_per_weight": row.bits_per_weight,
            "bytes": row.bytes,
        }
        for row in rows
    ]


def convert_data(result: ConvertResult) -> dict[str, Any]:
    """A finished conversion."""
    return {
        "artifacts": [
            {
                "name": artifact.name,
                "directory": str(artifact.directory),
                "bytes": artifact.bytes,
                "tensors": artifact.tensors,
                "units_resumed": artifact.units_resumed,
                "relative_errors": {
                    role: {"mean": mean, "worst": worst} for role, (mean, worst) in artifact.relative_errors.items()
                },
                "roles": role_data(artifact.roles),
                "clients": [asdict(note) for note in artifact.notes],
            }
            for artifact in result.artifacts
        ],
        "source_bytes": result.source_bytes,
        "seconds": result.seconds,
    }


def plan_data(
    plan: Plan,
    roles: Mapping[str, list[RoleSummary]],
    cost: CostEstimate,
    context: int,
    fits: Mapping[str, list[GpuFit]],
) -> dict[str, Any]:
    """A plan; ``roles`` and ``fits`` by artifact name.  ``complete``: manifest and tokenizer files are included."""
    return {
        "artifacts": [
            {
                "name": artifact.name,
                "recipe": artifact.recipe.to_dict(),
                "roles": role_data(roles[artifact.name]),
                "bytes": artifact.total_bytes,
                "files": artifact.file_sizes,
                "clients": [asdict(note) for note in artifact.notes],
                "gpus": [asdict(fit) for fit in fits[artifact.name]],
            }
            for artifact in plan.artifacts
        ],
        "complete": plan.provenance is not None,
        "context": context,
        "cost": asdict(cost),
    }


def inspection_data(inspection: Inspection) -> dict[str, Any]:
    """What stands at a path."""
    return {
        "path": str(inspection.path),
        "kind": inspection.kind,
        "format": inspection.format,
        "model": inspection.model,
        "parameters": inspection.parameters,
        "bytes": inspection.bytes,
        "roles": role_data(inspection.roles),
        "files": dict(inspection.files),
        "notes": list(inspection.notes),
        "facts": dict(inspection.facts),
    }


def presets_data(rows: Iterable[PresetRow], gguf: Iterable[GgufRow], packed: Iterable[PresetRow]) -> dict[str, Any]:
    """All presets by name.  The bits are those of a quantized weight (packed: of a routed expert), of GGUF those of all weights of
    Scout's text model."""
    listed = {
        row.name: {"format": form, "scheme": row.scheme, "bits_per_weight": row.bits_per_weight, "what": row.what}
        for form, members in (("compressed-tensors", rows), ("packed", packed))
        for row in members
    }
    for row in gguf:
        for name in row.presets:
            _, _, method = name.partition("-")
            listed[name] = {
                "format": "gguf",
                "mixture": row.name,
                "method": method or ("importance" if row.calibrated else "rtn"),
                "bits_per_weight": row.bits_per_weight,
                "what": row.what,
            }
    return listed


def verify_data(result: VerifyResult) -> dict[str, Any]:
    """A verified artifact."""
    return {
        "directory": str(result.directory),
        "checks": [asdict(check) for check in result.checks],
        "tensors": result.tensors,
        "bytes": result.bytes,
        "sampled": result.sampled,
    }


def statistics_data(statistics: Statistics) -> dict[str, Any]:
    """What a calibration saw: experts, layers, kinds and languages of the text; all but the statistics of the units' inputs."""
    from quantkit.coverage import check_coverage, coverage_rows, kind_coverage, language_coverage, layer_coverage

    return {
        "description": statistics.description,
        "layers": [asdict(row) for row in layer_coverage(statistics)],
        "experts": [asdict(row) for row in coverage_rows(statistics)],
        "cold": [{"layer": layer, "expert": expert, "tokens": tokens} for layer, expert, tokens in check_coverage(statistics)],
        "kinds": [asdict(row) for row in kind_coverage(statistics)],
        "languages": [asdict(row) for row in language_coverage(statistics)],
        "cache_peaks": {str(layer): {"key": key, "value": value} for layer, (key, value) in statistics.cache_peaks.items()},
    }
