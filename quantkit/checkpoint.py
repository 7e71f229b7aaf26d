"""Checkpoint: a Llama 4 source, checked in full from headers alone, then read slice by slice.

Opening costs milliseconds for a directory of any size and settles everything that can be settled without weights: it is a Llama 4,
it is not already quantized, index and shards agree, no shard is truncated, and there are exactly the tensors, shapes and dtypes
that ``config.json`` implies.  All that is wrong is said at once, before any work is done.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from quantkit.errors import AlreadyQuantizedError, CheckpointError, UnsupportedModelError
from quantkit.hub import download_file, download_snapshot, is_carried, is_repository_id
from quantkit.llama4 import FLOAT_DTYPES, Llama4Config, Unit, WeightMatrix, inventory, parse_config
from quantkit.packed_files import SUFFIX as PACKED_SUFFIX
from quantkit.strict_json import parse_object
from quantkit.tensor_files import CHUNK_BYTES, TensorFiles, TensorLocation, list_directory, listing, read_small_file
from quantkit.workspace import Workspace

__all__ = ["Checkpoint", "TensorFiles", "TensorLocation", "load_config"]

CONFIG_NAME = "config.json"
_CONFIG_LIMIT = 16 << 20  # bytes

# What the last part of a tensor's name, or its dtype, says about how a checkpoint was quantized.
_QUANTIZED_NAMES = {
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or another FP8 or INT8 format",
    "weight_scale_inv": "FP8 in blocks",
    "weight_scale_2": "ModelOpt",
    "gate_up_proj_scale": "fbgemm FP8",
    "gate_up_proj_weight_scale": "ModelOpt",
    "qweight": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
}
_QUANTIZED_DTYPE = re.compile(r"F8_.*|F4|F6_.*|I8|U8")


def load_config(source: str | Path, revision: str | None = None) -> tuple[str, Llama4Config, Path | None]:
    """The config alone, from a directory, a ``config.json`` file or a hub repository (downloads only that file).

    Returns (exact text, parsed config, the directory when weights lie in it too, else None).  Raises CheckpointError.
    """
    path = Path(os.path.expanduser(source))
    if path.suffix == ".json" and os.path.isfile(path):
        _no_revision(path, revision)
    elif (directory := _local_directory(source, revision)) is not None:
        path = directory / CONFIG_NAME
    else:
        path = download_file(str(source), CONFIG_NAME, revision)
    text, config = _read_config(path)
    has_weights = any(name.endswith(".safetensors") for name in list_directory(path.parent))
    return text, config, path.parent if has_weights else None


class Checkpoint:
    """An opened source.

    directory: where its files lie.  config_text: ``config.json`` as it stands.  config: the same, parsed.
    tensors: name -> location, exactly the inventory of the config.  files: its shards, opened.
    """

    def __init__(self, directory: Path, origin: dict[str, str] | None = None):
        """Check the checkpoint in ``directory``; see :meth:`open`.  origin: repository and commit when it came from the hub."""
        self.directory = directory
        self.config_text, self.config = _read_config(directory / CONFIG_NAME)
        self._origin = origin or {}
        _refuse_other_formats(directory)
        self._carried = _carried_files(directory)
        self.files = TensorFiles.open(directory)
        self.tensors = self.files.tensors
        _refuse_quantized(directory, self.tensors)
        _check_inventory(directory, self.config, self.tensors)

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> Self:
        """Open a local directory or a hub repository id (``owner/name``, then at ``revision``).

        Raises CheckpointError that lists all that is wrong; UnsupportedModelError when it is no Llama 4; AlreadyQuantizedError.
        """
        directory = _local_directory(source, revision)
        if directory is not None:
            return cls(directory)
        repository = str(source)
        load_config(repository, revision)  # a wrong model is refused before its weights are downloaded
        snapshot = download_snapshot(repository, revision)
        return cls(snapshot, {"repository": repository, "commit": snapshot.name})

    # -------------------------------------------------------------------------------------------------------------- read

    def read_unit(self, unit: Unit, workspace: Workspace) -> tuple[list[torch.Tensor], list[str]]:
        """The unit's matrices as ``[out, in]`` views of workspace buffers, and for each the xxh3-64 of the bytes it was read from.

        Matrices from one slice (gate and up of an expert) share its bytes and its digest.  Valid until the next call with the same
        workspace.
        """
        read: dict[tuple[str, int | None], tuple[torch.Tensor, str]] = {}
        weights, digests = [], []
        for matrix in unit.matrices:
            key = (matrix.tensor, matrix.expert)
            if key not in read:
                buffer = workspace.take(f"source {len(read)}", self._nbytes(*key))
                read[key] = self.read_slice(*key, buffer), xxhash.xxh3_64_hexdigest(buffer.data)
            stored, digest = read[key]
            weights.append(_logical(matrix, stored))
            digests.append(digest)
        return weights, digests

    def read_matrix(self, matrix: WeightMatrix, buffer: NDArray[np.uint8] | None = None) -> torch.Tensor:
        """One matrix as a view ``[out, in]``; an expert's stays input-major, as it is stored.  See :meth:`read_slice`."""
        return _logical(matrix, self.read_slice(matrix.tensor, matrix.expert, buffer))

    def read_slice(self, name: str, expert: int | None = None, buffer: NDArray[np.uint8] | None = None) -> torch.Tensor:
        """A tensor, or one expert's slice of a fused one, as it is stored; see :meth:`TensorFiles.read`."""
        return self.files.read(name, expert, buffer)

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The bytes of a tensor, piece by piece; see :meth:`TensorFiles.chunks`."""
        return self.files.chunks(name, chunk_bytes)

    def _nbytes(self, name: str, expert: int | None) -> int:
        location = self.tensors[name]
        return location.nbytes if expert is None else location.nbytes // location.shape[0]

    # ---------------------------------------------------------------------------------------------------------- identity

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether a source is still the same one: its provenance and the time each shard was last changed."""
        return self.provenance() | {"modified": {path.name: self.files.modified(path) for path in self.files.paths}}

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, the same on every machine: config hash; name, size and header hash of each shard."""
        return self._origin | {
            "config": xxhash.xxh3_64_hexdigest(self.config_text.encode()),
            "shards": {
                path.name: {"size": header.file_size, "header": header.digest} for path, header in self.files.headers.items()
            },
        }

    @property
    def model_name(self) -> str:
        """What the model is called: the repository's name without its owner, or that of the directory.

        In the hub's cache that is ``models--OWNER--NAME/snapshots/COMMIT``.
        """
        directory = self.directory.resolve()
        cached = directory.parents[1].name if directory.parent.name == "snapshots" else ""
        if "repository" not in self._origin and cached.startswith("models--"):
            return cached.split("--", 2)[-1]
        return self._origin.get("repository", directory.name).rpartition("/")[2]

    def carried_files(self) -> list[Path]:
        """What an artifact keeps: tokenizer, chat template, generation and preprocessor settings, licence, use policy, notice."""
        return list(self._carried)

    def close(self) -> None:
        """Close the shards."""
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _logical(matrix: WeightMatrix, stored: torch.Tensor) -> torch.Tensor:
    """The matrix ``[out, in]`` as a view of what is stored: an expert's slice is ``[in, out]``, gate and up side by side."""
    if matrix.expert is None:
        return stored
    return (stored if matrix.columns is None else stored[:, slice(*matrix.columns)]).t()


