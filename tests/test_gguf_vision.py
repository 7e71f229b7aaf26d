"""The vision file in llama.cpp's own multimodal loader: it loads, and encodes an image as transformers does.

The library's functions for images are called with ctypes.  Their parameters are passed as an opaque block: the defaults that the
library gives, without GPU.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from quantkit.assignment import vision_type
from quantkit.config import Llama4Config, parse_config
from quantkit.formats.gguf_metadata import text_metadata
from quantkit.formats.gguf_names import place_of
from quantkit.formats.gguf_tokenizer import tokenizer_metadata
from quantkit.formats.gguf_vision import vision_metadata
from quantkit.gguf_header import build_header, parse_header
from quantkit.llama4 import inventory
from tests.llama_cpp import Llama, library

DEMO = Path(__file__).resolve().parent.parent / "demo" / "tiny-scout"
CONFIG = json.loads((DEMO / "config.json").read_text())
IMAGE = 1  # a chunk of a prompt that is an image


class Parameters(Structure):
    _fields_ = [("use_gpu", c_bool), ("rest", c_uint8 * 511)]


class Prompt(Structure):
    _fields_ = [("text", c_char_p), ("length", c_size_t), ("add_special", c_bool), ("parse_special", c_bool)]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "mtmd_context_params_default": (Parameters, []),
    "mtmd_init_from_file": (c_void_p, [c_char_p, c_void_p, Parameters]),
    "mtmd_free": (None, [c_void_p]),
    "mtmd_default_marker": (c_char_p, []),
    "mtmd_bitmap_init": (c_void_p, [c_uint32, c_uint32, c_char_p]),
    "mtmd_bitmap_free": (None, [c_void_p]),
    "mtmd_input_chunks_init": (c_void_p, []),
    "mtmd_input_chunks_free": (None, [c_void_p]),
    "mtmd_input_chunks_size": (c_size_t, [c_void_p]),
    "mtmd_input_chunks_get": (c_void_p, [c_void_p, c_size_t]),
    "mtmd_input_chunk_get_type": (c_int32, [c_void_p]),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, [c_void_p]),
    "mtmd_tokenize": (c_int32, [c_void_p, c_void_p, POINTER(Prompt), POINTER(c_void_p), c_size_t]),
    "mtmd_encode_chunk": (c_int32, [c_void_p, c_void_p]),
    "mtmd_get_output_embd": (POINTER(c_float), [c_void_p]),
}


def functions() -> ctypes.CDLL:
    loaded = library()
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


@pytest.fixture(scope="module")
def config() -> Llama4Config:
    return parse_config(CONFIG)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The demo's vision tower and projector in float32, by the checkpoint's names."""
    files = json.loads((DEMO / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in files.items():
        if name.startswith(("vision_model.", "multi_modal_projector.")):
            with safe_open(DEMO / file, "pt") as opened:
                found[name] = opened.get_tensor(name).float()
    return found


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory, config: Llama4Config) -> Iterator[Llama]:
    """Vocabulary and sizes of the text model, which is all that the loader asks of it."""
    path = tmp_path_factory.mktemp("text") / "text.gguf"
    path.write_bytes(
        build_header(text_metadata(config, model_name="x", file_type=0, tokenizer=tokenizer_metadata(DEMO, config)), [])[0]
    )
    model = Llama(path, vocab_only=True)
    yield model
    model.close()


def vision_file(path: Path, config: Llama4Config, weights: dict[str, torch.Tensor], file_type: str) -> Path:
    names = {tensor.name: place_of(tensor.name).tensor for tensor in inventory(config) if tensor.role in ("vision", "projector")}
    assert set(names) == set(weights)
    kinds = {name: vision_type(name, tuple(weights[name].shape), file_type) or "F32" for name in names}
    planned = [(names[name], kinds[name], tuple(weights[name].shape)) for name in names]
    header, offsets, size = build_header(vision_metadata(config, model_name="tiny-scout", file_type=file_type), planned)
    content = bytearray(size)
    content[: len(header)] = header
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, tensor in weights.items():
        stored = tensor.to(dtypes[kinds[name]]).contiguous().flatten().view(torch.uint8).numpy().tobytes()
        content[offsets[names[name]] : offsets[names[name]] + len(stored)] = stored
    path.write_bytes(content)
    return path


def encoded(path: Path, text_model: Llama, image: np.ndarray[Any, Any], width: int) -> torch.Tensor:
    """What llama.cpp makes of an image ``[height, width, 3]``: float32 ``[tokens, width]``."""
    run = functions()
    parameters = run.mtmd_context_params_default()
    parameters.use_gpu = False
    context = run.mtmd_init_from_file(str(path).encode(), text_model._model, parameters)
    assert context, "the file was refused"
    bitmap, chunks = run.mtmd_bitmap_init(image.shape[1], image.shape[0], image.tobytes()), run.mtmd_input_chunks_init()
    text = b"Hi " + run.mtmd_default_marker()
    bitmaps = (c_void_p * 1)(bitmap)
    assert run.mtmd_tokenize(context, chunks, byref(Prompt(text, len(text), False, True)), bitmaps, 1) == 0
    found = []
    for number in range(run.mtmd_input_chunks_size(chunks)):
        chunk = run.mtmd_input_chunks_get(chunks, number)
        if run.mtmd_input_chunk_get_type(chunk) == IMAGE:
            assert run.mtmd_encode_chunk(context, chunk) == 0
            rows = run.mtmd_input_chunk_get_n_tokens(chunk)
            found.append(np.ctypeslib.as_array(run.mtmd_get_output_embd(context), (rows, width)).copy())
    run.mtmd_input_chunks_free(chunks)
    run.mtmd_bitmap_free(bitmap)
    run.mtmd_free(context)
    [only] = found  # the image is as large as one tile
    return torch.from_numpy(only)


def expected(weights: dict[str, torch.Tensor], image: np.ndarray[Any, Any]) -> torch.Tensor:
    from transformers import Llama4Config as TheirConfig
    from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector, Llama4VisionModel

    theirs = TheirConfig(text_config=CONFIG["text_config"], vision_config=CONFIG["vision_config"])
    theirs.vision_config._attn_implementation = "eager"
    tower, projector = Llama4VisionModel(theirs.vision_config).float(), Llama4MultiModalProjector(theirs).float()
    for module, prefix in ((tower, "vision_model."), (projector, "multi_modal_projector.")):
        module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)})
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        hidden = tower(pixel_values=(pixels - 0.5) / 0.5).last_hidden_state
        return projector(hidden.reshape(-1, hidden.shape[-1]))


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16"])
def test_llama_cpp_sees_what_transformers_sees(
    tmp_path: Path, config: Llama4Config, weights: dict[str, torch.Tensor], text_model: Llama, file_type: str
) -> None:
    assert config.vision is not None
    path = vision_file(tmp_path / "mmproj.gguf", config, weights, file_type)
    assert len(parse_header(path).tensors) == len(weights)
    size = config.vision.image_size
    image = np.random.default_rng(5).integers(0, 256, (size, size, 3), dtype=np.uint8)
    found, reference = encoded(path, text_model, image, config.hidden_size), expected(weights, image)
    side = round(len(reference) ** 0.5)
    # llama.cpp lists the joined patches column by column, transformers row by row
    found = found.reshape(side, side, -1).transpose(0, 1).reshape(reference.shape)
    error = (found - reference).norm() / reference.norm()
    assert error < (1e-2 if file_type == "BF16" else 2e-3)
    assert (found - reference.roll(1, 0)).norm() / reference.norm() > 0.5  # patches differ from each other
