"""A reader of packed files in plain numpy.  It shares nothing with quantkit: it was written from docs/packed-format.md alone.

Integers are taken bit by bit, floats by arithmetic on their bits; every place and every checksum is looked at.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I8": 1, "I32": 4}
BLOCKS = {"Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210), "Q4_0": (32, 18), "F16": (1, 2)}
PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def aligned(position: int, to: int) -> int:
    return (position + to - 1) // to * to


def read_json(data: bytes) -> tuple[dict[str, Any], int]:
    """The JSON of a file, and where its data starts; all of the prelude is checked."""
    magic, version, prelude, length, start, size = struct.unpack_from("<8sIIQQQ", data)
    assert (magic, version, prelude, size) == (b"QKPACKED", 1, 64, len(data))
    assert data[40:56] == bytes(16) and start == aligned(64 + length, 4096)
    text = data[64 : 64 + length]
    assert struct.unpack_from("<Q", data, 56)[0] == xxhash.xxh3_64(data[:56] + text).intdigest()
    assert not any(data[64 + length : start])
    return json.loads(text), start


def read_file(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, str], dict[str, tuple[int, int]]]:
    """By full name: dtype, shape and bytes of each tensor; the schemes; and the absolute place of each block."""
    data = path.read_bytes()
    content, start = read_json(data)
    tensors, schemes, places = {}, {}, {}
    position = start
    for name, block in content["blocks"].items():
        assert start + block["offset"] == position and position % 4096 == 0
        end, sums = 0, []
        for key, (dtype, shape, offset) in block["tensors"].items():
            assert offset == aligned(end, 256) and not any(data[position + end : position + offset])
            if dtype in BYTES:
                nbytes = math.prod(shape) * BYTES[dtype]
            else:
                nbytes = math.prod(shape) // BLOCKS[dtype][0] * BLOCKS[dtype][1]
            end = offset + nbytes
            raw = data[position + offset : position + end]
            sums.append(xxhash.xxh3_64(raw).intdigest())
            tensors[f"{name}.{key}"] = dtype, tuple(shape), raw
        assert block["checksums"] == aligned(end, 8) and not any(data[position + end : position + block["checksums"]])
        after = position + block["checksums"] + 8 * len(sums)
        assert list(struct.unpack_from(f"<{len(sums)}Q", data, position + block["checksums"])) == sums
        assert block["size"] == aligned(after - position, 4096) and not any(data[after : position + block["size"]])
        schemes |= {f"{name}.{key}": scheme for key, scheme in block["schemes"].items()}
        places[name] = position, block["size"]
        position += block["size"]
    assert position == len(data)
    return tensors, schemes, places


def numbers(dtype: str, shape: tuple[int, ...], raw: bytes) -> np.ndarray:
    """What a tensor holds, floats as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype == "F8_E4M3":
        bits = np.frombuffer(raw, np.uint8)
        exponent, fraction = (bits >> 3) % 16, (bits % 8).astype(np.float32)
        magnitude = np.where(exponent == 0, fraction * np.float32(2**-9), np.ldexp(1 + fraction / 8, exponent.astype(np.int32) - 7))
        return np.where(bits >= 128, -magnitude, magnitude).astype(np.float32).reshape(shape)
    kinds = {"F16": "<f2", "F32": "<f4", "U8": "u1", "I8": "i1", "I32": "<i4"}
    found = np.frombuffer(raw, kinds[dtype]).reshape(shape)
    return found.astype(np.float32) if dtype in ("F16", "F32") else found


def unpacked(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Planes to signed codes, [out, columns]."""
    rows = words.shape[0]
    groups = words.view(np.uint32).reshape(rows, -1, 4 * bits)
    assert groups.shape[1] == -(-columns // 128)
    codes = np.zeros((rows, groups.shape[1], 128), np.int32)
    for k in range(128):
        first = low = 0
        for width in PLANES[bits]:
            count = 4 * width
            field, word = k // count, first + k % count
            part = groups[:, :, word] >> np.uint32(width * field) & np.uint32(2**width - 1)
            codes[:, :, k] += part.astype(np.int32) << low
            first, low = first + count, low + width
    return codes.reshape(rows, -1)[:, :columns] - 2 ** (bits - 1)


def weight(tensors: dict[str, tuple[str, tuple[int, ...], bytes]], name: str, scheme: str | None) -> np.ndarray:
    """The stored values of matrix ``name``, float32 [out, in]; of schemes that are no types of llama.cpp."""
    if scheme is None:
        return numbers(*tensors[f"{name}.weight"])
    parts = {
        key: numbers(*tensors[f"{name}.{key}"])
        for key in ("codes", "scale", "zero_point", "global_scale")
        if f"{name}.{key}" in tensors
    }
    scale = parts["scale"].T  # [out, groups]
    kind = scheme.split("-")
    if kind[0].startswith("int"):
        bits = int(kind[0][3:])
        size = int(kind[1][1:]) if kind[1].startswith("g") else None
        columns = scale.shape[1] * size if size else parts["codes"].shape[1] // (4 * bits) * 128
        values = unpacked(parts["codes"], bits, columns).astype(np.float32)
    elif kind[0] == "fp8":
        values = parts["codes"]
    else:
        packed = parts["codes"]
        codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
        codes[:, 0::2], codes[:, 1::2] = packed % 16, packed // 16
        magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes % 8]
        values = np.where(codes >= 8, -magnitude, magnitude)
    if kind[0] == "mxfp4":
        scale = np.exp2(scale.astype(np.float32) - 127)
    if "global_scale" in parts:
        scale = scale / parts["global_scale"]

    def spread(per_scale: np.ndarray) -> np.ndarray:
        tall = np.repeat(per_scale, values.shape[0] // per_scale.shape[0], axis=0)
        return np.repeat(tall, values.shape[1] // per_scale.shape[1], axis=1)

    if "zero_point" in parts:
        values = values - spread(parts["zero_point"].T).astype(np.float32)
    return values * spread(scale)
