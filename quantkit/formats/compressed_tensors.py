"""compressed-tensors, the bytes: which tensors a weight becomes, how its codes are packed, where everything lies in the files.

A weight ``[out, in]`` of module M is stored as (E = encoding, chosen by the scheme):

    E       schemes                 codes                                   M.weight_scale           others
    ------  ----------------------  --------------------------------------  -----------------------  -----------------------------
    packed  int4, int8 weight-only  M.weight_packed I32 [out, in*bits/32]   BF16 [out, groups]       M.weight_shape I64 [2];
            int4-*-asym             the same                                the same                 M.weight_zero_point I32
                                                                                                     [out*bits/32, groups]
    plain   fp8, int8-*-dynamic     M.weight F8_E4M3 or I8 [out, in]        BF16 [out, 1] or blocks
            fp8-tensor-static       M.weight F8_E4M3 [out, in]              BF16 [1]                 M.input_scale BF16 [1]
    fp4     nvfp4                   M.weight_packed U8 [out, in/2]          F8_E4M3 [out, in/16]     M.weight_global_scale F32 [1]
            mxfp4                   M.weight_packed U8 [out, in/2]          U8 [out, in/32]
            (kept)                  M.weight as in the source, [out, in]

Packing: element i of a row sits in bits ``bits * (i mod (32 / bits))`` of word ``i // (32 / bits)``, with half the range added;
zero points likewise, but along the output dimension.  fp4: two codes per byte, the even column in the low nibble.  mxfp4 scales
are the exponent + 127.  A quantized KV cache adds ``self_attn.k_scale`` and ``self_attn.v_scale``, BF16 [1], to every layer of the
language model; the unit of q, k and v writes them.  The vision tower has no cache, and vLLM refuses such scales there.  Experts
are always written one by one, also when a layer is kept: clients refuse a mixture of fused and per-expert names.  Encode and
decode stand side by side; ``encode`` never holds more than one buffer of the output's size.

The other halves of the format: ``compressed_tensors_config`` builds and reads the ``quantization_config`` from which clients make
their modules, and ``compressed_tensors_clients`` says which client loads what.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from quantkit.errors import ArtifactError
from quantkit.formats.base import FileRequest, OutputFile, OutputTensor, PlannedFiles
from quantkit.formats.compressed_tensors_clients import client_notes
from quantkit.formats.compressed_tensors_config import config_text, encoding, kv_cache_of, quantization_config, scheme_of
from quantkit.grid import QuantizedTensor, cover_peak
from quantkit.kernels.packing import flip_sign, pack_nibbles, unpack_nibbles
from quantkit.llama4 import SourceTensor, Unit, WeightMatrix, units
from quantkit.safetensors_header import build_header
from quantkit.scheme import Scheme
from quantkit.workspace import Workspace

__all__ = [
    "aliases",
    "carries",
    "client_notes",
    "config_text",
    "copied_tensor",
    "decode",
    "encode",
    "encode_kv_cache",
    "index_text",
    "kv_cache_of",
    "kv_cache_tensors",
    "output_tensors",
    "place",
    "plan_files",
    "quantization_config",
    "scheme_of",
]

METADATA = {"format": "pt"}
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
SCALE_DTYPES = {"bf16": "BF16", "fp8": "F8_E4M3", "e8m0": "U8"}
WORD_BITS = 32


# --------------------------------------------------------------------------------------------------------------- tensors


def output_tensors(matrix: WeightMatrix, scheme: Scheme | None, dtype: str) -> list[OutputTensor]:
    """The tensors that ``matrix`` becomes under ``scheme``; None keeps it as ``<name>.weight`` in ``dtype``, ``[out, in]``.

    The shape must fit the scheme (``Scheme.misfit``); ``client_notes`` reports those that do not.
    """
    if scheme is None:
        return [OutputTensor(f"{matrix.name}.weight", dtype, matrix.shape)]
    return _tensors(matrix.name, matrix.shape, scheme)


def _tensors(name: str, shape: tuple[int, int], scheme: Scheme) -> list[OutputTensor]:
    out_features, in_features = shape
    scale_shape = scheme.scale_shape(out_features, in_features)
    stored_shape = (1,) if scheme.granularity == "tensor" else scale_shape
    scale = OutputTensor(f"{name}.weight_scale", SCALE_DTYPES[scheme.scale_number], stored_shape)
    kind = encoding(scheme)
    if kind == "plain":
        tensors = [OutputTensor(f"{name}.weight", "F8_E4M3" if scheme.number == "fp8" else "I8", shape), scale]
        if scheme.static_activations:
            tensors.append(OutputTensor(f"{name}.input_scale", "BF16", (1,)))
        return tensors
    if kind == "fp4":
        tensors = [OutputTensor(f"{name}.weight_packed", "U8", (out_features, in_features // 2)), scale]
        if scheme.global_scale:
            tensors.append(OutputTensor(f"{name}.weight_global_scale", "F32", (1,)))
        return tensors
    per_word = WORD_BITS // scheme.bits
    tensors = [OutputTensor(f"{name}.weight_packed", "I32", (out_features, in_features // per_word)), scale]
    if not scheme.symmetric:
        tensors.append(OutputTensor(f"{name}.weight_zero_point", "I32", (out_features // per_word, scale_shape[1])))
    return [*tensors, OutputTensor(f"{name}.weight_shape", "I64", (2,))]


def encode(name: str, quantized: QuantizedTensor, workspace: Workspace | None = None) -> dict[str, torch.Tensor]:
    """Full tensor name -> contiguous CPU tensor whose raw bytes are written; names, dtypes and shapes of ``output_tensors``.

    Packed codes go to a new buffer, or to one of ``workspace`` (then valid until the next matrix of the same projection is encoded
    with it); codes that need no packing are returned as they are.
    """
    scheme, codes = quantized.scheme, quantized.codes.contiguous()
    shape = (codes.shape[0], codes.shape[1])
    scale = quantized.scale.reshape(1) if scheme.granularity == "tensor" else quantized.scale.contiguous()
    tensors = {f"{name}.weight_scale": scale}
    if encoding(scheme) == "plain":
        if quantized.input_scale is not None:
            tensors[f"{name}.input_scale"] = quantized.input_scale.reshape(1)
        return {f"{name}.weight": codes, **tensors}
    nbytes = codes.numel() * scheme.bits // 8
    out = np.empty(nbytes, np.uint8) if workspace is None else workspace.take(f"packed {name.rpartition('.')[2]}", nbytes)
    packed = _pack(codes, scheme, out)
    if scheme.number == "fp4":
        tensors[f"{name}.weight_packed"] = packed.view(shape[0], shape[1] // 2)
        if quantized.global_scale is not None:
            tensors[f"{name}.weight_global_scale"] = quantized.global_scale.reshape(1)
        return tensors
    tensors[f"{name}.weight_packed"] = packed.view(torch.int32).view(shape[0], -1)
    if quantized.zero_point is not None:
        by_group = quantized.zero_point.t().contiguous()  # [groups, out]: neighbours in a word are neighbouring output rows
        words = _pack(by_group, scheme, np.empty(by_group.numel() * scheme.bits // 8, np.uint8)).view(torch.int32)
        tensors[f"{name}.weight_zero_point"] = words.view(by_group.shape[0], -1).t().clone(memory_format=torch.contiguous_format)
    tensors[f"{name}.weight_shape"] = torch.tensor(shape, dtype=torch.int64)
    return tensors


def decode(name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
    """The reverse of :func:`encode`.  ``tensors`` holds at least the tensors of module ``name``, by full name.

    Raises ArtifactError for a tensor that is missing, misshapen or of the wrong dtype, with its name.
    """
    found = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
    shape = _decoded_shape(name, found, scheme)
    for expected in _tensors(name, shape, scheme):
        tensor = found.get(expected.name.removeprefix(f"{name}."))
        if tensor is None:
            raise ArtifactError(f"{expected.name} is missing; {scheme.name} needs it")
        if tensor.dtype != TORCH_DTYPES[expected.dtype] or tuple(tensor.shape) != expected.shape:
            raise ArtifactError(
                f"{expected.name} is {tensor.dtype} {list(tensor.shape)}; {scheme.name} of a weight {list(shape)} has "
                f"{expected.dtype} {list(expected.shape)}"
            )
    scale = found["weight_scale"]
    if encoding(scheme) == "plain":
        scale = scale.reshape(scheme.scale_shape(*shape))
        return QuantizedTensor(scheme, found["weight"], scale, input_scale=found.get("input_scale"))
    codes = _unpack(found["weight_packed"], scheme).view(shape)
    if scheme.number == "fp4":
        return QuantizedTensor(scheme, codes, scale, global_scale=found.get("weight_global_scale"))
    zero_point = None
    if not scheme.symmetric:
        zero_point = _unpack(found["weight_zero_point"].t(), scheme).view(scale.shape[1], shape[0]).t().contiguous()
    return QuantizedTensor(scheme, codes, scale, zero_point)


def _decoded_shape(name: str, found: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[int, int]:
    codes_name = "weight" if encoding(scheme) == "plain" else "weight_packed"
    codes = found.get(codes_name)
    if codes is None or codes.dim() != 2:
        raise ArtifactError(f"{name}.{codes_name} is {'missing' if codes is None else 'not a matrix'}; {scheme.name} needs it")
    shape = (codes.shape[0], codes.shape[1] * (1 if codes_name == "weight" else codes.element_size() * 8 // scheme.bits))
    stated = found.get("weight_shape")
    if stated is not None and stated.tolist() != list(shape):
        raise ArtifactError(f"{name}.weight_shape says {stated.tolist()} but {codes_name} holds {list(shape)}")
    misfit = scheme.misfit(*shape)
    if misfit:
        raise ArtifactError(f"{name}.{codes_name} cannot be {scheme.name}: {misfit}")
    return shape


def _pack(codes: torch.Tensor, scheme: Scheme, out: np.ndarray) -> torch.Tensor:
    """codes, one per byte, contiguous -> the packed bytes, flat uint8."""
    source = codes.reshape(-1).view(torch.uint8).numpy()
    if scheme.bits == 8:
        flip_sign(source, out)
    else:
        pack_nibbles(source, out, signed=scheme.number == "int4")
    return torch.from_numpy(out)


def _unpack(packed: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """packed words or bytes in row-major order -> flat codes, one per byte, int8 (int4, int8) or uint8 (fp4)."""
    source = packed.contiguous().reshape(-1).view(torch.uint8).numpy()
    if scheme.bits == 8:
        codes = np.empty_like(source)
        flip_sign(source, codes)
    else:
        codes = unpack_nibbles(source, signed=scheme.number == "int4")
    return torch.from_numpy(codes if scheme.number == "fp4" else codes.view(np.int8))


# -------------------------------------------------------------------------------------------------------------- KV cache

CACHE_UNIT = ".o_proj"  # end of the key of the units that a quantized KV cache adds tensors to: by then keys and values are known


def kv_cache_tensors(unit: Unit, kv_cache: str | None) -> list[OutputTensor]:
    """The tensors that ``unit`` writes besides its weights: the scales of its layer's keys and values, or none."""
    if kv_cache is None or unit.role != "attention" or not unit.key.endswith(CACHE_UNIT):
        return []
    base = unit.key.removesuffix(CACHE_UNIT)
    return [OutputTensor(f"{base}.k_scale", "BF16", (1,)), OutputTensor(f"{base}.v_scale", "BF16", (1,))]


