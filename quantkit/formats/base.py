"""What a format tells the plan and the writer: tensors with exact sizes, placed in files with exact offsets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantkit import ggml
from quantkit.assignment import Assignment
from quantkit.llama4 import Llama4Config
from quantkit.recipe import Recipe

# Bytes per element of the safetensors dtypes that quantkit reads or writes.
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an artifact, or an expert's part of one, before any weight has been read.

    dtype: in safetensors' spelling, or one of llama.cpp's types.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        if self.dtype in DTYPE_BYTES:
            return math.prod(self.shape) * DTYPE_BYTES[self.dtype]
        return math.prod(self.shape[:-1]) * ggml.TYPES[self.dtype].row_bytes(self.shape[-1])


@dataclass(frozen=True)
class OutputFile:
    """One planned file: header bytes at offset 0, then every tensor at its absolute offset; zeros between them, if anything.

    offsets: tensor name -> absolute offset in the file.  size: of the whole file in bytes.  checksums: tensor name -> absolute
    offset of the xxh3-64 of its bytes, little-endian, in formats that store it.
    """

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    offsets: dict[str, int]
    size: int
    checksums: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FileRequest:
    """What a format needs to know to lay out the files of one artifact.

    tensors: in the order of the units that write them.  small: of a few bytes each, best kept behind the others.  source: directory
    with the tokenizer, None when it is not at hand.  max_shard_bytes: of tensor files; None leaves it to the format.
    """

    model_name: str
    config_text: str
    config: Llama4Config
    recipe: Recipe
    assignments: Mapping[str, Assignment]
    tensors: Sequence[OutputTensor]
    small: Sequence[OutputTensor]
    source: Path | None
    max_shard_bytes: int | None


@dataclass(frozen=True)
class PlannedFiles:
    """Tensor files, and small files that are known in full (name -> content)."""

    files: tuple[OutputFile, ...]
    sidecars: dict[str, bytes]


@dataclass(frozen=True)
class ClientNote:
    """Whether a client loads the planned artifact.  ``why`` says what stands against it, or what to mind; may be empty."""

    client: str
    loads: bool
    why: str = ""
