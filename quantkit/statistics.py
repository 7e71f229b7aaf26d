"""Statistics: what calibration saw, as values and as two files that can be used again.

For every unit the statistics of its inputs, for every expert what the router sent there, for every layer how large the entries of
its KV cache grew.  ``statistics.json`` holds what people read (corpus, source, settings, token counts), ``statistics.safetensors``
the tensors, laid out by the same code as artifacts.  One digest in the JSON covers both, so a damaged or mixed-up pair is noticed;
the same statistics give the same bytes.  Hessians are left out: of 100 MB each, they live for as long as their unit is at work.

Loading takes nothing on trust: whatever the files hold, either sound statistics come back or a CalibrationError.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from quantkit.errors import CalibrationError, CheckpointError, listed
from quantkit.evidence import Evidence
from quantkit.journal import output_errors, sync_directory, write_all
from quantkit.llama4 import Llama4Config, units
from quantkit.safetensors_header import build_header
from quantkit.strict_json import brief, parse_object
from quantkit.tensor_files import TensorFiles, listing, read_small_file

TENSORS_NAME = "statistics.safetensors"
DESCRIPTION_NAME = "statistics.json"
_FORMAT = "quantkit statistics 1"
_DESCRIPTION_LIMIT = 64 << 20  # bytes; 6,000 units and 12,000 shards take about 2 MB
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
_INPUTS = {"mean_square": torch.float32, "peak": torch.float32}
_COUNTS = {
    "tokens": torch.int64,
    "score_mass": torch.float64,
    "margin": torch.float64,
    "kinds": torch.int64,
    "borrowed": torch.int64,
}
_MEMBERS = {"format", "digest", "description", "kinds", "inputs", "experts", "cache_peaks"}
_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")
_REPEAT = "Calibrate again (`quantkit calibrate`), or restore the files from a copy."


@dataclass(frozen=True)
class ExpertCounts:
    """What the experts of one MoE layer received.

    tokens: int64 ``[experts]``, tokens that the router sent there.  score_mass: float64 ``[experts]``, the sum of their scores.
    margin: float64 ``[experts]``, mean over its tokens of how far the chosen logit is above the first one not chosen; 0 without
    tokens.  kinds: int64 ``[experts, kinds]``, its tokens by kind of the corpus.  borrowed: int64 ``[experts]``, tokens lent to it
    because too few came.
    """

    layer: int
    tokens: torch.Tensor
    score_mass: torch.Tensor
    margin: torch.Tensor
    kinds: torch.Tensor
    borrowed: torch.Tensor


@dataclass(frozen=True)
class Statistics:
    """What one calibration saw.

    inputs: by unit key, without Hessian.  experts: by MoE layer.  cache_peaks: by layer, the largest magnitude of a key and of a
    value.  kinds: the labels of the corpus.  description: JSON-able; ``corpus`` (its description), ``source`` (its provenance),
    ``settings``, ``version``.
    """

    inputs: dict[str, Evidence]
    experts: dict[int, ExpertCounts]
    cache_peaks: dict[int, tuple[float, float]]
    kinds: tuple[str, ...]
    description: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------------ save


def save_statistics(directory: Path, statistics: Statistics) -> None:
    """Write both files into an existing directory, durably; the same statistics give the same bytes.

    Raises OutputError when they cannot be written, CalibrationError when a tensor or a value is not what it should be.
    """
    _check_values(statistics, "the statistics")
    tensors, content = _tensors(statistics), _content(statistics)
    header, offsets, size = build_header([(name, _DTYPES[at.dtype], tuple(at.shape)) for name, at in tensors.items()])
    path = directory / TENSORS_NAME
    with output_errors(f"write {path}"):
        descriptor = _create(path)
        try:
            os.ftruncate(descriptor, size)
            write_all(descriptor, header, 0)
            for name, tensor in tensors.items():
                write_all(descriptor, _bytes(tensor), offsets[name])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    text = json.dumps(content | {"digest": _digest(content, tensors)}, indent=1, sort_keys=True, allow_nan=False) + "\n"
    path = directory / DESCRIPTION_NAME
    with output_errors(f"write {path}"):
        descriptor = _create(path)
        try:
            write_all(descriptor, text.encode(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(directory)


def statistics_digest(statistics: Statistics) -> str:
    """xxh3-128 of all values; what the files carry, and what tells in a ledger which statistics were used."""
    return _digest(_content(statistics), _tensors(statistics))


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def _tensors(statistics: Statistics) -> dict[str, torch.Tensor]:
    """All tensors by the name they have in the file."""
    tensors = {
        f"inputs.{key}.{part}": getattr(evidence, part) for key, evidence in statistics.inputs.items() for part in _INPUTS
    } | {f"experts.{layer}.{part}": getattr(counts, part) for layer, counts in statistics.experts.items() for part in _COUNTS}
    return {name: tensors[name].detach().contiguous() for name in sorted(tensors)}


def _content(statistics: Statistics) -> dict[str, Any]:
    """What the JSON says, without the digest."""
    return {
        "format": _FORMAT,
        "description": statistics.description,
        "kinds": list(statistics.kinds),
        "inputs": {key: evidence.tokens for key, evidence in statistics.inputs.items()},
        "experts": sorted(statistics.experts),
        "cache_peaks": {str(layer): list(peaks) for layer, peaks in statistics.cache_peaks.items()},
    }


def _digest(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {_DTYPES[tensors[name].dtype]} {list(tensors[name].shape)}\n".encode("utf-8", "surrogatepass"))
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# ------------------------------------------------------------------------------------------------------------------ load


def is_statistics(directory: Path) -> bool:
    """Whether statistics, perhaps damaged ones, are what this directory is for: it holds one of the files and is no model."""
    present = any(os.path.lexists(directory / name) for name in (DESCRIPTION_NAME, TENSORS_NAME))
    return present and not os.path.lexists(directory / "config.json")


def load_statistics(directory: Path) -> Statistics:
    """Read what :func:`save_statistics` wrote.  Raises CalibrationError when files are missing, damaged or not a pair."""
    missing = [name for name in (DESCRIPTION_NAME, TENSORS_NAME) if not os.path.isfile(directory / name)]
    if missing:
        raise CalibrationError(
            f"{directory} has no {' and no '.join(missing)}. Give the directory that `quantkit calibrate` wrote, with both files."
        )
    try:
        content = parse_object(read_small_file(directory / DESCRIPTION_NAME, _DESCRIPTION_LIMIT), str(directory / DESCRIPTION_NAME))
        _check_content(content, directory / DESCRIPTION_NAME)
        with TensorFiles.open(directory / TENSORS_NAME) as files:
            _check_tensors(content, files, directory / TENSORS_NAME)
            tensors = {name: files.read(name) for name in files.tensors}
        stated = content.pop("digest")
        actual = _digest(content, tensors)
    except (CheckpointError, RecursionError) as error:
        reason = str(error).removesuffix(" Download it again.").removesuffix(" Download the file again.")
        raise CalibrationError(f"{reason} {_REPEAT}") from error
    if actual != stated:
        raise CalibrationError(
            f"{directory}: {DESCRIPTION_NAME} and {TENSORS_NAME} are damaged or do not belong together. {_REPEAT}"
        )
    statistics = Statistics(
        {
            key: Evidence(tokens, tensors[f"inputs.{key}.mean_square"], tensors[f"inputs.{key}.peak"])
            for key, tokens in content["inputs"].items()
        },
        {layer: ExpertCounts(layer, *(tensors[f"experts.{layer}.{part}"] for part in _COUNTS)) for layer in content["experts"]},
        {int(layer): (float(peaks[0]), float(peaks[1])) for layer, peaks in sorted(content["cache_peaks"].items(), key=_by_layer)},
        tuple(content["kinds"]),
        content["description"],
    )
    _check_values(statistics, str(directory))
    return statistics


def _by_layer(item: tuple[str, Any]) -> int:
    return int(item[0])


def _check_content(content: Mapping[str, Any], path: Path) -> None:
    """Raise CalibrationError unless every member has its form."""

    def require(sound: bool, member: str) -> None:
        if not sound:
            raise CalibrationError(f"{path} is damaged: {member!r} is {brief(content.get(member))}. {_REPEAT}")

    if content.get("format") != _FORMAT:
        raise CalibrationError(
            f"{path}: its format is {brief(content.get('format'))}, this version reads {_FORMAT!r}. "
            "Calibrate again, or use the version of quantkit that wrote it."
        )
    if set(content) != _MEMBERS:
        differing = sorted(set(content) ^ _MEMBERS)
        raise CalibrationError(f"{path} is damaged: {brief(differing[0])} is missing or one too many. {_REPEAT}")
    kinds, inputs, experts, peaks = (content[name] for name in ("kinds", "inputs", "experts", "cache_peaks"))
    require(isinstance(content["digest"], str), "digest")
    require(isinstance(content["description"], dict), "description")
    require(isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds) and len(set(kinds)) == len(kinds), "kinds")
    require(isinstance(inputs, dict) and all(type(tokens) is int and 0 <= tokens < 2**63 for tokens in inputs.values()), "inputs")
    require(
        isinstance(experts, list)
        and all(type(layer) is int and 0 <= layer < 10**6 for layer in experts)
        and sorted(set(experts)) == experts,
        "experts",
    )
    require(
        isinstance(peaks, dict) and all(_LAYER.fullmatch(layer) and _is_pair(pair) for layer, pair in peaks.items()), "cache_peaks"
    )


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(value) is float for value in pair)


def _check_tensors(content: Mapping[str, Any], files: TensorFiles, path: Path) -> None:
    """Raise CalibrationError unless the file holds exactly the tensors that the JSON implies, in their dtypes."""
    expected = {f"inputs.{key}.{part}": dtype for key in content["inputs"] for part, dtype in _INPUTS.items()}
    expected |= {f"experts.{layer}.{part}": dtype for layer in content["experts"] for part, dtype in _COUNTS.items()}
    if differing := sorted(expected.keys() ^ files.tensors.keys()):
        shown = listing([brief(name) for name in differing[:3]])
        raise CalibrationError(f"{path} does not hold the tensors that {DESCRIPTION_NAME} lists; differing: {shown}. {_REPEAT}")
    for name, dtype in expected.items():
        if files.tensors[name].dtype != _DTYPES[dtype]:
            raise CalibrationError(f"{path} is damaged: {brief(name)} is {files.tensors[name].dtype}. {_REPEAT}")


def _check_values(statistics: Statistics, where: str) -> None:
    """Raise CalibrationError unless all dtypes and shapes fit each other and all values are possible ones."""

    def fault(what: str) -> CalibrationError:
        return CalibrationError(f"{where}: {what}. {_REPEAT}")

    def require(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise fault(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}")
        if not tensor.isfinite().all() or (tensor < 0).any():
            raise fault(f"{name} holds a value that is negative or not finite")

    for key, evidence in statistics.inputs.items():
        for part, dtype in _INPUTS.items():
            require(f"{part} of {brief(key)}", getattr(evidence, part), dtype, (evidence.mean_square.numel(),))
        if not 0 <= evidence.tokens < 2**63:
            raise fault(f"{brief(key)} counts {evidence.tokens} tokens")
    for layer, counts in statistics.experts.items():
        experts = counts.tokens.numel()
        for part, dtype in _COUNTS.items():
            shape = (experts, len(statistics.kinds)) if part == "kinds" else (experts,)
            require(f"{part} of the experts of layer {layer}", getattr(counts, part), dtype, shape)
        if not torch.equal(counts.kinds.sum(1), counts.tokens):
            raise fault(f"in layer {layer}, the tokens of all kinds are not the tokens of the experts")
    for layer, peaks in statistics.cache_peaks.items():
        if not all(math.isfinite(peak) and peak >= 0 for peak in peaks):
            raise fault(f"the cache of layer {layer} has the peaks {peaks}")


# ----------------------------------------------------------------------------------------------------------- merge, check


def merge(parts: Sequence[Statistics]) -> Statistics:
    """One Statistics from those of different layers of one run.  Raises CalibrationError when they are not that."""
    if not parts:
        raise CalibrationError("There are no statistics to merge. Calibrate at least one layer.")
    first = parts[0]
    if any((part.kinds, part.description) != (first.kinds, first.description) for part in parts):
        raise CalibrationError(f"Statistics of different runs cannot be merged: corpus, source or settings differ. {_REPEAT}")
    for name in ("inputs", "experts", "cache_peaks"):
        if twice := _repeated(key for part in parts for key in getattr(part, name)):
            raise CalibrationError(
                f"Statistics of the same layer cannot be merged: {name} of {brief(twice)} occur twice. {_REPEAT}"
            )
    return Statistics(
        {key: value for part in parts for key, value in part.inputs.items()},
        dict(sorted((layer, value) for part in parts for layer, value in part.experts.items())),
        dict(sorted((layer, value) for part in parts for layer, value in part.cache_peaks.items())),
        first.kinds,
        first.description,
    )


def _repeated(keys: Iterable[str | int]) -> str | int | None:
    seen: set[str | int] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


def check_statistics(statistics: Statistics, config: Llama4Config, provenance: Mapping[str, Any]) -> None:
    """Raise CalibrationError that lists all in which the statistics do not belong to this model.

    provenance: of the checkpoint; its config and shards must be those that were calibrated.  The name that the hub gave it and
    where it lies do not matter.
    """
    problems = _source_problems(statistics.description.get("source"), provenance)
    widths = {unit.key: unit.matrices[0].shape[1] for unit in units(config) if unit.matrices}
    problems += [f"no statistics of {key}" for key in widths if key not in statistics.inputs]
    problems += [f"statistics of {brief(key)}, which the model does not have" for key in statistics.inputs if key not in widths]
    problems += [
        f"{key} has {len(evidence.mean_square)} inputs instead of {widths[key]}"
        for key, evidence in statistics.inputs.items()
        if widths.get(key, len(evidence.mean_square)) != len(evidence.mean_square)
    ]
    sparse = {layer for layer in range(config.num_layers) if config.moe_layers[layer]}
    problems += [f"no counts of the experts of layer {layer}" for layer in sorted(sparse - statistics.experts.keys())]
    problems += [f"experts in layer {layer}, which has none" for layer in sorted(statistics.experts.keys() - sparse)]
    problems += [
        f"layer {layer} has {len(counts.tokens)} experts instead of {config.num_experts}"
        for layer, counts in statistics.experts.items()
        if layer in sparse and len(counts.tokens) != config.num_experts
    ]
    if different := sorted(set(range(config.num_layers)) ^ statistics.cache_peaks.keys()):
        problems.append(f"the cache of layer {different[0]} is missing or one too many")
    if problems:
        raise CalibrationError(
            f"The statistics do not belong to this model. Use those of this checkpoint, or calibrate it.{listed(problems)}"
        )


def _source_problems(source: object, provenance: Mapping[str, Any]) -> list[str]:
    if not isinstance(source, dict):
        return [f"they do not say what they were measured on: 'source' is {brief(source)}"]
    problems = []
    if source.get("config") != provenance["config"]:
        problems.append("config.json is another one")
    measured, present = source.get("shards"), provenance["shards"]
    if not isinstance(measured, dict):
        return [*problems, f"they do not say which shards they were measured on: 'shards' is {brief(measured)}"]
    different = sorted(name for name in measured.keys() | present.keys() if measured.get(name) != present.get(name))
    if different:
        problems.append(f"shards differ ({len(different)}): {listing([brief(name) for name in different[:3]])}")
    return problems