def encode_kv_cache(unit: Unit, key_peak: float, value_peak: float) -> dict[str, torch.Tensor]:
    """Full tensor name -> scale, of those that ``kv_cache_tensors`` names: FP8 numbers reach the largest key and value seen.

    The key is that which goes to the cache: rotated and normalized.  Raises WeightError for a peak that is not finite.
    """
    base = unit.key.removesuffix(CACHE_UNIT)
    return {f"{base}.k_scale": cover_peak(key_peak), f"{base}.v_scale": cover_peak(value_peak)}


# ----------------------------------------------------------------------------------------------------------------- files


def aliases(units: Sequence[Unit]) -> dict[str, str]:
    """Other names of the tensors, in which patterns of recipes are searched too: none."""
    return {}


def carries(name: str) -> bool:
    """Whether artifacts keep this file of the source that could be carried along: all of them."""
    return True


def copied_tensor(copy: SourceTensor, scheme: Scheme | None, dtype: str) -> OutputTensor:
    """What a tensor without scheme becomes: itself."""
    assert scheme is None
    return OutputTensor(copy.name, dtype, copy.shape)


def plan_files(request: FileRequest) -> PlannedFiles:
    """Lay out tensor files, config and index."""
    matrices = [matrix for unit in units(request.config) for matrix in unit.matrices]
    schemes: dict[WeightMatrix, Scheme | None] = {matrix: request.assignments[matrix.name].scheme for matrix in matrices}
    largest = DEFAULT_MAX_SHARD_BYTES if request.max_shard_bytes is None else request.max_shard_bytes
    # Small ones behind all weights: two bytes each, they would shift whatever follows off its alignment.
    files = tuple(place([*request.tensors, *request.small], largest))
    section = quantization_config(schemes, request.recipe.kv_cache)
    sidecars = {"config.json": config_text(request.config_text, section).encode()}
    index = index_text(files)
    if index is not None:
        sidecars["model.safetensors.index.json"] = index.encode()
    return PlannedFiles(files, sidecars)


