"""Exact arithmetic for Triton's interpreter.

The interpreter computes with NumPy, which has neither BF16 nor FP8: it multiplies their bit patterns, or rounds toward zero,
without a word.  ``make_exact`` lets torch convert these numbers, and computes in float32 in between, as a GPU does.  Products of
matrices are summed in float32.  Call it once, in a process that interprets, before a kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
UNKNOWN = {tl.bfloat16: np.uint16, tl.float8e4nv: np.uint8, tl.float8e5: np.uint8}  # to NumPy, and what it stores them as


def to_torch(handle: Any) -> torch.Tensor:
    """The numbers of one of the interpreter's values."""
    kind, data = handle.dtype.scalar, np.ascontiguousarray(handle.data)
    if kind not in UNKNOWN:
        return torch.from_numpy(data)
    signed = np.int16 if UNKNOWN[kind] == np.uint16 else np.uint8
    return torch.from_numpy(data.view(signed)).view(TORCH[kind])


def from_torch(values: torch.Tensor, kind: Any, shape: tuple[int, ...]) -> Any:
    """The interpreter's value with these numbers, rounded to its kind."""
    if kind in (tl.float8e4nv, tl.float8e5):
        values = values.to(torch.float32)
    values = values.to(TORCH[kind])
    if kind in UNKNOWN:
        values = values.view(torch.int16 if UNKNOWN[kind] == np.uint16 else torch.uint8)
    data = values.numpy()
    return interpreter.TensorHandle((data.view(UNKNOWN[kind]) if kind in UNKNOWN else data).reshape(shape), kind)


def wide(handle: Any) -> Any:
    """The same in float32, where NumPy does not know its numbers."""
    if handle.dtype.scalar not in UNKNOWN:
        return handle
    return interpreter.TensorHandle(to_torch(handle).to(torch.float32).numpy().reshape(handle.data.shape), tl.float32)


def make_exact() -> None:
    """Replace the interpreter's operations that are wrong for BF16 and FP8."""
    builder = interpreter.InterpreterBuilder
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    binary, unary = builder.binary_op, builder.unary_op

    def converted(value: Any, kind: Any) -> Any:
        return from_torch(to_torch(value), kind, value.data.shape)

    def exact_cast(self: Any, value: Any, kind: Any) -> Any:
        source, target = value.dtype.scalar, kind.scalar
        if source in UNKNOWN or target in UNKNOWN:
            if source in TORCH and target in TORCH:
                return converted(value, target)
            if target in UNKNOWN:
                return converted(cast(self, value, tl.float32), target)
        return cast(self, wide(value), kind)

    def exact_convert(self: Any, value: Any, kind: Any, rounding: Any) -> Any:
        if value.dtype.scalar in TORCH and kind.scalar in TORCH:
            return converted(value, kind.scalar)
        return convert(self, value, kind, rounding)

    def rounded(result: Any, kind: Any) -> Any:
        if np.asarray(result).dtype == bool:
            return interpreter.TensorHandle(result, tl.int1)
        return converted(interpreter.TensorHandle(np.asarray(result, dtype=np.float32), tl.float32), kind)

    def exact_binary(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        if left.dtype.scalar not in UNKNOWN:
            return binary(self, left, right, operation)
        return rounded(operation(wide(left).data, wide(right).data), left.dtype.scalar)

    def exact_unary(self: Any, value: Any, operation: Callable[..., Any]) -> Any:
        if value.dtype.scalar not in UNKNOWN:
            return unary(self, value, operation)
        return rounded(operation(wide(value).data), value.dtype.scalar)

    def exact_dot(self: Any, left: Any, right: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        if all(side.dtype.scalar in (tl.float32, tl.float64) or side.dtype.scalar not in TORCH for side in (left, right)):
            return dot(self, left, right, total, precision, imprecise)
        product = to_torch(left).to(torch.float32) @ to_torch(right).to(torch.float32)
        return interpreter.TensorHandle(product.numpy().astype(total.data.dtype) + total.data, total.dtype.scalar)

    def constant(_self: Any, value: float) -> Any:
        return from_torch(torch.tensor([value], dtype=torch.float32), tl.bfloat16, (1,))

    if not hasattr(builder, "get_bf16"):  # before Triton 3.9
        builder.get_bf16 = constant
        patch = interpreter._patch_lang_tensor

        def patched(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))  # NumPy 2.4 converts no array [1]

        interpreter._patch_lang_tensor = patched
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = exact_cast, exact_convert, exact_dot
    builder.binary_op, builder.unary_op = exact_binary, exact_unary
