"""Assignments of GGUF recipes: mixture, overrides, methods, bounds, vision.  Oracle of overrides: llama.cpp's own choices."""

from __future__ import annotations

from typing import Any

import pytest
from test_mixtures import ORACLE, answers, configuration, spread

from quantkit.assignment import Assignment, assign, maximum_error, vision_type
from quantkit.config import Llama4Config, parse_config
from quantkit.errors import RecipeError
from quantkit.formats.gguf import aliases
from quantkit.ggml import TYPES
from quantkit.llama4 import units
from quantkit.mixtures import FILE_TYPES, mixture_types
from quantkit.recipe import GGUF_PRESETS, OVERRIDE_ROLES, PRESETS, VISION_TYPES, Recipe, Rule, resolve_recipe
from quantkit.scheme import parse_scheme
from tests.gguf_models import SIZES
from tests.tiny_models import tiny_config

SCOUT = parse_config(tiny_config("scout", **SIZES))
MAVERICK = parse_config(tiny_config("maverick", **SIZES))
LAYER = "language_model.model.layers.{}."


def given(recipe: Recipe, config: Llama4Config = SCOUT) -> dict[str, Assignment]:
    work = units(config)
    return assign(recipe, work, config, aliases(work))


def gguf(*rules: Rule, **others: Any) -> Recipe:
    return Recipe("mine", rules, format="gguf", **({"mixture": "Q4_K_M"} | others))


def types(table: dict[str, Assignment]) -> dict[str, str | None]:
    return {name: assignment.scheme.name if assignment.scheme else None for name, assignment in table.items()}


def roles_of(config: Llama4Config) -> dict[str, str]:
    return {item.name: item.role for unit in units(config) for item in unit.items}


# ------------------------------------------------------------------------------------------------------------------ mixtures


@pytest.mark.parametrize("name", GGUF_PRESETS)
@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_a_mixture_decides_every_tensor(name: str, config: Llama4Config) -> None:
    recipe = GGUF_PRESETS[name]
    assert recipe.mixture is not None
    table = given(recipe, config)
    wanted = mixture_types(FILE_TYPES[recipe.mixture], config, recipe.method != "rtn")
    for item, role in roles_of(config).items():
        kind = types(table)[item]
        if role in ("norm", "router"):
            assert kind is None
        elif role not in ("vision", "projector"):
            assert kind == wanted[item]
    assert table.keys() == roles_of(config).keys()


@pytest.mark.parametrize("case", ["small", "scout", "few-experts"])
def test_overrides_give_what_llama_cpp_gives(case: str) -> None:
    """Its option --tensor-type as rules: what is counted for the others is what it counts."""
    config = configuration(case)
    names, compared = aliases(units(config)), 0
    for entry, importance in answers(case):
        kind = FILE_TYPES[entry["file type"]]
        if "refused" in entry or (kind.needs_importance and not importance):
            continue
        if TYPES[kind.default].floating and entry.get("overrides"):
            continue  # where llama.cpp does not even look at overrides; a rule is obeyed, see the next test
        rules = tuple(
            Rule(scheme, roles=OVERRIDE_ROLES, name=pattern, method="rtn") for pattern, scheme in entry.get("overrides", [])
        )
        table = types(given(gguf(*rules, mixture=entry["file type"], method="importance" if importance else "rtn"), config))
        ours = {names[item]: scheme or "F32" for item, scheme in table.items() if not names[item].startswith(("v.", "mm."))}
        assert ours == spread(entry["types"]), (entry["file type"], importance, rules)
        compared += 1
        assert len(ours) < len(table) or config.num_experts == 1
    assert compared > 20


@pytest.mark.parametrize("mixture", ["BF16", "F16", "F32"])
def test_a_rule_is_obeyed_in_a_file_of_floats_too(mixture: str) -> None:
    table = types(given(gguf(Rule("Q8_0", name=r"^blk\.\d+\.attn_v"), mixture=mixture)))
    assert {table[LAYER.format(layer) + "self_attn.v_proj"] for layer in range(4)} == {"Q8_0"}
    assert table[LAYER.format(0) + "self_attn.k_proj"] == table["language_model.lm_head.weight"] == mixture


def test_the_oracle_knows_overrides() -> None:
    assert sum(bool(entry.get("overrides")) for entry in ORACLE["small"]["answers"]) >= 10


# ----------------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize("pattern", [r"blk\.1\.ffn_down_exps", r"layers\.1\.feed_forward\.experts\.\d+\.down_proj"])
def test_a_name_is_searched_in_both_names(pattern: str) -> None:
    table, plain = types(given(gguf(Rule("Q8_0", name=pattern)))), types(given(gguf()))
    changed = {name for name in table if table[name] != plain[name]}
    assert changed == {LAYER.format(1) + f"feed_forward.experts.{expert}.down_proj" for expert in range(4)}
    assert {table[name] for name in changed} == {"Q8_0"}


def test_without_other_names_ours_alone_are_searched() -> None:
    with pytest.raises(RecipeError, match=r"ffn_down_exps\) decides no tensor"):
        assign(gguf(Rule("Q8_0", name="ffn_down_exps")), units(SCOUT), SCOUT)


