"""compressed-tensors, the words: ``quantization_config`` in ``config.json``, and what each client makes of it.

Clients build their modules from this section alone, so it is kept to the form that all of them read.  Their models forbid fields
they do not know, and the set of known fields grew over time: only the oldest fields are written.  Rules kept here:

* the scheme with the most weights targets the class name ``Linear`` (older clients look for that literal); every other scheme is a
  group of its own whose targets are name regexes, which beat class targets in every client;
* what stays as in the source is named in ``ignore`` by regexes, never module by module: clients rename and fuse modules;
* one scheme per routed-expert block, per q/k/v and per gate/up: clients fuse these into one weight;
* groups that share an encoding leave the top-level ``format`` at that encoding (int4 with int8, both weight-only, is still
  ``pack-quantized``); otherwise the top level says ``mixed-precision`` and each group its own.

Regexes are built from the modules themselves: in each layer the largest subtrees that have one scheme throughout are named, then
layers with equal subtrees are joined into one pattern such as ``re:.*layers\\.(?:0|1)\\.feed_forward\\..*``.  A pattern for single
projections names the fused weight too (``(?:gate|up|gate_up)_proj``): SGLang looks for that name before it looks for its parts.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

from quantkit.errors import ArtifactError, RecipeError
from quantkit.llama4 import WeightMatrix
from quantkit.scheme import BLOCK_SIZE, IN_WORDS, INTEGERS, KEEP, Scheme, parse_scheme, scheme_names
from quantkit.strict_json import brief

Schemes = Mapping[WeightMatrix, Scheme | None]

QUANT_METHOD = "compressed-tensors"
PACKED, MIXED = "pack-quantized", "mixed-precision"
ATTENTION_IGNORE = r"re:.*self_attn"
IGNORE = (r"re:.*lm_head", ATTENTION_IGNORE, r"re:.*router", r"re:.*vision_model.*", r"re:.*multi_modal_projector.*")
QUANTIZABLE_ROLES = ("routed_expert", "shared_expert", "dense_mlp", "attention")
_FUSED = {
    **dict.fromkeys(("gate_proj", "up_proj"), "(?:gate|up|gate_up)_proj"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "(?:q|k|v|qkv)_proj"),
}
KV_CACHE_SCHEMES = {"fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}}
_ARGUMENTS = ("weights", "input_activations", "output_activations")
_NOT_LINEAR = re.compile(r"(?:^|\.)(?:\w*norm\w*|\w*embed\w*|experts|\w*layernorm_(?:pre|post))$")


def encoding(scheme: Scheme) -> Literal["packed", "plain", "fp4"]:
    """How the codes are stored: in 32-bit words, one per byte as they are, or two fp4 codes per byte."""
    if scheme.number == "fp4":
        return "fp4"
    return "plain" if scheme.number == "fp8" or scheme.dynamic_activations else "packed"


def held(scheme: Scheme) -> bool:
    """Whether the format holds numbers of this family, so that clients can compute with them."""
    return scheme.number in ("fp8", "fp4", *IN_WORDS)


def format_name(scheme: Scheme) -> str:
    """The format field of a group: the client's name for the encoding."""
    if scheme.number == "fp4":
        return "nvfp4-pack-quantized" if scheme.global_scale else "mxfp4-pack-quantized"
    if encoding(scheme) == "packed":
        return PACKED
    return "float-quantized" if scheme.number == "fp8" else "int-quantized"


def _arguments(scheme: Scheme) -> dict[str, dict[str, Any]]:
    """The ``weights`` and, if the client quantizes activations, ``input_activations`` of a group."""
    kind = "int" if scheme.number in INTEGERS else "float"
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": kind, "symmetric": scheme.symmetric}
    if scheme.granularity == "group":
        weights |= {"strategy": "tensor_group" if scheme.global_scale else "group", "group_size": scheme.group_size}
    elif scheme.granularity == "block":
        weights |= {"strategy": "block", "block_structure": [BLOCK_SIZE, BLOCK_SIZE]}
    else:
        weights |= {"strategy": scheme.granularity}
    result = {"weights": weights | {"dynamic": False}}
    if scheme.dynamic_activations:
        per = {"strategy": "group", "group_size": BLOCK_SIZE} if scheme.granularity == "block" else {"strategy": "token"}
        result["input_activations"] = {"num_bits": scheme.bits, "type": kind, "symmetric": True, **per, "dynamic": True}
    if scheme.static_activations:
        inputs = {"num_bits": scheme.bits, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False}
        result["input_activations"] = inputs
    return result


