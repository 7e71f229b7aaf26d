"""What GGUF files hold, from headers alone: any model, ours or not, vision towers, importance files, parts of a split model.

Tensors of a Llama 4 are grouped by role, all others by type.  Where a directory holds several models, or one in several sizes,
there is one group for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import Keys

from quantkit.formats.gguf_general import FILE_TYPES
from quantkit.formats.gguf_metadata import ARCHITECTURE
from quantkit.formats.gguf_names import ROPE_FREQS, meaning_of
from quantkit.ggml import TYPES
from quantkit.gguf_files import FileSet, file_sets
from quantkit.gguf_header import TYPE_SIZES
from quantkit.plan import RoleSummary
from quantkit.strict_json import brief
from quantkit.tensor_files import TensorLocation

OTHER = "other"  # the role of tensors that are not of a Llama 4
IMPORTANCE, VISION = "imatrix", "mmproj"  # kinds of files
_SHOWN = 120  # characters of a text
_GUESSED = 1024  # added to a file type that was told from the tensors
_FULL = ("F64", "F32", "F16", "BF16")
_FILE_TYPE_NAMES = {number: name for name, number in FILE_TYPES.items()}


@dataclass(frozen=True)
class GgufContents:
    """What the files of one path hold; the fields are those of :class:`quantkit.inspection.Inspection`."""

    kind: str
    model: str
    parameters: int
    bytes: int
    files: tuple[tuple[str, int], ...]
    roles: tuple[RoleSummary, ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def gguf_contents(path: Path) -> GgufContents:
    """Read the headers of a file, or of all GGUF files of a directory.  Raises CheckpointError."""
    sets = sorted(file_sets(path), key=lambda found: found.kind == VISION)  # the language model first
    files = tuple((file.name, header.file_size) for found in sets for file, header in found.headers.items())
    notes: list[str] = []
    apart = len(sets) > 1 and not _belong_together(sets)
    if apart:
        rows = _rows((found.path.name, location) for found in sets for location in found.tensors.values())
        notes.append(f"{len(sets)} models, or one in several sizes: name one file to see its roles")
    else:
        rows = _rows((role, location) for found in sets for role, location in _roles(found, notes))
    for found in sets:
        if not found.complete and found.split is not None:
            notes.append(f"file {found.split[0] + 1} of the {found.split[1]} of a split model: inspect the directory for all of it")
    types = {location.dtype for found in sets for location in found.tensors.values()}
    if unknown := sorted(types - set(TYPES) - set(TYPE_SIZES)):
        notes.append(f"types that quantkit does not know, taken to fill the room up to the next tensor: {', '.join(unknown)}")
    kinds = {found.kind for found in sets}
    kind = "importance" if kinds == {IMPORTANCE} else "artifact" if types.difference(_FULL) else "unquantized"
    return GgufContents(
        kind,
        "; ".join(_describe(found) for found in sets) if not apart else f"{len(sets)} models",
        sum(row.parameters for row in rows),
        sum(size for _, size in files),
        files,
        rows,
        () if apart else tuple(fact for found in sets for fact in _facts(found)),
        tuple(notes),
    )


def _belong_together(sets: list[FileSet]) -> bool:
    """Whether these are one model and at most one vision tower."""
    kinds = [found.kind for found in sets]
    return len(sets) == 2 and kinds.count(VISION) == 1 and IMPORTANCE not in kinds


def _roles(found: FileSet, notes: list[str]) -> list[tuple[str, TensorLocation]]:
    """What each tensor is grouped under; notes are added for what is strange."""
    tensors = found.tensors
    if found.architecture == ARCHITECTURE:
        known = True
    else:
        known = found.value(Keys.Clip.PROJECTOR_TYPE) == ARCHITECTURE
    if not known or found.kind == IMPORTANCE:
        return [(location.dtype, location) for location in tensors.values()]
    grouped: list[tuple[str, TensorLocation]] = []
    unknown: list[str] = []
    for name, location in tensors.items():
        meaning = meaning_of(name)
        if meaning is None:
            unknown.append(name)
        if name != ROPE_FREQS:  # no weight of the model
            grouped.append((OTHER if meaning is None or meaning.role is None else meaning.role, location))
    if unknown:
        notes.append(f"{len(unknown)} tensors are not Llama 4 tensors, {_shown(unknown[0])} first")
    return grouped


def _rows(grouped: Iterable[tuple[str, TensorLocation]]) -> tuple[RoleSummary, ...]:
    rows: dict[str, tuple[set[str], int, int, int]] = {}
    for group, location in grouped:
        types, tensors, elements, size = rows.get(group, (set(), 0, 0, 0))
        rows[group] = (types | {location.dtype}, tensors + 1, elements + location.elements, size + location.nbytes)
    return tuple(RoleSummary(_shown(group), tuple(sorted(types)), *totals) for group, (types, *totals) in rows.items())


def _describe(found: FileSet) -> str:
    """One line on a file set, with what keys of its architecture say."""
    if found.kind == IMPORTANCE:
        return f"importance of {sum(name.endswith('.in_sum2') for name in found.tensors)} tensors, for llama-quantize"
    architecture = found.architecture
    parts = [_shown(architecture) if architecture else "unknown architecture"]
    if found.kind == VISION:
        parts = [f"vision tower ({parts[0]})"]
    elif found.kind != "model":
        parts[0] += f" {_shown(found.kind)}"
    section = "clip.vision" if found.kind == VISION else architecture
    layers, experts = _count(found, f"{section}.block_count"), _count(found, f"{section}.expert_count")
    if layers is not None:
        parts.append(f"{layers:,} layers")
    if experts:
        parts.append(f"{experts:,} experts, {_count(found, f'{section}.expert_used_count') or 0:,} for a token")
    if (width := _count(found, f"{section}.embedding_length")) is not None:
        parts.append(f"hidden size {width:,}")
    return ", ".join(parts)


def _count(found: FileSet, key: str) -> int | None:
    value = found.value(key)
    return value if type(value) is int else None


def _facts(found: FileSet) -> list[tuple[str, str]]:
    """What the metadata of a file set say that is worth showing."""
    shown: tuple[tuple[str, str, Callable[[object], str]], ...] = (
        ("name", Keys.General.NAME, _shown),
        ("file type", Keys.General.FILE_TYPE, _file_type),
        ("context length", f"{found.architecture}.context_length", _shown),
        ("projector", Keys.Clip.PROJECTOR_TYPE, _shown),
        ("image size", Keys.ClipVision.IMAGE_SIZE, _shown),
        ("quantized by", Keys.General.QUANTIZED_BY, _shown),
        ("license", Keys.General.LICENSE, _shown),
        ("importance file", "quantize.imatrix.file", _shown),
        ("importance measured on", "quantize.imatrix.dataset", _shown),
        ("measured on", Keys.IMatrix.DATASETS, _shown),
        ("chunks", Keys.IMatrix.CHUNK_COUNT, _shown),
        ("tokens in a chunk", Keys.IMatrix.CHUNK_SIZE, _shown),
    )
    facts = [(label, show(value)) for label, key, show in shown if (value := found.value(key)) is not None]
    tokens = found.value(Keys.Tokenizer.LIST)
    if found.value(Keys.Tokenizer.MODEL) is not None:
        names = [_shown(value) for key in (Keys.Tokenizer.MODEL, Keys.Tokenizer.PRE) if (value := found.value(key)) is not None]
        facts.append(("tokenizer", f"{' '.join(names)}, {len(tokens) if isinstance(tokens, tuple) else 0:,} tokens"))
        facts.append(("chat template", "yes" if found.value(Keys.Tokenizer.CHAT_TEMPLATE) else "none"))
    if ROPE_FREQS in found.tensors:
        facts.append(("rotary scaling", f"by {ROPE_FREQS}"))
    if found.split is not None:
        facts.append(("split", f"{len(found.headers)} of {found.split[1]} files"))
    return facts if found.kind != VISION else [(f"vision: {label}", value) for label, value in facts]


def _file_type(value: object) -> str:
    if type(value) is not int:
        return brief(value)
    name = _FILE_TYPE_NAMES.get(value % _GUESSED, f"number {value}")
    return f"{name}, guessed" if value >= _GUESSED else name


def _shown(value: object) -> str:
    """A value as a short line of printable text."""
    if type(value) is int:
        return f"{value:,}"
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        value = ", ".join(map(str, value))
    if not isinstance(value, str):
        return brief(value)
    text = value if value.isprintable() else brief(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
