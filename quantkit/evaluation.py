"""What an evaluation found, as data: what ``evaluate`` returns, reports show and gates are checked against.

Divergences are Kullback-Leibler divergences of the artifact's next-token distribution from the reference's, in nats.  Every figure
that has an interval was bootstrapped over windows, the same windows for all artifacts of an evaluation: tokens of one window are
not independent of each other, and paired windows make differences between artifacts far sharper than the figures themselves.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

INTERVAL = 0.95  # of all intervals


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """How an artifact does on some positions of the text.

    positions: tokens that were predicted.  perplexity_error: one standard error, tokens taken as independent, as llama.cpp states
    it.  ratio: of the perplexity to the reference's.  divergence: the mean.  divergence_percentiles: by percentile, ``"50"``,
    ``"90"``, ``"99"``, ``"99.9"``, ``"100"`` (the largest).  agreement: share of positions with the same most likely token.
    probability_shift: mean change of the right token's probability; its root mean square beside it.
    """

    positions: int
    perplexity: Estimate
    perplexity_error: float
    reference_perplexity: float
    ratio: Estimate
    divergence: Estimate
    divergence_percentiles: dict[str, float]
    agreement: Estimate
    probability_shift: Estimate
    probability_shift_square: float


@dataclass(frozen=True)
class LedgerCell:
    """What the ledger says of the quantized matrices of one role in one layer (None: tensors of no layer).

    relative_error: root of the summed squared errors over the summed squares of all matrices here, as far as known the mean; worst:
    the largest of one matrix.  output_error: the mean over calibrated matrices, 0 where none is.
    """

    layer: int | None
    role: str
    matrices: int
    relative_error: float
    worst: float
    output_error: float


@dataclass(frozen=True)
class RoleSize:
    """What the tensors of one role are stored as, and in how many bytes."""

    role: str
    schemes: tuple[str, ...]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class ArtifactEvaluation:
    """One artifact.

    format: ``compressed-tensors``, ``gguf``, ``packed``, or ``unquantized``.  bytes: of all tensors of the text model; parameters:
    likewise.  router_agreement: by layer the share of tokens that go to the same experts as in the reference, None in layers
    without experts.  coverage: by MoE layer, the tokens that each expert received in calibration, empty where nothing says it.
    ledger: empty for files without one.  fallbacks: what differs from what was asked, or from the usual, one line each.  recipe,
    fingerprint: as the manifest has them.  seconds: this artifact's share of the evaluation.
    """

    name: str
    path: str
    format: str
    bytes: int
    parameters: int
    scores: Scores
    kinds: dict[str, Scores]
    languages: dict[str, Scores]
    router_agreement: tuple[float | None, ...]
    roles: tuple[RoleSize, ...] = ()
    ledger: tuple[LedgerCell, ...] = ()
    coverage: dict[int, tuple[int, ...]] = field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()
    recipe: dict[str, Any] | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter of the text model."""
        return 8 * self.bytes / self.parameters


@dataclass(frozen=True)
class Difference:
    """Of two artifacts on the same windows: first minus second.

    The p-values are of the hypothesis that there is no difference, adjusted by Holm's method over all pairs of the evaluation; NaN
    where there are no intervals.
    """

    first: str
    second: str
    divergence: Estimate
    log_perplexity: Estimate
    divergence_p_value: float = math.nan
    log_perplexity_p_value: float = math.nan


@dataclass(frozen=True)
class GoldenComparison:
    """An artifact's answers beside the reference's to the same questions.

    gained: questions that the artifact answers right and the reference wrong; lost: the other way round.  p_value: of both being
    equally good, by the exact two-sided sign test (McNemar's); adjusted_p_value: by Holm's method over all artifacts.
    """

    gained: int
    lost: int
    p_value: float
    adjusted_p_value: float


@dataclass(frozen=True)
class GoldenAnswers:
    """How one artifact, or the reference, answers a golden set.

    accuracy: share of right answers.  by_kind: accuracy by kind of question (``exact``, ``contains``, ``choice``).  latency: mean
    seconds from question to complete answer.  tokens_per_second: of generating, once prompts are read.  The ends of both are their
    spread, NaN where there is none, over ``rounds`` rounds of measuring.  answers: (identifier, right, what was answered) in order.
    beside_reference: None for the reference itself.
    """

    name: str
    bytes: int
    questions: int
    accuracy: Estimate
    by_kind: dict[str, float]
    latency: Estimate
    tokens_per_second: Estimate
    rounds: int
    answers: tuple[tuple[str, bool, str], ...]
    beside_reference: GoldenComparison | None = None


@dataclass(frozen=True)
class Evaluation:
    """Artifacts, measured on the same windows against the same reference.

    reference: the unquantized model's name; reference_path: where it lies.  text: JSON-able record of the text and its digest.
    convention: ``full`` or ``llama.cpp``.  positions: tokens predicted in each window.  environment: versions and hardware.
    golden: of the reference, then of the artifacts in their order; empty without a golden set.
    """

    reference: str
    reference_path: str
    reference_bytes: int
    reference_fingerprint: dict[str, Any]
    text: dict[str, Any]
    convention: str
    window: int
    windows: int
    rounded_activations: bool
    environment: dict[str, str]
    artifacts: tuple[ArtifactEvaluation, ...]
    differences: tuple[Difference, ...] = ()
    golden: tuple[GoldenAnswers, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; keys of ``coverage`` become strings."""
        content = asdict(self)
        for artifact, own in zip(content["artifacts"], self.artifacts, strict=True):
            artifact["coverage"] = {str(layer): counts for layer, counts in own.coverage.items()}
            artifact["bits_per_weight"] = own.bits_per_weight
        return content
