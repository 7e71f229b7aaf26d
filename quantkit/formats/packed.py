"""Packed, quantkit's own format, for what others cannot hold: every expert and matrix with its own scheme, in the kernels' layout.

    model.packed              or model-00001-of-0000N.packed: blocks of tensors; ``docs/packed-format.md``
    config.json               the source's, with a section that says what this is

A *block* holds what is used together: an expert, a shared expert or a dense MLP (gate, up, down, each with its scales), the
attention of a layer, or a tensor that is no matrix of a layer.  It is a whole number of pages at the start of a page, so an engine
maps it or reads it in one go.  A weight ``[out, in]`` of module M becomes:

    schemes                 M.codes                                    M.scale, transposed           others
    ----------------------  -----------------------------------------  ----------------------------  -----------------------------
    int2 ... int8           I32 [out, in / 128 * 4 * bits], planes     BF16 [groups, out]            M.zero_point I8 [groups, out]
    fp8                     F8_E4M3 [out, in]                          BF16 [1, out], [in/128,       M.input_scale BF16 [1]
                                                                       out/128] or [1, 1]
    nvfp4, mxfp4            U8 [out, in / 2], even column low          F8_E4M3 or U8 [groups, out]   M.global_scale F32 [1]
    types of llama.cpp      the type [out, in], rows of its blocks
    (kept)                  M.weight as in the source, [out, in]

Planes are those of :mod:`quantkit.kernels.planes`.  Embedding, head, vision tower and projector may have types of llama.cpp, whose
rows can be written as they come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from quantkit.errors import ArtifactError, RecipeError, listed
from quantkit.formats import ggml_blocks
from quantkit.formats.base import ClientNote, FileRequest, OutputFile, OutputTensor, PlannedFiles
from quantkit.formats.compressed_tensors import encode_kv_cache, kv_cache_tensors
from quantkit.formats.compressed_tensors_config import config_text
from quantkit.grid import QuantizedTensor
from quantkit.kernels.packing import pack_nibbles, unpack_nibbles
from quantkit.kernels.planes import GROUP, pack_planes, plane_words, unpack_planes
from quantkit.llama4 import Llama4Config, SourceTensor, Unit, WeightMatrix, units
from quantkit.packed_files import SUFFIX
from quantkit.packed_header import BlockContent, build_header, model_of
from quantkit.scheme import Scheme
from quantkit.tensor_files import TORCH_DTYPES
from quantkit.workspace import Workspace

__all__ = [
    "aliases",
    "block_contents",
    "carries",
    "client_notes",
    "copied_tensor",
    "decode",
    "encode",
    "encode_kv_cache",
    "kv_cache_tensors",
    "misfit",
    "output_tensors",
    "plan_files",
    "quantization_section",
    "weight_shape",
]

QUANT_METHOD = "quantkit-packed"
SECTION_VERSION = 1
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
SCALE_DTYPES = {"bf16": "BF16", "fp8": "F8_E4M3", "e8m0": "U8"}


# --------------------------------------------------------------------------------------------------------------- tensors


def output_tensors(matrix: WeightMatrix, scheme: Scheme | None, dtype: str) -> list[OutputTensor]:
    """The tensors that ``matrix`` becomes under ``scheme``; None keeps it as ``<name>.weight`` in ``dtype``, ``[out, in]``."""
    if scheme is None:
        return [OutputTensor(f"{matrix.name}.weight", dtype, matrix.shape)]
    return _tensors(matrix.name, matrix.shape, scheme)


def copied_tensor(copy: SourceTensor, scheme: Scheme | None, dtype: str) -> OutputTensor:
    """What a tensor becomes that is no matrix of a layer: itself, or rows of one of llama.cpp's types.  Raises RecipeError."""
    if scheme is None:
        return OutputTensor(copy.name, dtype, copy.shape)
    if scheme.number != "ggml" or (reason := scheme.misfit(copy.shape[0], copy.shape[-1])):
        why = "it is written row by row: keep it, or take a type of llama.cpp such as Q8_0" if scheme.number != "ggml" else reason
        raise RecipeError(f"{copy.name} cannot be {scheme.name} in the packed format: {why}")
    return OutputTensor(copy.name, scheme.name, copy.shape)