# -------------------------------------------------------------------------------------------------------------- building


def quantization_config(schemes: Schemes, kv_cache: str | None = None) -> dict[str, Any]:
    """The ``quantization_config`` section for these matrices; None as scheme means kept as in the source.

    kv_cache: ``fp8`` when the scales of keys and values are stored as well.

    Raises RecipeError for what the format cannot hold, see :func:`check`, and when no matrix is quantized.
    """
    check(schemes)
    weights: Counter[Scheme] = Counter()
    for matrix, scheme in schemes.items():
        if scheme is not None:
            weights[scheme] += matrix.shape[0] * matrix.shape[1]
    if not weights:
        raise RecipeError("the recipe quantizes no weight at all; there is nothing to write in the compressed-tensors format")
    ordered = [scheme for scheme, _ in weights.most_common()]  # equal counts stay in order of appearance
    formats = {format_name(scheme) for scheme in ordered}
    layers = _layers(schemes)
    groups = {}
    for number, scheme in enumerate(ordered):
        targets = ["Linear"] if number == 0 else _patterns(layers, scheme)
        groups[f"group_{number}"] = {"targets": targets, **_arguments(scheme)}
        if len(formats) > 1:
            groups[f"group_{number}"]["format"] = format_name(scheme)
    attention_kept = not any(scheme is not None and matrix.role == "attention" for matrix, scheme in schemes.items())
    ignore = [pattern for pattern in IGNORE if attention_kept or pattern != ATTENTION_IGNORE]
    ignore += [pattern for pattern in _patterns(layers, None) if not (attention_kept and r"\.self_attn" in pattern)]
    section = {
        "quant_method": QUANT_METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }
    return section if kv_cache is None else section | {"kv_cache_scheme": KV_CACHE_SCHEMES[kv_cache]}


Path = tuple[str, ...]  # of a module below its layer: ("feed_forward", "experts", "3", "gate_proj")


def _layers(schemes: Schemes) -> dict[int, dict[Path, Scheme | None]]:
    layers: dict[int, dict[Path, Scheme | None]] = defaultdict(dict)
    for matrix, scheme in schemes.items():
        if matrix.layer is not None:
            layers[matrix.layer][tuple(matrix.name.partition(f"layers.{matrix.layer}.")[2].split("."))] = scheme
    return layers


def _patterns(layers: Mapping[int, Mapping[Path, Scheme | None]], scheme: Scheme | None) -> list[str]:
    """Regexes that match exactly the modules of that scheme among ``layers``."""
    where: dict[str, list[int]] = defaultdict(list)  # pattern of a subtree -> layers in which all of it has the scheme
    present: dict[str, int] = {}  # pattern of a subtree -> number of layers that have such a subtree
    for layer, modules in layers.items():
        for path, pattern in _uniform_subtrees(modules, scheme):
            where[pattern].append(layer)
            if pattern not in present:
                present[pattern] = sum(any(other[: len(path)] == path for other in others) for others in layers.values())
    patterns = []
    for pattern, chosen in where.items():
        if len(chosen) == present[pattern]:
            numbers = r"\d+"
        else:
            numbers = str(chosen[0]) if len(chosen) == 1 else f"(?:{'|'.join(map(str, chosen))})"
        patterns.append(rf"re:.*layers\.{numbers}\.{pattern}")
    return patterns


def _uniform_subtrees(modules: Mapping[Path, Scheme | None], scheme: Scheme | None) -> Iterator[tuple[Path, str]]:
    """The largest subtrees of one layer in which every module has ``scheme``, each with its pattern, in order of appearance."""
    mixed = {path[:depth] for path, other in modules.items() if other != scheme for depth in range(len(path))}
    seen = set()
    for path, other in modules.items():
        if other != scheme:
            continue
        subtree = next(path[:depth] for depth in range(1, len(path) + 1) if path[:depth] not in mixed)
        names = [re.escape(name) for name in subtree]
        if subtree == path:
            pattern = r"\.".join([*names[:-1], _FUSED.get(path[-1], names[-1])]) + "$"
        else:
            pattern = r"\.".join(names) + r"\..*"
        if pattern not in seen:
            seen.add(pattern)
            yield subtree, pattern


