"""A finished artifact in safetensors, as ``verify`` looks at it: what its config and quantization section imply is compared with
the files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from quantkit.checkpoint import CONFIG_NAME, Checkpoint
from quantkit.errors import ArtifactError, joined
from quantkit.formats import compressed_tensors
from quantkit.formats.base import OutputTensor
from quantkit.ledger import LedgerEntry
from quantkit.llama4 import Llama4Config, SourceTensor, Unit, WeightMatrix, parse_config, units
from quantkit.scheme import Scheme
from quantkit.strict_json import parse_object
from quantkit.tensor_files import SIDECAR_BYTES, TensorFiles, read_small_file


class SafetensorsArtifact:
    """An opened artifact with what its own config says of it.  units, schemes: filled by the check of tensors."""

    form = compressed_tensors
    files: TensorFiles

    def __init__(self, path: Path, entries: Mapping[str, LedgerEntry]):
        """Open its files.  Raises CheckpointError."""
        self.path, self.files = path, TensorFiles.open(path)
        self.config: Llama4Config
        self.units: list[Unit] = []
        self.schemes: dict[WeightMatrix | SourceTensor, Scheme | None] = {}
        self.checks = {"tensors": self._check_tensors, "scales": self._check_scales}

    def _check_tensors(self) -> str:
        content = parse_object(read_small_file(self.path / CONFIG_NAME, SIDECAR_BYTES), CONFIG_NAME)
        quantization = content.pop("quantization_config", None)
        if not isinstance(quantization, Mapping):
            raise ArtifactError("config.json has no quantization_config: this is not a quantized artifact")
        self.config = parse_config(content)
        kv_cache = compressed_tensors.kv_cache_of(quantization)
        self.units = units(self.config)
        expected: dict[str, OutputTensor] = {}
        found = self.files.tensors
        for unit in self.units:
            for copy in unit.copies:
                self.schemes[copy] = None
                dtype = found[copy.name].dtype if copy.name in found else self.config.dtype
                expected[copy.name] = compressed_tensors.copied_tensor(copy, None, dtype)
            for matrix in unit.matrices:
                scheme = self.schemes[matrix] = compressed_tensors.scheme_of(quantization, matrix.name)
                stored = found.get(f"{matrix.name}.weight")
                dtype = stored.dtype if stored else self.config.dtype
                expected |= {tensor.name: tensor for tensor in compressed_tensors.output_tensors(matrix, scheme, dtype)}
            expected |= {tensor.name: tensor for tensor in compressed_tensors.kv_cache_tensors(unit, kv_cache)}
        problems = [f"{name} is missing" for name in expected if name not in found]
        problems += [f"{name} is not expected" for name in found if name not in expected]
        for name, tensor in expected.items():
            if name in found and (found[name].shape != tensor.shape or found[name].dtype != tensor.dtype):
                problems.append(
                    f"{name} is {found[name].dtype} {list(found[name].shape)}; expected {tensor.dtype} {list(tensor.shape)}"
                )
        if problems:
            raise ArtifactError(joined(problems))
        return f"{len(expected)} tensors have the names, shapes and dtypes that config.json implies"

    def _check_scales(self) -> str:
        count = 0
        for name in self.files.tensors:
            if name.endswith(("_scale", "_global_scale")):
                scale = self.files.read(name)
                if not finite_and_positive(scale):
                    raise ArtifactError(f"{name} holds a scale that is not finite and positive")
                count += scale.numel()
        return f"{count:,} scales are finite and positive"

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Raise ArtifactError when the artifact cannot have been made from that checkpoint."""
        if checkpoint.config != self.config:
            raise ArtifactError(f"{checkpoint.directory} is not the source of this artifact: its config differs")


def finite_and_positive(scale: torch.Tensor) -> bool:
    """Whether all scales are; uint8 stands for powers of two, of which 255 is NaN."""
    if scale.dtype == torch.uint8:
        return not bool((scale == 255).any())
    values = scale.float()
    return bool(torch.isfinite(values).all() and (values > 0).all())
