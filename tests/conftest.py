"""Fixtures that several test modules ask for by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Torch by itself uses one thread: on small tensors threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Tells how many bytes ``os.preadv`` has read since the test began."""
    original, counts = os.preadv, [0]

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = original(descriptor, buffers, offset)
        counts.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    return lambda: sum(counts)
