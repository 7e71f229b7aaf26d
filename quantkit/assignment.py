"""Assignment: what each tensor of a model gets by a recipe.

The rules are tried for each tensor, then the recipe's mixture.  Nothing is silent: a tensor that nothing matches, a rule that
decides nothing, and a rule that quantizes what has to stay as it is are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from quantkit.errors import RecipeError, listed
from quantkit.ggml import TYPES
from quantkit.llama4 import Llama4Config, Role, SourceTensor, Unit, WeightMatrix
from quantkit.mixtures import FILE_TYPES, NEED_IMPORTANCE, mixture_types
from quantkit.recipe import (
    FEED_FORWARD_ROLES,
    GGUF,
    METHODS_WITH_HESSIANS,
    OVERRIDE_ROLES,
    PACKED,
    Recipe,
    Rule,
    fitting_method,
    parse_layers,
)
from quantkit.scheme import Scheme, parse_scheme

QUANTIZABLE_ROLES: tuple[Role, ...] = ("routed_expert", "shared_expert", "dense_mlp", "attention")
# What GGUF and packed quantize besides, data-free.
STREAMED_ROLES: tuple[Role, ...] = ("embedding", "lm_head", "vision", "projector")

# Relative L2 error of one matrix above which a run fails, by number family.  Round-to-nearest stays below these for weights
# as heavy tailed as Student's t with 3 degrees of freedom; more means a damaged source or a wrong axis.  A method that looks at
# outputs may go twice as far from the weights.  A recipe can state its own.
MAXIMUM_ERROR = {"int8": 0.12, "int6": 0.2, "int5": 0.3, "int4": 0.45, "int3": 0.6, "int2": 0.75, "fp8": 0.06, "fp4": 0.25}


@dataclass(frozen=True)
class Assignment:
    """What one tensor gets.  scheme None: stored as in the source.  maximum_error: relative L2 bound, None when kept."""

    scheme: Scheme | None
    method: str = "rtn"
    clip_search: bool = False
    maximum_error: float | None = None
    smooth: bool = False


def assign(
    recipe: Recipe, units: list[Unit], config: Llama4Config | None = None, aliases: Mapping[str, str] | None = None
) -> dict[str, Assignment]:
    """The assignment of every matrix and copied tensor of ``units``, by name.

    config: of the model, which a mixture asks for.  aliases: other names of tensors, in which patterns are searched too.  Raises
    RecipeError that lists every unmatched tensor, every rule that decides nothing, and every tensor that a rule quantizes but that
    must stay as it is.
    """
    table = [_assignment(recipe, rule) for rule in recipe.rules]
    ranges = [parse_layers(rule.layers) if rule.layers is not None else None for rule in recipe.rules]
    patterns = [re.compile(rule.name) if rule.name is not None else None for rule in recipe.rules]
    mixture = _mixture(recipe, units, config)
    changeable = QUANTIZABLE_ROLES + (STREAMED_ROLES if recipe.format in (GGUF, PACKED) else ())
    used = [0] * len(recipe.rules)
    passed: dict[int, str] = {}  # by rule: what it would reach if that were a matrix
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
                if pattern is not None and not _searched(pattern, item.name, aliases):
                    continue
                if table[index].scheme is not None and item.role in STREAMED_ROLES and not _is_matrix(item):
                    if rule.name is not None:
                        passed.setdefault(index, item.name)
                        continue  # "attn_q" means the matrix and not a bias of the vision tower
                    result[item.name] = Assignment(None)  # a rule for the vision tower means its matrices
                    break
                used[index] += 1
                if table[index].scheme is not None and (item.role not in changeable or not _is_matrix(item)):
                    which = "tensors" if item.role not in changeable else "tensors that are no matrices"
                    problems.append(f"rule {index + 1} gives {rule.scheme} to {item.name}, but {item.role} {which} are always kept")
                if unit.matrices and rule.method is None and table[index].method == "rtn" and rule.scheme in NEED_IMPORTANCE:
                    problems.append(
                        f"rule {index + 1} gives {rule.scheme} to {item.name}, which is of no use without importance: say "
                        'method = "importance" (--method importance)'
                    )
                result[item.name] = _streamed(item, table[index]) if unit.copies else table[index]
                break
            else:
                if item.name in mixture:
                    result[item.name] = mixture[item.name]
                else:
                    problems.append(f'no rule matches {item.name} (role {item.role}); end the recipe with a rule scheme = "keep"')
    problems += _smoothing_problems(units, result)
    for number, rule in enumerate(recipe.rules):
        kept = f": {passed[number]} is no matrix, and such tensors are always kept" if number in passed else ""
        if not used[number]:
            problems.append(f"rule {number + 1} ({_describe(rule)}) decides no tensor{kept}")
    if problems:
        raise RecipeError(f"recipe {recipe.name!r} does not fit this model:{listed(problems)}")
    return result


def _is_matrix(item: WeightMatrix | SourceTensor) -> bool:
    """Whether it is multiplied with activations; biases, norms and positions within the vision tower are not."""
    return isinstance(item, WeightMatrix) or (len(item.shape) == 2 and item.name.endswith(".weight"))


def _searched(pattern: re.Pattern[str], name: str, aliases: Mapping[str, str] | None) -> bool:
    return bool(pattern.search(name) or (aliases is not None and pattern.search(aliases.get(name, ""))))


def _streamed(item: WeightMatrix | SourceTensor, assignment: Assignment) -> Assignment:
    """Calibration says nothing of tensors that are quantized as they are copied; GPTQ knows how to round an embedding all the
    same."""
    learns = item.role == "embedding" and assignment.method == "gptq"
    return assignment if assignment.scheme is None or learns else replace(assignment, method="rtn")


def _mixture(recipe: Recipe, units: list[Unit], config: Llama4Config | None) -> dict[str, Assignment]:
    """What the recipe's mixture gives to each tensor of the model."""
    if recipe.mixture is None or config is None:
        return {}
    # Some rules of llama.cpp count tensors and leave out those whose type the user chose; so it has to know which these are.
    chosen = [(rule.name, rule.scheme) for rule in recipe.rules if rule.name is not None and _is_override(rule)]
    types = mixture_types(FILE_TYPES[recipe.mixture], config, recipe.method != "rtn", chosen)
    kept, by_type = Assignment(None), {name: _assignment(recipe, Rule(name)) for name in TYPES}
    result: dict[str, Assignment] = {}
    for unit in units:
        for item in unit.items:
            name = types.get(item.name)
            if item.role in ("vision", "projector"):
                name = vision_type(item.name, item.shape, recipe.vision)
            if name is None or item.role in ("norm", "router") or item.name.endswith(".bias"):
                result[item.name] = kept  # in full: GGUF widens what is small to F32
            else:
                result[item.name] = _streamed(item, by_type[name]) if unit.copies else by_type[name]
    return result


