"""Triton kernels on simulated devices: launches in the interpreter, with CUDA's rules, and inline assembly run by hand.

The process must have been started with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import instructions_by_hand
import numpy as np
import torch
import triton.language as tl
import triton_arithmetic
from simulated_device import MOST_PROGRAMS, DeviceError, SimulatedTensor, Simulation, held, simulate
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor


@contextlib.contextmanager
def simulate_with_kernels(count: int = 1, memory: int = 1 << 40) -> Iterator[Simulation]:
    """As ``simulate``, with Triton."""
    one_at_a_time = threading.Lock()  # the interpreter keeps the place in the grid for the process
    launch = interpreter.GridExecutor.__call__

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        _check(executor, given, simulation)
        simulation.launches.append(executor.fn.__name__)
        with one_at_a_time, _disable_current_modes(), torch._C.DisableTorchFunction():
            launch(executor, *map(_on_the_cpu, args), **{name: _on_the_cpu(value) for name, value in kwargs.items()})

    with simulate(count, memory) as simulation, contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launched))
        patches.enter_context(mock.patch.object(interpreter.InterpreterBuilder, "create_inline_asm", _assembly))
        yield simulation


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, TensorDescriptor):
        return [value.base]
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def _check(executor: Any, given: dict[str, Any], simulation: Simulation) -> None:
    where = f"kernel {executor.fn.__name__}"
    for name, value in given.items():
        for tensor in _tensors(value):
            if not isinstance(tensor, SimulatedTensor):
                raise DeviceError(f"{where}: pointer argument {name} cannot be accessed from Triton (cpu tensor?)")
            if tensor.device.index != simulation.current:
                raise DeviceError(f"{where}: {name} is on {tensor.device}, but the current device is cuda:{simulation.current}")
    grid = executor.grid(given) if callable(executor.grid) else executor.grid
    for programs, most in zip(grid, MOST_PROGRAMS, strict=False):
        if programs > most:
            raise DeviceError(f"{where}: a grid of {grid} programs; CUDA has at most {MOST_PROGRAMS}")


def _on_the_cpu(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor(held(value.base), value.shape, value.strides, value.block_shape, value.padding)
    if isinstance(value, tuple):
        return type(value)(*map(_on_the_cpu, value)) if hasattr(value, "_fields") else tuple(map(_on_the_cpu, value))
    return held(value)


# ---------------------------------------------------------------------------------------------------------------- assembly


class _Results(list[Any]):
    def get_result(self, place: int) -> Any:
        return self[place]


def _assembly(builder: Any, asm: str, constraints: str, values: list[Any], kinds: list[Any], pure: bool, pack: int) -> Any:
    """Neighbouring elements share a register, ``pack`` of them a call; all registers have 32 bits."""
    shape = values[0].data.shape
    inputs = [column for value in values for column in _registers(value.data, pack)]
    widths = [kind.scalar.primitive_bitwidth // 8 for kind in kinds]
    counts = [max(1, pack * width // 4) for width in widths]
    assert constraints.count("=") == sum(counts) and len(constraints.split(",")) == sum(counts) + len(inputs), constraints
    words = instructions_by_hand.run(asm, sum(counts), inputs)
    results, first = _Results(), 0
    for kind, width, count in zip(kinds, widths, counts, strict=True):
        joined = np.stack(words[first : first + count], 1)  # [calls, registers]
        first += count
        data = np.ascontiguousarray(joined).view(np.uint8).reshape(-1)[: np.prod(shape) * width]
        results.append(interpreter.TensorHandle(data.view(_numpy_kind(kind.scalar)).reshape(shape), kind.scalar))
    return results


def _registers(data: Any, pack: int) -> list[Any]:
    flat = np.ascontiguousarray(data).reshape(-1, pack)
    assert flat.itemsize * pack % 4 == 0, "registers are filled"
    return list(flat.view(np.uint32).T)


def _numpy_kind(kind: Any) -> Any:
    if kind in triton_arithmetic.UNKNOWN:
        return triton_arithmetic.UNKNOWN[kind]
    return {tl.int32: np.int32, tl.int8: np.int8, tl.float16: np.float16, tl.float32: np.float32}[kind]
