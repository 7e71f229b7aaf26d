"""Evaluations that were never measured, for tests of what shows them: shaped like real ones, the same for the same arguments."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations

from quantkit.evaluation import (
    ArtifactEvaluation,
    Difference,
    Estimate,
    Evaluation,
    GoldenAnswers,
    LedgerCell,
    RoleSize,
    Scores,
)
from quantkit.golden_figures import beside_reference

NAMES = ("fp8-dynamic", "Q6_K", "w4a16-gptq", "Q4_K_M", "w4a16-rtn")
BITS = (8.04, 6.57, 4.53, 4.85, 4.53)
DIVERGENCES = (0.00184, 0.00271, 0.0213, 0.0187, 0.0342)
LANGUAGES = (
    "bash",
    "c",
    "cpp",
    "go",
    "java",
    "javascript",
    "python",
    "rust",
    "sql",
    "typescript",
    *("ar", "de", "en", "es", "fr", "hi", "th", "vi"),
)
KINDS = (
    *(f"code.{name}" for name in LANGUAGES[:10]),
    *(f"dialogue.{name}" for name in (*LANGUAGES[10:], "id", "it", "pt", "tl")),
    *("long.de", "long.en", "long.es", "mathematics.en"),
    *(f"prose.{name}" for name in (*LANGUAGES[10:], "id", "it", "pt", "tl")),
    *("structured.en", "tools.en"),
)
ROLES = {"attention": 0.95, "shared_expert": 1.02, "dense_mlp": 0.9, "routed_expert": 1.2}


def around(value: float, share: float) -> Estimate:
    return Estimate(value, value * (1 - share), value * (1 + 1.1 * share))


def scores(divergence: float, reference: float = 7.812, positions: int = 261_632, share: float = 0.03) -> Scores:
    """Scores of an artifact at a divergence; share: the half-width of the intervals."""
    ratio = math.exp(0.42 * divergence)
    percentiles = {"50": 0.31, "90": 2.4, "99": 9.6, "99.9": 41.0, "100": 260.0}
    agreement = 1 - 0.36 * math.sqrt(divergence)
    return Scores(
        positions=positions,
        perplexity=around(reference * ratio, 0.5 * share),
        perplexity_error=0.0423,
        reference_perplexity=reference,
        ratio=around(ratio, 0.03 * share),
        divergence=around(divergence, share),
        divergence_percentiles={name: factor * divergence for name, factor in percentiles.items()},
        agreement=around(agreement, 0.05 * share),
        probability_shift=Estimate(-0.12 * divergence, -0.15 * divergence, -0.09 * divergence),
        probability_shift_square=0.31 * math.sqrt(divergence),
    )


def sample(artifacts: int = 5, layers: int = 48, experts: int = 16, every: int = 1, seed: int = 0) -> Evaluation:
    """An evaluation of so many artifacts of a model whose every ``every``th layer has so many experts."""
    chance = random.Random(seed)
    parameters = 107_770_000_000 if every == 1 else 400_700_000_000
    moe = range(every - 1, layers, every)
    spread = {name: math.exp(chance.gauss(0, 0.45)) for name in (*KINDS, *LANGUAGES)}
    calibration = {layer: tuple(int(math.exp(chance.gauss(9.6, 1.0))) for _ in range(experts)) for layer in moe}
    calibration[moe[0]] = (0, 3, *calibration[moe[0]][2:])
    dense = [layer for layer in range(layers) if layer not in moe]
    places = {"attention": range(layers), "shared_expert": moe, "routed_expert": moe, "dense_mlp": dense}
    made = []
    for number in range(artifacts):
        name = NAMES[number] if number < len(NAMES) else f"{NAMES[number % 5]}-{'abcd'[number // 5]}"
        bits = BITS[number % 5] * (1 + 0.04 * (number // 5))
        divergence = DIVERGENCES[number % 5] / (1 + 0.25 * (number // 5))
        slips = math.sqrt(divergence)
        calibrated = "gptq" in name or "Q4" in name
        made.append(
            ArtifactEvaluation(
                name=name,
                path=f"/models/out/{name}",
                format="gguf" if name.startswith("Q") else "compressed-tensors",
                bytes=round(bits * parameters / 8),
                parameters=parameters,
                scores=scores(divergence),
                kinds={kind: scores(divergence * spread[kind] * math.exp(chance.gauss(0, 0.08)), 7, 6000, 0.14) for kind in KINDS},
                languages={
                    language: scores(divergence * spread[language] * math.exp(chance.gauss(0, 0.06)), 7, 14000, 0.09)
                    for language in LANGUAGES
                },
                router_agreement=tuple(
                    1 - slips * (0.15 + 0.35 * layer / layers) * math.exp(chance.gauss(0, 0.25)) if layer in moe else None
                    for layer in range(layers)
                ),
                roles=(
                    RoleSize("routed_expert", ("int4-g128",), parameters // 2, round(bits * parameters / 16)),
                    RoleSize("embedding", ("keep",), 1_034_000_000, 2_068_000_000),
                ),
                ledger=tuple(
                    LedgerCell(layer, role, experts, error, 1.3 * error, 0.5 * error if calibrated else 0.0)
                    for role, factor in ROLES.items()
                    for layer in places[role]
                    for error in [
                        0.62 * slips * factor * (1.25 - 0.4 * math.sin(3 * layer / layers)) * math.exp(chance.gauss(0, 0.04))
                    ]
                ),
                coverage=calibration if calibrated else {},
                fallbacks=("ffn_down_exps of layer 3: Q5_0 instead of Q4_K, whose rows must be a multiple of 256",) * (number == 3),
                recipe={
                    "name": name,
                    "format": "gguf" if name.startswith("Q") else "compressed-tensors",
                    "rules": [{"match": "*"}],
                },
                fingerprint={"version": "0.4.0", "files": {"model.safetensors": f"xxh3:{chance.getrandbits(64):016x}"}},
                seconds=412.5,
            )
        )
    return Evaluation(
        reference="Llama-4-Scout-17B-16E-Instruct" if every == 1 else "Llama-4-Maverick-17B-128E-Instruct",
        reference_path="/models/reference",
        reference_bytes=2 * parameters,
        reference_fingerprint={"config.json": "xxh3:0011223344556677"},
        text={"source": "bundled held-out text", "documents": 412, "tokens": 262_144, "digest": "xxh3:8c2f0d5a9e417b36"},
        convention="full",
        window=512,
        windows=512,
        rounded_activations=True,
        environment={"quantkit": "0.4.0", "python": "3.11.7", "torch": "2.9.1", "cpu": "Xeon, 2 cores", "device": "cpu"},
        artifacts=tuple(made),
        differences=tuple(map(difference, *zip(*combinations(made, 2), strict=True))) if artifacts > 1 else (),
        seconds=2204.0,
    )


def difference(first: ArtifactEvaluation, second: ArtifactEvaluation) -> Difference:
    """Of two artifacts, with narrow intervals, and p-values as if there were no other pair."""
    apart = first.scores.divergence.value - second.scores.divergence.value
    width = 0.02 * (first.scores.divergence.value + second.scores.divergence.value)
    logarithms = math.log(first.scores.perplexity.value / second.scores.perplexity.value)
    return Difference(
        first.name,
        second.name,
        Estimate(apart, apart - width, apart + width),
        Estimate(logarithms, logarithms - 0.3 * width, logarithms + 0.3 * width),
        math.erfc(1.96 / math.sqrt(2) * abs(apart) / width),
        math.erfc(1.96 / math.sqrt(2) * abs(logarithms) / (0.3 * width)),
    )


def with_golden(evaluation: Evaluation) -> Evaluation:
    """The same with answers to a golden set, the reference's first."""
    questions = 120
    rows = [(evaluation.reference, evaluation.reference_bytes, 0.0)]
    rows += [(artifact.name, artifact.bytes, artifact.scores.divergence.value) for artifact in evaluation.artifacts]
    answers = []
    for name, size, divergence in rows:
        wrong = {7, 19, 44, 80, 101} | set(range(round(300 * divergence)))
        right = 1 - len(wrong) / questions
        answers.append(
            GoldenAnswers(
                name=name,
                bytes=size,
                questions=questions,
                accuracy=Estimate(right, right - 0.04, min(1.0, right + 0.035)),
                by_kind={"exact": right - 0.02, "contains": right + 0.01, "choice": right},
                latency=Estimate(4.2 + size / 1e11, 4.1 + size / 1e11, 4.4 + size / 1e11),
                tokens_per_second=Estimate(7.4 - size / 1e11, 7.1 - size / 1e11, 7.5 - size / 1e11),
                rounds=4,
                answers=tuple((f"q{number:03d}", number not in wrong, "forty-two <b>") for number in range(questions)),
            )
        )
    return replace(evaluation, golden=beside_reference(answers))


