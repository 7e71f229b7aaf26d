"""Importance files, written by the library and read by the ``gguf`` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantkit.imatrix import Imatrix, write_imatrix

Array = np.ndarray[Any, Any]


def written(directory: Path, imatrix: Imatrix, *, legacy: bool = False) -> Path:
    path = directory / ("importance.dat" if legacy else "importance.gguf")
    write_imatrix(path, imatrix, legacy=legacy, force=True)
    return path


def tensors_by_gguf(path: Path) -> dict[str, Array]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
