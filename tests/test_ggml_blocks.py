"""llama.cpp's blocks as bytes, against the decoder of the ``gguf`` package and llama.cpp's own library."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import grid
from quantkit.errors import ArtifactError
from quantkit.formats.ggml_blocks import FLOATING, decode, encode
from quantkit.formats.ggml_codebooks import decode_codebook
from quantkit.ggml import TYPES
from quantkit.grid import QuantizedTensor
from quantkit.kernels.ggml_packing import LAYOUTS
from quantkit.scheme import Scheme, parse_scheme
from tests.llama_cpp import ggml_dequantize, ggml_quantize

PACKED = sorted(LAYOUTS)
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# Where each block has FP16 numbers, from the structures of ggml-common.h.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}


def scheme_of(name: str) -> Scheme:
    scheme = parse_scheme(name)
    assert scheme is not None
    return scheme


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> Bytes:
    """Rows of random bytes with finite FP16 numbers in their places."""
    generator = np.random.default_rng(seed)
    kind = TYPES[name]
    data = generator.integers(0, 256, (rows, blocks, kind.nbytes), dtype=np.uint8)
    for place in HALVES[name]:
        numbers = generator.standard_normal((rows, blocks, 1)).astype(np.float16)
        data[:, :, place : place + 2] = numbers.view(np.uint8)
    if name == "MXFP4":
        data[:, :, 0] = generator.integers(100, 150, (rows, blocks))
    return data.reshape(rows, blocks * kind.nbytes)


def decoded_by_gguf(name: str, data: Bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])


def same_bits(actual: torch.Tensor, expected: np.ndarray[Any, Any]) -> bool:
    return actual.dtype == torch.float32 and np.array_equal(actual.numpy().view(np.int32), expected.view(np.int32))


def test_every_type_without_codebook_is_packed() -> None:
    plain = {name for name, kind in TYPES.items() if not kind.codebook and not kind.floating}
    assert plain == set(PACKED)
    assert set(FLOATING) == {name for name, kind in TYPES.items() if kind.floating}


@pytest.mark.parametrize("name", PACKED)
def test_random_blocks_mean_what_gguf_and_llama_cpp_say(name: str) -> None:
    columns = 768
    data = random_blocks(name, 70, columns // TYPES[name].block)  # more than the kernel packs at a stretch
    quantized = decode(torch.from_numpy(data), scheme_of(name), columns)
    values = grid.dequantize(quantized)
    assert same_bits(values, decoded_by_gguf(name, data))
    assert np.array_equal(values.numpy(), ggml_dequantize(name, data, columns))
    assert np.array_equal(encode(quantized).numpy(), data)


@pytest.mark.parametrize("name", PACKED)
def test_fields_have_the_dtypes_shapes_and_ranges_of_the_type(name: str) -> None:
    kind, rows, columns = TYPES[name], 16, 2 * TYPES[name].block
    quantized = decode(torch.from_numpy(random_blocks(name, rows, 2)), scheme_of(name), columns)
    assert quantized.codes.dtype == torch.int8 and quantized.codes.shape == (rows, columns)
    if name != "Q8_0":  # random bytes hold every code; in Q8_0 also -128, which no quantizer writes
        assert (int(quantized.codes.min()), int(quantized.codes.max())) == kind.codes
    assert quantized.scale.dtype == (torch.uint8 if name == "MXFP4" else torch.float16)
    assert quantized.scale.shape == (rows, columns // kind.block)
    assert (quantized.minimum is not None) == kind.minimum
    assert (quantized.group_scale is not None) == bool(kind.group)
    assert (quantized.group_minimum is not None) == bool(kind.group and kind.minimum)
    if quantized.group_scale is not None:
        assert quantized.group_scale.dtype == torch.int8 and quantized.group_scale.shape == (rows, columns // kind.group)
        low, high = kind.group_scales
        assert low <= int(quantized.group_scale.min()) and int(quantized.group_scale.max()) <= high


@pytest.mark.parametrize("name", PACKED)
def test_what_ggml_quantized_is_encoded_unchanged(name: str) -> None:
    weights = np.random.default_rng(3).standard_normal((7, 512)).astype(np.float32)
    weights[2] = 0
    data = ggml_quantize(name, weights)
    quantized = decode(torch.from_numpy(data), scheme_of(name), 512)
    assert np.array_equal(encode(quantized).numpy(), data)
    assert np.array_equal(grid.dequantize(quantized).numpy(), ggml_dequantize(name, data, 512))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PACKED), st.integers(0, 4), st.integers(0, 70), st.data())
def test_any_bytes_survive_a_round_trip(name: str, rows: int, blocks: int, draw: st.DataObject) -> None:
    blocks = blocks if TYPES[name].block == 32 else blocks // 8
    row = blocks * TYPES[name].nbytes
    data = np.frombuffer(draw.draw(st.binary(min_size=rows * row, max_size=rows * row)), np.uint8).reshape(rows, row)
    quantized = decode(torch.from_numpy(data.copy()), scheme_of(name), blocks * TYPES[name].block)
    assert np.array_equal(encode(quantized).numpy(), data)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PACKED), st.integers(0, 2**32 - 1))
def test_any_codes_survive_a_round_trip(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kind, rows, columns = TYPES[name], 3, 768

    def integers(low: int, high: int, size: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (rows, columns // size), generator=generator, dtype=torch.int8)

    def halves() -> torch.Tensor:
        return torch.randn(rows, columns // kind.block, generator=generator).to(torch.float16)

    exponents = torch.randint(0, 250, (rows, columns // kind.block), generator=generator, dtype=torch.uint8)
    expected = QuantizedTensor(
        scheme_of(name),
        integers(*kind.codes, 1),
        exponents if name == "MXFP4" else halves(),
        minimum=halves() if kind.minimum else None,
        group_scale=integers(*kind.group_scales, kind.group) if kind.group else None,
        group_minimum=integers(0, kind.group_scales[1], kind.group) if kind.group and kind.minimum else None,
    )
    data = encode(expected)
    actual = decode(data, expected.scheme, columns)
    for field in ("codes", "scale", "minimum", "group_scale", "group_minimum"):
        one, other = getattr(actual, field), getattr(expected, field)
        assert (one is None and other is None) or torch.equal(one, other)
    assert same_bits(grid.dequantize(expected), decoded_by_gguf(name, data.numpy()))


@pytest.mark.parametrize("name", sorted(name for name, kind in TYPES.items() if kind.codebook))
def test_types_with_a_codebook_are_handed_on(name: str) -> None:
    data = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (3, TYPES[name].row_bytes(512)), dtype=np.uint8))
    quantized = decode(data, scheme_of(name), 512)
    assert torch.equal(quantized.codes, decode_codebook(data, scheme_of(name), 512).codes)
    buffer = np.empty(data.numel(), np.uint8)
    assert torch.equal(encode(quantized, buffer), data)
    assert np.array_equal(buffer, data.numpy().reshape(-1))


@pytest.mark.parametrize("name", sorted(FLOATING))
def test_floating_types_are_their_own_bytes(name: str) -> None:
    weight = torch.randn(6, 40).to(FLOATING[name])
    data = encode(QuantizedTensor(scheme_of(name), weight, torch.empty(0)))
    assert data.numpy().tobytes() == weight.view(torch.uint8).numpy().tobytes()
    decoded = decode(data, scheme_of(name), 40)
    assert torch.equal(decoded.codes, weight)
    assert same_bits(grid.dequantize(decoded), decoded_by_gguf(name, data.numpy()))
    assert np.array_equal(grid.dequantize(decoded).numpy(), weight.to(torch.float32).numpy())


def test_strided_codes_and_a_buffer_of_the_caller() -> None:
    quantized = decode(torch.from_numpy(random_blocks("Q4_K", 4, 2)), scheme_of("Q4_K"), 512)
    strided = QuantizedTensor(
        quantized.scheme,
        quantized.codes.T.contiguous().T,
        quantized.scale,
        minimum=quantized.minimum,
        group_scale=quantized.group_scale,
        group_minimum=quantized.group_minimum,
    )
    buffer = np.full(4 * 288 + 2, 7, np.uint8)
    encoded = encode(strided, buffer[1:-1])
    assert encoded.shape == (4, 288)
    assert np.shares_memory(encoded.numpy(), buffer)
    assert buffer[0] == buffer[-1] == 7
    assert torch.equal(encoded, encode(quantized))


@pytest.mark.parametrize("name", [*PACKED, *FLOATING])
def test_data_of_another_size_is_refused(name: str) -> None:
    kind, scheme = TYPES[name], scheme_of(name)
    row = kind.row_bytes(512)
    good = torch.zeros(2, row, dtype=torch.uint8)
    for data, columns in (
        (good[:, :-1], 512),
        (good, 512 - kind.block),
        (good, 512 + kind.block),
        (good.reshape(-1), 512),
        (good.to(torch.int32), 512),
        (good, -512),
    ):
        with pytest.raises(ArtifactError, match=rf"{name}.*write it again"):
            decode(data, scheme, columns)
    if kind.block > 1:
        with pytest.raises(ArtifactError, match="blocks of"):
            decode(good, scheme, 513)


def test_a_buffer_or_a_field_of_another_size_is_refused() -> None:
    quantized = decode(torch.zeros(2, 18, dtype=torch.uint8), scheme_of("Q4_0"), 32)
    buffers: list[Any] = [np.empty(35, np.uint8), np.empty((2, 18), np.int8), np.empty((2, 36), np.uint8)[:, ::2]]
    for out in buffers:
        with pytest.raises(ValueError, match="contiguous bytes"):
            encode(quantized, out)
    with pytest.raises(ValueError, match="expected"):
        encode(QuantizedTensor(quantized.scheme, quantized.codes, quantized.scale[:1]))
