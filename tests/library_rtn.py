"""compressed-tensors' own round-to-nearest, as an independent oracle for ours.

The library computes scales and codes in the dtype it is given.  In BF16, which is how llm-compressor calls it on a BF16 model, its
quotients are rounded to BF16 before they are rounded to a code.  In float32 it is as exact as it can be; scales are then rounded to
the BF16 they are stored in before codes are computed.  Either way the result is returned as our own ``QuantizedTensor``, so that
errors of both are measured alike, on the stored numbers.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from quantkit.grid import FP4_VALUES, QuantizedTensor
from quantkit.scheme import BLOCK_SIZE, INTEGERS, Scheme


def library_arguments(scheme: Scheme) -> QuantizationArgs:
    """The library's description of the weights of a scheme."""
    kind = "int" if scheme.number in INTEGERS else "float"
    fields = {"num_bits": scheme.bits, "type": kind, "symmetric": scheme.symmetric, "strategy": scheme.granularity}
    if scheme.granularity == "group":
        fields |= {"group_size": scheme.group_size}
    if scheme.granularity == "block":
        fields |= {"block_structure": [BLOCK_SIZE, BLOCK_SIZE]}
    if scheme.name == "nvfp4":
        fields |= {"strategy": "tensor_group", "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    if scheme.name == "mxfp4":
        fields |= {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    return QuantizationArgs(**fields)


def library_quantize(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """Min-max scales and codes of ``weight`` [out, in], computed by the library in the weight's dtype (BF16 or F32)."""
    arguments = library_arguments(scheme)
    out_features, in_features = weight.shape
    rows, columns = scheme.scale_shape(out_features, in_features)
    if scheme.granularity == "block":
        grouped = weight.reshape(rows, BLOCK_SIZE, columns, BLOCK_SIZE).transpose(1, 2).reshape(rows, columns, -1)
    else:
        grouped = weight.reshape(rows, columns, -1)
    global_scale = generate_gparam(weight.amin(), weight.amax()) if scheme.global_scale else None
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments, global_scale=global_scale)
    if scheme.scale_number == "bf16":
        scale = scale.to(torch.bfloat16).to(weight.dtype)
    codes = quantize(weight, scale, None if scheme.symmetric else zero_point.to(weight.dtype), arguments, global_scale=global_scale)
    return QuantizedTensor(
        scheme,
        _stored_codes(scheme, codes),
        _stored_scale(scheme, scale),
        None if scheme.symmetric else zero_point.to(torch.int8),
        global_scale,
    )


def _stored_codes(scheme: Scheme, values: torch.Tensor) -> torch.Tensor:
    if scheme.number == "fp8":
        return values.to(torch.float8_e4m3fn)
    if scheme.number != "fp4":
        return values.to(torch.int8)
    magnitude = torch.searchsorted(torch.tensor(FP4_VALUES), values.abs().to(torch.float32).contiguous())
    return (magnitude + 8 * torch.signbit(values)).to(torch.uint8)


def _stored_scale(scheme: Scheme, scale: torch.Tensor) -> torch.Tensor:
    if scheme.scale_number == "e8m0":
        return (torch.log2(scale.to(torch.float32)).floor() + 127).to(torch.uint8)
    return scale.to(torch.float8_e4m3fn if scheme.scale_number == "fp8" else torch.bfloat16)
