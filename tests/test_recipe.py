"""Recipes: presets, TOML, and the promise that nothing is silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.assignment import assign
from quantkit.errors import RecipeError
from quantkit.llama4 import Llama4Config, parse_config, units
from quantkit.recipe import PRESETS, Recipe, Rule, load_recipe, parse_layers, parse_recipe, resolve_recipe
from quantkit.scheme import parse_scheme, scheme_names

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"
KEEP_REST = '[[rules]]\nscheme = "keep"\n'
FEED_FORWARD = 'roles = ["routed_expert", "shared_expert"]\n'


@pytest.fixture(scope="module")
def config() -> Llama4Config:
    return parse_config(json.loads((DEMO / "config.json").read_text()))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_quantizes_feed_forward_only(name: str, config: Llama4Config) -> None:
    work = units(config)
    table = assign(PRESETS[name], work)
    for unit in work:
        for item in (*unit.matrices, *unit.copies):
            quantized = table[item.name].scheme is not None
            assert quantized == (item.role in ("routed_expert", "shared_expert", "dense_mlp")), item.name
    assert len(table) == sum(len(unit.matrices) + len(unit.copies) for unit in work)


def test_a_mixture_of_codebooks_needs_hessians_for_its_other_types() -> None:
    """Most of IQ2_M cannot be rounded by GPTQ, but its attention can."""
    assert Recipe("own", format="gguf", mixture="IQ2_M", method="gptq").needs_hessians
    assert not Recipe("own", format="gguf", mixture="IQ2_M", method="importance").needs_hessians
    assert not Recipe("own", format="gguf", mixture="F16", method="gptq").needs_calibration


@pytest.mark.parametrize("name", scheme_names())
def test_scheme_names_parse_back(name: str) -> None:
    scheme = parse_scheme(name)
    assert scheme is None if name == "keep" else scheme is not None and scheme.name == name


@pytest.mark.parametrize("name", ["int4", "int4-g48", "int8-g128-asym", "fp8", "INT4-g128", "", "int4-g"])
def test_unknown_schemes_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="scheme"):
        parse_scheme(name)


def test_first_matching_rule_decides(config: Llama4Config) -> None:
    recipe = parse_recipe(
        f'[[rules]]\n{FEED_FORWARD}layers = "0-1"\nscheme = "int8-g128"\n'
        f'[[rules]]\nname = "layers\\\\.2\\\\.feed_forward\\\\.shared_expert"\nscheme = "keep"\n'
        f'[[rules]]\n{FEED_FORWARD}scheme = "int4-g64"\nclip_search = false\n{KEEP_REST}',
        "test",
    )
    table = assign(recipe, units(config))
    base = "language_model.model.layers."
    expert = "feed_forward.experts.7.up_proj"
    schemes = {layer: table[f"{base}{layer}.{expert}"].scheme for layer in range(4)}
    assert {layer: scheme.name if scheme else None for layer, scheme in schemes.items()} == {
        0: "int8-g128",
        1: "int8-g128",
        2: "int4-g64",
        3: "int4-g64",
    }
    assert table[f"{base}2.feed_forward.shared_expert.up_proj"].scheme is None
    assert table[f"{base}3.{expert}"].clip_search is False
    assert table[f"{base}0.{expert}"].clip_search is True


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (f'[[rules]]\n{FEED_FORWARD}scheme = "int4-g128"', "no rule matches .*embed_tokens"),
        (f'[[rules]]\nroles = ["dense_mlp"]\nscheme = "int4-g128"\n{KEEP_REST}', r"rule 1 .*dense_mlp.* decides no tensor"),
        (f'[[rules]]\nlayers = "9"\nscheme = "int4-g128"\n{KEEP_REST}', r"rule 1 .*layers = 9.* decides no tensor"),
        (f'{KEEP_REST}[[rules]]\n{FEED_FORWARD}scheme = "int4-g128"', r"rule 2 .* decides no tensor"),
        (f'[[rules]]\nroles = ["router"]\nscheme = "int8-g128"\n{KEEP_REST}', r"router tensors are always kept"),
        (f'[[rules]]\nname = "o_proj"\nscheme = "int8-g128"\n{KEEP_REST}', r"vision tensors are always kept"),
    ],
)
def test_misfits_are_named(rules: str, message: str, config: Llama4Config) -> None:
    with pytest.raises(RecipeError, match=message):
        assign(parse_recipe(rules, "test"), units(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules = [", "not valid TOML"),
        ("", "at least one"),
        ("rules = 3", "at least one"),
        ('rules = ["keep"]', "rule 1: expected a table"),
        ("[[rules]]\n", "rule 1: needs a scheme"),
        ('[[rules]]\nscheme = "int4-g99"', "rule 1: .*group size 99"),
        ('[[rules]]\nscheme = "keep"\nrole = ["router"]', "unknown key 'role' .did you mean 'roles'"),
        ('[[rules]]\nscheme = "keep"\nroles = ["rooter"]', "unknown role 'rooter' .did you mean 'router'"),
        ('[[rules]]\nscheme = "keep"\nroles = "router"', "roles must be a list"),
        ('[[rules]]\nscheme = "keep"\nlayers = "3-1"', "layers is '3-1'"),
        ('[[rules]]\nscheme = "keep"\nlayers = [1]', "expected inclusive ranges"),
        ('[[rules]]\nscheme = "keep"\nname = "("', "not a regular expression"),
        ('[[rules]]\nscheme = "keep"\nmethod = "magic"', "unknown method 'magic'"),
        ('[[rules]]\nscheme = "keep"\nclip_search = 1', "expected true or false"),
        (f'name = "../up"\n{KEEP_REST}', "names a directory"),
        (f"maximum_error = -1\n{KEEP_REST}", "maximum_error is -1"),
        (f"maximum_eror = 1\n{KEEP_REST}", "did you mean 'maximum_error'"),
        (f"format = 7\n{KEEP_REST}", "format is 7"),
    ],
)
def test_malformed_recipes_say_where(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(text, "my.toml")
    assert "my.toml" in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_gives_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        recipe = parse_recipe(text, "fuzz")
    except RecipeError:
        return
    assert recipe.rules


_values = st.one_of(st.text(max_size=8), st.integers(), st.floats(), st.booleans(), st.lists(st.text(max_size=8), max_size=3))
_keys = st.sampled_from(["scheme", "roles", "layers", "name", "method", "clip_search"])


@given(st.dictionaries(_keys, _values))
def test_any_values_give_a_recipe_or_a_recipe_error(values: dict[str, object]) -> None:
    lines = [f"{key} = {json.dumps(value).replace('NaN', 'nan').replace('Infinity', 'inf')}" for key, value in values.items()]
    try:
        recipe = parse_recipe("[[rules]]\n" + "\n".join(lines), "fuzz")
    except RecipeError:
        return
    assert recipe.rules[0].scheme in scheme_names()


def test_layers() -> None:
    assert parse_layers("0-3, 47") == [(0, 3), (47, 47)]


def test_resolve(tmp_path: Path) -> None:
    assert resolve_recipe("w8a8") is PRESETS["w8a8"]
    assert resolve_recipe(PRESETS["w8a8"]) is PRESETS["w8a8"]
    path = tmp_path / "mine.toml"
    path.write_text(KEEP_REST)
    assert resolve_recipe(path).name == "mine"
    assert load_recipe(path) == resolve_recipe(str(path))
    with pytest.raises(RecipeError, match="did you mean 'fp8-dynamic'"):
        resolve_recipe("fp8-dynamik")
    with pytest.raises(RecipeError, match="cannot be read"):
        resolve_recipe(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("int4-g99"), "group size 99"),
        (lambda: Rule("keep", roles="router"), "roles must be a list"),
        (lambda: Rule("keep", roles=("rooter",)), "did you mean 'router'"),
        (lambda: Rule("keep", name="("), "not a regular expression"),
        (lambda: Rule("keep", layers="x"), "layers is 'x'"),
        (lambda: Rule("keep", method="gtpq"), "unknown method 'gtpq'"),
        (lambda: Rule("keep", maximum_error=float("nan")), "maximum_error is nan"),
        (lambda: Recipe("x", (Rule("keep"),), maximum_error=-1.0), "maximum_error is -1"),
        (lambda: Recipe("x", ()), "at least one rule"),
        (lambda: Recipe("../x", (Rule("keep"),)), "names a directory"),
        (lambda: Recipe("", (Rule("keep"),)), "names a directory"),
        (lambda: Recipe("a" * 201, (Rule("keep"),)), "names a directory"),
        (lambda: Recipe("x.partial", (Rule("keep"),)), "unfinished work"),
        (lambda: Recipe("x.replaced", (Rule("keep"),)), "unfinished work"),
    ],
)
def test_recipes_made_in_code_are_checked_like_files(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_a_rule_may_state_its_own_bound(config: Llama4Config) -> None:
    text = f'maximum_error = 0.3\n[[rules]]\n{FEED_FORWARD}layers = "0"\nscheme = "int4-g128"\nmaximum_error = 0.9\n'
    text += f'[[rules]]\n{FEED_FORWARD}scheme = "int4-g128"\n{KEEP_REST}'
    table = assign(parse_recipe(text, "test"), units(config))
    bounds = [table[f"language_model.model.layers.{layer}.feed_forward.shared_expert.up_proj"].maximum_error for layer in (0, 1)]
    assert bounds == [0.9, 0.3]
