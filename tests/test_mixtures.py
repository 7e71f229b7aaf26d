"""Mixtures.  Oracle: llama.cpp's ``llama_model_quantize``, asked by ``benchmarks/llama_quantize_oracle.py`` and kept as data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantkit.config import Llama4Config, parse_config
from quantkit.errors import RecipeError
from quantkit.ggml import TYPES
from quantkit.llama4 import inventory, units
from quantkit.mixtures import (
    FILE_TYPES,
    LLAMA_CPP,
    data_bytes,
    file_tensors,
    file_types,
    find_file_type,
    fitting_type,
    fixed_tensors,
    mixture_types,
)

ORACLE = json.loads((Path(__file__).parent / "data" / "llama_quantize_types.json").read_text(encoding="utf-8"))
CASES = [case for case in ORACLE if case != "about"]


def configuration(case: str) -> Llama4Config:
    return parse_config(ORACLE[case]["config"])


def spread(brief: dict[str, str]) -> dict[str, str]:
    """Types by tensor from the oracle's short form: ``attn_v:0-5,8 output``."""
    types = {}
    for kind, text in brief.items():
        for word in text.split():
            part, _, ranges = word.partition(":")
            for span in ranges.split(",") if ranges else [""]:
                start, _, stop = span.partition("-")
                for layer in range(int(start), int(stop or start) + 1) if span else [None]:
                    types[f"{part}.weight" if layer is None else f"blk.{layer}.{part}.weight"] = kind
    return types


def translated(config: Llama4Config, types: dict[str, str]) -> dict[str, str]:
    """Our answer by llama.cpp's names, as the ``gguf`` package maps them; all experts of a tensor must agree."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA4, config.num_layers)
    found: dict[str, set[str]] = {}
    for name, kind in types.items():
        words = [word for word in name.removesuffix(".weight").split(".") if not word.isdigit() or "experts" not in name]
        if "experts" in name.split("."):  # model.layers.3.feed_forward.experts.7.up_proj: the layer stays, the expert goes
            words = [*words[:2], name.split(".")[2], *words[2:]]
        translation = names.get_name(".".join(words))
        assert translation is not None, name
        found.setdefault(f"{translation}.weight", set()).add(kind)
    assert all(len(kinds) == 1 for kinds in found.values())
    return {name: kinds.pop() for name, kinds in found.items()}


def answers(case: str) -> Iterator[tuple[dict[str, Any], bool]]:
    for entry in ORACLE[case]["answers"]:
        for importance in entry["importance"]:
            yield entry, importance


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(case: str) -> None:
    config = configuration(case)
    fixed = translated(config, dict.fromkeys(fixed_tensors(config), "F32"))
    compared = 0
    for entry, importance in answers(case):
        if "refused" in entry:
            continue
        overrides = [(pattern, kind) for pattern, kind in entry.get("overrides", [])]
        file_type = FILE_TYPES[entry["file type"]]
        chosen = {tensor.name: kind for tensor, kind in file_types(file_type, config, importance, overrides)}
        ours = chosen | dict.fromkeys(fixed, "F32")
        assert ours == spread(entry["types"]), (entry["file type"], importance, overrides)
        size = data_bytes(file_type, config, importance, overrides)
        assert f"{size / 2**20:.2f}" == entry["MiB"]
        if "bytes" in entry:
            assert size == entry["bytes"]
        compared += 1
    assert compared >= {"rows-of-80": 6, "experts-of-80": 48}.get(case, 62)


@pytest.mark.parametrize("case", CASES)
def test_types_by_our_names_are_those_by_the_file_s_names(case: str) -> None:
    """The names of the file are checked with the ``gguf`` package's own table."""
    config = configuration(case)
    file_type = FILE_TYPES["Q4_K_M"]
    fixed = translated(config, dict.fromkeys(fixed_tensors(config), "F32"))
    chosen = {tensor.name: kind for tensor, kind in file_types(file_type, config, False)}
    assert translated(config, mixture_types(file_type, config, False)) == chosen | fixed


@pytest.mark.parametrize("case", ["rows-of-80", "experts-of-80"])
def test_what_llama_cpp_refuses_falls_back_to_f16(case: str) -> None:
    """Rows that no block divides, where llama.cpp knows no other type and gives up."""
    config = configuration(case)
    odd = {tensor.sources[0] for tensor in file_tensors(config) if tensor.columns == 80}
    refused = [(entry["file type"], importance) for entry, importance in answers(case) if "refused" in entry]
    assert ("Q8_0", False) in refused and odd
    for name, importance in refused:
        types = mixture_types(FILE_TYPES[name], config, importance)
        assert {types[source] for source in odd} == {"F16"}


@pytest.mark.parametrize("case", ["scout", "maverick", "tiny-scout"])
def test_file_types_that_llama_cpp_makes_only_with_importance(case: str) -> None:
    demanding = {entry["file type"] for entry, importance in answers(case) if not importance and entry["demands importance"]}
    assert demanding == {name for name, file_type in FILE_TYPES.items() if file_type.needs_importance}


def test_numbers_and_default_types() -> None:
    for file_type in LLAMA_CPP:
        known = gguf.LlamaFileType
        prefix = "ALL" if file_type.name == "F32" else "MOSTLY"
        assert file_type.number == known[f"{prefix}_{file_type.name}"].value
    everything = {file_type.default for file_type in FILE_TYPES.values()} | {
        rule.type for file_type in FILE_TYPES.values() for rule in file_type.rules
    }
    assert everything <= set(TYPES)
    assert {entry["file type"] for entry, _ in answers("scout")} == {file_type.name for file_type in LLAMA_CPP}


