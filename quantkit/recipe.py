"""Recipe: which scheme, method and format each tensor gets.  Presets, TOML files, validation, fingerprint.

A recipe is an ordered list of rules.  For each tensor the rules are tried from top to bottom and the first that matches decides,
so exceptions stand above the general rule.  A rule matches by role, by layer and by name, all of those that it states:

    name = "int4-with-int8-start"            # the artifact's directory name
    format = "compressed-tensors"
    kv_cache = "fp8"                         # optional: store the scales that a KV cache in FP8 needs
    maximum_error = 0.2                      # optional: relative L2 error of one matrix that ends the run

    [[rules]]
    roles = ["routed_expert", "shared_expert", "dense_mlp"]
    layers = "0-3,47"                        # inclusive ranges
    scheme = "int8-g128"

    [[rules]]
    name = 'layers\\.10\\.feed_forward\\.'      # regular expression, searched in the tensor's name
    scheme = "keep"

    [[rules]]
    roles = ["routed_expert", "shared_expert", "dense_mlp"]
    scheme = "int4-g128"
    method = "rtn"
    clip_search = true
    smooth = false                           # optional: move ranges of activations from down into up projections

    [[rules]]
    scheme = "keep"                          # everything else is stored as in the source

Nothing is silent: a tensor that no rule matches, a rule that decides nothing, and a quantizing rule that reaches a tensor
which must stay as it is (router, norms, embedding, head, vision) are errors that name the tensor or the rule.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import RecipeError
from quantkit.llama4 import ROLES, Role, Unit
from quantkit.scheme import GGML, KEEP, Scheme, parse_scheme, scheme_names

QUANTIZABLE_ROLES: tuple[Role, ...] = ("routed_expert", "shared_expert", "dense_mlp", "attention")
FEED_FORWARD_ROLES: tuple[Role, ...] = ("routed_expert", "shared_expert", "dense_mlp")
METHOD_NAMES = ("rtn", "gptq", "awq")
METHODS_WITH_EVIDENCE = frozenset({"gptq", "awq"})  # these need a Hessian, hence a pass of the corpus through the model
KV_CACHES = ("fp8",)
WORKING_SUFFIXES = (".partial", ".replaced")  # of directories in which the writer works

# Relative L2 error of one matrix above which a run fails, by number family.  Round-to-nearest stays below these for weights
# as heavy tailed as Student's t with 3 degrees of freedom; more means a damaged source or a wrong axis.  A method that looks at
# outputs may go twice as far from the weights.  A recipe can state its own.
MAXIMUM_ERROR = {"int8": 0.12, "fp8": 0.06, "int4": 0.45, "fp4": 0.25}


@dataclass(frozen=True)
class Rule:
    """One line of a recipe; see the module docstring.  ``None`` means that the rule does not look at that property.

    maximum_error: relative L2 error of one matrix that ends the run, instead of the recipe's.  Raises RecipeError for wrong values.
    """

    scheme: str
    roles: tuple[Role, ...] | None = None
    layers: str | None = None
    name: str | None = None
    method: str = "rtn"
    clip_search: bool | None = None
    maximum_error: float | None = None
    smooth: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, str):
            raise RecipeError(f"needs a scheme, one of {', '.join([*scheme_names(), *GGML])}")
        scheme = parse_scheme(self.scheme)
        if self.roles is not None:
            if not isinstance(self.roles, tuple) or not self.roles or not all(isinstance(role, str) for role in self.roles):
                raise RecipeError(f"roles must be a list of names; known roles: {', '.join(ROLES)}")
            for role in self.roles:
                if role not in ROLES:
                    raise RecipeError(f"unknown role {role!r}{_suggest(role, list(ROLES))}. Roles: {', '.join(ROLES)}")
        if self.layers is not None:
            parse_layers(self.layers)
        if self.name is not None:
            try:
                re.compile(self.name)
            except (re.error, TypeError, RecursionError, OverflowError) as error:
                raise RecipeError(f"name {self.name!r} is not a regular expression: {error}") from error
        if self.method not in METHOD_NAMES:
            raise RecipeError(f"unknown method {self.method!r}. Methods: {', '.join(METHOD_NAMES)}")
        if scheme is not None and self.method == "gptq" and scheme.number not in ("int4", "int8"):
            raise RecipeError(f"method gptq is for int4 and int8 schemes; {self.scheme} takes method rtn")
        if scheme is not None and self.method == "awq":
            if scheme.number not in ("int4", "int8") or scheme.granularity != "group":
                raise RecipeError(f"method awq is for int4 and int8 schemes with groups; {self.scheme} takes method rtn")
            if self.clip_search is False:
                raise RecipeError("method awq is a search for scales; leave clip_search = false out, or take method rtn")
        if self.clip_search is not None and not isinstance(self.clip_search, bool):
            raise RecipeError(f"clip_search is {self.clip_search!r}; expected true or false")
        if not isinstance(self.smooth, bool):
            raise RecipeError(f"smooth is {self.smooth!r}; expected true or false")
        if self.smooth and scheme is None:
            raise RecipeError("smooth = true changes weights, and this rule keeps them as they are")
        _check_bound(self.maximum_error)


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules for one artifact.  ``name`` is its directory name.  Raises RecipeError for wrong values.

    kv_cache: ``fp8`` stores the scales with which clients keep keys and values in FP8; None leaves that to them.
    """

    name: str
    rules: tuple[Rule, ...]
    format: str = "compressed-tensors"
    maximum_error: float | None = None
    kv_cache: Literal["fp8"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", self.name):
            raise RecipeError(f"name {self.name!r} must be letters, digits, '.', '_' and '-' (it names a directory)")
        if self.name.endswith(WORKING_SUFFIXES):
            raise RecipeError(f"name {self.name!r} ends like the directories of unfinished work ({', '.join(WORKING_SUFFIXES)})")
        if not isinstance(self.rules, tuple) or not self.rules or not all(isinstance(rule, Rule) for rule in self.rules):
            raise RecipeError("needs at least one rule")
        if not isinstance(self.format, str):
            raise RecipeError(f"format is {self.format!r}; expected a string")
        _check_bound(self.maximum_error)
        if self.kv_cache is not None and self.kv_cache not in KV_CACHES:
            raise RecipeError(f"kv_cache is {self.kv_cache!r}; expected one of {', '.join(KV_CACHES)}, or nothing")

    @property
    def needs_hessians(self) -> bool:
        """Whether a method asks for Hessians, which saved statistics do not hold."""
        return any(rule.method in METHODS_WITH_EVIDENCE and rule.scheme != KEEP for rule in self.rules)

    @property
    def needs_calibration(self) -> bool:
        """Whether something here can only be known from what the model does with text."""
        quantizing = [(scheme, rule.method) for rule in self.rules if (scheme := parse_scheme(rule.scheme)) is not None]
        return (
            self.kv_cache is not None
            or any(rule.smooth for rule in self.rules)
            or any(scheme.static_activations or method in METHODS_WITH_EVIDENCE for scheme, method in quantizing)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, the one that fingerprints and manifests hold."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def _check_bound(bound: object) -> None:
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 < bound < 10):
        raise RecipeError(f"maximum_error is {bound!r}; expected a number between 0 and 10")


@dataclass(frozen=True)
class Assignment:
    """What one tensor gets.  scheme None: stored as in the source.  maximum_error: relative L2 bound, None when kept."""

    scheme: Scheme | None
    method: str = "rtn"
    clip_search: bool = False
    maximum_error: float | None = None
    smooth: bool = False


# --------------------------------------------------------------------------------------------------------------- presets


def _preset(name: str, scheme: str, method: str = "rtn", smooth: bool = False) -> Recipe:
    return Recipe(name, (Rule(scheme, roles=FEED_FORWARD_ROLES, method=method, smooth=smooth), Rule(KEEP)))


# What every public Llama 4 release does: feed-forward weights quantized, everything else as in the source.
PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _preset("fp8-dynamic", "fp8-channel-dynamic"),
        _preset("fp8-block", "fp8-block-dynamic"),
        _preset("fp8-static", "fp8-tensor-static"),
        _preset("w8a16", "int8-g128"),
        _preset("w8a16-channel", "int8-channel"),
        _preset("w8a8", "int8-channel-dynamic", smooth=True),
        _preset("w8a8-rtn", "int8-channel-dynamic"),
        _preset("w4a16-gptq", "int4-g128", "gptq"),
        _preset("w4a16-awq", "int4-g128", "awq"),
        _preset("w4a16-rtn", "int4-g128"),
        _preset("w4a16-rtn-g64", "int4-g64"),
        _preset("w4a16-rtn-g32", "int4-g32"),
        _preset("w4a16-rtn-channel", "int4-channel"),
        _preset("w4a16-rtn-asym", "int4-g128-asym"),
        _preset("nvfp4a16", "nvfp4"),
        _preset("mxfp4a16", "mxfp4"),
    )
}