def without_anything(evaluation: Evaluation) -> Evaluation:
    """The same as one window, no experts and no ledger leave it: no interval, no router, no coverage, no kinds."""
    nothing = math.nan

    def bare(estimate: Estimate) -> Estimate:
        return Estimate(estimate.value, nothing, nothing)

    def single(own: Scores) -> Scores:
        return replace(
            own,
            perplexity=bare(own.perplexity),
            ratio=bare(own.ratio),
            divergence=bare(own.divergence),
            agreement=bare(own.agreement),
            probability_shift=bare(own.probability_shift),
        )

    artifacts = tuple(
        replace(
            artifact,
            scores=single(artifact.scores),
            kinds={},
            languages={},
            router_agreement=(None,) * len(artifact.router_agreement),
            ledger=(),
            coverage={},
            roles=(),
            fallbacks=(),
            recipe=None,
            fingerprint={},
        )
        for artifact in evaluation.artifacts
    )
    pairs = tuple(
        replace(
            pair,
            divergence=bare(pair.divergence),
            log_perplexity=bare(pair.log_perplexity),
            divergence_p_value=nothing,
            log_perplexity_p_value=nothing,
        )
        for pair in evaluation.differences
    )
    return replace(evaluation, artifacts=artifacts, differences=pairs, windows=1, environment={}, golden=())