# Files that llama-quantize of b11549, half a year newer than the oracle, made of demo/tiny-scout; without and with importance.
FILES_OF_B11549 = {
    False: {"Q8_0": 16_292_704, "Q4_K_M": 9_417_056, "Q4_0": 8_825_696},
    True: {
        "Q6_K": 12_610_624,
        "Q5_K_M": 10_965_568,
        "Q4_K_M": 9_417_280,
        "Q4_K_S": 8_842_304,
        "IQ4_XS": 8_367_168,
        "Q3_K_M": 7_528_512,
        "Q2_K": 5_877_824,
    },
}


@pytest.mark.parametrize("importance", [False, True])
def test_sizes_differ_from_whole_files_by_the_same_header(importance: bool) -> None:
    config = parse_config(json.loads((Path(__file__).parent.parent / "demo" / "tiny-scout" / "config.json").read_text()))
    rotary = 4 * config.head_dim // 2  # one more tensor of the file: factors of the rotary frequencies
    headers = {
        name: size - data_bytes(FILE_TYPES[name], config, importance) - rotary for name, size in FILES_OF_B11549[importance].items()
    }
    assert len(set(headers.values())) == 1, headers
    assert 50_000 < next(iter(headers.values())) < 150_000


@pytest.mark.parametrize("name", FILE_TYPES)
@pytest.mark.parametrize("case", ["small-interleaved", "tied", "rows-of-96"])
def test_every_tensor_of_the_text_model_has_a_type_that_fits(case: str, name: str) -> None:
    config = configuration(case)
    types = mixture_types(FILE_TYPES[name], config, True)
    expected = {item.name: item.shape[-1] for unit in units(config) for item in unit.items}
    assert types.keys() == expected.keys()
    assert all(expected[name] % TYPES[kind].block == 0 for name, kind in types.items())
    stay = {tensor.name for tensor in inventory(config) if tensor.role in ("norm", "router")}
    assert stay and all(types[name] == "F32" for name in stay)


def test_vision_is_no_part_of_it() -> None:
    config = parse_config(json.loads((Path(__file__).parent.parent / "demo" / "tiny-scout" / "config.json").read_text()))
    assert config.vision is not None
    assert all(name.startswith("language_model.") for name in mixture_types(FILE_TYPES["Q4_K_M"], config, False))


def test_tensors_of_the_file_hold_each_weight_once() -> None:
    config = configuration("small-interleaved")
    tensors = file_tensors(config)
    sources = [source for tensor in tensors for source in tensor.sources]
    assert len(sources) == len(set(sources))
    stacked = next(tensor for tensor in tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    assert (stacked.rows, stacked.columns) == (128 * 256, 512)
    assert stacked.sources[5] == "model.layers.1.feed_forward.experts.5.down_proj"
    assert sum(tensor.rows * tensor.columns for tensor in tensors) == sum(
        tensor.elements for tensor in inventory(config) if tensor.role not in ("norm", "router")
    )


def test_fallbacks_end_in_f16() -> None:
    assert fitting_type("Q4_K", 512) == "Q4_K"
    assert fitting_type("Q4_K", 96) == "Q5_0"
    assert fitting_type("IQ4_XS", 80) == "F16"
    assert all(fitting_type(name, 1) == (name if kind.floating else "F16") for name, kind in TYPES.items())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("QK5_MOE", "Q5_K_M"), ("QK4_MOE", "Q4_K_M"), ("QK3_MOE_L", "IQ4_XS"), ("QK3_MOE", "Q3_K_M"), ("QK2_MOE", "Q2_K")],
)
def test_our_own_mixtures_are_no_larger_than_those_they_compete_with(ours: str, theirs: str) -> None:
    for case in ("scout", "maverick", "tiny-scout"):
        config = configuration(case)
        share = data_bytes(FILE_TYPES[ours], config, True) / data_bytes(FILE_TYPES[theirs], config, True)
        assert 0.9 < share <= 1, case


def test_a_mixture_of_our_own_in_bytes() -> None:
    routed = 48 * 16 * 3 * 5120 * 8192
    others = 48 * (2 * 5120 * 5120 + 2 * 5120 * 1024) + 48 * 3 * 5120 * 8192 + 2 * 202048 * 5120
    small = 4 * (48 * (2 * 5120 + 16 * 5120) + 5120)
    assert data_bytes(FILE_TYPES["QK4_MOE"], configuration("scout"), True) == routed * 144 // 256 + others * 210 // 256 + small


def test_our_own_mixtures_give_routed_experts_the_fewest_bits() -> None:
    for name in ("QK5_MOE", "QK4_MOE", "QK3_MOE", "QK2_MOE"):
        bits: dict[bool, set[float]] = {True: set(), False: set()}
        for tensor, kind in file_types(FILE_TYPES[name], configuration("maverick"), True):
            bits[tensor.part.endswith("_exps")].add(TYPES[kind].bits_per_weight)
        assert max(bits[True]) < min(bits[False]), name


def test_names_in_any_case() -> None:
    assert find_file_type("q4_k_m") is FILE_TYPES["Q4_K_M"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda config: find_file_type("Q4_K_XL"), "unknown GGUF file type 'Q4_K_XL'. File types: F32, F16"),
        (lambda config: mixture_types(FILE_TYPES["Q4_K_M"], config, False, [("attn_v", "Q7_K")]), "'Q7_K', which is not a ggml"),
        (lambda config: mixture_types(FILE_TYPES["Q4_K_M"], config, False, [("attn_(", "Q6_K")]), "not a regular expression"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        call(configuration("small"))
    assert message in str(caught.value)
