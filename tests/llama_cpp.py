"""llama.cpp itself as an oracle: its C functions, called in the library that the PyPI wheel ``xllamacpp`` brings.

The layouts of the structures below belong to one build, so ``pyproject.toml`` pins that version of the wheel.  A GGUF is opened on
the CPU, with a float32 cache for keys and values and without flash attention, so that little is rounded beside the weights.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.ggml import TYPES

FLOATS = POINTER(c_float)


class ModelParameters(Structure):
    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buffer_overrides", c_void_p),
        ("gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_data", c_void_p),
        ("overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_buffers", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class ContextParameters(Structure):
    _fields_ = [
        *((name, c_uint32) for name in ("context", "batch", "ubatch", "sequences", "rs_sequences", "outputs", "sequence_outputs")),
        *((name, c_int32) for name in ("threads", "threads_batch", "kind", "rope_scaling")),
        *((name, c_int32) for name in ("pooling", "attention", "flash_attention")),
        *((name, c_float) for name in ("rope_base", "rope_scale", "yarn_ext", "yarn_attn", "yarn_fast", "yarn_slow")),
        ("yarn_context", c_uint32),
        ("defragmentation", c_float),
        ("evaluation_callback", c_void_p),
        ("evaluation_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_performance", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("sampler_count", c_size_t),
        ("other", c_void_p),
    ]


class Batch(Structure):
    _fields_ = [
        ("count", c_int32),
        ("tokens", POINTER(c_int32)),
        ("embeddings", c_void_p),
        ("positions", POINTER(c_int32)),
        ("sequence_counts", POINTER(c_int32)),
        ("sequences", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


class VisionParameters(Structure):
    _fields_ = [
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("threads", c_int32),
        ("image_marker", c_char_p),
        ("media_marker", c_char_p),
        ("flash_attention", c_int32),
        ("warm_up", c_bool),
        ("least_tokens", c_int32),
        ("most_tokens", c_int32),
        ("evaluation_callback", c_void_p),
        ("evaluation_data", c_void_p),
        ("batch_tokens", c_int32),
        ("progress_callback", c_void_p),
        ("progress_data", c_void_p),
    ]


class VisionText(Structure):
    _fields_ = [("text", c_char_p), ("length", c_size_t), ("add_special", c_bool), ("parse_special", c_bool)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParameters, []),
    "llama_context_default_params": (ContextParameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParameters]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParameters]),
    "llama_free": (None, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (FLOATS, [c_void_p, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int32, FLOATS, c_void_p, c_int64, c_int64, c_int64, FLOATS]),
    "ggml_quantize_requires_imatrix": (c_bool, [c_int32]),
    "llama_model_n_embd": (c_int32, [c_void_p]),
    "mtmd_log_set": (None, [c_void_p, c_void_p]),
    "mtmd_context_params_default": (VisionParameters, []),
    "mtmd_init_from_file": (c_void_p, [c_char_p, c_void_p, VisionParameters]),
    "mtmd_free": (None, [c_void_p]),
    "mtmd_default_marker": (c_char_p, []),
    "mtmd_bitmap_init": (c_void_p, [c_uint32, c_uint32, c_void_p]),
    "mtmd_bitmap_free": (None, [c_void_p]),
    "mtmd_input_chunks_init": (c_void_p, []),
    "mtmd_input_chunks_size": (c_size_t, [c_void_p]),
    "mtmd_input_chunks_get": (c_void_p, [c_void_p, c_size_t]),
    "mtmd_input_chunks_free": (None, [c_void_p]),
    "mtmd_input_chunk_get_type": (c_int32, [c_void_p]),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, [c_void_p]),
    "mtmd_tokenize": (c_int32, [c_void_p, c_void_p, POINTER(VisionText), POINTER(c_void_p), c_size_t]),
    "mtmd_encode_chunk": (c_int32, [c_void_p, c_void_p]),
    "mtmd_get_output_embd": (FLOATS, [c_void_p]),
}
_IMAGE_CHUNK = 1
_messages: list[str] = []


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def _collect(_level: int, text: bytes, _data: int) -> None:
    _messages.append(text.decode("utf-8", "replace"))


@functools.cache
def library() -> ctypes.CDLL:
    """The library, with the signatures above; its log goes to :func:`messages`."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    [path] = Path(spec.origin).parent.glob("*.so")
    loaded = ctypes.CDLL(str(path), mode=os.RTLD_LAZY | os.RTLD_LOCAL)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.llama_log_set(_collect, None)
    loaded.ggml_log_set(_collect, None)
    loaded.mtmd_log_set(_collect, None)
    loaded.llama_backend_init()
    if hasattr(loaded, "ggml_backend_load_all"):
        loaded.ggml_backend_load_all()
    return loaded


def messages() -> str:
    """What the library has logged so far."""
    return "".join(_messages)


def ggml_quantize(kind: str, weights: np.ndarray[Any, Any], importance: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    """ggml's own quantizer: float32 ``[rows, columns]`` to uint8 ``[rows, row bytes]``.  importance: ``[columns]``."""
    rows, columns = weights.shape
    source = np.ascontiguousarray(weights, np.float32)
    out = np.zeros((rows, TYPES[kind].row_bytes(columns)), np.uint8)
    weighting = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data_as(FLOATS)
    data = source.ctypes.data_as(FLOATS)
    written = library().ggml_quantize_chunk(TYPES[kind].id, data, out.ctypes.data, 0, rows, columns, weighting)
    assert written == out.size
    return out


_DEQUANTIZE = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}


