"""Inspection: what a checkpoint or artifact is, from headers alone.

Works on any Llama 4 directory (BF16 source, our artifact, somebody else's) and on a single safetensors file.  Each stored tensor is
given its role by name, each module its scheme by the quantization section of the config; nothing is read but headers and JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint import TensorFiles, load_config
from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats import compressed_tensors
from quantkit.llama4 import Llama4Config, Role, inventory, parse_config
from quantkit.plan import RoleSummary
from quantkit.strict_json import parse_object

# First match decides; the order puts the specific before the general.
_ROLE_PATTERNS: tuple[tuple[str, Role], ...] = (
    (r"(^|\.)vision_model\.", "vision"),
    (r"(^|\.)multi_modal_projector\.", "projector"),
    (r"\.feed_forward\.experts\.", "routed_expert"),
    (r"\.feed_forward\.shared_expert\.", "shared_expert"),
    (r"\.feed_forward\.router\.", "router"),
    (r"\.feed_forward\.", "dense_mlp"),
    (r"\.self_attn\.", "attention"),
    (r"(^|\.)embed_tokens\.", "embedding"),
    (r"(^|\.)lm_head\.", "lm_head"),
    (r"norm\.", "norm"),
)
# Endings of the tensors that quantized checkpoints store for one module.
_PARTS = re.compile(
    r"\.(weight_packed|weight_scale|weight_shape|weight_zero_point|weight_global_scale|input_global_scale|input_scale|qweight|qzeros|scales|g_idx|weight|bias)$"
)


@dataclass(frozen=True)
class Inspection:
    """What stands at ``path``.  kind: ``source`` or ``artifact``.  format: how it is stored.  parameters: of the model, by
    its config,
    or the stored elements when there is no config.  notes: what a reader should know."""

    path: Path
    kind: str
    format: str
    model: str
    parameters: int
    bytes: int
    files: tuple[tuple[str, int], ...]
    roles: tuple[RoleSummary, ...]
    notes: tuple[str, ...]


def role_of(name: str) -> Role | None:
    """The role of a stored tensor by its name; None for a name no Llama 4 checkpoint has."""
    return next((role for pattern, role in _ROLE_PATTERNS if re.search(pattern, name)), None)


def inspect(path: str | Path, revision: str | None = None) -> Inspection:
    """Inspect a directory, a safetensors file or a hub repository.  Raises CheckpointError when it cannot be read."""
    target = Path(path)
    config: Llama4Config | None = None
    quantization: Mapping[str, Any] | None = None
    notes: list[str] = []
    if target.is_file() and target.suffix == ".safetensors":
        notes.append("a single file: the parameter count is that of the stored elements")
    else:
        config_text, target = _config_text(path, revision)
        raw = parse_object(config_text.encode(), f"{target / 'config.json'}")
        found = raw.pop("quantization_config", None)
        quantization = found if isinstance(found, Mapping) else None
        config = parse_config(raw)
    with TensorFiles.open(target) as files:
        rows, unknown = _rows(files, config, quantization, notes)
        if unknown:
            notes.append(f"{len(unknown)} tensors are not Llama 4 tensors, {unknown[0]} first")
        sizes = tuple((file.name, file.stat().st_size) for file in files.paths)
        parameters = sum(row.parameters for row in rows)
    if quantization is not None and not (target / "manifest.json").is_file():
        notes.append("no manifest.json: not made by quantkit, or stripped of its proof")
    form = str(quantization.get("format") or quantization.get("quant_method")) if quantization is not None else "safetensors"
    kind = "artifact" if quantization is not None else "source"
    return Inspection(target, kind, form, _describe(config), parameters, sum(size for _, size in sizes), sizes, rows, tuple(notes))


def _config_text(path: str | Path, revision: str | None) -> tuple[str, Path]:
    target = Path(path)
    if target.is_dir():
        try:
            return (target / "config.json").read_text(encoding="utf-8"), target
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{target}: config.json cannot be read: {error}") from error
    text, _, directory = load_config(path, revision)
    if directory is None:
        raise CheckpointError(f"{path} is not a directory with weights, nor a safetensors file")
    return text, directory


def _describe(config: Llama4Config | None) -> str:
    if config is None:
        return "unknown (no config.json)"
    moe = sum(config.moe_layers)
    vision = f", layers of the vision tower: {config.vision.num_hidden_layers}" if config.vision else ", text only"
    layers = f"{config.num_layers} layers, {moe} of them with {config.num_experts} experts"
    return f"Llama 4, {layers}, hidden size {config.hidden_size}{vision}"


def _rows(
    files: TensorFiles, config: Llama4Config | None, quantization: Mapping[str, Any] | None, notes: list[str]
) -> tuple[tuple[RoleSummary, ...], list[str]]:
    schemes: dict[Role, set[str]] = {}
    counts: dict[Role, tuple[int, int, int]] = {}
    unknown: list[str] = []
    seen: dict[str, str] = {}
    for name, tensor in files.tensors.items():
        role = role_of(name)
        if role is None:
            unknown.append(name)
            continue
        module = _PARTS.sub("", name)
        if module not in seen:
            seen[module] = _scheme_name(module, tensor.dtype, quantization, notes)
            schemes.setdefault(role, set()).add(seen[module])
        tensors, elements, size = counts.get(role, (0, 0, 0))
        counts[role] = (tensors + 1, elements + tensor.elements, size + tensor.nbytes)
    parameters: dict[Role, int] = {}
    if config is not None:
        for expected in inventory(config):
            parameters[expected.role] = parameters.get(expected.role, 0) + expected.elements
    rows = tuple(
        RoleSummary(role, tuple(sorted(schemes[role])), tensors, parameters.get(role) or elements, size)
        for role, (tensors, elements, size) in counts.items()
    )
    return rows, unknown


def _scheme_name(module: str, dtype: str, quantization: Mapping[str, Any] | None, notes: list[str]) -> str:
    if quantization is None or quantization.get("quant_method") != "compressed-tensors":
        return dtype
    try:
        scheme = compressed_tensors.scheme_of(quantization, module)
    except (RecipeError, CheckpointError) as error:
        if (note := f"a scheme quantkit does not know: {error}") not in notes:
            notes.append(note)
        return f"unknown ({dtype})"
    return scheme.name if scheme is not None else dtype