def check(schemes: Schemes) -> None:
    """Raise RecipeError, with all problems in one message, for what no client could load from this format."""
    problems: dict[str, list[str]] = defaultdict(list)
    fused: dict[str, dict[str, WeightMatrix]] = defaultdict(dict)
    for matrix, scheme in schemes.items():
        if scheme is not None and matrix.role not in QUANTIZABLE_ROLES:
            problems[f"{matrix.role} weights must stay as in the source, clients build them unquantized"].append(matrix.name)
        if scheme is not None and scheme.number == "ggml":
            problems[f"{scheme.name} is a type of GGUF files; say format = 'gguf'"].append(matrix.name)
            continue
        if scheme is not None and not held(scheme):
            problems[f"no client computes with {scheme.number}, which {scheme.name} is; say format = 'packed'"].append(matrix.name)
            continue
        misfit = scheme.misfit(*matrix.shape) if scheme is not None else None
        if scheme is not None and misfit:
            problems[f"{scheme.name} does not fit, {misfit}"].append(matrix.name)
        fused[_fused_name(matrix)].setdefault(scheme.name if scheme is not None else KEEP, matrix)
    for name, found in fused.items():
        if len(found) > 1:
            detail = ", ".join(f"{matrix.name} has {scheme}" for scheme, matrix in found.items())
            problems["weights that clients fuse into one must have one scheme"].append(f"{name}: {detail}")
    if problems:
        lines = [f"{problem}: {_some(names)}" for problem, names in problems.items()]
        raise RecipeError("the compressed-tensors format cannot hold this recipe:\n  " + "\n  ".join(lines))


def _fused_name(matrix: WeightMatrix) -> str:
    """The weight that clients fuse this matrix into: one per routed-expert block, q/k/v and gate/up; else itself."""
    parent, _, projection = matrix.name.rpartition(".")
    if matrix.role == "routed_expert":
        return parent.rpartition(".")[0]
    if projection in ("gate_proj", "up_proj"):
        return f"{parent}.gate_up_proj"
    return f"{parent}.qkv_proj" if projection in ("q_proj", "k_proj", "v_proj") else matrix.name


def _some(names: list[str]) -> str:
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def config_text(source_text: str, quantization_config: Mapping[str, Any]) -> str:
    """The source's ``config.json`` with one more member, ``quantization_config``; every other character stays as it is.

    A parse and dump would respell numbers and drop what the parser does not keep.  An empty or null section of that name is
    replaced.
    """
    opening, members, closing = _members(source_text)
    present = next((member for member in members if member[0] == "quantization_config"), None)
    lead = source_text[opening : members[0][1]] if members else "\n  "
    newline = "\r\n" if "\r\n" in lead else "\n"
    if newline in lead:
        unit = lead.rpartition("\n")[2]
        value = json.dumps(quantization_config, indent=unit or None).replace("\n", newline + unit)
    else:
        value = json.dumps(quantization_config)
    if present is not None:
        return source_text[: present[2]] + value + source_text[present[3] :]
    end = members[-1][3] if members else opening
    tail = source_text[end:] if members else (newline + source_text[closing:])
    return source_text[:end] + ("," if members else "") + lead + f'"quantization_config": {value}' + tail


