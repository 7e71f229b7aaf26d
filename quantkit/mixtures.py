"""Which ggml type each tensor of a GGUF file gets: llama.cpp's file types for Llama 4, and mixtures of our own.

A file type such as Q4_K_M is a mixture: most tensors get its default type, some parts of the model another one in some layers.
Here that is data: each :class:`FileType` has an ordered list of rules, and the first that fits a tensor decides.

Rules speak of tensors as a GGUF file holds them (``token_embd``, ``output``, ``attn_q`` ..., ``ffn_down`` of a dense layer,
``ffn_down_shexp`` and ``ffn_down_exps`` of a layer with experts).  All experts of a layer and projection are one stacked tensor
there, so they have one type.  What llama.cpp's choice looks at, all of it reproduced, and compared with the program itself in
``tests/test_mixtures.py``:

* The place of a tensor: the layer for feed-forward parts, but for ``attn_v`` (and the ``ffn_down`` of the smallest types) how many
  of the kind came before it in the file, not counting those whose type the user chose.  A single expert makes all of them counted.
* The model: four query heads or more for each key head, four experts or more, or exactly eight of them.
* Whether importance is known.
* Whether the head is the embedding (no ``output`` in the file): then the embedding gets the head's type.
* Rows that are not a multiple of the type's block take another type, the last resort being F16.  (Where a row is not even a
  multiple of 32, llama.cpp knows a last resort for the types with blocks of 256 only and gives up for the others.)

Norms, biases and the router are always F32, and the vision tower goes to a file of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal

from quantkit.errors import RecipeError
from quantkit.ggml import FALLBACKS, TYPES
from quantkit.llama4 import Llama4Config, Unit, inventory, units

Fact = Literal["always", "importance", "no importance", "grouped", "four experts", "eight experts", "several experts"]
Place = Callable[[int, int], bool]

EMBEDDING, HEAD = "token_embd", "output"
_PROJECTIONS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_SUFFIXES = {"attention": "", "dense_mlp": "", "shared_expert": "_shexp", "routed_expert": "_exps"}


# ------------------------------------------------------------------------------------------------------- places in a model


def everywhere(place: int, count: int) -> bool:
    """In every layer."""
    return True


def early(place: int, count: int) -> bool:
    """In the first eighth of the layers."""
    return place < count // 8


def earliest(place: int, count: int) -> bool:
    """In the first sixteenth of the layers."""
    return place < count // 16


def middle(place: int, count: int) -> bool:
    """In neither the first nor the last eighth of the layers."""
    return count // 8 <= place < 7 * count // 8


def sensitive(place: int, count: int) -> bool:
    """In the first and the last eighth of the layers, and in every third one between them."""
    return not middle(place, count) or (place - count // 8) % 3 == 2


def first(number: int) -> Place:
    """In that many layers from the start."""
    return lambda place, count: place < number


# ------------------------------------------------------------------------------------------------------------- file types


@dataclass(frozen=True)
class Rule:
    """Tensors that get another type than the default.

    part: name of the tensor within its layer; ``*`` stands for anything.  type: what they get.  where: in which layers, a function
    of a tensor's place and of how many places there are.  when: what must be known of the model or the run.  counted: the place is
    how many tensors of the kind came before, not the layer.
    """

    part: str
    type: str
    where: Place = everywhere
    when: Fact = "always"
    counted: bool = False


@dataclass(frozen=True)
class FileType:
    """A mixture.

    name: as users type it.  number: what ``general.file_type`` says; clients show it and decide nothing by it.  default: type of
    tensors that no rule fits.  rules: the first that fits decides.  head: type of ``output``, or of the embedding where that is the
    head as well.  needs_importance: llama.cpp refuses to make it without.
    """

    name: str
    number: int
    default: str
    rules: tuple[Rule, ...] = ()
    head: str = "Q6_K"
    needs_importance: bool = False


def _smallest(default: str, high: str, embedding: str, output: str | None) -> tuple[Rule, ...]:
    """The rules of the types with 1 and 2 bits.  high: for ``attn_v`` and early ``ffn_down``.  output: for ``attn_output``."""
    return (
        Rule("attn_k", "Q4_K", when="eight experts"),
        Rule("attn_output", "Q5_K", when="eight experts"),
        Rule(EMBEDDING, embedding),
        Rule("attn_v", "Q4_K", when="grouped"),
        Rule("attn_v", "Q4_K", when="four experts"),
        Rule("attn_v", high),
        Rule("ffn_down*", high, early, counted=True),
        Rule("attn_output", output or default),
    )


# With eight experts llama.cpp spends bits on attention, in all but the smallest types.
_EIGHT = (Rule("attn_k", "Q8_0", when="eight experts"), Rule("attn_v", "Q8_0", when="eight experts"))
_EIGHT_OUTPUT = (*_EIGHT, Rule("attn_output", "Q5_K", when="eight experts"))
_SENSITIVE_Q6 = (Rule("attn_v", "Q6_K", sensitive), Rule("ffn_down*", "Q6_K", sensitive))
_IQ4 = (*_EIGHT_OUTPUT, Rule("attn_v", "Q5_K", when="grouped"), Rule("ffn_down*", "Q5_K", early, "no importance"))

LLAMA_CPP: tuple[FileType, ...] = (
    FileType("F32", 0, "F32", head="F32"),
    FileType("F16", 1, "F16", head="F16"),
    FileType("BF16", 32, "BF16", head="BF16"),
    FileType("Q8_0", 7, "Q8_0", _EIGHT, head="Q8_0"),
    FileType("Q4_0", 2, "Q4_0", (*_EIGHT, Rule("ffn_down*", "Q4_1", early, "importance"))),
    FileType("Q4_1", 3, "Q4_1", _EIGHT),
    FileType("Q5_0", 8, "Q5_0", (*_EIGHT, Rule("ffn_down*", "Q5_1", early, "importance"))),
    FileType("Q5_1", 9, "Q5_1", _EIGHT),
    FileType("Q6_K", 18, "Q6_K", _EIGHT),
    FileType("Q5_K_M", 17, "Q5_K", (*_EIGHT, *_SENSITIVE_Q6)),
    FileType("Q5_K_S", 16, "Q5_K", _EIGHT),
    FileType("Q4_K_M", 15, "Q4_K", (*_EIGHT_OUTPUT, *_SENSITIVE_Q6)),
    FileType("Q4_K_S", 14, "Q4_K", (*_EIGHT_OUTPUT, Rule("attn_v", "Q5_K", first(4)), Rule("ffn_down*", "Q5_K", early))),
    FileType("IQ4_NL", 25, "IQ4_NL", _IQ4),
    FileType("IQ4_XS", 30, "IQ4_XS", _IQ4),
    FileType(
        "Q3_K_L",
        13,
        "Q3_K",
        (
            *_EIGHT,
            Rule("attn_output", "Q3_K", when="eight experts"),
            Rule("attn_v", "Q5_K"),
            Rule("attn_output", "Q5_K"),
            Rule("ffn_down*", "Q5_K"),
        ),
    ),
    FileType(
        "Q3_K_M",
        12,
        "Q3_K",
        (
            *_EIGHT_OUTPUT,
            Rule("attn_v", "Q5_K", first(2)),
            Rule("attn_v", "Q4_K"),
            Rule("attn_output", "Q4_K"),
            Rule("ffn_down*", "Q5_K", earliest),
            Rule("ffn_down*", "Q4_K"),
        ),
    ),
    FileType("Q3_K_S", 11, "Q3_K", _EIGHT_OUTPUT),
    FileType(
        "Q2_K",
        10,
        "Q2_K",
        (
            *_EIGHT_OUTPUT,
            Rule("attn_v", "Q4_K", when="grouped"),
            Rule("attn_v", "Q3_K"),
            Rule("attn_output", "Q3_K"),
            Rule("ffn_down*", "Q3_K"),
        ),
    ),
    FileType(
        "Q2_K_S",
        21,
        "Q2_K",
        (*_EIGHT, Rule("attn_v", "Q4_K", when="grouped"), Rule("ffn_down*", "Q4_K", early)),
        needs_importance=True,
    ),
    FileType(
        "IQ3_M",
        27,
        "IQ3_S",
        (
            *_EIGHT_OUTPUT,
            Rule("ffn_down*", "Q4_K", sensitive, "eight experts"),
            Rule("attn_v", "Q4_K"),
            Rule("attn_output", "Q4_K"),
            Rule("ffn_down*", "Q4_K", early),
        ),
    ),
    FileType("IQ3_S", 26, "IQ3_S", (*_EIGHT_OUTPUT, Rule("attn_v", "Q4_K", when="grouped"))),
    FileType(
        "IQ3_XS",
        22,
        "IQ3_S",
        (
            *_EIGHT_OUTPUT,
            Rule("attn_v", "Q4_K", when="grouped"),
            Rule("attn_q", "IQ3_XXS"),
            Rule("attn_k", "IQ3_XXS"),
            Rule("ffn_gate*", "IQ3_XXS", middle),
            Rule("ffn_up*", "IQ3_XXS", middle),
        ),
        needs_importance=True,
    ),
    FileType(
        "IQ3_XXS",
        23,
        "IQ3_XXS",
        (
            *_EIGHT_OUTPUT,
            Rule(EMBEDDING, "IQ3_S"),
            Rule("attn_v", "Q4_K", when="grouped"),
            Rule("attn_v", "IQ3_S", when="no importance"),
            Rule("attn_q", "IQ2_S"),
            Rule("attn_k", "IQ2_S"),
            Rule("attn_output", "IQ3_S"),
            Rule("ffn_down*", "Q4_K", early, "no importance"),
            Rule("ffn_down*", "Q3_K", when="no importance"),
        ),
        head="Q5_K",
        needs_importance=True,
    ),
    FileType("IQ2_M", 29, "IQ2_S", _smallest("IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"), "Q5_K", True),
    FileType("IQ2_XS", 20, "IQ2_XS", _smallest("IQ2_XS", "Q2_K", "Q2_K", None), "Q5_K", True),
    FileType("IQ2_S", 28, "IQ2_XS", _smallest("IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"), "Q5_K", True),
    FileType("IQ2_XXS", 19, "IQ2_XXS", _smallest("IQ2_XXS", "Q2_K", "Q2_K", None), "Q5_K", True),
    FileType("IQ1_M", 31, "IQ1_M", _smallest("IQ1_M", "Q2_K", "Q2_K", "IQ2_XXS"), "Q5_K", True),
    FileType("IQ1_S", 24, "IQ1_S", _smallest("IQ1_S", "Q2_K", "Q2_K", "IQ2_XXS"), "Q5_K", True),
    FileType("MXFP4_MOE", 38, "MXFP4", (Rule("ffn_*_exps", "MXFP4", when="several experts"), Rule("*", "Q8_0")), head="Q8_0"),
)

# Mixtures that know what a mixture of experts is: nine tenths of Scout's weights are routed experts, of which a token meets one in
# sixteen (Maverick: one in 128), while every token meets the rest, which costs little.  Each is smaller than the file type of
# llama.cpp that it stands beside (Q5_K_M, Q4_K_M, IQ4_XS, Q3_K_M, Q2_K), for Scout, Maverick and small models, and was chosen by
# measurements (``benchmarks/results/gguf_quality.md``): six bits for routed experts gain next to nothing.
OWN: tuple[FileType, ...] = (
    FileType("QK5_MOE", 17, "Q6_K", (Rule("ffn_*_exps", "Q5_K"),)),
    FileType("QK4_MOE", 15, "Q6_K", (Rule("ffn_*_exps", "Q4_K"),)),
    FileType("QK3_MOE_L", 13, "Q6_K", (Rule("ffn_down_exps", "Q4_K"), Rule("ffn_*_exps", "Q3_K"))),
    FileType("QK3_MOE", 12, "Q5_K", (Rule("ffn_*_exps", "Q3_K"), Rule(EMBEDDING, "Q6_K"))),
    FileType("QK2_MOE", 10, "Q3_K", (Rule("ffn_*_exps", "Q2_K"), Rule(EMBEDDING, "Q6_K"))),
)

# Types that are of no use without importance: llama.cpp refuses them too, but for embedding and head.
NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})

FILE_TYPES: dict[str, FileType] = {file_type.name: file_type for file_type in (*LLAMA_CPP, *OWN)}


# ------------------------------------------------------------------------------------------------------ tensors of the file


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the GGUF file whose type is chosen.

    name: in the file.  part: the name within its layer, without ``.weight``.  columns, rows: the row is what blocks are cut from;
    rows of all experts together.  sources: our names of what it holds, experts one by one.
    """

    name: str
    part: str
    layer: int | None
    columns: int
    rows: int
    sources: tuple[str, ...]