def resolve_recipe(target: str | Path | Recipe) -> Recipe:
    """A Recipe as it is, the preset of that name, or the TOML file at that path.  Raises RecipeError."""
    if isinstance(target, Recipe):
        return target
    if str(target) in PRESETS:
        return PRESETS[str(target)]
    path = Path(target)
    if path.suffix == ".toml" or os.path.isfile(path):
        return load_recipe(path)
    raise RecipeError(
        f"unknown preset {str(target)!r}{_suggest(str(target), list(PRESETS))}. "
        f"Presets: {', '.join(PRESETS)}; or give a recipe file (.toml)"
    )


# ------------------------------------------------------------------------------------------------------------ TOML files


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.  Raises RecipeError with the file, the rule and what is wrong in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read: {error}") from error
    return parse_recipe(text, str(path), default_name=path.stem)


def parse_recipe(text: str, where: str, default_name: str = "recipe") -> Recipe:
    """Parse and validate the TOML text of a recipe; ``where`` is named in errors."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"recipe {where}: not valid TOML: {error}") from error
    _known_keys(data, ("name", "format", "maximum_error", "kv_cache", "rules"), f"recipe {where}")
    rules = data.get("rules")
    if not isinstance(rules, list) or not rules:
        raise RecipeError(f"recipe {where}: needs at least one [[rules]] table")
    parsed = tuple(_parse_rule(rule, f"recipe {where}, rule {number}") for number, rule in enumerate(rules, 1))
    values: dict[str, Any] = {"name": default_name, **data, "rules": parsed}
    try:
        return Recipe(**values)
    except RecipeError as error:
        raise RecipeError(f"recipe {where}: {error}") from error


def _parse_rule(rule: Any, where: str) -> Rule:
    if not isinstance(rule, Mapping):
        raise RecipeError(f"{where}: expected a table")
    _known_keys(rule, tuple(field.name for field in fields(Rule)), where)
    values: dict[str, Any] = {"scheme": None, **rule}
    if isinstance(values.get("roles"), list):
        values["roles"] = tuple(values["roles"])
    if isinstance(values.get("layers"), int) and not isinstance(values["layers"], bool):
        values["layers"] = str(values["layers"])
    try:
        return Rule(**values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def parse_layers(text: Any) -> list[tuple[int, int]]:
    """``"0-3,47"`` as inclusive ranges ``[(0, 3), (47, 47)]``.  Raises RecipeError."""
    ranges = []
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise RecipeError(f'layers is {text!r}; expected inclusive ranges such as "0-3,47"')
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return ranges


def _known_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{_suggest(key, list(known))}. Known keys: {', '.join(known)}")


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ------------------------------------------------------------------------------------------------------------ assignment


def assign(recipe: Recipe, units: list[Unit]) -> dict[str, Assignment]:
    """The assignment of every matrix and copied tensor of ``units``, by name.

    Raises RecipeError that lists every unmatched tensor, every rule that decides nothing, and every tensor that a rule
    quantizes but that must stay as it is.
    """
    table = [_assignment(recipe, rule) for rule in recipe.rules]
    ranges = [parse_layers(rule.layers) if rule.layers is not None else None for rule in recipe.rules]
    patterns = [re.compile(rule.name) if rule.name is not None else None for rule in recipe.rules]
    used = [0] * len(recipe.rules)
    result: dict[str, Assignment] = {}
    problems: list[str] = []
    for unit in units:
        for item in unit.items:
            for index, rule in enumerate(recipe.rules):
                if rule.roles is not None and item.role not in rule.roles:
                    continue
                allowed, pattern = ranges[index], patterns[index]
                if allowed is not None and (item.layer is None or not any(low <= item.layer <= high for low, high in allowed)):
                    continue
                if pattern is not None and not pattern.search(item.name):
                    continue
                used[index] += 1
                if table[index].scheme is not None and not unit.matrices:
                    problems.append(f"rule {index + 1} gives {rule.scheme} to {item.name}, but {item.role} tensors are always kept")
                result[item.name] = table[index]
                break
            else:
                problems.append(f'no rule matches {item.name} (role {item.role}); end the recipe with a rule scheme = "keep"')
    problems += _smoothing_problems(units, result)
    problems += [f"rule {i + 1} ({_describe(rule)}) decides no tensor" for i, rule in enumerate(recipe.rules) if not used[i]]
    if problems:
        shown = problems[:12] + ([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise RecipeError(f"recipe {recipe.name!r} does not fit this model:\n  " + "\n  ".join(shown))
    return result


def _smoothing_problems(units: list[Unit], assignments: Mapping[str, Assignment]) -> list[str]:
    """What stands against smoothing: it takes up and down of one MLP, both quantized, both smoothed."""
    matrices = {matrix.name: matrix for unit in units for matrix in unit.matrices}
    problems = []
    for name, matrix in matrices.items():
        given = assignments.get(name)
        if given is None:
            continue
        if given.smooth and matrix.role not in FEED_FORWARD_ROLES:
            problems.append(f"smooth = true reaches {name}; it is for gate, up and down projections only")
        elif matrix.projection == "up_proj":
            other = f"{name.removesuffix('up_proj')}down_proj"
            partner = assignments.get(other)
            if partner is not None and partner.smooth != given.smooth:
                problems.append(f"{name} and {other} belong together: smooth both or neither")
    return problems


def _assignment(recipe: Recipe, rule: Rule) -> Assignment:
    scheme = parse_scheme(rule.scheme)
    if scheme is None:
        return Assignment(None)
    # Searching FP8 scales gains little and costs a pass over the data; for the others it is cheap beside the disk.
    search = rule.clip_search if rule.clip_search is not None else scheme.number != "fp8"
    stated = rule.maximum_error if rule.maximum_error is not None else recipe.maximum_error
    usual = MAXIMUM_ERROR[scheme.number] * (2 if rule.method in METHODS_WITH_EVIDENCE else 1)
    return Assignment(scheme, rule.method, search, stated if stated is not None else usual, rule.smooth)


def _describe(rule: Rule) -> str:
    parts = [
        f"{key} = {value}"
        for key, value in asdict(rule).items()
        if value is not None and key in ("scheme", "roles", "layers", "name")
    ]
    return ", ".join(parts)
