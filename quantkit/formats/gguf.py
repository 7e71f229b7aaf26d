"""GGUF, the format of llama.cpp and Ollama: what each tensor becomes, and where everything lies in the files.

    <model>-<type>.gguf            the text model, or -00001-of-0000N.gguf files of at most so many bytes
    mmproj-<model>-F16.gguf        vision tower and projector, where the model has them
    Modelfile                      with which ``ollama create`` takes both

The experts of a layer and projection lie in one stacked tensor ``[experts, out, in]``.  They are planned, written and checked one
by one all the same: ``blk.0.ffn_up_exps.weight[7]`` names the bytes of expert 7, and the header, which is known in full before any
weight is read, names the stack.  What llama.cpp wants in F32 (norms, router, biases) is widened, so nothing of it is lost.

The factors of the rotary embedding are computed from the config.  Their tensor comes first in the data, so its bytes can be a part
of what is written with the header.

The other halves of the format: ``gguf_names`` (names), ``gguf_metadata``, ``gguf_general`` and ``gguf_tokenizer`` (what else
stands in the header), ``gguf_vision`` (the second file), ``ggml_blocks`` (the bytes of a type).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from quantkit.assignment import Assignment
from quantkit.errors import ArtifactError, RecipeError, UnsupportedModelError, listed
from quantkit.formats import ggml_blocks
from quantkit.formats.base import ClientNote, FileRequest, OutputFile, OutputTensor, PlannedFiles
from quantkit.formats.gguf_general import file_name, split_metadata, text, vision_file_name
from quantkit.formats.gguf_metadata import inexpressible, rope_freqs, text_metadata
from quantkit.formats.gguf_names import ROPE_FREQS, place_of
from quantkit.formats.gguf_tokenizer import tokenizer_metadata
from quantkit.formats.gguf_vision import modelfile, vision_inexpressible, vision_metadata
from quantkit.ggml import TYPES
from quantkit.gguf_header import MetadataEntry, build_header
from quantkit.grid import QuantizedTensor
from quantkit.llama4 import Llama4Config, SourceTensor, Unit, WeightMatrix
from quantkit.llama4 import units as model_units
from quantkit.mixtures import FILE_TYPES
from quantkit.scheme import Scheme
from quantkit.workspace import Workspace

CARRIED = ("license", "notice", "use_policy")  # beginnings of the names of files that go along; the rest is in the header
MODELFILE = "Modelfile"
SIZE_OF_ENTRY = 256  # at least the bytes of a tensor's header entry and padding

Stack = tuple[str, list[OutputTensor]]  # a tensor of the file, and its parts: experts, or the tensor itself


# --------------------------------------------------------------------------------------------------------------- tensors


def aliases(units: Sequence[Unit]) -> dict[str, str]:
    """The names that tensors have in the files, by ours; of those that have a place there, ``client_notes`` refuses the others."""
    names = {}
    for item in (item for unit in units for item in unit.items):
        with contextlib.suppress(UnsupportedModelError):
            names[item.name] = place_of(item.name).tensor
    return names


def output_tensors(matrix: WeightMatrix, scheme: Scheme | None, dtype: str) -> list[OutputTensor]:
    """What a matrix becomes; without scheme it stays in the source's dtype."""
    return [OutputTensor(_part_name(matrix.name), dtype if scheme is None else scheme.name, matrix.shape)]


def copied_tensor(copy: SourceTensor, scheme: Scheme | None, dtype: str) -> OutputTensor:
    """What a tensor becomes that is no matrix of a layer; without scheme what is no matrix is widened to F32."""
    if scheme is None:
        widened = copy.role in ("norm", "router") or len(copy.shape) == 1 or not copy.name.endswith(".weight")
        return OutputTensor(_part_name(copy.name), "F32" if widened else dtype, copy.shape)
    return OutputTensor(_part_name(copy.name), scheme.name, copy.shape)


def _part_name(name: str) -> str:
    place = place_of(name)
    return place.tensor if place.expert is None else f"{place.tensor}[{place.expert}]"