@lru_cache(maxsize=8)  # of Maverick it takes a tenth of a second
def file_tensors(config: Llama4Config) -> tuple[FileTensor, ...]:
    """Every tensor of the text model's file whose type is chosen, in llama.cpp's order: by layer, by name within."""
    slices: dict[str, list[FileTensor]] = {}
    for unit in units(config):
        for tensor in _slices(unit):
            slices.setdefault(tensor.name, []).append(tensor)
    whole = [
        replace(found[0], rows=len(found) * found[0].rows, sources=tuple(tensor.sources[0] for tensor in found))
        for found in slices.values()
    ]
    return tuple(sorted(whole, key=lambda tensor: (-1 if tensor.layer is None else tensor.layer, tensor.name)))


def _slices(unit: Unit) -> Iterable[FileTensor]:
    """What a unit contributes: whole tensors, or those of one expert."""
    for matrix in unit.matrices:
        part = _PROJECTIONS[matrix.projection] + _SUFFIXES[matrix.role]
        rows, columns = matrix.shape
        yield FileTensor(f"blk.{matrix.layer}.{part}.weight", part, matrix.layer, columns, rows, (matrix.name,))
    for source in unit.copies:
        if source.role in ("embedding", "lm_head"):
            part = EMBEDDING if source.role == "embedding" else HEAD
            rows, columns = source.shape
            yield FileTensor(f"{part}.weight", part, None, columns, rows, (source.name,))


