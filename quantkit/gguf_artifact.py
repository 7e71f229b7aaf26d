"""A finished GGUF artifact, as ``verify`` looks at it.

What must stand in the files follows from the recipe in the manifest and from the config.  With the source at hand the config is the
source's, and the headers must be those that the same conversion would plan today, but for what comes from the model's name and
card.  Without it the config is read back from the headers themselves; that every tensor has the type and shape that the recipe
gives to such a model, and every number of the header agrees with every other, is what can be told then.

How a model was split is no matter of the recipe, so the tensors of all its files are compared with one planned file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf.constants import Keys
from numpy.typing import NDArray

from quantkit.checkpoint import Checkpoint
from quantkit.errors import ArtifactError, joined
from quantkit.estimate import available_cores
from quantkit.formats import gguf
from quantkit.formats.gguf_metadata import ARCHITECTURE, CHUNK_SIZE, config_from_metadata, rope_freqs
from quantkit.formats.gguf_names import PREFIX, ROPE_FREQS, place_of
from quantkit.formats.gguf_vision import ARCHITECTURE as VISION_ARCHITECTURE
from quantkit.formats.gguf_vision import modelfile, vision_from_metadata
from quantkit.ggml import TYPES, BlockType
from quantkit.gguf_files import FileSet, GgufFiles
from quantkit.gguf_header import GgufHeader, parse_planned
from quantkit.kernels.ggml_packing import LAYOUTS
from quantkit.ledger import LedgerEntry
from quantkit.llama4 import FLOAT_DTYPES, Llama4Config, SourceTensor, Unit, WeightMatrix, units
from quantkit.plan import ArtifactPlan, make_plan
from quantkit.recipe import GGUF, Recipe, recipe_from_dict
from quantkit.scheme import KEEP, Scheme
from quantkit.strict_json import brief, parse_object
from quantkit.tensor_files import CHUNK_BYTES, SIDECAR_BYTES, read_small_file
from quantkit.writer import MANIFEST

# Of the keys that tell who made the model and what it is called, those that say what the file is
_CHECKED_GENERAL = (
    Keys.General.ARCHITECTURE,
    Keys.General.TYPE,
    Keys.General.FILE_TYPE,
    Keys.General.QUANTIZATION_VERSION,
    Keys.General.ALIGNMENT,
)
_UNTOLD = (CHUNK_SIZE, Keys.ClipVision.IMAGE_MEAN, Keys.ClipVision.IMAGE_STD)  # by nothing else in the file
_EXPONENTS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}


class GgufArtifact:
    """An opened artifact.  entries: of its ledger, none when that is damaged.  units, schemes: filled by the check of tensors."""

    form = gguf
    files: GgufFiles

    def __init__(self, path: Path, entries: Mapping[str, LedgerEntry]):
        """Open its files.  Raises CheckpointError."""
        self.path, self.files, self._entries = path, GgufFiles.open(path), entries
        self.units: list[Unit] = []
        self.schemes: dict[WeightMatrix | SourceTensor, Scheme | None] = {}
        self.checks: dict[str, Callable[[], str]] = {
            "tensors": self._check_tensors,
            "metadata": self._check_metadata,
            "scales": self._check_scales,
        }
        self._recipe: Recipe
        self._text: FileSet
        self._vision: FileSet | None = None
        self._planned: ArtifactPlan

    # -------------------------------------------------------------------------------------------------------- the checks

    def _check_tensors(self) -> str:
        self._recipe = self._read_recipe()
        self._sort_sets()
        config = self._read_config()
        self.units = units(config)
        self._planned = self._plan(config, self._stored_dtypes())
        self.schemes = {item: self._planned.assignments[item.name].scheme for unit in self.units for item in unit.items}
        _raise(self._tensor_problems(self._planned))
        return f"{len(self.files.tensors)} tensors have the names, shapes and types that header and recipe imply"

    def _check_metadata(self) -> str:
        problems = list(self._metadata_problems(self._planned, _UNTOLD))
        text = self._text.headers
        names = [path.name for path in text], None if self._vision is None else self._vision.path.name
        stated = read_small_file(self.path / gguf.MODELFILE, SIDECAR_BYTES)
        if stated != modelfile(*names).encode():
            problems.append(f"{gguf.MODELFILE} does not name these files")
        _raise(problems)
        return f"{len(self._text.header.metadata)} keys agree with each other, the tensors and the recipe"

    def _check_scales(self) -> str:
        with ThreadPoolExecutor(available_cores()) as pool:
            counts = list(pool.map(self._count_scales, self.files.tensors))
        return f"{sum(counts):,} blocks and numbers: all scales are finite"

    def _count_scales(self, name: str) -> int:
        """The number of blocks of a tensor.  Raises ArtifactError when one has a scale that is not finite."""
        location = self.files.tensors[name]
        kind = TYPES[location.dtype]
        for chunk in self.files.chunks(name, max(1, CHUNK_BYTES // kind.nbytes) * kind.nbytes):
            if not finite_scales(kind, np.frombuffer(chunk, np.uint8)):
                what = "number" if kind.floating else "scale"
                raise ArtifactError(f"{name} ({kind.name}) holds a {what} that is not finite")
        return location.nbytes // kind.nbytes

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Raise ArtifactError when the files are not what the same conversion of that checkpoint would plan."""
        dtypes = {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}
        planned = self._plan(checkpoint.config, dtypes, checkpoint.directory)
        problems = [*self._metadata_problems(planned, (), complete=True), *self._tensor_problems(planned)]
        factors = rope_freqs(checkpoint.config)
        if factors is not None and ROPE_FREQS in self.files.tensors:
            stored = self.files.read(ROPE_FREQS).numpy().tobytes()
            if stored != factors.numpy().tobytes():
                problems.append(f"{ROPE_FREQS} differs from what rope_scaling of the source gives")
        if not problems and {item.name for item in self.schemes} != set(planned.assignments):
            problems.append("the ledger begins the names of tensors otherwise than the source does")
        if problems:
            raise ArtifactError(f"{checkpoint.directory} is not the source of this artifact: {joined(problems)}")

    # ------------------------------------------------------------------------------------------------- what is implied

    def _read_recipe(self) -> Recipe:
        content = parse_object(read_small_file(self.path / MANIFEST, SIDECAR_BYTES), MANIFEST).get("recipe")
        if not isinstance(content, Mapping):
            raise ArtifactError(f"{MANIFEST} holds no recipe")
        recipe = recipe_from_dict(content, f"in {MANIFEST}")
        if recipe.format != GGUF:
            raise ArtifactError(f"the recipe in {MANIFEST} is for {brief(recipe.format)}")
        return recipe

    def _sort_sets(self) -> None:
        """Which of the files hold the text model, and which the vision tower."""
        texts = [found for found in self.files.sets if found.architecture == ARCHITECTURE]
        visions = [found for found in self.files.sets if found.architecture == VISION_ARCHITECTURE]
        others = [found for found in self.files.sets if found not in texts and found not in visions]
        if len(texts) != 1 or len(visions) > 1 or others:
            listed = ", ".join(f"{found.path.name} ({brief(found.architecture)})" for found in self.files.sets)
            raise ArtifactError(f"expected one {ARCHITECTURE} model and at most one vision tower, found {listed}")
        self._text, self._vision = texts[0], visions[0] if visions else None

    def _read_config(self) -> Llama4Config:
        """The config that the headers stand for; the ledger knows how the source begins the names of tensors."""
        listed = any(entry.role in ("vision", "projector") for entry in self._entries.values())
        if listed and self._vision is None:
            raise ArtifactError("the ledger lists a vision tower, but no file holds one (mmproj)")
        vision = None
        if self._vision is not None:
            vision = vision_from_metadata(self._vision.header.metadata, _shapes(self._vision), self._vision.path.name)
        config = config_from_metadata(self._text.header.metadata, _shapes(self._text), self._text.path.name)
        prefixed = vision is not None or any(name.startswith(PREFIX) for name in self._entries)
        return replace(config, vision=vision, prefix=PREFIX if prefixed else "")

    def _stored_dtypes(self) -> dict[str, str]:
        """By source tensor, the dtype in which kept tensors are stored; a type that none can have is left out."""
        dtypes: dict[str, str] = {}
        for unit in self.units:
            for item in unit.items:
                entry, stored = self._entries.get(item.name), self.files.tensors.get(place_of(item.name).tensor)
                if (entry is None or entry.applied == KEEP) and stored is not None and stored.dtype in FLOAT_DTYPES:
                    dtypes.setdefault(_tensor(item), stored.dtype)
        return dtypes

    def _plan(self, config: Llama4Config, dtypes: Mapping[str, str], source: Path | None = None) -> ArtifactPlan:
        """The same conversion, planned again.  Raises RecipeError, UnsupportedModelError."""
        known = {_tensor(item): config.dtype for unit in units(config) for item in unit.items} | dict(dtypes)
        return make_plan("", config, [self._recipe], dtypes=known, source=source).artifacts[0]

    # -------------------------------------------------------------------------------------------------------- differences

    def _pairs(self, planned: ArtifactPlan) -> Iterator[tuple[FileSet | None, GgufHeader]]:
        """What was found, None where nothing was, beside what was planned."""
        for file in planned.files:
            header = parse_planned(file.header, file.size, file.name)
            stated = header.value(Keys.General.ARCHITECTURE)
            yield self._text if stated == ARCHITECTURE else self._vision, header
        if self._vision is not None and len(planned.files) == 1:
            yield self._vision, GgufHeader(0, {}, {}, 0, 0, 0, "")

    def _tensor_problems(self, planned: ArtifactPlan) -> Iterator[str]:
        for found, header in self._pairs(planned):
            tensors = {} if found is None else found.tensors
            yield from (f"{name} is missing" for name in header.tensors if name not in tensors)
            yield from (f"{name} is not expected" for name in tensors if name not in header.tensors)
            for name, expected in header.tensors.items():
                stored = tensors.get(name)
                if stored is not None and (stored.dtype, stored.shape) != (expected.type, expected.shape):
                    sizes = list(stored.shape), list(expected.shape)
                    yield f"{name} is {stored.dtype} {sizes[0]}; expected {expected.type} {sizes[1]}"

    def _metadata_problems(self, planned: ArtifactPlan, untold: Sequence[str], complete: bool = False) -> Iterator[str]:
        """complete: the plan knows all keys, so that there are no others."""
        for found, header in self._pairs(planned):
            metadata = {} if found is None else found.header.metadata
            for key, expected in header.metadata.items():
                entry = metadata.get(key)
                if not _is_checked(key) or key in untold or entry == expected:
                    continue
                stated = "missing" if entry is None else f"{brief(entry.value)} ({entry.type.name})"
                yield f"{key} is {stated}; expected {brief(expected.value)} ({expected.type.name})"
            if complete:
                yield from (f"{key} is not expected" for key in metadata if key not in header.metadata and _is_checked(key))


