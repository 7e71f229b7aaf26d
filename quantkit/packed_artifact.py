"""A finished packed artifact, as ``verify`` looks at it.

What must stand in the files follows from ``config.json`` and from the schemes that the headers give to each matrix: exactly these
blocks with exactly these tensors.  Every byte of every block is compared with the checksums stored in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from quantkit.checkpoint import CONFIG_NAME, Checkpoint
from quantkit.errors import ArtifactError, RecipeError, joined
from quantkit.estimate import available_cores
from quantkit.formats import packed
from quantkit.formats.base import OutputTensor
from quantkit.ggml import TYPES
from quantkit.gguf_artifact import finite_scales
from quantkit.ledger import LedgerEntry
from quantkit.llama4 import Llama4Config, SourceTensor, Unit, WeightMatrix, parse_config, units
from quantkit.packed_files import PackedFiles
from quantkit.recipe import KV_CACHES
from quantkit.safetensors_artifact import finite_and_positive
from quantkit.scheme import KEEP, Scheme, parse_scheme
from quantkit.strict_json import brief, parse_object
from quantkit.tensor_files import CHUNK_BYTES, SIDECAR_BYTES, TORCH_DTYPES, read_small_file

_SCALES = (".scale", ".global_scale", ".input_scale", ".k_scale", ".v_scale")


class PackedArtifact:
    """An opened artifact.  units, schemes, config, kv_cache: filled by the check of tensors."""

    form = packed
    files: PackedFiles

    def __init__(self, path: Path, entries: Mapping[str, LedgerEntry]):
        """Open its files.  Raises CheckpointError."""
        self.path, self.files = path, PackedFiles.open(path)
        self.config: Llama4Config
        self.kv_cache: str | None = None
        self.units: list[Unit] = []
        self.schemes: dict[WeightMatrix | SourceTensor, Scheme | None] = {}
        self.checks: dict[str, Callable[[], str]] = {
            "tensors": self._check_tensors,
            "blocks": self._check_blocks,
            "scales": self._check_scales,
        }

    def _check_tensors(self) -> str:
        self.config, self.kv_cache = self._read_config()
        self.units = units(self.config)
        listed = {item.name: item for unit in self.units for item in unit.items}
        problems = [
            f"{name} has the scheme {brief(scheme)}, but there is no such matrix" for name, scheme in self._strangers(listed)
        ]
        tensors: list[OutputTensor] = []
        caches: list[OutputTensor] = []
        for unit in self.units:
            for item in unit.items:
                try:
                    scheme = self.schemes[item] = parse_scheme(self.files.schemes.get(item.name, KEEP))
                    tensors += self._expected(item, scheme)
                except RecipeError as error:
                    problems.append(f"{item.name}: {error}")
            caches += packed.kv_cache_tensors(unit, self.kv_cache)
        if not problems:
            by_name = {item.name: scheme for item, scheme in self.schemes.items()}
            problems += self._differences([*tensors, *caches], by_name)
        if problems:
            raise ArtifactError(joined(problems))
        return f"{len(self.files.blocks)} blocks hold the tensors that config.json and their schemes imply"

    def _read_config(self) -> tuple[Llama4Config, str | None]:
        """The source's config, and how the KV cache is quantized."""
        content = parse_object(read_small_file(self.path / CONFIG_NAME, SIDECAR_BYTES), CONFIG_NAME)
        section = content.pop("quantization_config", None)
        if not isinstance(section, Mapping) or section.get("quant_method") != packed.QUANT_METHOD:
            raise ArtifactError(f"config.json has no quantization_config of {packed.QUANT_METHOD}: {brief(section)}")
        kv_cache = section.get("kv_cache")
        if section != packed.quantization_section(kv_cache) or kv_cache not in (None, *KV_CACHES):
            raise ArtifactError(f"quantization_config is {brief(section)}, which this quantkit does not write")
        return parse_config(content), kv_cache

    def _strangers(self, listed: Mapping[str, object]) -> list[tuple[str, str]]:
        return [(name, scheme) for name, scheme in self.files.schemes.items() if name not in listed]

    def _expected(self, item: WeightMatrix | SourceTensor, scheme: Scheme | None) -> list[OutputTensor]:
        """The tensors of an item; what is kept may have any floating dtype.  Raises RecipeError."""
        stored = self.files.tensors.get(item.name if isinstance(item, SourceTensor) else f"{item.name}.weight")
        dtype = stored.dtype if stored is not None and stored.dtype in ("BF16", "F16", "F32") else self.config.dtype
        if isinstance(item, SourceTensor):
            return [packed.copied_tensor(item, scheme, dtype)]
        if scheme is not None and (reason := packed.misfit(scheme, *item.shape)):
            raise RecipeError(f"cannot be {scheme.name}: {reason}")
        return packed.output_tensors(item, scheme, dtype)

    def _differences(self, tensors: list[OutputTensor], schemes: Mapping[str, Scheme | None]) -> list[str]:
        """What the blocks hold otherwise than they should."""
        expected = {block.name: block for block in packed.block_contents(self.config, tensors, schemes)}
        problems = [f"block {name} is missing" for name in expected if name not in self.files.blocks]
        problems += [f"block {name} is not expected" for name in self.files.blocks if name not in expected]
        for name, block in expected.items():
            if name in self.files.blocks:
                found = [
                    (tensor.name.removeprefix(f"{name}."), tensor.dtype, tensor.shape)
                    for tensor in self.files.blocks[name].block.tensors
                ]
                if found != list(block.tensors):
                    pairs = zip([*found, None], [*block.tensors, None], strict=False)
                    stored, wanted = next(pair for pair in pairs if pair[0] != pair[1])
                    problems.append(f"block {name} holds {_told(stored)}; expected {_told(wanted)}")
        return problems

    def _check_blocks(self) -> str:
        with ThreadPoolExecutor(available_cores()) as pool:
            for _ in pool.map(self.files.check_block, self.files.blocks):
                pass
        size = sum(found.block.size for found in self.files.blocks.values())
        return f"{len(self.files.tensors)} tensors, {size:,} bytes, every checksum as stored, all padding zero"

    def _check_scales(self) -> str:
        count = 0
        for name, location in self.files.tensors.items():
            if name.endswith(_SCALES):
                scale = self.files.read(name)
                bad = not finite_and_positive(scale)
                count += scale.numel()
            elif location.dtype not in TORCH_DTYPES:
                kind = TYPES[location.dtype]
                pieces = self.files.chunks(name, max(1, CHUNK_BYTES // kind.nbytes) * kind.nbytes)
                bad = not all(finite_scales(kind, np.frombuffer(piece, np.uint8)) for piece in pieces)
                count += location.nbytes // kind.nbytes
            else:
                continue
            if bad:
                raise ArtifactError(f"{name} holds a scale that is not finite and positive")
        return f"{count:,} scales are finite and positive"

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Raise ArtifactError when the artifact cannot have been made from that checkpoint."""
        if checkpoint.config != self.config:
            raise ArtifactError(f"{checkpoint.directory} is not the source of this artifact: its config differs")


def _told(tensor: tuple[str, str, tuple[int, ...]] | None) -> str:
    return "no more" if tensor is None else f"{tensor[0]} {tensor[1]} {list(tensor[2])}"
