"""What a GGUF file says of itself beyond the architecture: its name, origin and license, and how files are called.

Publishers call a file ``<model>-<type>.gguf``, the vision tower's ``mmproj-<model>-<type>.gguf``, and number the files of a split
model from 1.  The parts of a model's name are told apart by the ``gguf`` package, as llama.cpp's converter does, so that
``Llama-4-Scout-17B-16E-Instruct`` becomes the same ``general.*`` keys as in published files.

License, languages, tags and base models come from the model card, the block between two lines ``---`` at the top of
``README.md``.  It is YAML; only what cards use for these keys is understood here (text, lists in both spellings), and everything
else in it is passed over, because a card is written by hand and nothing of the weights depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf.constants import GGUFType, Keys, LlamaFileType
from gguf.metadata import Metadata
from gguf.utility import size_label

from quantkit.config import Llama4Config
from quantkit.errors import CheckpointError
from quantkit.gguf_header import GGUFValueType, MetadataEntry
from quantkit.llama4 import inventory
from quantkit.strict_json import parse_object

CARD_FILE = "README.md"
MAX_CARD_BYTES = 2**18  # of the block at its top
MAX_CARD_ITEMS = 1000

# Name of a mixture -> llama.cpp's number for general.file_type
FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {
        kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): kind.value
        for kind in LlamaFileType
        if kind is not LlamaFileType.GUESSED
    }
)

_SAMPLING = {  # key of generation_config.json -> (key, type)
    "top_k": (Keys.General.SAMPLING_TOP_K, GGUFValueType.INT32),
    "top_p": (Keys.General.SAMPLING_TOP_P, GGUFValueType.FLOAT32),
    "min_p": (Keys.General.SAMPLING_MIN_P, GGUFValueType.FLOAT32),
    "temperature": (Keys.General.SAMPLING_TEMP, GGUFValueType.FLOAT32),
}


# --------------------------------------------------------------------------------------------------------------- entries


def text(key: str, value: str) -> MetadataEntry:
    """A string."""
    return MetadataEntry(key, GGUFValueType.STRING, value)


def count(key: str, value: int) -> MetadataEntry:
    """An unsigned number of 32 bits, which nearly all numbers of llama.cpp are."""
    return MetadataEntry(key, GGUFValueType.UINT32, value)


def real(key: str, value: float) -> MetadataEntry:
    """A float of 32 bits."""
    return MetadataEntry(key, GGUFValueType.FLOAT32, float(value))


def flag(key: str, value: bool) -> MetadataEntry:
    """True or false."""
    return MetadataEntry(key, GGUFValueType.BOOL, value)


def texts(key: str, values: Sequence[str]) -> MetadataEntry:
    """An array of strings, not empty."""
    return MetadataEntry(key, GGUFValueType.ARRAY, tuple(values), GGUFValueType.STRING)


def integers(key: str, values: Sequence[int]) -> MetadataEntry:
    """An array of signed numbers of 32 bits, not empty."""
    return MetadataEntry(key, GGUFValueType.ARRAY, tuple(values), GGUFValueType.INT32)


def reals(key: str, values: Sequence[float]) -> MetadataEntry:
    """An array of floats of 32 bits, not empty."""
    return MetadataEntry(key, GGUFValueType.ARRAY, tuple(float(value) for value in values), GGUFValueType.FLOAT32)


# ----------------------------------------------------------------------------------------------------------------- names


def _stem(model_name: str) -> str:
    """The model's name without its owner, fit for a file name."""
    return re.sub(r"[\s/\\\0]+", "-", model_name.strip().rstrip("/").rsplit("/", 1)[-1]) or "model"


def file_name(model_name: str, file_type: str, part: tuple[int, int] | None = None) -> str:
    """The name of a model's file.  part: (number from 0, how many) for a split model."""
    split = "" if part is None else f"-{part[0] + 1:05d}-of-{part[1]:05d}"
    return f"{_stem(model_name)}-{file_type}{split}.gguf"


def vision_file_name(model_name: str, file_type: str) -> str:
    """The name of the file with the vision tower."""
    return f"mmproj-{_stem(model_name)}-{file_type}.gguf"


def split_metadata(number: int, files: int, tensors: int) -> list[MetadataEntry]:
    """The keys that each file of a split model has; all but the first have no others.  number: from 0.  tensors: in all files."""
    return [
        MetadataEntry(Keys.Split.LLM_KV_SPLIT_NO, GGUFValueType.UINT16, number),
        MetadataEntry(Keys.Split.LLM_KV_SPLIT_COUNT, GGUFValueType.UINT16, files),
        MetadataEntry(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, GGUFValueType.INT32, tensors),
    ]


# ------------------------------------------------------------------------------------------------------------ model card


@dataclass(frozen=True)
class ModelCard:
    """What the model card says of origin and license.  Empty where it says nothing."""

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()


def read_model_card(directory: Path) -> ModelCard:
    """The card in ``README.md``, an empty one when there is none.  Raises CheckpointError when the file cannot be read."""
    path = directory / CARD_FILE
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CARD_BYTES)
    except FileNotFoundError:
        return ModelCard()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check its permissions, or remove it.") from error
    return parse_model_card(content.decode("utf-8", errors="replace"))