def encode(name: str, quantized: QuantizedTensor, workspace: Workspace | None = None) -> dict[str, torch.Tensor]:
    """Name of the part -> its bytes, uint8 ``[out, row bytes]``, in a buffer of ``workspace`` if given."""
    rows, columns = quantized.codes.shape
    nbytes = rows * quantized.scheme.block_type.row_bytes(columns)
    out = np.empty(nbytes, np.uint8) if workspace is None else workspace.take(f"packed {name.rpartition('.')[2]}", nbytes)
    return {_part_name(name): ggml_blocks.encode(quantized, out)}


def decode(name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
    """The reverse of :func:`encode`.  Raises ArtifactError for a part that is missing or misshapen."""
    part, kind = _part_name(name), scheme.block_type
    if part not in tensors:
        raise ArtifactError(f"{part} is missing")
    data = tensors[part]
    return ggml_blocks.decode(data, scheme, data.shape[-1] // kind.nbytes * kind.block)


def kv_cache_tensors(unit: Unit, kv_cache: str | None) -> list[OutputTensor]:
    """None: llama.cpp decides how keys and values are stored when it runs."""
    return []


# --------------------------------------------------------------------------------------------------------------- clients


def client_notes(schemes: Mapping[Any, Scheme | None], config: Llama4Config, kv_cache: str | None = None) -> list[ClientNote]:
    """What llama.cpp makes of it.  Raises UnsupportedModelError for a model that it computes otherwise, RecipeError."""
    reason = inexpressible(config) or (vision_inexpressible(config.vision) if config.vision is not None else None)
    if reason is not None:
        raise UnsupportedModelError(f"llama.cpp cannot run this model as it is: {reason}. Choose a safetensors format.")
    if kv_cache is not None:
        raise RecipeError("kv_cache is for safetensors; with llama.cpp say --cache-type-k and --cache-type-v when it runs")
    marks = "its rule for Llama 4's words splits at combining marks (Hindi, Thai): such text becomes other, longer tokens"
    remarks = [marks] if config.vision is None else ["images: --mmproj with the second file", marks]
    return [
        ClientNote("llama.cpp b11549", True, "; ".join(remarks)),
        ClientNote("Ollama 0.30 or newer", True, "ollama create NAME -f Modelfile"),
    ]


def _check(request: FileRequest) -> None:
    """Raise RecipeError, with all problems in one message, for what a GGUF file cannot hold."""
    problems: list[str] = []
    stacks: dict[str, dict[str, str]] = {}
    for unit in model_units(request.config):
        for item in unit.items:
            scheme = request.assignments[item.name].scheme
            if scheme is not None and scheme.number != "ggml":
                types = f"; types: {', '.join(TYPES)}" if not problems else ""
                problems.append(f"{item.name} has {scheme.name}, which is no type of GGUF files{types}")
            elif scheme is not None and (misfit := scheme.misfit(item.shape[0], item.shape[-1])):
                problems.append(f"{item.name} cannot be {scheme.name}: {misfit}")
            if isinstance(item, WeightMatrix) and item.expert is not None:
                stacks.setdefault(place_of(item.name).tensor, {}).setdefault(scheme.name if scheme else "keep", item.name)
    for tensor, found in stacks.items():
        if len(found) > 1:
            detail = ", ".join(f"{name} has {scheme}" for scheme, name in found.items())
            problems.append(f"all experts in {tensor} must have one type: {detail}")
    if problems:
        raise RecipeError(f"recipe {request.recipe.name!r} does not fit a GGUF file:{listed(problems)}")


# ----------------------------------------------------------------------------------------------------------------- files


def carries(name: str) -> bool:
    """Whether the artifact keeps this file of the source: licences and notices; all else stands in the header."""
    return name.lower().startswith(CARRIED)


def plan_files(request: FileRequest) -> PlannedFiles:
    """Lay out the files.  Raises RecipeError for what they cannot hold, CheckpointError for a tokenizer that is not as it
    should."""
    _check(request)
    config, label = request.config, _type_name(request.assignments, request.recipe.mixture)
    stacks = _stacks(request.tensors)
    vision = {name: parts for name, parts in stacks.items() if name.startswith(("v.", "mm."))}
    tokenizer = () if request.source is None else tokenizer_metadata(request.source, config)
    metadata = text_metadata(
        config,
        model_name=request.model_name,
        file_type=FILE_TYPES[label].number,
        tokenizer=tokenizer,
        source=request.source,
        extra=[text("general.quantized_by", "quantkit")],
    )
    files = _text_files(request, [stack for stack in stacks.items() if stack[0] not in vision], metadata, label)
    names = [file.name for file in files]
    vision_name = None
    if config.vision is not None:
        kind = Counter(parts[0].dtype for parts in vision.values() if len(parts[0].shape) == 2).most_common(1)[0][0]
        entries = vision_metadata(config, model_name=request.model_name, file_type=kind, source=request.source)
        vision_name = vision_file_name(request.model_name, kind)
        files.append(_file(vision_name, entries, list(vision.items())))
    return PlannedFiles(tuple(files), {MODELFILE: modelfile(names, vision_name).encode()})


def _type_name(assignments: Mapping[str, Assignment], mixture: str | None) -> str:
    """What the file type is called: the mixture, else that of which most tensors are."""
    if mixture is not None:
        return mixture
    used = Counter(assignment.scheme.name for assignment in assignments.values() if assignment.scheme is not None)
    defaults = {kind.default: name for name, kind in reversed(FILE_TYPES.items())}
    return next((defaults[name] for name, _ in used.most_common() if name in defaults), "F32")


def _stacks(tensors: Iterable[OutputTensor]) -> dict[str, list[OutputTensor]]:
    """The parts of each tensor of the files, in order."""
    stacks: dict[str, list[OutputTensor]] = {}
    for tensor in tensors:
        stacks.setdefault(tensor.name.partition("[")[0], []).append(tensor)
    return stacks


def _text_files(request: FileRequest, stacks: list[Stack], metadata: list[MetadataEntry], label: str) -> list[OutputFile]:
    """One file, or several of at most as many bytes as asked for; a larger tensor gets a file of its own."""
    factors = rope_freqs(request.config)
    if request.max_shard_bytes is None:
        return [_file(file_name(request.model_name, label), metadata, stacks, factors)]
    parts: list[list[Stack]] = [[]]
    size = len(build_header(metadata, [])[0])
    for name, tensors in stacks:
        nbytes = sum(tensor.nbytes for tensor in tensors) + SIZE_OF_ENTRY
        if parts[-1] and size + nbytes > request.max_shard_bytes:
            parts.append([])
            size = SIZE_OF_ENTRY
        parts[-1].append((name, tensors))
        size += nbytes
    if len(parts) == 1:
        return [_file(file_name(request.model_name, label), metadata, stacks, factors)]
    count = len(stacks) + (factors is not None)
    files = []
    for number, part in enumerate(parts):
        entries = [*(metadata if number == 0 else ()), *split_metadata(number, len(parts), count)]
        name = file_name(request.model_name, label, (number, len(parts)))
        files.append(_file(name, entries, part, factors if number == 0 else None))
    return files


def _file(name: str, metadata: list[MetadataEntry], stacks: list[Stack], factors: torch.Tensor | None = None) -> OutputFile:
    """One file with its parts in place.  factors: of the rotary embedding, written with the header."""
    listed = [(ROPE_FREQS, "F32", tuple(factors.shape))] if factors is not None else []
    for tensor, parts in stacks:
        shape = parts[0].shape if "[" not in parts[0].name else (len(parts), *parts[0].shape)
        listed.append((tensor, parts[0].dtype, shape))
    header, starts, size = build_header(metadata, listed)
    offsets: dict[str, int] = {}
    for tensor, parts in stacks:
        position = starts[tensor]
        for part in parts:
            offsets[part.name] = position
            position += part.nbytes
    if factors is not None:
        header += factors.numpy().tobytes()
    return OutputFile(name, header, tuple(part for _, parts in stacks for part in parts), offsets, size)
