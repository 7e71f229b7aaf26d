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

A GGUF recipe usually begins with one of llama.cpp's file types, which gives every tensor that no rule matches its type:

    format = "gguf"
    mixture = "Q4_K_M"
    vision = "BF16"                          # F16 (default), BF16, F32 or Q8_0: of the vision tower, in its own file
    method = "gptq"                          # rtn (default), importance or gptq: of all tensors that no rule gives another one

    [[rules]]
    name = "ffn_down_exps"                   # searched in the tensor's name here and in its name in the file
    scheme = "Q6_K"

Nothing is silent: a tensor that no rule matches, a rule that decides nothing, and a quantizing rule that reaches a tensor
which must stay as it is (router and norms; in safetensors also embedding, head and vision) are errors that name the tensor or the
rule.
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
from quantkit.llama4 import ROLES, Role
from quantkit.mixtures import FILE_TYPES
from quantkit.scheme import GGML, INTEGERS, KEEP, Scheme, parse_scheme, scheme_names

FEED_FORWARD_ROLES: tuple[Role, ...] = ("routed_expert", "shared_expert", "dense_mlp")
GGUF = "gguf"
PACKED = "packed"
VISION_TYPES = ("F16", "BF16", "F32", "Q8_0")
# What llama.cpp's option --tensor-type reaches: matrices of the text model, whatever else a pattern may match.
OVERRIDE_ROLES: tuple[Role, ...] = (*FEED_FORWARD_ROLES, "attention", "embedding", "lm_head")
METHOD_NAMES = ("rtn", "importance", "gptq", "awq")
METHODS_WITH_HESSIANS = frozenset({"gptq", "awq"})  # these need the corpus to go through the model
METHODS_WITH_EVIDENCE = METHODS_WITH_HESSIANS | {"importance"}
KV_CACHES = ("fp8",)
WORKING_SUFFIXES = (".partial", ".replaced")  # of directories in which the writer works


@dataclass(frozen=True)
class Rule:
    """One line of a recipe; see the module docstring.  ``None`` means that the rule does not look at that property, or leaves the
    method to the recipe.

    maximum_error: relative L2 error of one matrix that ends the run, instead of the recipe's.  Raises RecipeError for wrong values.
    """

    scheme: str
    roles: tuple[Role, ...] | None = None
    layers: str | None = None
    name: str | None = None
    method: str | None = None
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
        if self.method is not None:
            if self.method not in METHOD_NAMES:
                raise RecipeError(f"unknown method {self.method!r}. Methods: {', '.join(METHOD_NAMES)}")
            if scheme is not None and (misfit := method_misfit(self.method, scheme)):
                raise RecipeError(misfit)
        if self.method == "awq" and self.clip_search is False:
            raise RecipeError("method awq is a search for scales; leave clip_search = false out, or take method rtn")
        if self.clip_search is not None and not isinstance(self.clip_search, bool):
            raise RecipeError(f"clip_search is {self.clip_search!r}; expected true or false")
        if not isinstance(self.smooth, bool):
            raise RecipeError(f"smooth is {self.smooth!r}; expected true or false")
        if self.smooth and scheme is None:
            raise RecipeError("smooth = true changes weights, and this rule keeps them as they are")
        _check_bound(self.maximum_error)


def method_misfit(method: str, scheme: Scheme) -> str | None:
    """Why a method cannot quantize to a scheme, or None when it can."""
    if scheme.number == "ggml":
        kind = scheme.block_type
        if method == "awq" or (method != "rtn" and kind.floating) or (method == "gptq" and kind.codebook):
            usual = "rtn" if kind.floating else "importance or rtn" if kind.codebook else "gptq, importance or rtn"
            return f"method {method} is not for {scheme.name}, which takes method {usual}"
    elif method == "importance":
        return f"method importance is for the types of GGUF files; {scheme.name} takes method rtn"
    elif method == "gptq" and scheme.number not in INTEGERS:
        return f"method gptq is for schemes of integers and the types of GGUF files; {scheme.name} takes method rtn"
    elif method == "awq" and (scheme.number not in INTEGERS or scheme.granularity != "group"):
        return f"method awq is for schemes of integers with groups; {scheme.name} takes method rtn"
    return None


