"""How kernels are compiled, and where their machine code is kept.

An entry point is compiled on its first call (some seconds) and kept by numba on disk: beside the source, or in the user's cache
directory when that is read-only.  Two things are added to what numba does.  Machine code also holds the functions that an entry
point calls, so it is looked up by a digest of all sources here, not by the one file's time stamp.  And a disk that is full or
read-only costs only time: the kernel is compiled again by the next process.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache

Function = TypeVar("Function", bound=Callable[..., Any])

_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


class _Cache(FunctionCache):  # type: ignore[misc]
    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), _SOURCES)

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            self.disable()


def kernel(function: Function) -> Function:
    """Declare an entry point: compiled on its first call, kept on disk, run without Python's lock."""
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    with contextlib.suppress(RuntimeError):  # raised when there is no directory that numba may write to
        dispatcher._cache = _Cache(function)
    return dispatcher  # type: ignore[no-any-return]


def compiled(function: Function) -> Function:
    """Declare a function that kernels call; it becomes part of their machine code."""
    return njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]