# ---------------------------------------------------------------------------------------------------------------- source


def _local_directory(source: str | Path, revision: str | None) -> Path | None:
    """The directory that ``source`` names, None when it must be a hub repository id.  Raises CheckpointError for anything else."""
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        _no_revision(path, revision)
        return path
    if path.suffix == ".gguf":
        raise UnsupportedModelError(f"{path} is a GGUF file. quantkit reads the BF16 safetensors release that it was made from.")
    if os.path.exists(path):
        raise CheckpointError(f"{path} is a file. Give the directory that holds {CONFIG_NAME} and the safetensors shards.")
    if not is_repository_id(str(source)):
        raise CheckpointError(f"there is no directory {source}. Give a local directory or a hub repository id such as owner/name.")
    # Far more often a misspelt path than a repository of an owner who happens to be called like a directory here.
    if os.path.lexists(first := str(source).partition("/")[0]):
        raise CheckpointError(
            f"there is no directory {source}, though there is {first}. Check the spelling; if you mean the repository {source} on "
            "the hub, run the command in another directory."
        )
    return None


def _carried_files(directory: Path) -> tuple[Path, ...]:
    """The files to carry along.  Raises CheckpointError for one that could not be: an artifact would silently lack it."""
    carried = [directory / name for name in list_directory(directory) if is_carried(name)]
    for path in carried:
        if not os.path.exists(path):
            target = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "gone"
            raise CheckpointError(f"{path} is {target}. Artifacts carry it along: restore it, or remove it from the source.")
        if not os.path.isdir(path) and not (os.path.isfile(path) and os.access(path, os.R_OK)):
            raise CheckpointError(f"{path} is no file to read. Artifacts carry it along: restore it, or remove it from the source.")
    return tuple(path for path in carried if os.path.isfile(path))


