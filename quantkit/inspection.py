"""Inspection: what a checkpoint or artifact is, from headers alone.

Works on any Llama 4 directory (BF16 source, our artifact, somebody else's), on a single safetensors or packed file, and on GGUF
files of any model (:mod:`quantkit.gguf_inspection`).  Each stored tensor is given its role by name, each module its scheme by the
quantization section of the config; nothing is read but headers and JSON.

Of a single file all counts are those of what lies in it.  A safetensors file does not say how it is quantized: the config.json
beside it does, and without one all that can be counted are stored elements, of which one may be several weights.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint import CONFIG_NAME, TensorFiles, load_config
from quantkit.errors import ArtifactError, CheckpointError, RecipeError
from quantkit.formats import compressed_tensors, packed
from quantkit.formats.compressed_tensors_config import QUANT_METHOD, check_section
from quantkit.gguf_files import is_gguf
from quantkit.gguf_inspection import gguf_contents
from quantkit.llama4 import Llama4Config, Role, inventory, parse_config
from quantkit.packed_files import PackedFiles, is_packed
from quantkit.plan import RoleSummary
from quantkit.recipe import PACKED
from quantkit.scheme import parse_scheme
from quantkit.strict_json import brief, parse_object
from quantkit.tensor_files import OpenFiles, TensorLocation, read_small_file
from quantkit.writer import JOURNAL

_CONFIG_LIMIT = 16 << 20  # bytes
_UNFINISHED = "unfinished: a conversion that was stopped left this; run the same command again to complete it"
_SINGLE = "a single file: what is counted lies in it"
_ELEMENTS = "stored elements are counted, of which one may hold several weights"
_UNKNOWN_MODEL = "unknown (no config.json)"
_NO_MANIFEST = "no manifest.json: not made by quantkit, or stripped of its proof"

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
    r"\.(weight_packed|weight_scale|weight_shape|weight_zero_point|weight_global_scale|input_global_scale|input_scale|qweight|qzeros|scales|g_idx|weight|bias|codes|scale|zero_point|global_scale)$"
)
_CODES = re.compile(r"\.(weight_packed|weight_scale|qweight)$")  # what only quantized checkpoints have
_KV_CACHE = (".self_attn.k_scale", ".self_attn.v_scale")  # belong to a layer's cache, not to a module that has a scheme


@dataclass(frozen=True)
class Inspection:
    """What stands at ``path``.

    kind: ``source``, ``artifact`` (quantized), or of GGUF files also ``unquantized`` and ``importance``.  format: how it is stored.
    parameters: of the model, by its config; of a single file the weights in it, or the stored elements where ``notes`` say so.
    roles: of GGUF files that are no Llama 4 by type, of several models by file.  notes: what a reader should know.  facts: what a
    GGUF file says of itself.
    """

    path: Path
    kind: str
    format: str
    model: str
    parameters: int
    bytes: int
    files: tuple[tuple[str, int], ...]
    roles: tuple[RoleSummary, ...]
    notes: tuple[str, ...]
    facts: tuple[tuple[str, str], ...] = ()


def role_of(name: str) -> Role | None:
    """The role of a stored tensor by its name; None for a name no Llama 4 checkpoint has."""
    return next((role for pattern, role in _ROLE_PATTERNS if re.search(pattern, name)), None)


def inspect(path: str | Path, revision: str | None = None) -> Inspection:
    """Inspect a directory, a safetensors, packed or GGUF file, or a hub repository.

    Raises CheckpointError when it cannot be read, ArtifactError when its quantization section is malformed.  A section that is
    sound but says nothing that quantkit writes is no error: ``notes`` tells.
    """
    target = Path(path)
    if is_packed(target):
        return _inspect_packed(target)
    if is_gguf(target):
        return _inspect_gguf(target)
    config: Llama4Config | None = None
    notes: list[str] = []
    single = target.suffix == ".safetensors" and os.path.isfile(target)
    if single:
        model, quantization, note = _beside(target)
        notes.append(note)
    else:
        config_text, target = _config_text(path, revision)
        config, quantization = _read_config(config_text, target)
        model = _describe(config)
    with TensorFiles.open(target) as files:
        rows, unknown = _rows(
            files,
            config,
            lambda module, tensor: _scheme_name(module, tensor.dtype, quantization, notes),
            lambda tensor: _weights(tensor, quantization),
        )
        if unknown:
            notes.append(f"{len(unknown)} tensors are not Llama 4 tensors, {unknown[0]} first")
        sizes = tuple((file.name, file.stat().st_size) for file in files.paths)
        parameters = sum(row.parameters for row in rows)
        quantized = quantization is not None or any(map(_CODES.search, files.tensors))
    if quantization is not None and not single and not os.path.isfile(target / "manifest.json"):
        notes.append(_NO_MANIFEST)
    form = "safetensors"
    if quantization is not None:
        stated = quantization.get("format") or quantization.get("quant_method")
        form = stated if isinstance(stated, str) else brief(stated)
    kind = "artifact" if quantized else "source"
    return Inspection(target, kind, form, model, parameters, sum(size for _, size in sizes), sizes, rows, tuple(notes))


def _inspect_gguf(target: Path) -> Inspection:
    found = gguf_contents(target)
    notes = found.notes
    if os.path.isdir(target) and not os.path.isfile(target / "manifest.json"):
        notes += (_NO_MANIFEST,)
    if os.path.isfile(target / JOURNAL):
        notes += (_UNFINISHED,)
    return Inspection(
        target, found.kind, "gguf", found.model, found.parameters, found.bytes, found.files, found.roles, notes, found.facts
    )


def _inspect_packed(target: Path) -> Inspection:
    config, notes, model = None, [], _UNKNOWN_MODEL
    if os.path.isfile(target):
        model, _, _ = _beside(target)
        notes.append(_SINGLE)
    elif os.path.isfile(target / CONFIG_NAME):
        config, _ = _read_config(read_small_file(target / CONFIG_NAME, _CONFIG_LIMIT), target)
        model = _describe(config)
    with PackedFiles.open(target) as files:
        rows, unknown = _rows(
            files,
            config,
            lambda module, tensor: files.schemes.get(module) or files.schemes.get(tensor.name) or tensor.dtype,
            lambda tensor: _packed_weights(files, tensor),
        )
        sizes = tuple((file.name, file.stat().st_size) for file in files.paths)
        largest = max(found.block.size for found in files.blocks.values())
        notes += _unknown_schemes(files)
        facts = (("blocks", f"{len(files.blocks):,}, the largest of {largest:,} bytes"),)
    if unknown:
        notes.append(f"{len(unknown)} tensors are not Llama 4 tensors, {unknown[0]} first")
    if os.path.isdir(target) and not os.path.isfile(target / "manifest.json"):
        notes.append(_NO_MANIFEST)
    if os.path.isfile(target / JOURNAL):
        notes.append(_UNFINISHED)
    parameters, size = sum(row.parameters for row in rows), sum(size for _, size in sizes)
    return Inspection(target, "artifact", PACKED, model, parameters, size, sizes, rows, tuple(notes), facts)


def _unknown_schemes(files: PackedFiles) -> list[str]:
    """A note for each scheme of a file that means nothing here."""
    notes = []
    for name in sorted(set(files.schemes.values())):
        try:
            parse_scheme(name)
        except RecipeError:
            notes.append(f"a scheme quantkit does not know: {brief(name)}; its stored elements are counted as they are")
    return notes


def _packed_weights(files: PackedFiles, tensor: TensorLocation) -> int:
    """The weights that a tensor stands for: none for scales, and those of the whole matrix for its codes."""
    module, _, part = tensor.name.rpartition(".")
    if tensor.name.endswith(_KV_CACHE):
        return 0
    if module not in files.schemes:
        return tensor.elements
    if part != "codes":
        return 0
    try:
        scheme = parse_scheme(files.schemes[module])
    except RecipeError:  # a note says so
        return tensor.elements
    if scheme is None or scheme.number == "ggml" or len(tensor.shape) != 2:
        return tensor.elements
    scale = files.tensors.get(f"{module}.scale")
    return math.prod(packed.weight_shape(tensor.shape, None if scale is None else scale.shape, scheme))


def _config_text(path: str | Path, revision: str | None) -> tuple[bytes, Path]:
    target = Path(path)
    if os.path.isdir(target):
        if not os.path.isfile(target / CONFIG_NAME):
            raise CheckpointError(
                f"{target} has no {CONFIG_NAME}. Give the directory of a Llama 4 checkpoint or a safetensors file."
            )
        return read_small_file(target / CONFIG_NAME, _CONFIG_LIMIT), target
    text, _, directory = load_config(path, revision)
    if directory is None:
        raise CheckpointError(f"{path} is not a directory with weights, nor a safetensors file")
    return text.encode(), directory


def _read_config(text: bytes, directory: Path) -> tuple[Llama4Config, Mapping[str, Any] | None]:
    """A config and its quantization section.  Raises CheckpointError, and ArtifactError for a malformed section."""
    raw = parse_object(text, str(directory / CONFIG_NAME))
    quantization = _checked(raw.pop("quantization_config", None), directory)
    return parse_config(raw), quantization


def _beside(file: Path) -> tuple[str, Mapping[str, Any] | None, str]:
    """What a config.json beside a single file says: the model, the quantization section, and a note on what is counted."""
    path = file.parent / CONFIG_NAME
    if not os.path.isfile(path):
        return _UNKNOWN_MODEL, None, f"a single file without {CONFIG_NAME} beside it: {_ELEMENTS}"
    try:
        config, quantization = _read_config(read_small_file(path, _CONFIG_LIMIT), file.parent)
    except (CheckpointError, ArtifactError) as error:
        return "unknown", None, f"a single file: {_ELEMENTS}, since the {CONFIG_NAME} beside it cannot be used: {error}"
    if quantization is not None and quantization.get("quant_method") != QUANT_METHOD:
        return _describe(config), quantization, f"a single file of another quantizer: {_ELEMENTS}"
    return _describe(config), quantization, _SINGLE


def _checked(found: object, target: Path) -> Mapping[str, Any] | None:
    """The quantization section, None when there is none.  Raises ArtifactError when it is malformed."""
    if found is None or found == {}:
        return None
    try:
        if not isinstance(found, Mapping):
            raise ArtifactError(f"quantization_config: expected an object, found {brief(found)}")
        if found.get("quant_method") == QUANT_METHOD:
            check_section(found)
    except ArtifactError as error:
        raise ArtifactError(f"{target / CONFIG_NAME}: {error}") from error
    return found


def _describe(config: Llama4Config) -> str:
    moe = sum(config.moe_layers)
    vision = f", layers of the vision tower: {config.vision.num_hidden_layers}" if config.vision else ", text only"
    layers = f"{config.num_layers} layers, {moe} of them with {config.num_experts} experts"
    return f"Llama 4, {layers}, hidden size {config.hidden_size}{vision}"


def _rows(
    files: OpenFiles,
    config: Llama4Config | None,
    scheme_of: Callable[[str, TensorLocation], str],
    weights_of: Callable[[TensorLocation], int],
) -> tuple[tuple[RoleSummary, ...], list[str]]:
    """One row for each role, and the names of tensors that have none.

    scheme_of: what a module's first tensor is stored as.  weights_of: how many a tensor stands for, where no config tells.
    """
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
        if module not in seen and not name.endswith(_KV_CACHE):
            seen[module] = scheme_of(module, tensor)
            schemes.setdefault(role, set()).add(seen[module])
        tensors, elements, size = counts.get(role, (0, 0, 0))
        counts[role] = (tensors + 1, elements + weights_of(tensor), size + tensor.nbytes)
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
    if quantization is None or quantization.get("quant_method") != QUANT_METHOD:
        return dtype
    try:
        scheme = compressed_tensors.scheme_of(quantization, module)
    except ArtifactError as error:
        if (note := f"a scheme quantkit does not know: {error}") not in notes:
            notes.append(note)
        return f"unknown ({dtype})"
    return scheme.name if scheme is not None else dtype


def _weights(tensor: TensorLocation, quantization: Mapping[str, Any] | None) -> int:
    """The weights that a tensor of a safetensors file stands for; its elements where nothing tells."""
    if quantization is None or quantization.get("quant_method") != QUANT_METHOD:
        return tensor.elements
    if tensor.name.endswith(_KV_CACHE):
        return 0
    module, _, part = tensor.name.rpartition(".")
    try:
        scheme = compressed_tensors.scheme_of(quantization, module)
    except ArtifactError:  # a note says so
        return tensor.elements
    if scheme is None or part in ("weight", "bias"):
        return tensor.elements
    return 8 * tensor.nbytes // scheme.bits if part == "weight_packed" else 0
