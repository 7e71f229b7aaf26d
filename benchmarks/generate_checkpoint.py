"""Write a Llama 4 checkpoint with true Scout or Maverick shapes and few layers, to measure memory and speed on.

    python benchmarks/generate_checkpoint.py scout OUT --layers 1           # random BF16, about 4.4 GB a layer
    python benchmarks/generate_checkpoint.py maverick OUT --layers 2        # zeros in sparse files, about 33 GB that take no disk
    python benchmarks/generate_checkpoint.py scout OUT --config-only        # config.json alone, for a plan of any size

Layers are the first ones of the release: Maverick alternates dense and MoE layers, so two of its layers hold one set of 128
experts.  The vocabulary is small unless asked otherwise, so that embeddings do not drown what is measured; there is no vision tower
unless --vision-layers is given (a Llama4ForCausalLM then becomes a Llama4ForConditionalGeneration).  Shards have at most 5 GB; a
fused tensor larger than that gets a shard of its own, as in the releases.

Random weights are one block of Gaussian numbers (sigma 0.02, norms near 1), repeated from another start for each piece of a tensor:
as good as fresh numbers for measuring, and written at the speed of the disk from a few MB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))

from quantkit.llama4 import SourceTensor, inventory, parse_config
from quantkit.safetensors_header import build_header
from tests.releases import release as release_of_any_size

SHARD_BYTES = 5_000_000_000
BLOCK_ELEMENTS = 8 << 20
PRIME = 7_368_787  # step between the starts of pieces in the block; prime, so that starts do not repeat soon

RELEASES: dict[str, dict[str, Any]] = {
    "scout": {
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "max_position_embeddings": 10_485_760,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "maverick": {
        "num_local_experts": 128,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "max_position_embeddings": 1_048_576,
        "rope_scaling": None,
    },
}


def release_config(release: str, layers: int, vocabulary: int, experts: int | None, vision_layers: int) -> dict[str, Any]:
    """``config.json`` as the release spells it, with that many layers."""
    true = release_of_any_size()
    text: dict[str, Any] = {
        **true["text_config"],
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "bos_token_id": vocabulary - 48,
        "eos_token_id": [vocabulary - 47, vocabulary - 41, vocabulary - 40],
        "floor_scale": 8192,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)],
        "num_hidden_layers": layers,
        "output_router_logits": False,
        "pad_token_id": vocabulary - 30,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
        **RELEASES[release],
    }
    if experts is not None:
        text["num_local_experts"] = experts
    step = text["interleave_moe_layer_step"]
    text["moe_layers"] = list(range(step - 1, layers, step))
    if not vision_layers:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": vocabulary - 20,
        "eoi_token_index": vocabulary - 19,
        "image_token_index": vocabulary - 18,
        "model_type": "llama4",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {**true["vision_config"], "num_hidden_layers": vision_layers},
    }


def shards(tensors: list[SourceTensor], shard_bytes: int) -> list[list[SourceTensor]]:
    """Whole tensors into shards of at most ``shard_bytes``; a larger tensor stands alone."""
    result: list[list[SourceTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if result[-1] and size + 2 * tensor.elements > shard_bytes:
            result.append([])
            size = 0
        result[-1].append(tensor)
        size += 2 * tensor.elements
    return result


def pieces(tensor: SourceTensor, block: NDArray[np.uint8], seed: int) -> Iterator[memoryview]:
    """The bytes of a random tensor: stretches of ``block``, each from another start."""
    left, piece = 2 * tensor.elements, seed
    while left:
        start = piece * PRIME % (block.size // 2) * 2
        count = min(left, block.size - start)
        yield block[start : start + count].data
        left -= count
        piece += 1


def write_shard(path: Path, content: list[SourceTensor], filling: tuple[NDArray[np.uint8], ...] | None, seed: int) -> None:
    """One safetensors file.  filling: blocks of random bytes for weights and for norms; None makes a sparse file, all zeros."""
    header, offsets, size = build_header([(tensor.name, "BF16", tensor.shape) for tensor in content])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
        if filling is not None:
            for number, tensor in enumerate(content):
                file.seek(offsets[tensor.name])
                for piece in pieces(tensor, filling[tensor.role == "norm"], seed + 1000 * number):
                    file.write(piece)


def generate(config: dict[str, Any], output: Path, *, zeros: bool, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the checkpoint of ``config``; returns its size in bytes."""
    filling = None
    if not zeros:
        normal = torch.randn(BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(seed))
        weights, norms = 0.02 * normal, 1 + 0.1 * normal[: 1 << 16]
        filling = tuple(values.to(torch.bfloat16).view(torch.uint8).numpy() for values in (weights, norms))
    tensors = inventory(parse_config(config))
    groups = shards(tensors, shard_bytes)
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
        weight_map = {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": sum(2 * tensor.elements for tensor in tensors)}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        write_shard(output / name, group, filling, seed + 1_000_000 * number)
        print(f"{name}: {(output / name).stat().st_size:,} bytes, {len(group)} tensors", flush=True)
    return sum((output / name).stat().st_size for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", choices=sorted(RELEASES))
    parser.add_argument("output", type=Path, help="directory to make; must not exist unless --force")
    parser.add_argument("--layers", type=int, help="default 1 for scout, 2 for maverick; 48 in the releases")
    parser.add_argument("--vocabulary", type=int, default=2048, help="rows of embedding and head; 202048 in the releases")
    parser.add_argument("--experts", type=int, help="experts per MoE layer, if other than in the release")
    parser.add_argument("--vision-layers", type=int, default=0, help="layers of the vision tower; 34 in the releases")
    filling = parser.add_mutually_exclusive_group()
    filling.add_argument("--zeros", action="store_true", help="sparse files of zeros (default for maverick)")
    filling.add_argument("--random", action="store_true", help="random weights that take real disk space (default for scout)")
    parser.add_argument("--config-only", action="store_true", help="write config.json and nothing else")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="largest shard (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace the output directory")
    arguments = parser.parse_args()

    layers = arguments.layers or {"scout": 1, "maverick": 2}[arguments.release]
    zeros = arguments.zeros or (arguments.release == "maverick" and not arguments.random)
    config = release_config(arguments.release, layers, arguments.vocabulary, arguments.experts, arguments.vision_layers)
    if arguments.force:
        shutil.rmtree(arguments.output, ignore_errors=True)
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; remove it or use --force")
    needed = 2 * sum(tensor.elements for tensor in inventory(parse_config(config)))
    if not zeros and not arguments.config_only:
        os.makedirs(arguments.output.absolute().parent, exist_ok=True)
        free = shutil.disk_usage(arguments.output.absolute().parent).free
        if needed > free:
            parser.error(f"{needed:,} bytes are needed, {free:,} are free; use fewer layers or --zeros")
    arguments.output.mkdir(parents=True)
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not arguments.config_only:
        size = generate(config, arguments.output, zeros=zeros, seed=arguments.seed, shard_bytes=arguments.shard_bytes)
        print(f"{arguments.output}: {size:,} bytes, {'sparse zeros' if zeros else 'random'}")


if __name__ == "__main__":
    main()