def _no_revision(path: Path, revision: str | None) -> None:
    if revision is not None:
        raise CheckpointError(f"{path} is a local path; a revision ({revision}) is for hub repositories only. Leave it out.")


def _read_config(path: Path) -> tuple[str, Llama4Config]:
    if not os.path.isfile(path):
        _refuse_other_formats(path.parent)
        raise CheckpointError(f"{path.parent} has no {CONFIG_NAME}. Give the directory of a Llama 4 checkpoint as downloaded.")
    data = read_small_file(path, _CONFIG_LIMIT)
    content = parse_object(data, str(path))
    try:
        return data.decode("utf-8"), parse_config(content)
    except CheckpointError as error:
        raise type(error)(f"{path.parent}: {error}") from error


def _refuse_other_formats(directory: Path) -> None:
    """Name the format when the weights are there but are not safetensors."""
    names = list_directory(directory)
    if any(name.endswith(".safetensors") for name in names):
        return
    advice = "quantkit reads safetensors only: download the safetensors release of this model."
    if any(name.endswith(PACKED_SUFFIX) for name in names):
        raise AlreadyQuantizedError(f"{directory} holds packed files of quantkit. Use the BF16 release that they were made from.")
    if any(name.endswith(".gguf") for name in names):
        raise UnsupportedModelError(f"{directory} holds GGUF files. {advice}")
    if any(re.fullmatch(r"consolidated.*\.pth", name) for name in names):
        raise UnsupportedModelError(
            f"{directory} holds consolidated.*.pth, Meta's own layout. {advice} It is the repository of the same name on the hub."
        )
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        raise UnsupportedModelError(f"{directory} holds pickled weights ({listing(pickled)}). {advice}")


def _refuse_quantized(directory: Path, tensors: dict[str, TensorLocation]) -> None:
    advice = "Use the BF16 release that it was made from."
    if os.path.isfile(directory / "hf_quant_config.json"):
        raise AlreadyQuantizedError(f"{directory} is already quantized: it holds ModelOpt's hf_quant_config.json. {advice}")
    for name, tensor in tensors.items():
        if method := _QUANTIZED_NAMES.get(name.rpartition(".")[2]):
            raise AlreadyQuantizedError(f"{directory} is already quantized: {name} is a tensor of {method}. {advice}")
        if _QUANTIZED_DTYPE.fullmatch(tensor.dtype):
            raise AlreadyQuantizedError(f"{directory} is already quantized: {name} is stored as {tensor.dtype}. {advice}")


def _check_inventory(directory: Path, config: Llama4Config, tensors: dict[str, TensorLocation]) -> None:
    """Exactly the tensors that the config implies.  Raises CheckpointError that lists every difference."""
    expected = {tensor.name: tensor.shape for tensor in inventory(config)}
    found = [(tensor, expected[name]) for name, tensor in tensors.items() if name in expected]
    kinds = {
        "missing": [name for name in expected if name not in tensors],
        "not expected": [name for name in tensors if name not in expected],
        "wrong shape": [f"{at.name} is {list(at.shape)}, expected {list(shape)}" for at, shape in found if at.shape != shape],
        "wrong dtype": [f"{at.name} is {at.dtype}" for at, _ in found if at.dtype not in FLOAT_DTYPES],
    }
    problems = [f"{kind} ({len(items)}): {listing(items)}" for kind, items in kinds.items() if items]
    if problems:
        raise CheckpointError(
            f"{directory}: the shards do not hold the tensors that {CONFIG_NAME} implies (in {', '.join(FLOAT_DTYPES)}). "
            "Check that both come from the same model and revision.\n  " + "\n  ".join(problems)
        )
