"""Targets as people name them, with what they ask of all GGUF files of a run together.

Such a wish changes recipes and nothing else: a method is the suffix of a preset's name, types of single tensors are rules above all
others, the type of the vision file is a field.  So the artifact's manifest says all of it, and a recipe file could have said it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantkit.errors import RecipeError
from quantkit.ggml import TYPES
from quantkit.mixtures import FILE_TYPES
from quantkit.recipe import GGUF, GGUF_PRESETS, OVERRIDE_ROLES, VISION_TYPES, Recipe, Rule, method_misfit, resolve_recipe
from quantkit.scheme import parse_scheme

Target = str | Path | Recipe


def resolve_targets(
    to: Sequence[Target] | Target,
    *,
    method: str | None = None,
    tensor_types: Sequence[str] = (),
    vision: str | None = None,
) -> list[Recipe]:
    """The recipes that targets name, the GGUF ones among them changed as asked.

    to: presets, recipe files or recipes, one or several.
    method: for targets that are the plain name of a file type: ``Q4_K_M`` with gptq is the preset ``Q4_K_M-gptq``.
    tensor_types: as in llama.cpp, ``PATTERN=TYPE``: matrices of the text model whose name in the file the regular expression is
    found in get that type; the first that matches decides, before all rules and the mixture.
    vision: type of the vision file.

    Raises RecipeError for what is unknown or does not fit, and for a wish that no target takes.
    """
    targets = [to] if isinstance(to, (str, Path, Recipe)) else list(to)
    plain = [isinstance(target, str) and target.upper() in FILE_TYPES for target in targets]
    recipes = [
        _with_method(str(target).upper(), method) if method is not None and of_type else resolve_recipe(target)
        for target, of_type in zip(targets, plain, strict=True)
    ]
    named = ", ".join(recipe.name for recipe in recipes)
    if method is not None and not any(plain):
        raise RecipeError(f"the method {method} is for targets that are GGUF file types, such as Q4_K_M, and none of {named} is")
    if (tensor_types or vision is not None) and not any(recipe.format == GGUF for recipe in recipes):
        raise RecipeError(f"types of tensors and of the vision file are for GGUF targets, and none of {named} is one")
    rules = tuple(_override(wish) for wish in tensor_types)
    return [_changed(recipe, rules, vision) if recipe.format == GGUF else recipe for recipe in recipes]


def _with_method(name: str, method: str) -> Recipe:
    """The preset of a file type with that method."""
    scheme = parse_scheme(FILE_TYPES[name].default)
    assert scheme is not None
    if misfit := method_misfit(method, scheme):
        raise RecipeError(f"{name}: {misfit}")
    if method == "rtn":
        return replace(GGUF_PRESETS[name], method=method)  # RecipeError where that makes no sense
    return GGUF_PRESETS[f"{name}-{method}"]


def _override(wish: str) -> Rule:
    """``PATTERN=TYPE`` as a rule."""
    pattern, equals, kind = wish.rpartition("=")
    if not pattern or not equals:
        raise RecipeError(f"{wish!r} is not of the form PATTERN=TYPE, such as ffn_down_exps=Q6_K")
    if kind.upper() not in TYPES:
        raise RecipeError(f"{wish!r}: {kind!r} is no type of GGUF files. Types: {', '.join(TYPES)}")
    return Rule(kind.upper(), roles=OVERRIDE_ROLES, name=pattern)


def _changed(recipe: Recipe, rules: tuple[Rule, ...], vision: str | None) -> Recipe:
    if vision is not None and vision.upper() not in VISION_TYPES:
        raise RecipeError(f"the vision file cannot be {vision!r}. Types: {', '.join(VISION_TYPES)}")
    return replace(recipe, rules=(*rules, *recipe.rules), vision=recipe.vision if vision is None else vision.upper())