def ggml_dequantize(kind: str, data: np.ndarray[Any, Any], columns: int) -> np.ndarray[Any, Any]:
    """ggml's own decoder: uint8 ``[rows, row bytes]`` to float32 ``[rows, columns]``."""
    out = np.zeros((len(data), columns), np.float32)
    name = _DEQUANTIZE.get(kind) or "dequantize_row_" + (kind.lower() if kind.startswith(("IQ", "MX")) else f"q{kind[1:]}")
    function = getattr(library(), name)
    function.restype, function.argtypes = None, [c_void_p, c_void_p, c_int64]
    source = np.ascontiguousarray(data)
    function(source.ctypes.data, out.ctypes.data, out.size)
    return out


def ggml_requires_importance(kind: str) -> bool:
    """Whether ggml refuses to quantize to this type without importance."""
    return bool(library().ggml_quantize_requires_imatrix(TYPES[kind].id))


class Llama:
    """A GGUF file opened by llama.cpp.  Raises RuntimeError with its log when it refuses the file."""

    def __init__(self, path: Path | str, context: int = 512, threads: int = 2, vocab_only: bool = False) -> None:
        self._library, self._context = library(), None
        before = len(_messages)
        parameters = self._library.llama_model_default_params()
        parameters.gpu_layers, parameters.vocab_only, parameters.check_tensors = 0, vocab_only, not vocab_only
        self._model = self._library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError("".join(_messages[before:]))
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.vocabulary_size = self._library.llama_vocab_n_tokens(self._vocabulary)
        if not vocab_only:
            settings = self._library.llama_context_default_params()
            settings.context = settings.batch = settings.ubatch = context
            settings.threads = settings.threads_batch = threads
            settings.type_k = settings.type_v = settings.flash_attention = 0
            self._context = self._library.llama_init_from_model(self._model, settings)
            if not self._context:
                raise RuntimeError("".join(_messages[before:]))

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits float32 ``[tokens, vocabulary]`` of one window that begins at position 0."""
        run = self._library
        run.llama_memory_clear(run.llama_get_memory(self._context), True)
        batch = run.llama_batch_init(len(ids), 0, 1)
        batch.count = len(ids)
        for position, token in enumerate(ids):
            batch.tokens[position], batch.positions[position] = int(token), position
            batch.sequence_counts[position], batch.sequences[position][0], batch.logits[position] = 1, 0, 1
        assert run.llama_decode(self._context, batch) == 0
        rows = [
            np.ctypeslib.as_array(run.llama_get_logits_ith(self._context, row), (self.vocabulary_size,)).copy()
            for row in range(len(ids))
        ]
        run.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text.  parse_special: texts of special tokens become these tokens."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), add_special, parse_special)
        assert count >= 0
        return list(ids[:count])

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        size = 64 * len(ids) + 64
        buffer = ctypes.create_string_buffer(size)
        count = self._library.llama_detokenize(self._vocabulary, (c_int32 * len(ids))(*ids), len(ids), buffer, size, False, True)
        assert count >= 0
        return buffer.raw[:count].decode()

    def is_end_of_generation(self, token: int) -> bool:
        """Whether generation stops at this token."""
        return bool(self._library.llama_vocab_is_eog(self._vocabulary, token))

    def adds_bos(self) -> bool:
        """Whether tokenizing with special tokens begins with the begin-of-text token."""
        return bool(self._library.llama_vocab_get_add_bos(self._vocabulary))

    def chat_template(self) -> str | None:
        """The chat template in the file."""
        found = self._library.llama_model_chat_template(self._model, None)
        return None if found is None else found.decode()

    def close(self) -> None:
        """Free model and context."""
        if self._context:
            self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
        self._context = self._model = None


class Vision:
    """A vision file opened beside the text model that it belongs to.  Raises RuntimeError with the log when it is refused."""

    def __init__(self, path: Path | str, text_model: Llama, threads: int = 2) -> None:
        self._library = library()
        before = len(_messages)
        self.width = self._library.llama_model_n_embd(text_model._model)
        parameters = self._library.mtmd_context_params_default()
        parameters.use_gpu, parameters.threads, parameters.flash_attention, parameters.warm_up = False, threads, 0, False
        self._context = self._library.mtmd_init_from_file(str(path).encode(), text_model._model, parameters)
        if not self._context:
            raise RuntimeError("".join(_messages[before:]))

    def encode(self, image: np.ndarray[Any, Any]) -> list[torch.Tensor]:
        """What the text model gets for an image, uint8 ``[height, width, 3]``: float32 ``[tokens, width]`` of each tile."""
        run, pixels = self._library, np.ascontiguousarray(image, np.uint8)
        height, width, _ = pixels.shape
        bitmap, chunks = run.mtmd_bitmap_init(width, height, pixels.ctypes.data), run.mtmd_input_chunks_init()
        marker = run.mtmd_default_marker()
        text = VisionText(marker, len(marker), False, True)
        assert run.mtmd_tokenize(self._context, chunks, ctypes.byref(text), (c_void_p * 1)(bitmap), 1) == 0
        found = []
        for number in range(run.mtmd_input_chunks_size(chunks)):
            chunk = run.mtmd_input_chunks_get(chunks, number)
            if run.mtmd_input_chunk_get_type(chunk) == _IMAGE_CHUNK:
                assert run.mtmd_encode_chunk(self._context, chunk) == 0
                shape = run.mtmd_input_chunk_get_n_tokens(chunk), self.width
                found.append(torch.from_numpy(np.ctypeslib.as_array(run.mtmd_get_output_embd(self._context), shape).copy()))
        run.mtmd_input_chunks_free(chunks)
        run.mtmd_bitmap_free(bitmap)
        return found

    def close(self) -> None:
        """Free the tower."""
        self._library.mtmd_free(self._context)
        self._context = None