def _shapes(found: FileSet) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in found.tensors.items()}


def _tensor(item: WeightMatrix | SourceTensor) -> str:
    return item.tensor if isinstance(item, WeightMatrix) else item.name


def _is_checked(key: str) -> bool:
    """Whether a key says what the file is; the others say what the model is called, and how it was split."""
    return key in _CHECKED_GENERAL or not key.startswith(("general.", "split."))


def _raise(problems: Iterator[str] | Sequence[str]) -> None:
    if listed := list(problems):
        raise ArtifactError(joined(listed))


def finite_scales(kind: BlockType, data: NDArray[np.uint8]) -> bool:
    """Whether no block in ``data``, whole blocks of a type, has a scale or minimum that is infinite or NaN; of a floating type, no
    number.  FP16 shows that in the upper byte."""
    if kind.floating:
        letter, exponent = _EXPONENTS[kind.name]
        bits = data.view(letter)
        return not bool(((bits & letter(exponent)) == exponent).any())
    blocks = data.reshape(-1, kind.nbytes)
    if kind.name == "IQ1_M":  # the scale's four bits each are the upper ones of four numbers
        return not bool((((blocks[:, 53] & 0xC0) == 0xC0) & ((blocks[:, 55] & 0x70) == 0x70)).any())
    if kind.codebook:
        places = [0]
    else:
        layout = LAYOUTS[kind.name]
        if layout.scale_bytes == 1:  # powers of two; 255 is the NaN of this number format
            return not bool((blocks[:, layout.scale] == 255).any())
        places = [layout.scale] if layout.minimum < 0 else [layout.scale, layout.minimum]
    return not any(bool(((blocks[:, place + 1] & 0x7C) == 0x7C).any()) for place in places)
