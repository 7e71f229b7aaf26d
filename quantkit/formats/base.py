"""What a format tells the plan and the writer: tensors with exact sizes, placed in files with exact offsets."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Bytes per element of the safetensors dtypes that quantkit reads or writes.
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an artifact, before any weight has been read."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class OutputFile:
    """One planned file: header bytes at offset 0, then every tensor at its absolute offset, without gaps.

    offsets: tensor name -> absolute offset in the file.  size: of the whole file in bytes.
    """

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    offsets: dict[str, int]
    size: int


@dataclass(frozen=True)
class ClientNote:
    """Whether a client loads the planned artifact.  ``why`` says what stands against it, or what to mind; may be empty."""

    client: str
    loads: bool
    why: str = ""