def parse_model_card(content: str) -> ModelCard:
    """The card at the top of a text; an empty one when there is none."""
    lines = content.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---" or "---" not in (line.rstrip() for line in lines[1:]):
        return ModelCard()
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines[1:]:
        if line.rstrip() == "---":
            break
        if item := re.fullmatch(r"\s*-\s+(.*)", line):
            if current is not None and len(current) < MAX_CARD_ITEMS:
                current += _scalars(item[1])
        elif found := re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*):(?:\s+(.*))?", line):
            current = values.setdefault(found[1], [])
            current += _scalars(found[2] or "")
        elif line.strip():
            current = None  # something nested, or text over several lines: nothing that is looked for here
    listed = {key: tuple(items[:MAX_CARD_ITEMS]) for key, items in values.items()}

    def first(key: str) -> str:
        return next(iter(listed.get(key, ())), "")

    return ModelCard(
        license=",".join(listed.get("license", ())),
        license_name=first("license_name"),
        license_link=first("license_link"),
        tags=listed.get("tags", ()) + listed.get("pipeline_tag", ()),
        languages=listed.get("language", ()) or listed.get("languages", ()),
        base_models=listed.get("base_model", ()) or listed.get("base_models", ()),
    )


def _scalars(value: str) -> list[str]:
    """The text, or the texts of a list ``[a, b]``, of one line of a card."""
    value = re.sub(r"(^|\s)#.*$", "", value).strip()
    if value.startswith("[") and value.endswith("]"):
        return [scalar for part in value[1:-1].split(",")[:MAX_CARD_ITEMS] for scalar in _scalars(part)]
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    elif value[:1] in ("|", ">", "{", "&", "*", "!"):
        return []  # a block of text, or YAML that no card has here
    return [value] if value else []


# ----------------------------------------------------------------------------------------------------------- general.*


def general_metadata(
    model_name: str, *, architecture: str, kind: str = GGUFType.MODEL, source: Path | None = None, label: str = ""
) -> list[MetadataEntry]:
    """The ``general.*`` keys of a file, in the converter's order.

    model_name: as on the hub, with or without its owner.  source: directory of the checkpoint, for its model card and sampling
    settings.  label: the size, where the model's name does not tell it.
    """
    card = ModelCard() if source is None else read_model_card(source)
    entries = [text(Keys.General.ARCHITECTURE, architecture), text(Keys.General.TYPE, kind)]
    if source is not None and kind == GGUFType.MODEL:
        entries += _sampling_metadata(source)
    full, organization, basename, finetune, version, size = Metadata.get_model_id_components(model_name.strip().rstrip("/"))
    named = {
        Keys.General.NAME: _title(full),
        Keys.General.VERSION: version,
        Keys.General.ORGANIZATION: _title(organization),
        Keys.General.FINETUNE: finetune,
        Keys.General.BASENAME: basename,
        Keys.General.SIZE_LABEL: size or label,
        Keys.General.LICENSE: card.license,
        Keys.General.LICENSE_NAME: card.license_name,
        Keys.General.LICENSE_LINK: card.license_link,
    }
    entries += [text(key, value) for key, value in named.items() if value]
    entries += _base_model_metadata(card.base_models)
    entries += [
        texts(key, value) for key, value in ((Keys.General.TAGS, card.tags), (Keys.General.LANGUAGES, card.languages)) if value
    ]
    return entries


def _title(name: str | None) -> str:
    return str(Metadata.id_to_title(name)) if name else ""  # type: ignore[no-untyped-call]


def _base_model_metadata(models: Sequence[str]) -> list[MetadataEntry]:
    entries = [count(Keys.General.BASE_MODEL_COUNT, len(models))] if models else []
    for number, model in enumerate(models):
        url = f"https://huggingface.co/{model}"
        if re.match(r"[a-z]+://", model):
            url, model = model, model.removeprefix("https://huggingface.co/")
        full, organization, _, _, version, _ = Metadata.get_model_id_components(model)
        named = {
            Keys.General.BASE_MODEL_NAME: _title(full),
            Keys.General.BASE_MODEL_VERSION: version,
            Keys.General.BASE_MODEL_ORGANIZATION: _title(organization),
            Keys.General.BASE_MODEL_REPO_URL: url if organization else "",
        }
        entries += [text(key.format(id=number), value) for key, value in named.items() if value]
    return entries


def _sampling_metadata(source: Path) -> list[MetadataEntry]:
    """What ``generation_config.json`` recommends; llama.cpp takes it as its defaults."""
    path = source / "generation_config.json"
    try:
        settings = parse_object(path.read_bytes(), str(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    entries = []
    for name, (key, kind) in _SAMPLING.items():
        value: Any = settings.get(name)
        if kind is GGUFValueType.INT32 and type(value) is int and 0 <= value < 2**31:
            entries.append(MetadataEntry(key, kind, value))
        elif kind is GGUFValueType.FLOAT32 and type(value) in (int, float) and 0 <= value < 1e6:
            entries.append(real(key, value))
    return entries


def computed_label(config: Llama4Config) -> str:
    """The size as the converter computes it where a name does not tell: experts x (what is shared + one expert), such as 16x17B."""
    tensors = [tensor for tensor in inventory(config) if tensor.role not in ("vision", "projector")]
    experts = sum(tensor.elements for tensor in tensors if tensor.role == "routed_expert")
    shared = sum(tensor.elements for tensor in tensors) - experts
    return size_label(shared + experts, shared, experts // config.num_experts, config.num_experts if experts else 0)