def test_an_override_that_llama_cpp_can_state_shifts_what_is_counted_and_another_does_not() -> None:
    """The third of attn_v gets more bits: of those that are left, when llama.cpp would count so."""
    config = configuration("small")
    values = [f"model.layers.{layer}.self_attn.v_proj" for layer in range(config.num_layers)]
    pattern = r"blk\.[0-4]\.attn_v"
    plain, stated, by_layers = (
        types(given(gguf(*rules), config))
        for rules in ((), (Rule("Q8_0", name=pattern),), (Rule("Q8_0", roles=("attention",), layers="0-4", name=r"attn_v"),))
    )
    names = [name for name in plain if any(name.endswith(value) or value in name for value in values)]
    assert len(names) == config.num_layers
    assert all(stated[name] == by_layers[name] == "Q8_0" for name in names[:5])
    assert [by_layers[name] for name in names[5:]] == [plain[name] for name in names[5:]]
    counted = mixture_types(FILE_TYPES["Q4_K_M"], config, False, [(pattern, "Q8_0")])
    assert [stated[name] for name in names] == [counted[name] for name in names]
    assert [stated[name] for name in names[5:]] != [plain[name] for name in names[5:]]


def test_rules_go_before_the_mixture_and_the_first_that_matches_decides() -> None:
    table = types(
        given(
            gguf(
                Rule("keep", layers="0", roles=("shared_expert",)),
                Rule("Q6_K", roles=("shared_expert",), name="down"),
                Rule("Q8_0", roles=("shared_expert", "embedding")),
            )
        )
    )
    shared = "feed_forward.shared_expert."
    assert {table[LAYER.format(0) + shared + part] for part in ("gate_proj", "up_proj", "down_proj")} == {None}
    assert [table[LAYER.format(3) + shared + part] for part in ("gate_proj", "up_proj", "down_proj")] == ["Q8_0", "Q8_0", "Q6_K"]
    assert table["language_model.model.embed_tokens.weight"] == "Q8_0"
    assert table["language_model.lm_head.weight"] == "Q6_K"


# ------------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", ["rtn", "importance", "gptq"])
def test_methods_are_inherited_and_fitted(method: str) -> None:
    """A codebook cannot be rounded with feedback, a float type needs no method; what is streamed is not calibrated."""
    table = given(
        gguf(
            Rule("IQ3_S", name="ffn_up_exps"),
            Rule("F16", roles=OVERRIDE_ROLES, name="attn_q"),
            Rule("Q5_K", roles=("attention",), name="attn_k", method="rtn"),
            Rule("Q8_0", roles=("lm_head",), method="importance"),
            method=method,
        )
    )
    base = LAYER.format(2)
    fitted = "importance" if method == "gptq" else method
    assert table[f"{base}feed_forward.experts.1.up_proj"].method == fitted
    assert table[f"{base}feed_forward.experts.1.gate_proj"].method == method
    assert table[f"{base}self_attn.q_proj"].method == "rtn"
    assert table[f"{base}self_attn.k_proj"].method == "rtn"
    assert table["language_model.lm_head.weight"].method == "rtn"
    assert table["language_model.model.embed_tokens.weight"].method == ("gptq" if method == "gptq" else "rtn")
    assert {table[name].method for name, role in roles_of(SCOUT).items() if role in ("vision", "projector")} == {"rtn"}
    assert all(assignment.clip_search for assignment in table.values() if assignment.scheme)


def test_an_embedding_of_a_codebook_type_is_not_learned() -> None:
    table = given(gguf(Rule("IQ3_S", roles=("embedding",)), method="gptq"))
    assert table["language_model.model.embed_tokens.weight"].method == "rtn"


def test_a_recipe_of_safetensors_streams_nothing_quantized() -> None:
    table = assign(PRESETS["w4a16-gptq"], units(SCOUT))
    roles = roles_of(SCOUT)
    assert {roles[name] for name, assignment in table.items() if assignment.scheme} == {"routed_expert", "shared_expert"}


# -------------------------------------------------------------------------------------------------------------------- bounds


def test_bounds_are_the_rule_s_the_recipe_s_or_the_type_s() -> None:
    rules = (
        Rule("Q5_K", roles=("attention",), name="attn_k", maximum_error=0.1),
        Rule("Q5_K", roles=("attention",), name="attn_q"),
    )
    base, scheme = LAYER.format(0), parse_scheme("Q5_K")
    assert scheme is not None
    for method, factor in (("rtn", 1), ("importance", 1), ("gptq", 2)):
        table = given(gguf(*rules, method=method))
        assert table[f"{base}self_attn.k_proj"].maximum_error == 0.1
        assert table[f"{base}self_attn.q_proj"].maximum_error == pytest.approx(factor * maximum_error(scheme))
    table = given(gguf(*rules, maximum_error=0.2))
    assert table[f"{base}self_attn.k_proj"].maximum_error == 0.1
    assert table[f"{base}self_attn.q_proj"].maximum_error == 0.2


