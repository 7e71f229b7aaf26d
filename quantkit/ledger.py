"""The ledger: for every weight matrix and kept tensor, what was asked, what was done and what it cost.

``ledger.json`` is written one tensor per line with numbers of fixed width, so that its size is known before any weight is read and
the same run gives the same bytes.  ``check`` compares the entries with the plan and fails closed: an entry too few or too many, a
scheme or method that differs, an error that is not finite or above the recipe's bound ends the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import LedgerError
from quantkit.grid import QuantizationStatistics
from quantkit.llama4 import SourceTensor, WeightMatrix
from quantkit.recipe import Assignment
from quantkit.scheme import KEEP

LEDGER_VERSION = 1


@dataclass(frozen=True)
class LedgerEntry:
    """One line of the ledger.

    asked, applied: scheme names; they must be equal.  source_digest: xxh3-64 of the source bytes of the unit that the tensor
    was made from (for gate and up, the expert's whole gate_up slice).  relative_error: relative L2.  clipped: share of
    weights beyond the largest stored value of their scale.  scale_minimum, scale_maximum: over all scales of the matrix.  A
    kept tensor has zeros there.
    """

    name: str
    role: str
    layer: int | None
    expert: int | None
    asked: str
    applied: str
    method: str
    clip_search: bool
    elements: int
    source_digest: str
    relative_error: float = 0.0
    clipped: float = 0.0
    scale_minimum: float = 0.0
    scale_maximum: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as the journal holds it."""
        return asdict(self)


def kept_entry(item: WeightMatrix | SourceTensor, source_digest: str) -> LedgerEntry:
    """The entry of a tensor that is stored as in the source."""
    expert = item.expert if isinstance(item, WeightMatrix) else None
    return LedgerEntry(item.name, item.role, item.layer, expert, KEEP, KEEP, "copy", False, math.prod(item.shape), source_digest)


def quantized_entry(
    matrix: WeightMatrix, assignment: Assignment, applied: str, statistics: QuantizationStatistics, source_digest: str
) -> LedgerEntry:
    """The entry of a quantized matrix; ``applied`` is the scheme that the method's result really has."""
    elements = math.prod(matrix.shape)
    return LedgerEntry(
        matrix.name,
        matrix.role,
        matrix.layer,
        matrix.expert,
        assignment.scheme.name if assignment.scheme else KEEP,
        applied,
        assignment.method,
        assignment.clip_search,
        elements,
        source_digest,
        statistics.relative_error,
        statistics.clipped / elements,
        statistics.scale_minimum,
        statistics.scale_maximum,
    )


def ledger_text(artifact: str, entries: Iterable[LedgerEntry]) -> bytes:
    """``ledger.json``; numbers have fixed width, see the module docstring."""
    lines = []
    for entry in entries:
        fixed = {key: value for key, value in entry.to_dict().items() if not isinstance(value, float)}
        numbers = ", ".join(f'"{key}": {value:.6e}' for key, value in entry.to_dict().items() if isinstance(value, float))
        lines.append(f"{json.dumps(fixed)[:-1]}, {numbers}}}")
    head = f'{{"quantkit_ledger": {LEDGER_VERSION}, "artifact": {json.dumps(artifact)}, "tensors": [\n'
    return (head + ",\n".join(lines) + "\n]}\n").encode()


def read_ledger(data: bytes) -> list[LedgerEntry]:
    """The entries of a ``ledger.json``.  Raises LedgerError when it is not one."""
    try:
        parsed = json.loads(data)
        if parsed["quantkit_ledger"] != LEDGER_VERSION:
            raise LedgerError(
                f"ledger.json has version {parsed['quantkit_ledger']!r}; this quantkit reads version {LEDGER_VERSION}"
            )
        return [LedgerEntry(**entry) for entry in parsed["tensors"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LedgerError(f"ledger.json cannot be read: {error}") from error


def check_entry(entry: LedgerEntry, assignment: Assignment) -> None:
    """Raise LedgerError when what was done differs from what the recipe asked, or passed its error bound."""
    asked = assignment.scheme.name if assignment.scheme else KEEP
    if entry.asked != asked or entry.applied != asked:
        raise LedgerError(f"{entry.name}: the recipe asks for {asked}, but {entry.applied} was applied; nothing was published")
    if not all(map(math.isfinite, (entry.relative_error, entry.scale_minimum, entry.scale_maximum))):
        raise LedgerError(f"{entry.name}: error or scales are not finite after quantizing to {asked}; nothing was published")
    if assignment.maximum_error is not None and entry.relative_error > assignment.maximum_error:
        raise LedgerError(
            f"{entry.name}: relative error {entry.relative_error:.4f} with {asked} is above the bound "
            f"{assignment.maximum_error:g}. "
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