def place(tensors: Sequence[OutputTensor], max_shard_bytes: int) -> list[OutputFile]:
    """Tensors into files of at most ``max_shard_bytes`` (headers included), greedily in the given order.

    Tensors of one module that follow each other stay in one file, so that a tool which streams the shards sees whole modules.  A
    module larger than the limit gets a file of its own.
    """
    files: list[list[OutputTensor]] = []
    size = 0
    for _, group in itertools.groupby(tensors, key=lambda tensor: tensor.name.rpartition(".")[0]):
        module = list(group)
        module_size = sum(tensor.nbytes + _header_entry_bound(tensor) for tensor in module)
        if not files or size + module_size > max_shard_bytes:
            files.append([])
            size = _HEADER_FIXED_BOUND
        files[-1].extend(module)
        size += module_size
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    return [_output_file(name, content) for name, content in zip(names, files, strict=True)]


_HEADER_FIXED_BOUND = 8 + 64 + 8  # size field, metadata and braces, padding


def _header_entry_bound(tensor: OutputTensor) -> int:
    """At least the bytes of the tensor's JSON entry: name, dtype, shape, two offsets of up to 20 digits, punctuation."""
    return len(json.dumps(tensor.name)) + len(tensor.dtype) + 22 * len(tensor.shape) + 90


def _output_file(name: str, tensors: Sequence[OutputTensor]) -> OutputFile:
    # In the order of the units that write them: data is then written, and read back for its checksum, from front to back.
    entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    header, offsets, size = build_header(entries, METADATA, keep_order=True)
    return OutputFile(name, header, tuple(tensors), offsets, size)


def index_text(files: Iterable[OutputFile]) -> str | None:
    """``model.safetensors.index.json`` as the ecosystem writes it; None for a single file, which needs no index."""
    files = list(files)
    if len(files) <= 1:
        return None
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total_size = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