@pytest.mark.parametrize("name", TYPES)
def test_every_type_has_a_bound_that_noise_would_pass_only_where_it_is_hopeless(name: str) -> None:
    """Finer types have tighter ones; none lets everything pass."""
    scheme = parse_scheme(name)
    assert scheme is not None
    bound = maximum_error(scheme)
    assert 0 < bound < 1
    coarser = [kind for kind in TYPES.values() if not kind.floating and kind.bits_per_weight < TYPES[name].bits_per_weight]
    for kind in coarser:
        other = parse_scheme(kind.name)
        assert other is not None and (TYPES[name].floating or maximum_error(other) >= bound)


# -------------------------------------------------------------------------------------------------------------------- vision


@pytest.mark.parametrize("chosen", VISION_TYPES)
def test_vision_is_of_one_type_but_what_has_to_be_floats(chosen: str) -> None:
    table = types(given(gguf(vision=chosen)))
    shapes = {item.name: item.shape for unit in units(SCOUT) for item in unit.copies if item.role in ("vision", "projector")}
    assert any(name.startswith("multi_modal_projector") for name in shapes)
    for name, shape in shapes.items():
        if len(shape) != 2 or "positional" in name:
            assert table[name] is None
        elif "patch_embedding" in name:
            assert table[name] == ("F16" if chosen == "F16" else "F32")
        else:
            assert table[name] == chosen


@pytest.mark.parametrize(
    ("columns", "chosen", "expected"), [(64, "Q8_0", "Q8_0"), (80, "Q8_0", "F16"), (80, "BF16", "BF16"), (80, "F32", "F32")]
)
def test_rows_of_the_vision_tower_that_no_block_divides_are_f16(columns: int, chosen: str, expected: str) -> None:
    assert vision_type("vision_model.model.layers.0.mlp.fc1.weight", (32, columns), chosen) == expected


def test_a_rule_goes_before_the_type_of_the_vision_tower() -> None:
    table = types(given(gguf(Rule("BF16", roles=("projector",)), Rule("keep", name=r"vision_model.*fc1\.weight"))))
    assert table["multi_modal_projector.linear_1.weight"] == "BF16"
    assert table["vision_model.model.layers.0.mlp.fc1.weight"] is None
    assert table["vision_model.model.layers.0.mlp.fc2.weight"] == "F16"


# -------------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Rule("Q4_K", roles=("router",)), r"rule 1 gives Q4_K to .*router.*, but router tensors are always kept"),
        (Rule("F16", roles=("norm",)), "norm tensors are always kept"),
        (Rule("F16", name=r"vision_model.*bias"), "decides no tensor: .*bias is no matrix, and such tensors are always kept"),
        (Rule("Q8_0", name=r"blk\.9\."), r"rule 1 \(scheme = Q8_0, name = blk\\.9\\.\) decides no tensor"),
        (Rule("Q8_0", roles=("dense_mlp",)), "decides no tensor"),
        (Rule("Q8_0", layers="0", roles=("embedding",)), "decides no tensor"),
    ],
)
def test_a_rule_that_reaches_what_stays_or_nothing_is_named(rule: Rule, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        given(gguf(rule))
    assert "recipe 'mine' does not fit this model" in str(caught.value)


def test_many_problems_are_one_error_that_counts_the_rest() -> None:
    with pytest.raises(RecipeError, match=r"and \d+ more") as caught:
        given(gguf(Rule("Q8_0", roles=("norm", "router")), mixture="Q8_0"))
    assert len(str(caught.value).splitlines()) <= 14


def test_without_mixture_every_tensor_needs_a_rule() -> None:
    with pytest.raises(RecipeError, match=r'no rule matches .*embed_tokens.* end the recipe with a rule scheme = "keep"'):
        given(Recipe("mine", (Rule("Q4_K", roles=("attention",)),), format="gguf"))


def test_a_mixture_needs_the_model_s_config() -> None:
    with pytest.raises(RecipeError, match="no rule matches"):
        assign(gguf(), units(SCOUT))


@pytest.mark.parametrize("scheme", ["IQ2_XXS", "IQ3_XXS", "IQ1_M"])
def test_types_that_need_importance_are_refused_without(scheme: str) -> None:
    rule = Rule(scheme, name="ffn_up_exps", roles=("routed_expert",))
    with pytest.raises(RecipeError, match=f"{scheme} to .*, which is of no use without importance"):
        given(gguf(rule))
    assert given(gguf(rule, method="gptq"))[LAYER.format(0) + "feed_forward.experts.0.up_proj"].method == "importance"
    on_purpose = Rule(scheme, name="ffn_up_exps", roles=("routed_expert",), method="rtn")
    assert given(gguf(on_purpose))[LAYER.format(0) + "feed_forward.experts.0.up_proj"].method == "rtn"
    assert given(gguf(Rule(scheme, roles=("embedding",))))["language_model.model.embed_tokens.weight"].method == "rtn"


def test_short_names_of_file_types() -> None:
    assert resolve_recipe("q4_k") is GGUF_PRESETS["Q4_K_M"]
    assert resolve_recipe("Q5_K") is GGUF_PRESETS["Q5_K_M"]
