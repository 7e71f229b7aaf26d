"""A decoder of compressed-tensors modules in plain numpy.  It shares nothing with quantkit: it was written from the format's facts.

Packed integers: element i in the low bits first, half the range added; zero points packed along the output dimension; fp4 two codes
per byte, the even column in the low nibble; nvfp4 values are code * scale / global scale; mxfp4 scales are exponent + 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def numpy_weight(stored: Mapping[str, np.ndarray], arguments: Mapping[str, Any]) -> np.ndarray:
    """Stored tensors (FP8 and BF16 as their bits) and the ``weights`` arguments of their group -> float32 [out, in]."""
    four_bits, is_float = arguments["num_bits"] == 4, arguments["type"] == "float"
    if is_float and four_bits:
        packed = stored["weight_packed"]
        codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
        codes[:, 0::2], codes[:, 1::2] = packed % 16, packed // 16
        magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes % 8]
        values = np.where(codes >= 8, -magnitude, magnitude)
    elif is_float:
        values = e4m3(stored["weight"])
    elif "weight" in stored:
        values = stored["weight"].astype(np.float32)
    else:
        values = integers(stored["weight_packed"], arguments["num_bits"], axis=1).astype(np.float32)
        assert tuple(stored["weight_shape"]) == values.shape
    rows, columns = values.shape
    if "weight_global_scale" in stored:
        scale = e4m3(stored["weight_scale"]) / stored["weight_global_scale"]
    elif stored["weight_scale"].dtype == np.uint8:
        scale = np.exp2(stored["weight_scale"].astype(np.float32) - 127)
    else:
        scale = (stored["weight_scale"].astype(np.uint32) << 16).view(np.float32)
    if arguments["strategy"] == "tensor":
        assert scale.shape == stored["input_scale"].shape == (1,)
        return values * scale

    def spread(per_scale: np.ndarray) -> np.ndarray:
        tall = np.repeat(per_scale, rows // per_scale.shape[0], axis=0)
        return np.repeat(tall, columns // per_scale.shape[1], axis=1)

    if "weight_zero_point" in stored:
        values = values - spread(integers(stored["weight_zero_point"], 4, axis=0)).astype(np.float32)
    return values * spread(scale)


def integers(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Signed integers packed along ``axis``, the first in the lowest bits of a word, stored with half their range added."""
    unsigned = np.moveaxis(words.view(np.uint32), axis, -1)
    parts = [(unsigned >> np.uint32(bits * i)) % np.uint32(2**bits) for i in range(32 // bits)]
    flat = np.stack(parts, axis=-1).reshape(*unsigned.shape[:-1], -1).astype(np.int32) - 2 ** (bits - 1)
    return np.moveaxis(flat, -1, axis)


def e4m3(bits: np.ndarray) -> np.ndarray:
    exponent, fraction = (bits >> 3) % 16, (bits % 8).astype(np.float32)
    magnitude = np.where(exponent == 0, fraction * np.float32(2**-9), np.ldexp(1 + fraction / 8, exponent.astype(np.int32) - 7))
    return np.where(bits >= 128, -magnitude, magnitude).astype(np.float32)


def as_numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    views = {torch.float8_e4m3fn: torch.uint8, torch.bfloat16: torch.uint16}
    return {name.rpartition(".")[2]: tensor.view(views.get(tensor.dtype, tensor.dtype)).numpy() for name, tensor in tensors.items()}