def _members(text: str) -> tuple[int, list[tuple[str, int, int, int]], int]:
    """Of a JSON object: index after ``{``, (key, key start, value start, value end) of each member, index of the last ``}``."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")

    def skip(index: int) -> int:
        match = space.match(text, index)
        return match.end() if match else index

    opening = skip(0) + 1
    index, members = skip(opening), []
    while text[index] != "}":
        key, after_key = decoder.raw_decode(text, index)
        value_start = skip(skip(after_key) + 1)
        _, value_end = decoder.raw_decode(text, value_start)
        members.append((key, index, value_start, value_end))
        index = skip(value_end)
        if text[index] == ",":
            index = skip(index + 1)
    return opening, members, index


# --------------------------------------------------------------------------------------------------------------- reading


def check_section(quantization_config: Mapping[str, Any]) -> None:
    """Raise ArtifactError when a ``quantization_config`` that somebody wrote is not built as clients read it.

    Whether its groups are schemes of quantkit is not asked here.
    """
    _check_names("ignore", quantization_config.get("ignore"))
    groups = quantization_config.get("config_groups")
    if not isinstance(groups, Mapping):
        raise ArtifactError(f"quantization_config has no config_groups: expected an object, found {brief(groups)}")
    for key, group in groups.items():
        where = f"config_groups, {brief(key)}"
        if not isinstance(group, Mapping):
            raise ArtifactError(f"quantization_config, {where}: expected an object, found {brief(group)}")
        _check_names(f"{where}, targets", group.get("targets"))
        for name in _ARGUMENTS:
            if group.get(name) is not None and not isinstance(group[name], Mapping):
                raise ArtifactError(f"quantization_config, {where}, {name}: expected an object, found {brief(group[name])}")


def _check_names(where: str, names: object) -> None:
    """``names`` is a list of module names, class names and ``re:`` patterns, or absent."""
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"quantization_config, {where}: expected a list of names, found {brief(names)}")
    for name in names:
        if name.startswith("re:"):
            _pattern(name[3:])


def scheme_of(quantization_config: Mapping[str, Any], module_name: str) -> Scheme | None:
    """The scheme that a client gives to the linear module of that name, None when it is left alone.

    As clients do it: ``ignore`` first, then groups by name or ``re:`` pattern, then by class ``Linear``.  Modules that are not
    linear (norms, embeddings) have none.  Raises ArtifactError when the group is nothing that quantkit writes, or the section is
    malformed.
    """
    check_section(quantization_config)
    if _NOT_LINEAR.search(module_name) or _matches(module_name, quantization_config.get("ignore") or ()):
        return None
    groups = quantization_config["config_groups"]
    by_name = [group for group in groups.values() if _matches(module_name, group.get("targets") or ())]
    by_class = [group for group in groups.values() if "Linear" in (group.get("targets") or ())]
    for name_or_class in (by_name, by_class):
        if name_or_class:
            return _scheme_of_group(name_or_class[0])
    return None


def kv_cache_of(quantization_config: Mapping[str, Any]) -> str | None:
    """The ``kv_cache`` of the recipe that this section was made for, None when the KV cache is not quantized.

    Raises ArtifactError when the section asks for something that quantkit does not write.
    """
    stated = quantization_config.get("kv_cache_scheme")
    if stated is None:
        return None
    for name, arguments in KV_CACHE_SCHEMES.items():
        if isinstance(stated, Mapping) and _stated(stated) == _stated(arguments):
            return name
    raise ArtifactError(f"quantization_config, kv_cache_scheme: {brief(stated)} is nothing that quantkit writes")


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(_pattern(target[3:]).match(name) is not None if target.startswith("re:") else name == target for target in targets)


@lru_cache(maxsize=1024)
def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ArtifactError(f"quantization_config holds {brief(text)}, which is not a regular expression: {error}") from error


def _scheme_of_group(group: Mapping[str, Any]) -> Scheme:
    wanted = {key: _stated(group.get(key)) for key in _ARGUMENTS}
    for scheme in map(parse_scheme, scheme_names()):
        if scheme is not None and held(scheme):
            arguments = _arguments(scheme)
            if all(wanted[key] == _stated(arguments.get(key)) for key in wanted):
                return scheme
    spelled = [f"{key} " + ", ".join(f"{brief(name)}: {brief(value)}" for name, value in wanted[key].items()) for key in wanted]
    raise ArtifactError(f"quantization_config holds a group that is no scheme of quantkit: {'; '.join(spelled)}")


def _stated(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """What matters of one set of arguments: nulls, and how the numbers were once chosen, do not."""
    irrelevant = ("observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype")
    return {key: value for key, value in (arguments or {}).items() if value is not None and key not in irrelevant}
