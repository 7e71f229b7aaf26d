"""Where an artifact comes from, as its own ledger and manifest tell it: what a report shows beside the figures.

Files without either (GGUF files from elsewhere, a BF16 checkpoint) have less to tell; what they are stored as is read from their
headers all the same.  Nothing here is needed to measure, so what is absent stays empty; what is there but damaged is an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit import ledger
from quantkit.errors import ArtifactError, CheckpointError, LedgerError
from quantkit.evaluation import LedgerCell, RoleSize
from quantkit.evaluation_checks import model_directory
from quantkit.formats.gguf_tokenizer import TOKENIZER_FILE
from quantkit.ggml import FALLBACKS
from quantkit.ledger import LedgerEntry
from quantkit.llama4 import Llama4Config
from quantkit.scheme import KEEP
from quantkit.stored_model import TEXT_ROLES, UNQUANTIZED, GgufModel, StoredModel
from quantkit.tensor_files import SIDECAR_BYTES, read_small_file
from quantkit.verify import LEDGER

_SUPERBLOCK = 256  # inputs that llama.cpp's larger blocks hold
_FINGERPRINT = ("quantkit_version", "artifact", "source", "calibration")


@dataclass(frozen=True)
class Provenance:
    """What :class:`quantkit.evaluation.ArtifactEvaluation` holds under the same names."""

    roles: tuple[RoleSize, ...]
    ledger: tuple[LedgerCell, ...]
    coverage: dict[int, tuple[int, ...]]
    fallbacks: tuple[str, ...]
    recipe: dict[str, Any] | None
    fingerprint: dict[str, Any]


def read_provenance(model: StoredModel, manifest: Mapping[str, Any] | None) -> Provenance:
    """Of an opened model and its manifest, if it has one.  Raises ArtifactError for a damaged ledger."""
    entries = _read_entries(model, manifest)
    recipe = manifest.get("recipe") if manifest else None
    fingerprint = {name: manifest[name] for name in _FINGERPRINT if name in manifest} if manifest else model.fingerprint()
    return Provenance(
        roles=role_sizes(model),
        ledger=ledger_cells(entries),
        coverage=coverage(entries, model.config),
        fallbacks=tuple(_fallbacks(model, entries, manifest)),
        recipe=recipe if isinstance(recipe, dict) else None,
        fingerprint=fingerprint,
    )


def role_sizes(model: StoredModel) -> tuple[RoleSize, ...]:
    """What each role is stored as: schemes, most common first; parameters and bytes."""
    sizes = model.stored_bytes()
    found: dict[str, tuple[dict[str, int], int, int]] = {}
    for unit in model.units:
        for item in unit.items:
            elements = math.prod(item.shape)
            schemes, parameters, size = found.get(item.role, ({}, 0, 0))
            scheme = model.schemes[item.name]
            schemes[scheme] = schemes.get(scheme, 0) + elements
            found[item.role] = schemes, parameters + elements, size + sizes[item.name]
    return tuple(
        RoleSize(role, tuple(sorted(schemes, key=lambda scheme: (-schemes[scheme], scheme))), parameters, size)
        for role, (schemes, parameters, size) in sorted(found.items(), key=lambda item: TEXT_ROLES.index(item[0]))
    )


def ledger_cells(entries: Sequence[LedgerEntry]) -> tuple[LedgerCell, ...]:
    """The quantized matrices of the ledger by layer and role, what belongs to no layer last."""
    groups: dict[tuple[int | None, str], list[LedgerEntry]] = {}
    for entry in entries:
        if entry.applied != KEEP:
            groups.setdefault((entry.layer, entry.role), []).append(entry)
    order = sorted(groups, key=lambda key: (key[0] is None, key[0] or 0, key[1]))
    return tuple(_cell(*key, groups[key]) for key in order)


def _cell(layer: int | None, role: str, entries: Sequence[LedgerEntry]) -> LedgerCell:
    """The ledger has relative errors and no norms: matrices count by their elements."""
    elements = sum(entry.elements for entry in entries)
    squares = sum(entry.elements * entry.relative_error**2 for entry in entries)
    calibrated = [entry.output_error for entry in entries if entry.tokens or entry.borrowed]
    return LedgerCell(
        layer=layer,
        role=role,
        matrices=len(entries),
        relative_error=math.sqrt(squares / elements) if elements else 0.0,
        worst=max(entry.relative_error for entry in entries),
        output_error=sum(calibrated) / len(calibrated) if calibrated else 0.0,
    )


def coverage(entries: Iterable[LedgerEntry], config: Llama4Config) -> dict[int, tuple[int, ...]]:
    """By MoE layer the tokens that each expert received in calibration; empty where the ledger tells of none."""
    counts: dict[int, list[int]] = {}
    for entry in entries:
        if entry.role == "routed_expert" and entry.layer is not None and entry.expert is not None:
            row = counts.setdefault(entry.layer, [0] * config.num_experts)
            if entry.expert < len(row):
                row[entry.expert] = max(row[entry.expert], entry.tokens)
    if not any(any(row) for row in counts.values()):
        return {}
    return {layer: tuple(row) for layer, row in sorted(counts.items())}


def _read_entries(model: StoredModel, manifest: Mapping[str, Any] | None) -> list[LedgerEntry]:
    path = model_directory(model) / LEDGER
    if model.format == UNQUANTIZED or not os.path.lexists(path):
        return []
    if manifest is None and not os.path.isdir(model.path):  # then the ledger beside it is of something else
        return []
    try:
        return ledger.read_ledger(read_small_file(path, SIDECAR_BYTES))
    except (LedgerError, CheckpointError) as error:
        raise ArtifactError(f"{path}: {error}. Do not use the artifact; convert again.") from error


def _fallbacks(model: StoredModel, entries: Sequence[LedgerEntry], manifest: Mapping[str, Any] | None) -> Iterator[str]:
    if model.format == UNQUANTIZED:
        return
    if manifest is None:
        yield "no manifest: nothing says what the files should hold, so damage would not be found"
    if not isinstance(model, GgufModel) and not os.path.isfile(model_directory(model) / TOKENIZER_FILE):
        yield f"no {TOKENIZER_FILE}: taken to have the reference's tokenizer"
    yield from _short_rows(model)
    for entry in entries:
        if entry.asked != entry.applied:
            yield f"{entry.name}: asked {entry.asked}, applied {entry.applied}"
    quantized = [entry for entry in entries if entry.applied != KEEP]
    experts = [entry for entry in quantized if entry.role == "routed_expert"]
    if any(entry.tokens for entry in experts):
        yield from _learned(experts)
    usual = min((entry.damping for entry in quantized if entry.damping), default=0.0)
    raised = [entry for entry in quantized if entry.damping > usual]
    if raised:
        most = max(raised, key=lambda entry: entry.damping)
        yield f"matrices that needed more damping than {usual:g}: {len(raised)}, most ({most.damping:g}) {most.name}"


def _learned(experts: Sequence[LedgerEntry]) -> Iterator[str]:
    """How experts fared that saw few tokens."""
    by_expert = {(entry.layer, entry.expert): entry for entry in experts}
    lent = [entry for entry in by_expert.values() if entry.borrowed]
    blind = [entry for entry in by_expert.values() if not entry.tokens and not entry.borrowed]
    if lent:
        fewest = min(lent, key=lambda entry: entry.tokens)
        yield f"experts that were lent tokens: {len(lent)} of {len(by_expert)}, fewest of its own ({fewest.tokens}) {_of(fewest)}"
    if blind:
        yield f"experts that saw no tokens, so only their weights decided: {len(blind)} of {len(by_expert)}, first {_of(blind[0])}"


def _of(entry: LedgerEntry) -> str:
    return f"expert {entry.expert} of layer {entry.layer}"


def _short_rows(model: StoredModel) -> Iterator[str]:
    """Types of llama.cpp that stand in for one whose blocks do not fit the rows."""
    if not isinstance(model, GgufModel) or FALLBACKS.keys().isdisjoint(model.schemes.values()):
        return
    stand_ins: dict[str, int] = {}
    for unit in model.units:
        for item in unit.items:
            scheme = model.schemes[item.name]
            if len(item.shape) > 1 and item.shape[-1] % _SUPERBLOCK and scheme in FALLBACKS.values():
                stand_ins[scheme] = stand_ins.get(scheme, 0) + 1
    for scheme, count in stand_ins.items():
        yield f"matrices in {scheme} whose rows are no multiple of {_SUPERBLOCK}, which most types need: {count}"
