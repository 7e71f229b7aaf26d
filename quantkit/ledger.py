"""The ledger: for every weight matrix and kept tensor, what was asked, what was done and what it cost.

``ledger.json`` is written one tensor per line with numbers of fixed width, so that its size is known before any weight is read and
the same run gives the same bytes.  ``check`` compares the entries with the plan and fails closed: an entry too few or too many, a
scheme or method that differs, an error that is not finite or above the recipe's bound ends the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from quantkit.assignment import Assignment
from quantkit.errors import CheckpointError, LedgerError
from quantkit.evidence import Received
from quantkit.grid import QuantizationStatistics
from quantkit.llama4 import SourceTensor, WeightMatrix
from quantkit.scheme import KEEP
from quantkit.strict_json import brief, parse_object

LEDGER_VERSION = 2
LARGEST_NUMBER = 3.5e38  # a scale is at most what FP32 holds, all else is far smaller
_TEXTS = ("name", "role", "asked", "applied", "method", "source_digest")
_COUNTS = ("layer", "expert", "elements", "tokens", "borrowed")
_NUMBERS = ("relative_error", "clipped", "scale_minimum", "scale_maximum", "output_error", "damping", "score_mass")
_PADDED = ("tokens", "borrowed")  # counts that are known only afterwards


@dataclass(frozen=True)
class LedgerEntry:
    """One line of the ledger.

    asked, applied: scheme names; they must be equal.  smooth: up and down were multiplied by powers of two first, and errors are of
    the products.  source_digest: xxh3-64 of the source bytes of the unit that the tensor was made from (for gate and up, the
    expert's whole gate_up slice).  relative_error: relative L2.  clipped: share of weights beyond the largest stored value of their
    scale.  scale_minimum, scale_maximum: over all scales of the matrix.  A kept tensor has zeros there.

    Of a calibrated matrix also: tokens, borrowed: how many of its own, and how many lent ones, it learned from.  score_mass: sum of
    the router's scores of its own.  output_error: relative L2 error of its outputs for these; by gptq in a routed expert that makes
    up for the shared one, an upper bound of the error against what the outputs were asked for, which is more than the original's.
    damping: what was added to the diagonal of the Hessian, relative to its mean; it grows where tokens are few.
    """

    name: str
    role: str
    layer: int | None
    expert: int | None
    asked: str
    applied: str
    method: str
    clip_search: bool
    smooth: bool
    elements: int
    source_digest: str
    relative_error: float = 0.0
    clipped: float = 0.0
    scale_minimum: float = 0.0
    scale_maximum: float = 0.0
    tokens: int = 0
    borrowed: int = 0
    output_error: float = 0.0
    damping: float = 0.0
    score_mass: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as the journal holds it."""
        return asdict(self)


def kept_entry(item: WeightMatrix | SourceTensor, source_digest: str) -> LedgerEntry:
    """The entry of a tensor that is stored as in the source."""
    expert = item.expert if isinstance(item, WeightMatrix) else None
    return LedgerEntry(
        item.name, item.role, item.layer, expert, KEEP, KEEP, "copy", False, False, math.prod(item.shape), source_digest
    )


def quantized_entry(
    item: WeightMatrix | SourceTensor,
    assignment: Assignment,
    applied: str,
    statistics: QuantizationStatistics,
    source_digest: str,
    received: Received | None = None,
) -> LedgerEntry:
    """The entry of a quantized tensor; ``applied`` is the scheme that the method's result really has.

    received: what a method with evidence learned from.
    """
    elements = math.prod(item.shape)
    return LedgerEntry(
        item.name,
        item.role,
        item.layer,
        item.expert if isinstance(item, WeightMatrix) else None,
        assignment.scheme.name if assignment.scheme else KEEP,
        applied,
        assignment.method,
        assignment.clip_search,
        assignment.smooth,
        elements,
        source_digest,
        statistics.relative_error,
        statistics.clipped / elements,
        statistics.scale_minimum,
        statistics.scale_maximum,
        0 if received is None else received.tokens,
        0 if received is None else received.borrowed,
        statistics.output_error,
        statistics.damping,
        0.0 if received is None else received.score_mass,
    )


def ledger_text(artifact: str, entries: Iterable[LedgerEntry]) -> bytes:
    """``ledger.json``; numbers have fixed width, see the module docstring."""
    lines = []
    for entry in entries:
        values = entry.to_dict()
        known = {key: value for key, value in values.items() if key not in (*_NUMBERS, *_PADDED)}
        counts = [f'"{key}": {values[key]:>12d}' for key in _PADDED]
        numbers = [f'"{key}": {values[key]:.6e}' for key in _NUMBERS]
        lines.append(f"{json.dumps(known)[:-1]}, {', '.join(numbers + counts)}}}")
    head = f'{{"quantkit_ledger": {LEDGER_VERSION}, "artifact": {json.dumps(artifact)}, "tensors": [\n'
    return (head + ",\n".join(lines) + "\n]}\n").encode()


def read_ledger(data: bytes) -> list[LedgerEntry]:
    """The entries of a ``ledger.json``, each name once.  Raises LedgerError when it is not one."""
    try:
        parsed = parse_object(data, "ledger.json")
    except CheckpointError as error:
        raise LedgerError(str(error)) from error
    version, tensors = parsed.get("quantkit_ledger"), parsed.get("tensors")
    if version != LEDGER_VERSION:
        raise LedgerError(f"ledger.json has version {brief(version)}; this quantkit reads version {LEDGER_VERSION}")
    if not isinstance(tensors, list):
        raise LedgerError(f"ledger.json is damaged: tensors is {brief(tensors)} instead of a list")
    entries: dict[str, LedgerEntry] = {}
    for number, tensor in enumerate(tensors):
        entry = _read_entry(tensor, f"ledger.json is damaged: entry {number}")
        if entry.name in entries:
            raise LedgerError(f"ledger.json is damaged: {entry.name} has two entries")
        entries[entry.name] = entry
    return list(entries.values())


def _read_entry(values: object, where: str) -> LedgerEntry:
    names = [field.name for field in fields(LedgerEntry)]
    if not isinstance(values, dict) or set(values) != set(names):
        raise LedgerError(f"{where} does not have the members {', '.join(names)}")
    for name, value in values.items():
        if not _is_sound(name, value):
            raise LedgerError(f"{where}: {name} is {brief(value)}")
    return LedgerEntry(**values | {name: float(values[name]) for name in _NUMBERS})


def _is_sound(name: str, value: object) -> bool:
    """Whether a member of an entry can have that value at all."""
    if name in _TEXTS:
        return isinstance(value, str) and value.isprintable()
    if name in ("clip_search", "smooth"):
        return isinstance(value, bool)
    if value is None:
        return name in ("layer", "expert")
    if isinstance(value, bool) or not isinstance(value, int if name in _COUNTS else (int, float)):
        return False
    return 0 <= value <= LARGEST_NUMBER  # so neither NaN nor infinite


def check_entry(entry: LedgerEntry, assignment: Assignment) -> None:
    """Raise LedgerError when what was done differs from what the recipe asked, or passed its error bound."""
    asked = assignment.scheme.name if assignment.scheme else KEEP
    if entry.asked != asked or entry.applied != asked:
        raise LedgerError(f"{entry.name}: the recipe asks for {asked}, but {entry.applied} was applied; nothing was published")
    if not all(math.isfinite(getattr(entry, name)) for name in _NUMBERS):
        raise LedgerError(f"{entry.name}: error or scales are not finite after quantizing to {asked}; nothing was published")
    bound = assignment.maximum_error
    if bound is not None and not entry.relative_error <= bound:  # so that a bound of NaN lets nothing pass
        raise LedgerError(
            f"{entry.name}: relative error {entry.relative_error:.4f} with {asked} is above the bound {bound:g}. "
            "Give this tensor a finer scheme in a recipe, or raise maximum_error there if this is expected."
        )


def check(entries: Iterable[LedgerEntry], assignments: Mapping[str, Assignment]) -> None:
    """Check a whole run: every assigned tensor exactly once, each as asked.  Raises LedgerError."""
    seen: set[str] = set()
    for entry in entries:
        if entry.name not in assignments or entry.name in seen:
            raise LedgerError(f"{entry.name}: the ledger holds it {'twice' if entry.name in seen else 'but the plan does not'}")
        seen.add(entry.name)
        check_entry(entry, assignments[entry.name])
    missing = [name for name in assignments if name not in seen]
    if missing:
        raise LedgerError(f"{len(missing)} planned tensors were not written, {missing[0]} first; nothing was published")
