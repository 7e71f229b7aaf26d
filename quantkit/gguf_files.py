"""GgufFiles: GGUF files of one directory, or one such file, headers checked against each other, tensors read piece by piece.

A *file set* is what llama.cpp loads as one: a file, or all files of a split model, of which only the first says what the model is.
The files of a split are named ``<prefix>-00001-of-0000N.gguf`` and each says its number, their number and the number of all
tensors; whatever contradicts that, or another file of the set, is an error here, where llama.cpp would stop too.

A directory may hold several sets: a model and its vision tower, or the same model in several sizes.  ``file_sets`` tells them
apart; ``GgufFiles`` opens sets that belong together, so that no name occurs twice.  One file of a split model, named by itself, is
a set that is not complete.

Data is bytes here: a tensor ``[out, in]`` is read as uint8 ``[out, row bytes]``.  The experts of a stacked tensor have names of
their own: ``blk.0.ffn_up_exps.weight[7]`` is the part of expert 7.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from gguf.constants import Keys

from quantkit.errors import CheckpointError
from quantkit.gguf_header import TYPE_SIZES, GgufHeader, GGUFValueType, MetadataValue, parse_header
from quantkit.strict_json import brief
from quantkit.tensor_files import FileStates, OpenFiles, TensorLocation, list_directory, listing, read_headers

SUFFIX = ".gguf"
MAGIC = b"GGUF"
_SPLIT_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_PART = re.compile(r"(.+)\[(0|[1-9][0-9]{0,6})\]", re.DOTALL)
_SPLIT = Keys.Split
_SPLIT_KEYS = (  # with the type that llama.cpp insists on
    (_SPLIT.LLM_KV_SPLIT_NO, GGUFValueType.UINT16),
    (_SPLIT.LLM_KV_SPLIT_COUNT, GGUFValueType.UINT16),
    (_SPLIT.LLM_KV_SPLIT_TENSORS_COUNT, GGUFValueType.INT32),
)


@dataclass(frozen=True)
class FileSet:
    """What is loaded as one.

    headers: file -> its header, in order of the split.  states: of the files, when their headers were read.  split: None for a file
    that stands for itself, else (number from 0 of the first file here, how many belong to the model).
    """

    headers: dict[Path, GgufHeader]
    states: FileStates
    split: tuple[int, int] | None = None

    @property
    def path(self) -> Path:
        """The first file."""
        return next(iter(self.headers))

    @property
    def header(self) -> GgufHeader:
        """That of the first file, which says what the model is."""
        return self.headers[self.path]

    @property
    def complete(self) -> bool:
        """Whether all files of the model are here."""
        return self.split is None or len(self.headers) == self.split[1]

    @property
    def kind(self) -> str:
        """What the file says it is: ``model``, ``mmproj``, ``imatrix``, ``adapter`` and so on."""
        stated = self.header.value(Keys.General.TYPE)
        if isinstance(stated, str):
            return stated
        return "mmproj" if self.architecture == "clip" else "model"

    @property
    def architecture(self) -> str:
        """As the file states it; empty where it does not."""
        stated = self.header.value(Keys.General.ARCHITECTURE)
        return stated if isinstance(stated, str) else ""

    @property
    def tensors(self) -> dict[str, TensorLocation]:
        """Name -> location, over all files, in order."""
        return {
            name: TensorLocation(name, path, entry.type, entry.shape, entry.offset, entry.nbytes)
            for path, header in self.headers.items()
            for name, entry in header.tensors.items()
        }

    def value(self, key: str) -> MetadataValue | None:
        """The value of a key of the model."""
        return self.header.value(key)


class GgufFiles(OpenFiles):
    """The tensors of file sets that belong together.  sets: in the order of names.

    Locations have the types' names as dtypes.
    """

    def __init__(self, sets: Sequence[FileSet]):
        """Raises CheckpointError when two sets hold a tensor of the same name: they are two models then."""
        tensors: dict[str, TensorLocation] = {}
        for found in sets:
            for name, location in found.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{tensors[name].path} and {location.path.name} both hold {brief(name)}: they are different models, or one "
                        "in two sizes. Name one file, or keep them in directories of their own."
                    )
                tensors[name] = location
        paths = tuple(path for found in sets for path in found.headers)
        super().__init__(paths, tensors, {path: state for found in sets for path, state in found.states.items()})
        self.sets = tuple(sets)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file, or all files of a directory as one model; see :func:`file_sets` for the errors."""
        return cls(file_sets(Path(path)))

    def locate(self, name: str) -> TensorLocation:
        """Where a tensor lies, or ``name[expert]`` of a stacked one.  Raises CheckpointError for what no file holds."""
        if name in self.tensors:
            return self.tensors[name]
        part = _PART.fullmatch(name)
        whole = self.tensors.get(part[1]) if part else None
        if part is None or whole is None or len(whole.shape) < 2 or int(part[2]) >= whole.shape[0]:
            raise CheckpointError(f"{self.paths[0].parent}: no file holds {brief(name)}. Download the files again.")
        nbytes = whole.nbytes // whole.shape[0]
        return TensorLocation(name, whole.path, whole.dtype, whole.shape[1:], whole.offset + int(part[2]) * nbytes, nbytes)

    def read(self, name: str) -> torch.Tensor:
        """The bytes of a tensor or part, uint8 ``[rows, row bytes]``, one row for a vector.

        Raises CheckpointError when the file is gone, has changed or is too short, and for a type without known size.
        """
        location = self.locate(name)
        if location.dtype not in TYPE_SIZES:
            raise CheckpointError(f"{location.path}: tensor {brief(name)} is of {location.dtype}, which quantkit does not read.")
        data = np.empty(location.nbytes, np.uint8)
        self._fill(location, None, data.data, location.offset)
        rows = math.prod(location.shape[:-1])
        return torch.from_numpy(data).view(rows, location.nbytes // rows if rows else 0)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name, or is named like one; or a directory holds any, but no
    safetensors files."""
    if os.path.isdir(path):
        names = list_directory(path)
        return any(_is_listed(name) for name in names) and not any(name.endswith(".safetensors") for name in names)
    if not os.path.isfile(path):
        return False
    if path.suffix == SUFFIX:
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from error


def _is_listed(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")


def file_sets(path: Path) -> list[FileSet]:
    """The sets that the file or directory ``path`` holds, at least one, by the names of their first files.

    A file is one set, complete or not.  Raises CheckpointError that lists all damaged headers, or all that is wrong with the splits
    of a directory.
    """
    if not os.path.isdir(path):
        headers, states = read_headers((path,), parse_header)
        count = headers[path].value(_SPLIT.LLM_KV_SPLIT_COUNT)
        number = headers[path].value(_SPLIT.LLM_KV_SPLIT_NO)
        split = (number, count) if type(count) is int and type(number) is int and count > 1 else None
        return [FileSet(headers, states, split)]
    paths = tuple(path / name for name in list_directory(path) if _is_listed(name))
    if not paths:
        raise CheckpointError(f"{path} holds no GGUF files. Give the directory or the file of a model.")
    headers, states = read_headers(paths, parse_header)
    groups: dict[tuple[str, str], list[Path]] = {}
    problems: list[str] = []
    for file, header in headers.items():
        count, named = header.value(_SPLIT.LLM_KV_SPLIT_COUNT), _SPLIT_NAME.fullmatch(file.name)
        if count is not None and count != 1 and not named:
            problems.append(f"{file.name} is one of {brief(count)} files, but is not named <model>-00001-of-0000N.gguf")
        alone = count is None or count == 1 or not named
        groups.setdefault((file.name, "") if alone or not named else (named[1], named[3]), []).append(file)
    sets = []
    for (prefix, total), members in groups.items():
        chosen = {file: headers[file] for file in members}
        if total:
            problems += _split_problems(prefix, int(total), chosen)
        sets.append(FileSet(chosen, {file: states[file] for file in members}, (0, int(total)) if total else None))
    if problems:
        advice = "Download them again, from one revision, and keep their names."
        raise CheckpointError(f"{path}: files of a split model do not belong together. {advice}\n  " + "\n  ".join(problems))
    return sets


def _split_problems(prefix: str, total: int, headers: dict[Path, GgufHeader]) -> list[str]:
    """What is wrong with the files ``<prefix>-00001-of-<total>.gguf`` and following."""
    problems: list[str] = []
    numbers = {int(found[2]): path for path in headers if (found := _SPLIT_NAME.fullmatch(path.name))}
    if strange := sorted(path.name for number, path in numbers.items() if not 1 <= number <= total):
        problems.append(f"numbered beyond {total}: {listing(strange)}")
    missing = [number for number in range(1, total + 1) if number not in numbers]
    if missing:
        names = [f"{prefix}-{number:05d}-of-{total:05d}{SUFFIX}" for number in missing]
        problems.append(f"missing ({len(missing)} of {total}): {listing(names)}")
    held = sum(len(header.tensors) for header in headers.values())
    owners: dict[str, Path] = {}
    for number, path in sorted(numbers.items()):
        header = headers[path]
        for (key, kind), expected in zip(_SPLIT_KEYS, (number - 1, total, None if missing else held), strict=True):
            entry = header.metadata.get(key)
            if entry is None or entry.type is not kind:
                problems.append(f"{path.name}: {key} is {'missing' if entry is None else entry.type.name}; expected {kind.name}")
            elif expected is not None and entry.value != expected:
                problems.append(f"{path.name}: {key} is {brief(entry.value)}; expected {expected}")
        twice = [name for name in header.tensors if name in owners]
        if twice:
            problems.append(f"{path.name} and {owners[twice[0]].name} both hold {listing(twice)}")
        owners |= dict.fromkeys(header.tensors, path)
    return problems