def fitting_method(method: str, scheme: Scheme) -> str:
    """The method itself, or for one of llama.cpp's types that it is not for, the nearest one that is."""
    if scheme.number != "ggml" or method_misfit(method, scheme) is None:
        return method
    return "rtn" if scheme.block_type.floating else "importance"


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules for one artifact.  ``name`` is its directory name.  Raises RecipeError for wrong values.

    kv_cache: ``fp8`` stores the scales with which clients keep keys and values in FP8; None leaves that to them.  mixture: one of
    llama.cpp's file types (``quantkit.mixtures``), which decides for tensors that no rule matches.  method: of rules that state
    none, and of the mixture.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    format: str = "compressed-tensors"
    maximum_error: float | None = None
    kv_cache: Literal["fp8"] | None = None
    mixture: str | None = None
    method: str = "rtn"
    vision: str = "F16"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", self.name):
            raise RecipeError(f"name {self.name!r} must be letters, digits, '.', '_' and '-' (it names a directory)")
        if self.name.endswith(WORKING_SUFFIXES):
            raise RecipeError(f"name {self.name!r} ends like the directories of unfinished work ({', '.join(WORKING_SUFFIXES)})")
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise RecipeError("rules must be a tuple of rules")
        if not self.rules and self.mixture is None:
            raise RecipeError("needs at least one rule")
        if not isinstance(self.format, str):
            raise RecipeError(f"format is {self.format!r}; expected a string")
        if self.mixture is not None and (not isinstance(self.mixture, str) or self.mixture not in FILE_TYPES):
            close = _suggest(str(self.mixture), list(FILE_TYPES))
            raise RecipeError(f"unknown mixture {self.mixture!r}{close}. Mixtures: {', '.join(FILE_TYPES)}")
        if self.mixture is not None and self.format != GGUF:
            raise RecipeError(f"a mixture is for format = {GGUF!r}")
        if self.method not in METHOD_NAMES:
            raise RecipeError(f"unknown method {self.method!r}. Methods: {', '.join(METHOD_NAMES)}")
        if self.vision not in VISION_TYPES:
            raise RecipeError(f"vision is {self.vision!r}; expected one of {', '.join(VISION_TYPES)}")
        if self.mixture is not None and self.method == "awq":
            raise RecipeError("method awq is not for the types of GGUF files: take gptq, importance or rtn")
        if self.mixture is not None and FILE_TYPES[self.mixture].needs_importance and self.method == "rtn":
            raise RecipeError(f"{self.mixture} is useless without importance: take method importance or gptq")
        for number, rule in enumerate(self.rules, 1):
            scheme = parse_scheme(rule.scheme)
            inherits = rule.method is None and scheme is not None and scheme.number != "ggml"
            if scheme is not None and inherits and (misfit := method_misfit(self.method, scheme)):
                raise RecipeError(f"rule {number}: {misfit}")
        _check_bound(self.maximum_error)
        if self.kv_cache is not None and self.kv_cache not in KV_CACHES:
            raise RecipeError(f"kv_cache is {self.kv_cache!r}; expected one of {', '.join(KV_CACHES)}, or nothing")

    @property
    def needs_hessians(self) -> bool:
        """Whether a method asks for Hessians, which saved statistics do not hold."""
        return not METHODS_WITH_HESSIANS.isdisjoint(method for _, method in self._quantizing())

    @property
    def needs_peaks(self) -> bool:
        """Whether largest magnitudes are asked for, which importance files do not hold."""
        static = any(scheme.static_activations for scheme, _ in self._quantizing())
        return static or self.kv_cache is not None or any(rule.smooth for rule in self.rules)

    def _quantizing(self) -> list[tuple[Scheme, str]]:
        """The schemes that are asked for, each with its method."""
        found = [(scheme, rule.method or self.method) for rule in self.rules if (scheme := parse_scheme(rule.scheme)) is not None]
        if self.mixture is not None:
            kind = FILE_TYPES[self.mixture]
            types = dict.fromkeys((kind.default, *(rule.type for rule in kind.rules)))
            found += [(scheme, self.method) for name in types if (scheme := parse_scheme(name)) is not None]
        return [(scheme, fitting_method(method, scheme)) for scheme, method in found]

    @property
    def needs_calibration(self) -> bool:
        """Whether something here can only be known from what the model does with text."""
        return self.needs_peaks or any(method in METHODS_WITH_EVIDENCE for _, method in self._quantizing())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, the one that fingerprints and manifests hold."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def _check_bound(bound: object) -> None:
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 < bound < 10):
        raise RecipeError(f"maximum_error is {bound!r}; expected a number between 0 and 10")


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


