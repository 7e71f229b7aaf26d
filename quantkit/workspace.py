"""Workspace: scratch memory that one worker reuses from unit to unit.

A unit of work needs buffers of some 100 MB (source slice, codes, packed bytes).  Fresh allocations of that size are returned to the
system when freed, so every unit would pay for faulting the same pages in again; a named buffer is faulted once and kept.  A
workspace belongs to one worker: it is not thread-safe, and what ``take`` returned for a name is overwritten by the next user of it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

PAGE = 4096  # buffers begin on a page, so that vectors do not straddle cache lines


class Workspace:
    """Named byte buffers that only ever grow."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def take(self, name: str, nbytes: int) -> NDArray[np.uint8]:
        """The first ``nbytes`` of the buffer of that name, uninitialised: uint8 ``[nbytes]``."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < nbytes:
            self._buffers.pop(name, None)  # let go of the old one before the larger one is allocated
            raw = np.empty(nbytes + PAGE, dtype=np.uint8)
            start = -raw.ctypes.data % PAGE
            buffer = self._buffers[name] = raw[start : start + nbytes]
        return buffer[:nbytes]

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A buffer as a tensor of that shape, uninitialised."""
        return torch.from_numpy(self.take(name, math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)

    def release(self, *names: str) -> None:
        """Give the memory of these buffers back; nothing may use them any more."""
        for name in names:
            self._buffers.pop(name, None)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.size for buffer in self._buffers.values())
