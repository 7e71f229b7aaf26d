"""The fused dequantizers against the plain torch statement, bit for bit, for every scheme."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.formats import ggml_blocks
from quantkit.ggml import TYPES
from quantkit.grid import FLOATING, QuantizedTensor, dequantize, fit_global_scale
from quantkit.kernels.dequantize import dequantize_into
from quantkit.kernels.packing import pack_nibbles, unpack_nibbles
from quantkit.scheme import GGML, Scheme, parse_scheme, scheme_names
from quantkit.team import Team

NAMES = [name for name in scheme_names() if name != "keep"]


def random_bits(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def random_scale(scheme: Scheme, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Any bits at all: NaN, infinite and denormal scales too."""
    size = {"fp8": 1, "e8m0": 1, "bf16": 2}[scheme.scale_number]
    bits = random_bits((shape[0], shape[1] * size), generator)
    return (
        bits
        if scheme.scale_number == "e8m0"
        else bits.view({"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}[scheme.scale_number])
    )


def random_weight(name: str, rows: int, columns: int, seed: int) -> QuantizedTensor:
    scheme, generator = parse_scheme(name), torch.Generator().manual_seed(seed)
    assert scheme is not None
    if scheme.number == "ggml":
        kind = TYPES[name]
        data = random_bits((rows, kind.row_bytes(columns)), generator)
        return ggml_blocks.decode(data, scheme, columns)
    if scheme.number == "fp8":
        codes = random_bits((rows, columns), generator).view(torch.float8_e4m3fn)
    elif scheme.number == "fp4":
        codes = random_bits((rows, columns), generator) & 15
    else:
        half = 2 ** (scheme.bits - 1)
        codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)
    shape = scheme.scale_shape(rows, columns)
    half = 2 ** (min(scheme.bits, 8) - 1)
    zero_point = None if scheme.symmetric else torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)
    divisor = fit_global_scale(0.7) if scheme.global_scale else None
    return QuantizedTensor(scheme, codes, random_scale(scheme, shape, generator), zero_point, divisor)


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Any NaN equals any other."""
    return bool(((found.view(torch.int32) == wanted.contiguous().view(torch.int32)) | (found.isnan() & wanted.isnan())).all())


def columns_of(name: str, some: int) -> int:
    scheme = parse_scheme(name)
    assert scheme is not None
    if scheme.granularity == "group" or scheme.granularity == "block":
        return some * (scheme.group_size or 128)
    return some * 8 if scheme.number not in ("fp8", "int8") else some * 8 + 3


@pytest.mark.parametrize("name", [*NAMES, *GGML])
@settings(max_examples=8, deadline=None)
@given(some=st.integers(1, 3), rows=st.sampled_from([8, 128, 256]), seed=st.integers(0, 2**31))
def test_equals_the_plain_statement(name: str, some: int, rows: int, seed: int) -> None:
    quantized = random_weight(name, rows, columns_of(name, some), seed)
    if quantized.scheme.granularity == "block":
        rows = max(rows, 128)
        quantized = random_weight(name, rows, columns_of(name, some), seed)
    wanted = dequantize(quantized)
    out = torch.full_like(wanted, 7.0, memory_format=torch.contiguous_format)
    dequantize_into(quantized, out)
    assert same_bits(out, wanted)
    part = slice(seed % rows, seed % rows + 1 + seed % (rows - seed % rows))
    out = torch.full_like(wanted[part], 7.0, memory_format=torch.contiguous_format)
    dequantize_into(quantized, out, part)
    assert same_bits(out, wanted[part])


@pytest.mark.parametrize("name", ["int4-g32-asym", "fp8-block-dynamic", "Q4_K", "IQ2_S", "BF16"])
def test_threads_share_a_matrix(name: str) -> None:
    quantized = random_weight(name, 256, 512, 1)
    out = torch.empty(256, 512)
    with Team(3) as team:
        dequantize_into(quantized, out, team=team)
    assert same_bits(out, dequantize(quantized))


def test_codes_that_are_not_contiguous() -> None:
    quantized = random_weight("int8-channel-dynamic", 40, 24, 1)
    turned = QuantizedTensor(quantized.scheme, quantized.codes.t().contiguous().t(), quantized.scale)
    out = torch.empty(40, 24)
    dequantize_into(turned, out)
    assert same_bits(out, dequantize(quantized))


@pytest.mark.parametrize("name", ["int4-g128", "Q4_K"])
def test_a_buffer_that_does_not_fit_is_an_error(name: str) -> None:
    quantized = random_weight(name, 8, 256, 1)
    wrong = [
        torch.empty(8, 128),
        torch.empty(7, 256),
        torch.empty(8, 256, dtype=torch.float64),
        torch.empty(256, 8).t(),
        torch.empty(8, 512)[:, :256],
    ]
    for out in wrong:
        with pytest.raises(ValueError, match="expected contiguous float32"):
            dequantize_into(quantized, out)
    with pytest.raises(ValueError, match="rows 2 to 4"):
        dequantize_into(quantized, torch.empty(3, 256), slice(2, 4))


def test_no_rows() -> None:
    quantized = random_weight("int4-g128", 8, 256, 1)
    around = torch.full((3, 256), 7.0)
    dequantize_into(quantized, around[1:1], slice(3, 3))
    assert bool((around == 7.0).all())


def test_floating_types_are_copied() -> None:
    assert set(FLOATING) <= set(GGML)
    quantized = random_weight("F16", 4, 32, 5)
    out = torch.empty(4, 32)
    dequantize_into(quantized, out)
    assert same_bits(out, quantized.codes.float())


@settings(deadline=None)
@given(st.binary(max_size=70), st.booleans())
def test_nibbles(data: bytes, signed: bool) -> None:
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    wanted = torch.stack([packed & 15, packed >> 4], 1).reshape(-1)
    found = torch.from_numpy(unpack_nibbles(packed.numpy(), signed=signed))
    assert torch.equal(found, wanted - 8 if signed else wanted)
    whole = found.numel() // 8 * 8
    again = torch.empty(whole // 2, dtype=torch.uint8)
    pack_nibbles(found[:whole].numpy(), again.numpy(), signed=signed)
    assert torch.equal(again, packed[: whole // 2])