def _tensors(name: str, shape: tuple[int, int], scheme: Scheme) -> list[OutputTensor]:
    rows, columns = shape
    if scheme.number == "ggml":
        return [OutputTensor(f"{name}.codes", scheme.name, shape)]
    across, along = scheme.scale_shape(rows, columns)
    if scheme.number == "fp8":
        codes = OutputTensor(f"{name}.codes", "F8_E4M3", shape)
    elif scheme.number == "fp4":
        codes = OutputTensor(f"{name}.codes", "U8", (rows, columns // 2))
    else:
        codes = OutputTensor(f"{name}.codes", "I32", (rows, plane_words(columns, scheme.bits)))
    tensors = [codes, OutputTensor(f"{name}.scale", SCALE_DTYPES[scheme.scale_number], (along, across))]
    if not scheme.symmetric:
        tensors.append(OutputTensor(f"{name}.zero_point", "I8", (along, across)))
    if scheme.global_scale:
        tensors.append(OutputTensor(f"{name}.global_scale", "F32", (1,)))
    if scheme.static_activations:
        tensors.append(OutputTensor(f"{name}.input_scale", "BF16", (1,)))
    return tensors


def encode(name: str, quantized: QuantizedTensor, workspace: Workspace | None = None) -> dict[str, torch.Tensor]:
    """Full tensor name -> contiguous CPU tensor whose raw bytes are written; names, dtypes and shapes of ``output_tensors``.

    Codes are packed into a new buffer, or one of ``workspace`` (then valid until the next matrix of the same projection is encoded
    with it); codes that need no packing are returned as they are.
    """
    scheme, codes = quantized.scheme, quantized.codes
    rows, columns = codes.shape

    def buffer(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        return np.empty(nbytes, np.uint8) if workspace is None else workspace.take(f"packed {name.rpartition('.')[2]}", nbytes)

    if scheme.number == "ggml":
        return {f"{name}.codes": ggml_blocks.encode(quantized, buffer(rows * scheme.block_type.row_bytes(columns)))}
    if scheme.number == "fp8":
        packed = codes.contiguous()
    elif scheme.number == "fp4":
        out = buffer(rows * columns // 2)
        pack_nibbles(codes.contiguous().reshape(-1).numpy(), out, signed=False)
        packed = torch.from_numpy(out).view(rows, columns // 2)
    else:
        out = buffer(4 * rows * plane_words(columns, scheme.bits))
        packed = torch.from_numpy(pack_planes(codes.numpy(), scheme.bits, out.view(np.int32)))
    tensors = {f"{name}.codes": packed, f"{name}.scale": quantized.scale.t().contiguous()}
    if quantized.zero_point is not None:
        tensors[f"{name}.zero_point"] = quantized.zero_point.t().contiguous()
    if quantized.global_scale is not None:
        tensors[f"{name}.global_scale"] = quantized.global_scale.reshape(1)
    if quantized.input_scale is not None:
        tensors[f"{name}.input_scale"] = quantized.input_scale.reshape(1)
    return tensors


def decode(name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
    """The reverse of :func:`encode`, of a matrix, or of rows of a tensor that is none.  ``tensors`` holds at least its own.

    Raises ArtifactError for a tensor that is missing, misshapen or of the wrong dtype, with its name.
    """
    stored = tensors.get(f"{name}.codes", tensors.get(name))
    if stored is None or stored.dim() != 2:
        raise ArtifactError(f"{name}.codes is {'missing' if stored is None else 'no matrix'}; {scheme.name} needs it")
    if scheme.number == "ggml":
        data = stored.contiguous().view(torch.uint8)
        return ggml_blocks.decode(data, scheme, data.shape[1] // scheme.block_type.nbytes * scheme.block_type.block)
    scale = tensors.get(f"{name}.scale")
    shape = weight_shape(tuple(stored.shape), None if scale is None else tuple(scale.shape), scheme)
    for expected in _tensors(name, shape, scheme):
        tensor = tensors.get(expected.name)
        if tensor is None or tensor.dtype != TORCH_DTYPES[expected.dtype] or tuple(tensor.shape) != expected.shape:
            found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ArtifactError(
                f"{expected.name} is {found}; {scheme.name} of a weight {list(shape)} has {expected.dtype} {list(expected.shape)}"
            )
    if reason := misfit(scheme, *shape):
        raise ArtifactError(f"{name} cannot be {scheme.name}: {reason}")
    if scheme.number == "fp8":
        codes = stored
    elif scheme.number == "fp4":
        codes = torch.from_numpy(unpack_nibbles(stored.contiguous().reshape(-1).numpy(), signed=False)).view(shape)
    else:
        codes = torch.from_numpy(unpack_planes(stored.numpy(), scheme.bits, shape[1]))
    zero_point = tensors.get(f"{name}.zero_point") if not scheme.symmetric else None
    return QuantizedTensor(
        scheme,
        codes,
        tensors[f"{name}.scale"].t().contiguous(),
        None if zero_point is None else zero_point.t().contiguous(),
        tensors.get(f"{name}.global_scale"),
        tensors.get(f"{name}.input_scale"),
    )


def weight_shape(codes: tuple[int, ...], scale: tuple[int, ...] | None, scheme: Scheme) -> tuple[int, int]:
    """Shape of the weight whose codes and scale have such shapes, of a scheme that is no type of llama.cpp.

    A row of planes may be filled up; its scales tell how far it really goes.
    """
    rows, width = codes
    if scheme.number == "fp8":
        return rows, width
    if scheme.number == "fp4":
        return rows, 2 * width
    if scheme.granularity == "group" and scale is not None and len(scale) == 2:
        return rows, scale[0] * scheme.group_size
    return rows, width // plane_words(GROUP, scheme.bits) * GROUP


def misfit(scheme: Scheme, rows: int, columns: int) -> str | None:
    """Why the format cannot hold a weight ``[rows, columns]`` of a scheme, or None when it can."""
    planes = scheme.number not in ("fp8", "fp4", "ggml")
    if planes and scheme.granularity != "group" and columns % GROUP:
        return f"input size {columns} is not a multiple of {GROUP}, and without groups nothing tells where rows end"
    return scheme.misfit(rows, columns)


# --------------------------------------------------------------------------------------------------------------- clients


def client_notes(
    schemes: Mapping[WeightMatrix, Scheme | None], config: Llama4Config, kv_cache: str | None = None
) -> list[ClientNote]:
    """Who loads it.  Raises RecipeError, with all problems in one message, for shapes that do not fit."""
    problems = [
        f"{matrix.name} cannot be {scheme.name}: {reason}"
        for matrix, scheme in schemes.items()
        if scheme is not None and (reason := misfit(scheme, *matrix.shape))
    ]
    if problems:
        raise RecipeError(f"the packed format cannot hold some of these weights:{listed(problems)}")
    others = "they do not know this format; quantkit repack writes it as compressed-tensors where the schemes allow"
    return [
        ClientNote("quantkit", True, "its own kernels read the blocks as they are: quantkit eval, moe_forward"),
        ClientNote("vLLM, SGLang, transformers, llama.cpp", False, others),
    ]


# ----------------------------------------------------------------------------------------------------------------- files


def aliases(units: Sequence[Unit]) -> dict[str, str]:
    """Other names of the tensors, in which patterns of recipes are searched too: none."""
    return {}


def carries(name: str) -> bool:
    """Whether artifacts keep this file of the source that could be carried along: all of them."""
    return True


def quantization_section(kv_cache: str | None) -> dict[str, object]:
    """What ``config.json`` says: enough for other programs to refuse the directory by name; headers say the rest."""
    section: dict[str, object] = {"quant_method": QUANT_METHOD, "version": SECTION_VERSION}
    return section if kv_cache is None else section | {"kv_cache": kv_cache}


def block_contents(
    config: Llama4Config, tensors: Sequence[OutputTensor], schemes: Mapping[str, Scheme | None]
) -> list[BlockContent]:
    """Tensors as blocks, in the order in which the first of each is written.  schemes: by name of matrix or tensor."""
    work = units(config)
    matrices = {matrix.name for unit in work for matrix in unit.matrices}
    chosen: dict[str, dict[str, str]] = {}
    for unit in work:
        for item in unit.items:
            scheme, (block, _, key) = schemes[item.name], item.name.rpartition(".")
            if scheme is not None:
                chosen.setdefault(block, {})[key] = scheme.name
    found: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for tensor in tensors:
        module = tensor.name.rpartition(".")[0]
        block = module.rpartition(".")[0] if module in matrices else module
        found.setdefault(block, []).append((tensor.name.removeprefix(f"{block}."), tensor.dtype, tensor.shape))
    return [BlockContent(name, chosen.get(name, {}), content) for name, content in found.items()]


def plan_files(request: FileRequest) -> PlannedFiles:
    """Lay out the files."""
    schemes = {name: assignment.scheme for name, assignment in request.assignments.items()}
    blocks = block_contents(request.config, [*request.tensors, *request.small], schemes)
    largest = DEFAULT_MAX_SHARD_BYTES if request.max_shard_bytes is None else request.max_shard_bytes
    files: list[list[BlockContent]] = []
    size = 0
    for block in blocks:  # a block larger than the limit gets a file of its own
        if not files or size + block.size > largest:
            files.append([])
            size = 0
        files[-1].append(block)
        size += block.size
    by_name = {tensor.name: tensor for tensor in (*request.tensors, *request.small)}
    model = model_of(files)
    planned = tuple(_file(content, number, len(files), model, by_name) for number, content in enumerate(files))
    text = config_text(request.config_text, quantization_section(request.recipe.kv_cache))
    return PlannedFiles(planned, {"config.json": text.encode()})


def _file(blocks: Sequence[BlockContent], number: int, count: int, model: str, tensors: Mapping[str, OutputTensor]) -> OutputFile:
    name = f"model{SUFFIX}" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}{SUFFIX}"
    built = build_header(blocks, number, count, model)
    return OutputFile(
        name, built.data, tuple(tensors[found] for found in built.offsets), built.offsets, built.size, built.checksums
    )