def fixed_tensors(config: Llama4Config) -> dict[str, int]:
    """Our names of the text model's tensors that are always F32 (norms, router, biases), with how many numbers each has."""
    return {
        tensor.name: tensor.elements
        for tensor in inventory(config)
        if tensor.role in ("norm", "router") or (tensor.role == "attention" and len(tensor.shape) == 1)
    }


# ------------------------------------------------------------------------------------------------------------------ choice


def find_file_type(name: str) -> FileType:
    """The file type of that name, in any case.  Raises RecipeError for others."""
    file_type = FILE_TYPES.get(name.upper())
    if file_type is None:
        raise RecipeError(f"unknown GGUF file type {name!r}. File types: {', '.join(FILE_TYPES)}")
    return file_type


def mixture_types(
    file_type: FileType, config: Llama4Config, importance: bool, overrides: Sequence[tuple[str, str]] = ()
) -> dict[str, str]:
    """The ggml type of every tensor of the text model, by our names: of each matrix, and of each tensor that is none.

    importance: whether the weights of columns are known.  overrides: pairs of a regular expression, searched in the names of the
    file's tensors (``blk.3.ffn_down_exps.weight``), and a ggml type; the first that matches decides, before any rule.  F32, F16
    and BF16 take none here, as in llama.cpp.

    Raises RecipeError for an override that is malformed.
    """
    types = dict.fromkeys(fixed_tensors(config), "F32")
    for tensor, chosen in file_types(file_type, config, importance, overrides):
        types |= dict.fromkeys(tensor.sources, chosen)
    return types