def _packed(name: str, *rules: Rule) -> Recipe:
    return Recipe(f"packed-{name}", (*rules, Rule(KEEP)), format=PACKED)


# In quantkit's own format, for its own kernels: what other formats cannot hold, and the usual schemes to compare with.
PACKED_PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _packed("int8", Rule("int8-g128", roles=FEED_FORWARD_ROLES)),
        _packed("int4", Rule("int4-g128", roles=FEED_FORWARD_ROLES)),
        _packed("int4-gptq", Rule("int4-g128", roles=FEED_FORWARD_ROLES, method="gptq")),
        _packed("int3-gptq", Rule("int3-g64", roles=FEED_FORWARD_ROLES, method="gptq")),
        _packed("int2-gptq", Rule("int2-g64-asym", roles=FEED_FORWARD_ROLES, method="gptq")),
        _packed(
            "mixed-gptq",  # a token meets one routed expert of many, and all of the rest
            Rule("int3-g64", roles=("routed_expert",), method="gptq"),
            Rule("int8-g128", roles=("shared_expert", "dense_mlp", "attention")),
            Rule("Q8_0", roles=("embedding", "lm_head")),
        ),
    )
}


def _gguf_presets() -> dict[str, Recipe]:
    """A recipe for each file type: under its own name without calibration where that makes sense, and with each method."""
    presets = {}
    for name, kind in FILE_TYPES.items():
        scheme = parse_scheme(kind.default)
        assert scheme is not None
        presets[name] = Recipe(name, format=GGUF, mixture=name, method="importance" if kind.needs_importance else "rtn")
        for method in ("importance", "gptq"):
            if method_misfit(method, scheme) is None:
                presets[f"{name}-{method}"] = Recipe(f"{name}-{method}", format=GGUF, mixture=name, method=method)
    return presets


# llama.cpp's file types: ``Q4_K_M``, ``Q4_K_M-importance``, ``Q4_K_M-gptq`` and so on.
GGUF_PRESETS: dict[str, Recipe] = _gguf_presets()
_SHORT = {kind: GGUF_PRESETS[f"{kind}_M"] for kind in ("Q3_K", "Q4_K", "Q5_K")}  # as llama-quantize takes them
_PRESETS_BY_LOWER_CASE = {name.lower(): recipe for name, recipe in (PRESETS | PACKED_PRESETS | GGUF_PRESETS | _SHORT).items()}


def resolve_recipe(target: str | Path | Recipe) -> Recipe:
    """A Recipe as it is, the preset of that name in any case, or the TOML file at that path.  Raises RecipeError."""
    if isinstance(target, Recipe):
        return target
    if str(target).lower() in _PRESETS_BY_LOWER_CASE:
        return _PRESETS_BY_LOWER_CASE[str(target).lower()]
    path = Path(target)
    if path.suffix == ".toml" or os.path.isfile(path):
        return load_recipe(path)
    raise RecipeError(
        f"unknown preset {str(target)!r}{_suggest(str(target), [*PRESETS, *PACKED_PRESETS, *GGUF_PRESETS])}. "
        f"Presets: {', '.join([*PRESETS, *PACKED_PRESETS])}; "
        f"for GGUF {', '.join(FILE_TYPES)}, with -importance or -gptq to calibrate; or give a recipe file (.toml)"
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
    return recipe_from_dict(data, where, default_name)


def recipe_from_dict(data: Mapping[str, Any], where: str, default_name: str = "recipe") -> Recipe:
    """The reverse of :meth:`Recipe.to_dict`, for any content.  Raises RecipeError."""
    _known_keys(data, tuple(field.name for field in fields(Recipe)), f"recipe {where}")
    rules = data.get("rules", [] if "mixture" in data else None)
    if not isinstance(rules, list) or (not rules and "mixture" not in data):
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
    cases = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), cases, 1)
    return f" (did you mean {cases[close[0]]!r}?)" if close else ""
