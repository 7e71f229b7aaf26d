"""llama.cpp's tensor types as bytes: encoder and decoder of every type in :mod:`quantkit.ggml`.

A row of weights is a sequence of whole blocks, a matrix a sequence of rows, so the bytes of some rows do not depend on the others:
an expert is encoded by itself and written at its place in the stacked tensor.  Types of plain codes and scales are packed by
:mod:`quantkit.kernels.ggml_packing`; those with a codebook by ``ggml_codebooks``; floating types are their own bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from quantkit.formats.ggml_codebooks import check_rows, decode_codebook, encode_codebook, memory_for
from quantkit.ggml import BlockType
from quantkit.grid import FLOATING, QuantizedTensor
from quantkit.kernels.ggml_packing import LAYOUTS, Fields, pack, unpack
from quantkit.scheme import Scheme

Bytes = npt.NDArray[np.uint8]


def encode(quantized: QuantizedTensor, out: Bytes | None = None) -> torch.Tensor:
    """The bytes of a weight ``[out, in]``: uint8 ``[out, row bytes]``.

    out: contiguous memory of exactly that many bytes to fill, of any shape; allocated when None.  Raises ValueError when it, or a
    tensor of ``quantized``, has another size.
    """
    kind = quantized.scheme.block_type
    if kind.codebook:
        return encode_codebook(quantized, out)
    target = memory_for(quantized, out)
    flat = target.reshape(-1)
    if kind.floating:
        np.copyto(flat, _bytes(quantized.codes))
    else:
        pack(LAYOUTS[kind.name], _fields(quantized), flat)
    return torch.from_numpy(target)


def decode(data: torch.Tensor, scheme: Scheme, columns: int) -> QuantizedTensor:
    """Codes and scales from uint8 ``[rows, row bytes]``; ``columns`` weights a row.  The reverse of :func:`encode`.

    Raises ArtifactError when the bytes are not rows of so many weights.
    """
    kind = scheme.block_type
    if kind.codebook:
        return decode_codebook(data, scheme, columns)
    check_rows(data, kind, columns)
    rows, data = data.shape[0], data.contiguous()
    if kind.floating:
        return QuantizedTensor(scheme, data.reshape(-1).view(FLOATING[kind.name]).reshape(rows, columns), torch.empty(0))
    return _unpacked(data, scheme, kind, rows, columns)


def _unpacked(data: torch.Tensor, scheme: Scheme, kind: BlockType, rows: int, columns: int) -> QuantizedTensor:
    """Decode a type that is packed here."""
    blocks, groups = columns // kind.block, columns // kind.group if kind.group else 0
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, blocks, dtype=torch.uint8 if scheme.scale_number == "e8m0" else torch.float16)
    minimum = torch.empty(rows, blocks, dtype=torch.float16) if kind.minimum else None
    group_scale = torch.empty(rows, groups, dtype=torch.int8) if kind.group else None
    group_minimum = torch.empty(rows, groups, dtype=torch.int8) if kind.group and kind.minimum else None
    quantized = QuantizedTensor(scheme, codes, scale, group_scale=group_scale, minimum=minimum, group_minimum=group_minimum)
    unpack(LAYOUTS[kind.name], _bytes(data), _fields(quantized))  # into the memory of these tensors
    return quantized


def _fields(quantized: QuantizedTensor) -> Fields:
    return Fields(
        _bytes(quantized.codes),
        _bytes(quantized.scale),
        _bytes(quantized.minimum),
        _bytes(quantized.group_scale),
        _bytes(quantized.group_minimum),
    )


def _bytes(tensor: torch.Tensor | None) -> Bytes:
    """The memory of a tensor, copied only where it is not contiguous; nothing for None."""
    if tensor is None:
        return np.empty(0, np.uint8)
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
