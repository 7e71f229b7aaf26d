"""The vision file in llama.cpp: what it makes of an image, compared with transformers' vision tower and projector.

llama.cpp (build b11549) hands the text model the tokens of an image column by column where transformers goes row by row: the
last step of its pixel shuffle is missing.  No file can change that, so rows and columns are swapped here before comparing.  Its
GELU is the approximation by tanh, looked up in a table of FP16 numbers; with the same GELU in transformers' tower nothing but
the order of sums is left, and with it a neighbouring entry of the table here and there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import Llama4ForConditionalGeneration

from quantkit.convert import convert
from quantkit.recipe import Recipe, Rule
from tests.gguf_models import DEMO, SIZES, TOKENIZER_FILES, stored_values, text_file, vision_file
from tests.llama_cpp import Llama, Vision
from tests.tiny_models import tiny_config, tiny_tensors, write_files

IMAGE = 84  # pixels, 6 by 6 patches, 3 by 3 tokens
TYPES = ("F32", "F16", "BF16", "Q8_0")


class TableGelu(torch.nn.Module):
    """GELU as ggml computes it for vectors: of a number rounded to FP16, by tanh, rounded to FP16."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        half = values.half().float()
        table = torch.nn.functional.gelu(half, approximate="tanh").half().float()
        return torch.where(values <= -10, 0.0, torch.where(values >= 10, values, table))


def write_vision_source(directory: Path) -> Path:
    """A random model whose tower is larger than that of the other tests, with biases and norms that matter."""
    config = tiny_config("scout", **(SIZES | {"num_hidden_layers": 1, "num_local_experts": 1}))
    config["vision_config"] |= {"image_size": IMAGE, "num_hidden_layers": 3, "norm_eps": 1e-5}
    directory.mkdir()
    tensors = tiny_tensors(config, seed=11)
    write_files(directory, tensors)
    (directory / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, directory / name)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


@dataclass(frozen=True)
class Made:
    """A source, its artifacts by the type of the tower, and the text model, opened."""

    source: Path
    artifacts: dict[str, Path]
    text: Llama


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    directory = tmp_path_factory.mktemp("vision")
    source = write_vision_source(directory / "source")
    recipes = {kind: Recipe(f"tower-{kind}", format="gguf", mixture="F32", vision=kind) for kind in TYPES}
    kept, fine = Rule("keep", roles=("vision", "projector")), Rule("Q8_0", name=r"^vision_model.*(proj|fc\d)\.weight")
    recipes |= {
        "kept": Recipe("kept", (kept,), format="gguf", mixture="F32"),
        "by rule": Recipe("by-rule", (fine,), format="gguf", mixture="F32"),
    }
    result = convert(source, list(recipes.values()), directory)
    artifacts = {kind: artifact.directory for kind, artifact in zip(recipes, result.artifacts, strict=True)}
    text = Llama(text_file(artifacts["F32"]))
    yield Made(source, artifacts, text)
    text.close()


def random_image(height: int = IMAGE, width: int = IMAGE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def load_tower(source: Path, gelu: torch.nn.Module | None) -> Any:
    """transformers' model.  gelu: replaces its own."""
    model = Llama4ForConditionalGeneration.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    for module in list(model.vision_model.modules()):
        if gelu is not None and hasattr(module, "activation_fn"):
            module.activation_fn = gelu
    return model


@torch.no_grad()
def reference(model: Any, image: np.ndarray[Any, Any]) -> torch.Tensor:
    """What transformers makes of an image of the tower's size, with rows and columns of tokens swapped."""
    mean, deviation = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.5, 0.25, 0.2])
    pixels = ((torch.from_numpy(image) / 255 - mean) / deviation).permute(2, 0, 1)[None]
    tokens = model.multi_modal_projector(model.vision_model(pixels).last_hidden_state[0])
    side = round(len(tokens) ** 0.5)
    return tokens.reshape(side, side, -1).transpose(0, 1).reshape(len(tokens), -1)


def their_tiles(made: Made, kind: str, image: np.ndarray[Any, Any]) -> list[torch.Tensor]:
    tower = Vision(vision_file(made.artifacts[kind]), made.text)
    tiles = tower.encode(image)
    tower.close()
    return tiles


def relative_distances(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each token, relative to its size."""
    assert found.shape == expected.shape
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize(
    ("kind", "usual", "largest"),
    [
        ("F32", 1e-6, 2e-3),
        ("F16", 2e-3, 4e-3),
        ("BF16", 1e-2, 2e-2),
        ("kept", 1e-2, 2e-2),
        ("Q8_0", 3e-2, 5e-2),
        ("by rule", 3e-2, 5e-2),
    ],
)
def test_an_image_becomes_the_tokens_that_transformers_makes(kind: str, usual: float, largest: float, made: Made) -> None:
    """Most tokens of the tower in F32 differ by 2e-7.  With matrices in 16 and 8 bits, activations are rounded to the type."""
    image = random_image()
    expected = reference(load_tower(made.source, TableGelu()), image)
    [found] = their_tiles(made, kind, image)
    assert found.shape == (9, 256)
    distances = relative_distances(found, expected)
    assert float(distances.median()) <= usual
    assert float(distances.max()) <= largest


def test_with_the_exact_gelu_the_difference_stays_small(made: Made) -> None:
    image = random_image()
    expected = reference(load_tower(made.source, None), image)
    [found] = their_tiles(made, "F32", image)
    assert float(relative_distances(found, expected).max()) <= 3e-3


def test_an_image_of_several_tiles_arrives_tile_by_tile_with_an_overview(made: Made) -> None:
    """The size of the tower, which decides how images are cut, is read as it should."""
    image = random_image(2 * IMAGE, IMAGE)
    tiles = their_tiles(made, "F32", image)
    assert len(tiles) == 3
    model = load_tower(made.source, TableGelu())
    for found, part in zip(tiles, (image[:IMAGE], image[IMAGE:]), strict=False):
        assert float(relative_distances(found, reference(model, part)).max()) <= 2e-3


@pytest.mark.parametrize("kind", TYPES)
def test_tensors_of_the_file_are_those_of_the_source(kind: str, made: Made) -> None:
    """Norms, biases, embeddings and the embedding of patches in F32 (that of patches in F16 with F16), matrices in the type."""
    source = {name: tensor for path in made.source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    values = stored_values(vision_file(made.artifacts[kind]))
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(vision_file(made.artifacts[kind])).tensors}
    left = {name for name in source if name.startswith(("vision_model.", "multi_modal_projector."))}
    assert len(left) == len(values)
    contents = {source[name].float().numpy().tobytes(): source[name].shape for name in left}
    assert len(contents) == len(left)
    for name, value in values.items():
        matrix = value.ndim == 2 and name not in ("v.position_embd.weight", "v.patch_embd.weight")
        expected = kind if matrix else "F16" if (name, kind) == ("v.patch_embd.weight", "F16") else "F32"
        assert types[name] == expected, name
        if kind in ("F32", "BF16"):
            assert contents.pop(value.numpy().tobytes()) == value.shape, name
    assert kind not in ("F32", "BF16") or not contents
