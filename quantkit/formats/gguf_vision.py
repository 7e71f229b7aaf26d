"""The vision tower and projector in a file of their own, which llama.cpp calls ``mmproj``, and Ollama's ``Modelfile``.

llama.cpp loads the two files side by side.  Its vision code has Llama 4's arithmetic built in, with a few numbers as keys; norms,
biases, embeddings and the patch embedding are float32 there, and only the tower's matrices take the chosen type.  The tower of
the releases has rows of 1408 weights, which no type with blocks of 256 fits, so F16, BF16 and Q8_0 are the choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_VERSION, GGUFType, Keys, VisionProjectorType

from quantkit.config import MAX_LAYERS, Llama4Config, VisionConfig
from quantkit.errors import ArtifactError, CheckpointError, RecipeError
from quantkit.formats.gguf_general import FILE_TYPES, count, flag, general_metadata, real, reals, text
from quantkit.formats.gguf_metadata import MetadataReader
from quantkit.gguf_header import GGUFValueType, MetadataEntry
from quantkit.recipe import VISION_TYPES
from quantkit.strict_json import brief, parse_object

ARCHITECTURE = "clip"
ROPE_THETA = 10_000.0  # built into llama.cpp
CHANNELS = 3
PREPROCESSOR_FILE = "preprocessor_config.json"
DEFAULT_PIXEL = (0.5, 0.5, 0.5)  # mean and deviation that Llama 4's image processor takes


def vision_inexpressible(vision: VisionConfig) -> str | None:
    """Why llama.cpp would compute something else than this tower; None when it computes the same."""
    reasons = []
    if vision.hidden_act != "gelu":
        reasons.append(f"hidden_act is {brief(vision.hidden_act)}, but llama.cpp's Llama 4 tower has gelu")
    if vision.rope_theta != ROPE_THETA:
        reasons.append(f"rope_theta is {vision.rope_theta:g}, but llama.cpp has {ROPE_THETA:g} built in")
    if vision.num_channels != CHANNELS:
        reasons.append(f"num_channels is {vision.num_channels}, but llama.cpp reads images of {CHANNELS}")
    if vision.pixel_shuffle_ratio * _shuffle(vision) != 1:
        reasons.append(f"pixel_shuffle_ratio is {vision.pixel_shuffle_ratio:g}, but llama.cpp stores its inverse as a whole number")
    elif vision.image_size % vision.patch_size or vision.image_size // vision.patch_size % _shuffle(vision):
        reasons.append(
            f"an image of {vision.image_size} pixels does not divide into patches of {vision.patch_size}, {_shuffle(vision)} by "
            f"{_shuffle(vision)} of which are joined"
        )
    if vision.hidden_size % vision.num_attention_heads:
        reasons.append(f"hidden_size is {vision.hidden_size}, no multiple of num_attention_heads, {vision.num_attention_heads}")
    return "; ".join(reasons) or None


def _shuffle(vision: VisionConfig) -> int:
    """How many patches are joined along each side."""
    return max(1, round(1 / vision.pixel_shuffle_ratio))


def vision_metadata(config: Llama4Config, *, model_name: str, file_type: str, source: Path | None = None) -> list[MetadataEntry]:
    """All keys of the vision file, in the converter's order.

    file_type: one of ``VISION_TYPES``.  source: directory of the checkpoint, for its model card and ``preprocessor_config.json``.
    """
    vision = config.vision
    if vision is None:
        raise RecipeError("this checkpoint is text-only; it has no vision tower to write. Leave the vision file out.")
    if file_type not in VISION_TYPES:
        raise RecipeError(f"the vision file cannot be {brief(file_type)}. Choose one of {', '.join(VISION_TYPES)}.")
    mean, deviation = (DEFAULT_PIXEL, DEFAULT_PIXEL) if source is None else _pixels(source)
    keys, attention = Keys.ClipVision, Keys.ClipVision.Attention
    return [
        *general_metadata(model_name, architecture=ARCHITECTURE, kind=GGUFType.MMPROJ, source=source),
        count(Keys.General.FILE_TYPE, FILE_TYPES[file_type]),
        flag(Keys.Clip.HAS_VISION_ENCODER, True),
        count(keys.PROJECTION_DIM, config.hidden_size),
        count(keys.IMAGE_SIZE, vision.image_size),
        count(keys.PATCH_SIZE, vision.patch_size),
        count(keys.EMBEDDING_LENGTH, vision.hidden_size),
        count(keys.FEED_FORWARD_LENGTH, vision.intermediate_size),
        count(keys.BLOCK_COUNT, vision.num_hidden_layers),
        count(attention.HEAD_COUNT, vision.num_attention_heads),
        reals(keys.IMAGE_MEAN, mean),
        reals(keys.IMAGE_STD, deviation),
        text(Keys.Clip.PROJECTOR_TYPE, VisionProjectorType.LLAMA4),
        real(attention.LAYERNORM_EPS, vision.norm_eps),
        count(keys.Projector.SCALE_FACTOR, _shuffle(vision)),
        flag(keys.USE_GELU, True),
        count(Keys.General.QUANTIZATION_VERSION, GGML_QUANT_VERSION),
    ]


def _pixels(source: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixel values, from the image processor's settings where the checkpoint has them."""
    path = source / PREPROCESSOR_FILE
    try:
        settings = parse_object(path.read_bytes(), str(path))
    except FileNotFoundError:
        settings = {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    return _channels(settings, "image_mean", path), _channels(settings, "image_std", path)


def _channels(settings: dict[str, Any], key: str, path: Path) -> tuple[float, ...]:
    values = settings.get(key)
    if values is None:
        return DEFAULT_PIXEL
    if not isinstance(values, list) or len(values) != CHANNELS or not all(type(value) in (int, float) for value in values):
        raise CheckpointError(f"{path}: {key} is {brief(values)}; expected {CHANNELS} numbers. Download it again.")
    if not all(-1e6 < value < 1e6 for value in values) or (key == "image_std" and not all(value > 0 for value in values)):
        raise CheckpointError(f"{path}: {key} is {brief(values)}, which cannot be. Download it again.")
    return tuple(float(value) for value in values)


def vision_from_metadata(
    metadata: Mapping[str, MetadataEntry], shapes: Mapping[str, tuple[int, ...]], where: str = "the vision file"
) -> VisionConfig:
    """The config of the tower that a finished vision file stands for, as llama.cpp reads it; the reverse of ``vision_metadata``.

    shapes: of all tensors, in torch's order.  Raises ArtifactError when a key or tensor is missing.
    """
    read, keys = MetadataReader(metadata, where), Keys.ClipVision
    projector = read.value(Keys.Clip.PROJECTOR_TYPE, GGUFValueType.STRING)
    if projector != VisionProjectorType.LLAMA4:
        raise ArtifactError(f"{where}: its projector is {brief(projector)}; expected {VisionProjectorType.LLAMA4}.")
    sizes = [shapes.get(f"mm.model.{name}.weight", ()) for name in ("mlp.1", "mlp.2", "fc")]
    if not all(len(shape) == 2 for shape in sizes):
        raise ArtifactError(f"{where}: the projector's matrices mm.model.mlp.1, mm.model.mlp.2 and mm.model.fc are not all there.")
    layers, image, patch = read.count(keys.BLOCK_COUNT), read.count(keys.IMAGE_SIZE), read.count(keys.PATCH_SIZE)
    if layers > MAX_LAYERS:
        raise ArtifactError(f"{where}: {layers:,} layers cannot be. Convert the model again.")
    return VisionConfig(
        hidden_size=read.count(keys.EMBEDDING_LENGTH),
        intermediate_size=read.count(keys.FEED_FORWARD_LENGTH),
        num_hidden_layers=layers,
        image_size=image,
        patch_size=patch,
        num_channels=CHANNELS,
        projector_input_dim=sizes[0][0],
        projector_output_dim=sizes[1][0],
        vision_output_dim=sizes[2][1],
        num_attention_heads=read.count(keys.Attention.HEAD_COUNT),
        norm_eps=read.real(keys.Attention.LAYERNORM_EPS),
        rope_theta=ROPE_THETA,
        hidden_act="gelu",
        pixel_shuffle_ratio=1 / read.count(keys.Projector.SCALE_FACTOR),
    )


def modelfile(model_files: Sequence[str], vision_file: str | None = None) -> str:
    """Ollama's ``Modelfile`` for files in the same directory.

    The chat template and the ends of generation stand in the model's file, from which Ollama takes them.
    """
    lines = ["# ollama create NAME -f Modelfile"]
    if len(model_files) > 1:
        lines.append("# Ollama wants the model in one file: llama-gguf-split --merge joins these.")
    lines += [f"FROM ./{name}" for name in (*model_files, *([vision_file] if vision_file else []))]
    return "\n".join(lines) + "\n"