def file_types(
    file_type: FileType, config: Llama4Config, importance: bool, overrides: Sequence[tuple[str, str]] = ()
) -> list[tuple[FileTensor, str]]:
    """Every tensor of the file whose type is chosen, in llama.cpp's order, with its type.  See :func:`mixture_types`."""
    tensors = file_tensors(config)
    if TYPES[file_type.default].floating:
        return [(tensor, file_type.default) for tensor in tensors]
    patterns = [_parse_override(*override) for override in overrides]
    facts = _facts(config, importance)
    seen: Counter[str] = Counter()
    chosen = []
    for tensor in tensors:
        matched = next((number for number, (pattern, _) in enumerate(patterns) if pattern.search(tensor.name)), None)
        if matched is not None:
            wanted = patterns[matched][1]
        else:
            wanted = _rule_type(file_type, config, tensor, facts, seen)
        chosen.append((tensor, fitting_type(wanted, tensor.columns)))
    return chosen


def fitting_type(wanted: str, columns: int) -> str:
    """The type that rows of so many weights get where ``wanted`` was chosen: itself, where they are a multiple of its block."""
    while columns % TYPES[wanted].block:
        wanted = FALLBACKS.get(wanted, "F16")
    return wanted


def data_bytes(file_type: FileType, config: Llama4Config, importance: bool, overrides: Sequence[tuple[str, str]] = ()) -> int:
    """Bytes of all tensors, without what aligns them and without the header."""
    chosen = file_types(file_type, config, importance, overrides)
    sizes = (tensor.rows * TYPES[kind].row_bytes(tensor.columns) for tensor, kind in chosen)
    return sum(sizes) + TYPES["F32"].nbytes * sum(fixed_tensors(config).values())


