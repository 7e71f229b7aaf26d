"""The codebook types' numbers and bytes, against the gguf package and llama.cpp's library."""

from __future__ import annotations

import dataclasses
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.codebooks import CODEBOOKS, dequantize_codebook, grid_digits
from quantkit.errors import ArtifactError
from quantkit.formats.ggml_codebooks import decode_codebook, encode_codebook
from quantkit.ggml import TYPES
from quantkit.grid import QuantizedTensor
from quantkit.scheme import Scheme, parse_scheme

COLUMNS = 512
NAMES = sorted(CODEBOOKS)


def scheme_of(name: str) -> Scheme:
    scheme = parse_scheme(name)
    assert scheme is not None
    return scheme


def random_bytes(name: str, rows: int, seed: int = 0) -> torch.Tensor:
    shape = rows, TYPES[name].row_bytes(COLUMNS)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def values_of(quantized: QuantizedTensor) -> np.ndarray[Any, Any]:
    assert quantized.group_scale is not None
    return dequantize_codebook(quantized.scheme.name, quantized.codes, quantized.scale, quantized.group_scale).numpy()


def same_bits(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Equal bit for bit, where a NaN equals every NaN."""
    return bool(((one.view(np.int32) == other.view(np.int32)) | (np.isnan(one) & np.isnan(other))).all())


@pytest.mark.parametrize("name", NAMES)
def test_codebooks_agree_with_the_types(name: str) -> None:
    book, kind = CODEBOOKS[name], TYPES[name]
    assert kind.codebook and kind.group == book.group
    points = grid_digits(name)
    assert points.shape == getattr(gguf.quants, name).grid_shape
    assert points.shape[1] == book.length and points.max() == len(book.levels) - 1
    assert len(np.unique(points, axis=0)) == len(points)  # else bytes could not be restored from codes


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_mean_what_others_say(name: str) -> None:
    data = random_bytes(name, 8)
    values = values_of(decode_codebook(data, scheme_of(name), COLUMNS))
    with np.errstate(invalid="ignore"):
        assert same_bits(values, gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))
    assert same_bits(values, llama_cpp.ggml_dequantize(name, data.numpy(), COLUMNS))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_bytes_come_back(name: str, data: st.DataObject) -> None:
    nbytes = TYPES[name].nbytes
    raw = data.draw(st.lists(st.binary(min_size=nbytes, max_size=nbytes), min_size=1, max_size=3))
    source = torch.tensor([list(block) for block in raw], dtype=torch.uint8)
    quantized = decode_codebook(source, scheme_of(name), 256)
    assert torch.equal(encode_codebook(quantized), source)
    out = np.zeros(source.numel(), np.uint8)
    assert torch.equal(encode_codebook(quantized, out), source)
    assert np.array_equal(out, source.numpy().reshape(-1))


@pytest.mark.parametrize("name", NAMES)
def test_views_without_padding_can_be_encoded(name: str) -> None:
    data = random_bytes(name, 4)
    whole = decode_codebook(data, scheme_of(name), COLUMNS)
    assert whole.group_scale is not None
    half = QuantizedTensor(
        whole.scheme, whole.codes[:3, :256], whole.scale[:3, :1], group_scale=whole.group_scale[:3, : 256 // CODEBOOKS[name].group]
    )
    assert torch.equal(encode_codebook(half), data[:3, : TYPES[name].nbytes])


@pytest.mark.parametrize("name", NAMES)
def test_what_a_type_cannot_hold_is_refused(name: str) -> None:
    quantized = decode_codebook(random_bytes(name, 2), scheme_of(name), COLUMNS)
    assert quantized.group_scale is not None

    def refused(changed: QuantizedTensor) -> None:
        with pytest.raises(ValueError, match="row 1, block 1"):
            encode_codebook(changed)

    codes = quantized.codes.clone()
    codes[1, 300] = 77  # a level of no type
    refused(dataclasses.replace(quantized, codes=codes))
    groups = quantized.group_scale.clone()
    groups[1, -1] = CODEBOOKS[name].highest + 1
    refused(dataclasses.replace(quantized, group_scale=groups))
    if CODEBOOKS[name].signs == "even":
        codes = quantized.codes.clone()
        codes[1, 300] *= -1
        refused(dataclasses.replace(quantized, codes=codes))
    missing = missing_point(name)
    codes = quantized.codes.clone()
    codes[1, 256 : 256 + len(missing)] = missing * (codes[1, 256 : 256 + len(missing)].sign() if missing[0] > 0 else 1)
    refused(dataclasses.replace(quantized, codes=codes))


def missing_point(name: str) -> torch.Tensor:
    """Codes of a combination of levels that the grid does not hold."""
    book = CODEBOOKS[name]
    held = {tuple(point) for point in grid_digits(name).tolist()}
    digits = next(
        point for point in np.ndindex(*(len(book.levels),) * book.length) if point not in held
    )  # some of the combinations are always missing
    return torch.tensor([book.levels[digit] + (1 if book.shifted else 0) for digit in digits], dtype=torch.int8)


def test_sizes_that_do_not_fit() -> None:
    scheme = scheme_of("IQ3_S")
    with pytest.raises(ArtifactError, match="220 bytes"):
        decode_codebook(torch.zeros(2, 219, dtype=torch.uint8), scheme, COLUMNS)
    with pytest.raises(ArtifactError, match="blocks of 256"):
        decode_codebook(torch.zeros(2, 110, dtype=torch.uint8), scheme, 128)
    quantized = decode_codebook(torch.zeros(2, 220, dtype=torch.uint8), scheme, COLUMNS)
    with pytest.raises(ValueError, match="2 x 220"):
        encode_codebook(quantized, np.zeros(439, np.uint8))
    with pytest.raises(ValueError, match="do not fit"):
        encode_codebook(dataclasses.replace(quantized, scale=quantized.scale[:, :1]))
