"""ggml's codebook types as bytes: encoder and decoder of the ``IQ1``, ``IQ2`` and ``IQ3`` types.

A decoded tensor has for codes the signed levels of :mod:`quantkit.codebooks` and for group scales the stored whole numbers; its
group_minimum is None, also for the types whose levels are moved, since the codes tell which way.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit.errors import ArtifactError
from quantkit.ggml import BlockType
from quantkit.grid import QuantizedTensor
from quantkit.kernels.ggml_codebook_packing import pack_blocks, packing_tables, unpack_blocks
from quantkit.scheme import Scheme


def memory_for(quantized: QuantizedTensor, out: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """``out``, or new memory when None, as uint8 ``[rows, row bytes]``.  Raises ValueError when it does not fit."""
    kind, (rows, columns) = quantized.scheme.block_type, quantized.codes.shape
    shape = rows, kind.row_bytes(columns)
    target = np.empty(shape, np.uint8) if out is None else out
    if target.dtype != np.uint8 or not target.flags.c_contiguous or target.size != shape[0] * shape[1] or columns % kind.block:
        raise ValueError(
            f"{kind.name} of {columns} columns takes {shape[0]} x {shape[1]} contiguous bytes, got {target.dtype} {target.shape}"
        )
    return target.reshape(shape)


def check_rows(data: torch.Tensor, kind: BlockType, columns: int) -> None:
    """Raise ArtifactError when ``data`` is not uint8 ``[rows, row bytes]`` of ``columns`` weights a row."""
    fits = data.dtype == torch.uint8 and data.ndim == 2 and columns >= 0 and columns % kind.block == 0
    if not fits or data.shape[1] != kind.row_bytes(columns):
        raise ArtifactError(
            f"data of type {kind.name} is {data.dtype} {list(data.shape)}; rows of {columns} weights, in blocks of {kind.block}, "
            f"take {kind.row_bytes(columns)} bytes. The file is damaged or was written by another program; write it again."
        )


def encode_codebook(quantized: QuantizedTensor, out: NDArray[np.uint8] | None = None) -> torch.Tensor:
    """The bytes of a weight ``[out, in]`` of a codebook type: uint8 ``[out, row bytes]``.

    out: contiguous memory of exactly that many bytes to fill, of any shape; allocated when None.  Raises ValueError when it has
    another size, or when codes are no point of the type's grid or signs or group scales are not those it can hold.
    """
    kind = quantized.scheme.block_type
    rows, columns = quantized.codes.shape
    target = memory_for(quantized, out)
    assert quantized.group_scale is not None
    codes, scales, groups = (
        tensor.contiguous().view(dtype).numpy().reshape(-1)
        for tensor, dtype in ((quantized.codes, torch.int8), (quantized.scale, torch.uint16), (quantized.group_scale, torch.int8))
    )
    blocks = rows * (columns // kind.block)
    if codes.size != blocks * kind.block or scales.size != blocks or groups.size != blocks * (kind.block // kind.group):
        raise ValueError(
            f"{kind.name} {rows} x {columns}: {scales.size} scales and {groups.size} group scales do not fit the codes"
        )
    bad = pack_blocks(packing_tables(kind.name), codes, scales, groups, kind.nbytes, target.reshape(-1), 0, blocks)
    if bad >= 0:
        row, block = divmod(int(bad), columns // kind.block)
        raise ValueError(
            f"row {row}, block {block}: codes, signs or group scales that {kind.name} cannot hold; they were not made for this type"
        )
    return torch.from_numpy(target)


def decode_codebook(data: torch.Tensor, scheme: Scheme, columns: int) -> QuantizedTensor:
    """Codes and scales from uint8 ``[rows, row bytes]``; ``columns`` weights a row.  The reverse of :func:`encode_codebook`.

    Raises ArtifactError when the bytes are not rows of so many weights.
    """
    kind = scheme.block_type
    check_rows(data, kind, columns)
    rows, blocks = data.shape[0], data.shape[0] * (columns // kind.block)
    codes, scales = np.empty(rows * columns, np.int8), np.empty(blocks, np.uint16)
    groups = np.empty(rows * columns // kind.group, np.int8)
    flat = data.contiguous().numpy().reshape(-1)
    unpack_blocks(packing_tables(kind.name), flat, kind.nbytes, codes, scales, groups, 0, blocks)
    return QuantizedTensor(
        scheme,
        codes=torch.from_numpy(codes).reshape(rows, columns),
        scale=torch.from_numpy(scales).view(torch.float16).reshape(rows, columns // kind.block),
        group_scale=torch.from_numpy(groups).reshape(rows, columns // kind.group),
    )