def _is_override(rule: Rule) -> bool:
    """Whether the rule is what llama.cpp's option --tensor-type can say."""
    return rule.roles in (None, OVERRIDE_ROLES) and rule.layers is None and rule.scheme in TYPES


def vision_type(name: str, shape: tuple[int, ...], chosen: str) -> str | None:
    """What a tensor of vision tower or projector is stored as where matrices are to be ``chosen``; None: as it is, widened to F32.

    llama.cpp convolves with the embedding of patches, in floats.
    """
    if len(shape) != 2 or not name.endswith(".weight"):
        return None
    if "patch_embedding" in name:
        return "F16" if chosen == "F16" else "F32"
    return "F16" if shape[-1] % TYPES[chosen].block else chosen


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
    method = rule.method or fitting_method(recipe.method, scheme)
    # Searching FP8 scales gains little and costs a pass over the data; for the others it is cheap beside the disk.
    search = rule.clip_search if rule.clip_search is not None else scheme.number != "fp8"
    stated = rule.maximum_error if rule.maximum_error is not None else recipe.maximum_error
    usual = maximum_error(scheme) * (2 if method in METHODS_WITH_HESSIANS else 1)
    return Assignment(scheme, method, search, stated if stated is not None else usual, rule.smooth)


def maximum_error(scheme: Scheme) -> float:
    """The usual bound of one matrix's relative L2 error.  Of llama.cpp's types: three times what Gaussian weights get."""
    if scheme.number != "ggml":
        return MAXIMUM_ERROR[scheme.number]
    return 0.02 if scheme.block_type.floating else min(0.95, 5 * 2.0**-scheme.block_type.bits_per_weight)


def _describe(rule: Rule) -> str:
    stated = {
        key: value for key, value in asdict(rule).items() if value is not None and key in ("scheme", "roles", "layers", "name")
    }
    if rule.roles == OVERRIDE_ROLES:  # router and norms are not among them
        stated["roles"] = "matrices of the text model"
    return ", ".join(f"{key} = {value}" for key, value in stated.items())
