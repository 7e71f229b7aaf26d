"""StoredModel: the text model in the files of one path, whatever their format, read matrix by matrix as it is stored.

This is what an evaluation runs: a BF16 checkpoint, or an artifact in safetensors, GGUF or the packed format.  Matrices come as the
numbers that the file holds (codes and scales, or floats), so whoever multiplies decides how; the few tensors that are no matrices
of a layer come as float32, large tables some rows at a time.  GGUF files need not be ours: everything about them stands in their
headers.  Whether the files are what their manifest says is for ``verify``; here every tensor must be there in the right shape.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from quantkit import forward, grid
from quantkit.checkpoint import CONFIG_NAME, Checkpoint
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.ggml_blocks import decode
from quantkit.formats.gguf_metadata import ARCHITECTURE, config_from_metadata
from quantkit.formats.gguf_names import ROPE_FREQS, place_of
from quantkit.gguf_files import GgufFiles, file_sets, is_gguf
from quantkit.kernels.weights import Weight
from quantkit.llama4 import Llama4Config, SourceTensor, Unit, WeightMatrix, units
from quantkit.packed_artifact import PackedArtifact
from quantkit.packed_files import SUFFIX as PACKED_SUFFIX
from quantkit.recipe import WORKING_SUFFIXES
from quantkit.safetensors_artifact import SafetensorsArtifact
from quantkit.scheme import GGML, KEEP, Scheme
from quantkit.strict_json import brief, parse_object
from quantkit.tensor_files import SIDECAR_BYTES, TORCH_DTYPES, OpenFiles, read_small_file
from quantkit.writer import JOURNAL

UNQUANTIZED = "unquantized"
TEXT_ROLES = ("routed_expert", "shared_expert", "dense_mlp", "attention", "router", "norm", "embedding", "lm_head")


class StoredModel(ABC):
    """An opened model.

    path: as given.  format: ``unquantized``, or the name of a format.  config: without what concerns images.  units: of the text
    model, with the names that the config's prefix gives.  schemes: by name of matrix or tensor, ``keep`` or the scheme.  files: all
    of its tensor files.  frequencies: of the rotary embedding, radians per position, float32 ``[head_dim / 2]``.
    """

    format: str
    files: OpenFiles

    def __init__(self, path: Path, config: Llama4Config):
        self.path = path
        self.config = replace(config, vision=None)
        self.units: list[Unit] = units(self.config)
        self.schemes: dict[str, str] = {}
        self.frequencies = forward.rotary_frequencies(config)

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.path.resolve().name

    @property
    def parameters(self) -> int:
        """Weights of the text model."""
        return sum(math.prod(item.shape) for unit in self.units for item in unit.items)

    @property
    def bytes(self) -> int:
        """Bytes in which the text model is stored."""
        return sum(self.stored_bytes().values())

    @abstractmethod
    def stored_bytes(self) -> dict[str, int]:
        """Bytes of every tensor of the text model, scales included, by name of the matrix or tensor that it belongs to."""

    @abstractmethod
    def read(self, matrix: WeightMatrix) -> Weight:
        """A matrix of a layer, ``[out, in]``, as it is stored.  Raises CheckpointError, ArtifactError."""

    @abstractmethod
    def vector(self, name: str) -> torch.Tensor:
        """A norm, a router or a bias in float32; ``name`` as in ``units``."""

    @abstractmethod
    def rows(self, name: str, at_once: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Embedding or head, from first to last: number of the first row, some rows, float32 ``[at_once or fewer, hidden]``.

        The rows are valid until the next are asked for.
        """

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name among ``units``."""
        return name in self.schemes

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether the files are still the same: name, size and time of change of each."""
        return {path.name: [path.stat().st_size, self.files.modified(path)] for path in self.files.paths}

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class CheckpointModel(StoredModel):
    """An unquantized checkpoint."""

    format = UNQUANTIZED

    def __init__(self, path: Path, checkpoint: Checkpoint):
        super().__init__(path, checkpoint.config)
        self.checkpoint, self.files = checkpoint, checkpoint.files
        self.schemes = {item.name: KEEP for unit in self.units for item in unit.items}

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.checkpoint.model_name

    def stored_bytes(self) -> dict[str, int]:
        """See :class:`StoredModel`."""
        sizes = {}
        for unit in self.units:
            for item in unit.items:
                location = self.checkpoint.tensors[item.tensor if isinstance(item, WeightMatrix) else item.name]
                sizes[item.name] = math.prod(item.shape) * location.nbytes // location.elements
        return sizes

    def read(self, matrix: WeightMatrix) -> Weight:
        """See :class:`StoredModel`; an expert's matrix is input-major."""
        return self.checkpoint.read_matrix(matrix)

    def vector(self, name: str) -> torch.Tensor:
        """See :class:`StoredModel`."""
        return self.checkpoint.read_slice(name).to(torch.float32)

    def rows(self, name: str, at_once: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See :class:`StoredModel`."""
        location = self.checkpoint.tensors[name]
        return _float_rows(self.files, name, TORCH_DTYPES[location.dtype], location.shape[1], at_once)


class ArtifactModel(StoredModel):
    """An artifact that carries the config of its source: in safetensors, or packed."""

    def __init__(self, path: Path, artifact: SafetensorsArtifact | PackedArtifact, form: str):
        """artifact: with its tensors checked."""
        super().__init__(path, artifact.config)
        self.format, self.files, self._artifact = form, artifact.files, artifact
        self._schemes: Mapping[str, Scheme | None] = {item.name: scheme for item, scheme in artifact.schemes.items()}
        listed = {item.name for unit in self.units for item in unit.items}
        self.schemes = {name: scheme.name if scheme else KEEP for name, scheme in self._schemes.items() if name in listed}

    def stored_bytes(self) -> dict[str, int]:
        """See :class:`StoredModel`."""
        located = self.files.tensors
        return {item.name: sum(located[name].nbytes for name in self._parts(item)) for unit in self.units for item in unit.items}

    def _parts(self, item: WeightMatrix | SourceTensor) -> list[str]:
        scheme = self._schemes[item.name]
        if isinstance(item, WeightMatrix):
            return [tensor.name for tensor in self._artifact.form.output_tensors(item, scheme, self.config.dtype)]
        return [self._artifact.form.copied_tensor(item, scheme, self.config.dtype).name]

    def read(self, matrix: WeightMatrix) -> Weight:
        """See :class:`StoredModel`."""
        scheme = self._schemes[matrix.name]
        tensors = {name: self.files.read(name) for name in self._parts(matrix)}
        if scheme is None:
            return next(iter(tensors.values()))
        quantized: grid.QuantizedTensor = self._artifact.form.decode(matrix.name, tensors, scheme)
        return quantized.codes if scheme.number == "ggml" and scheme.block_type.floating else quantized

    def vector(self, name: str) -> torch.Tensor:
        """See :class:`StoredModel`."""
        return self.files.read(name).to(torch.float32)

    def rows(self, name: str, at_once: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See :class:`StoredModel`."""
        location = self.files.locate(name)
        if location.dtype not in TORCH_DTYPES:  # packed: one of llama.cpp's types
            return _block_rows(self.files, name, GGML[location.dtype], location.shape[1], at_once)
        return _float_rows(self.files, name, TORCH_DTYPES[location.dtype], location.shape[1], at_once)


class GgufModel(StoredModel):
    """The text model of GGUF files, whoever made them."""

    format = "gguf"
    files: GgufFiles

    def __init__(self, path: Path, files: GgufFiles):
        """files: of one model.  Raises ArtifactError for what is not a whole Llama 4, CheckpointError."""
        shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
        super().__init__(path, config_from_metadata(files.sets[0].header.metadata, shapes, files.paths[0].name))
        self.files = files
        problems = []
        for unit in self.units:
            for item in unit.items:
                found = files.tensors.get(place_of(item.name).tensor)
                expected = item.shape if place_of(item.name).expert is None else (self.config.num_experts, *item.shape)
                if found is None or found.shape != expected:
                    what = "missing" if found is None else f"{list(found.shape)}"
                    problems.append(f"{place_of(item.name).tensor} is {what}; expected {list(expected)}")
                elif found.dtype not in GGML:
                    problems.append(f"{found.name} is of {brief(found.dtype)}, which quantkit does not read")
                else:
                    self.schemes[item.name] = found.dtype
        if problems:
            shown = "; ".join(list(dict.fromkeys(problems))[:8])
            raise ArtifactError(f"{path} is not a whole Llama 4 (a split model is given by its directory): {shown}")
        if ROPE_FREQS in files.tensors:  # divisors of the frequencies
            base = forward.rotary_frequencies(replace(self.config, rope_scaling=None))
            self.frequencies = base / files.read(ROPE_FREQS).view(-1).view(torch.float32)

    @property
    def name(self) -> str:
        """What tables call it: the directory of our artifacts, else the file."""
        return super().name if self.path.is_dir() else self.path.stem

    def stored_bytes(self) -> dict[str, int]:
        """See :class:`StoredModel`."""
        return {item.name: self.files.locate(_part(item.name)).nbytes for unit in self.units for item in unit.items}

    def read(self, matrix: WeightMatrix) -> Weight:
        """See :class:`StoredModel`."""
        quantized = decode(self.files.read(_part(matrix.name)), GGML[self.schemes[matrix.name]], matrix.shape[1])
        return quantized.codes if quantized.scheme.block_type.floating else quantized

    def vector(self, name: str) -> torch.Tensor:
        """See :class:`StoredModel`."""
        location = self.files.locate(_part(name))
        values = decode(self.files.read(location.name), GGML[location.dtype], location.shape[-1])
        return grid.dequantize(values).view(location.shape)

    def rows(self, name: str, at_once: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See :class:`StoredModel`."""
        location = self.files.locate(_part(name))
        return _block_rows(self.files, location.name, GGML[location.dtype], location.shape[-1], at_once)


def _part(name: str) -> str:
    place = place_of(name)
    return place.tensor if place.expert is None else f"{place.tensor}[{place.expert}]"


def _float_rows(files: OpenFiles, name: str, dtype: torch.dtype, columns: int, at_once: int) -> Iterator[tuple[int, torch.Tensor]]:
    for number, chunk in enumerate(files.chunks(name, at_once * columns * dtype.itemsize)):
        yield number * at_once, torch.frombuffer(chunk, dtype=dtype).view(-1, columns).to(torch.float32)


def _block_rows(files: OpenFiles, name: str, scheme: Scheme, columns: int, at_once: int) -> Iterator[tuple[int, torch.Tensor]]:
    row_bytes = scheme.block_type.row_bytes(columns)
    for number, chunk in enumerate(files.chunks(name, at_once * row_bytes)):
        data = torch.frombuffer(chunk, dtype=torch.uint8).view(-1, row_bytes)
        yield number * at_once, grid.dequantize(decode(data, scheme, columns))


def open_model(path: str | Path) -> StoredModel:
    """Open the model at ``path``: a directory, a GGUF file, or for unquantized models a hub repository id.

    Raises CheckpointError, ArtifactError, UnsupportedModelError for what is not a readable Llama 4.
    """
    target = Path(os.path.expanduser(path))
    directory = (target if os.path.isdir(target) else target.parent).resolve()
    if directory.name.endswith(WORKING_SUFFIXES) and os.path.isfile(directory / JOURNAL):
        raise ArtifactError(
            f"{directory} is a conversion that was not finished. Finish it with the command that began it, or remove it; nothing "
            "in it is to be used."
        )
    if is_gguf(target):
        return _open_gguf(target)
    if os.path.isdir(target) and os.path.isfile(target / CONFIG_NAME):
        if any(name.endswith(PACKED_SUFFIX) for name in os.listdir(target)):
            return _open_artifact(target, PackedArtifact(target, {}), "packed")
        content = parse_object(read_small_file(target / CONFIG_NAME, SIDECAR_BYTES), str(target / CONFIG_NAME))
        if content.get("quantization_config"):
            return _open_artifact(target, SafetensorsArtifact(target, {}), "compressed-tensors")
    if target.suffix == PACKED_SUFFIX and os.path.isfile(target):
        raise CheckpointError(f"{target} is a file of an artifact in the packed format. Give the directory that holds it.")
    return CheckpointModel(target, Checkpoint.open(path))


def _open_artifact(path: Path, artifact: SafetensorsArtifact | PackedArtifact, form: str) -> StoredModel:
    """An artifact whose tensors are those that its config implies."""
    try:
        artifact.checks["tensors"]()
    except (ArtifactError, CheckpointError) as error:
        artifact.files.close()
        raise type(error)(f"{path}: {error}") from error
    return ArtifactModel(path, artifact, form)


def _open_gguf(path: Path) -> StoredModel:
    """The text model of a file, or of a directory that may also hold its vision tower."""
    sets = [found for found in file_sets(path) if found.architecture == ARCHITECTURE]
    if len(sets) != 1:
        what = "no Llama 4 text model" if not sets else f"{len(sets)} text models; name one file"
        raise ArtifactError(f"{path} holds {what}.")
    files = GgufFiles(sets)
    try:
        return GgufModel(path, files)
    except (ArtifactError, CheckpointError):
        files.close()
        raise