def _rule_type(file_type: FileType, config: Llama4Config, tensor: FileTensor, facts: set[Fact], seen: Counter[str]) -> str:
    """What the rules say.  seen: how many of each kind came before; this tensor is added."""
    if tensor.part == HEAD or (tensor.part == EMBEDDING and config.tie_word_embeddings):
        fits = tensor.columns % TYPES[file_type.default].block == 0
        return file_type.head if fits else "Q8_0"
    kind = tensor.part.removesuffix("_exps").removesuffix("_shexp")
    before = seen[kind]
    seen[kind] += 1
    for rule in file_type.rules:
        by_count = rule.counted or kind == "attn_v" or tensor.layer is None or config.num_experts == 1
        place = before if by_count or tensor.layer is None else tensor.layer
        if fnmatchcase(tensor.part, rule.part) and rule.when in facts and rule.where(place, config.num_layers):
            return rule.type
    return file_type.default


def _facts(config: Llama4Config, importance: bool) -> set[Fact]:
    facts: dict[Fact, bool] = {
        "always": True,
        "importance": importance,
        "no importance": not importance,
        "grouped": config.num_heads // config.num_key_value_heads >= 4,
        "four experts": config.num_experts >= 4,
        "eight experts": config.num_experts == 8,
        "several experts": config.num_experts > 1,
    }
    return {fact for fact, holds in facts.items() if holds}


def _parse_override(pattern: str, kind: str) -> tuple[re.Pattern[str], str]:
    if kind.upper() not in TYPES:
        raise RecipeError(f"the override {pattern!r} asks for {kind!r}, which is not a ggml type. Types: {', '.join(TYPES)}")
    try:
        return re.compile(pattern), kind.upper()
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeError(f"the override {pattern!r} is not a regular expression: {error}") from error
