"""Gates: conditions under which an evaluation counts as failed, as a CI job states them.

    kld > 0.02                     of every artifact, on the estimate
    kld.high > 0.02                on the upper end of its interval: fails unless the artifact is surely below
    w4a16-gptq: agreement < 95 %   of one artifact, by its name or its path
    size > 70GB

A gate is parsed before any work, so that a typing error does not cost an evaluation.  It fails closed: a figure that is not known
(no golden set, no experts, an interval from a single window) crosses every gate on it.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import GateError
from quantkit.evaluation import ArtifactEvaluation, Estimate, Evaluation

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_ESTIMATES = ("perplexity", "ratio", "kld", "agreement", "golden")  # have intervals
_PERCENTILES = {"kld_median": "50", "kld_90": "90", "kld_99": "99", "kld_99.9": "99.9", "kld_max": "100"}
_SHARES = ("agreement", "router_agreement", "router_agreement_mean", "golden")  # may be written in per cent
METRICS = (
    *("perplexity", "ratio", "kld", *_PERCENTILES),
    *("agreement", "router_agreement", "router_agreement_mean", "bits", "size", "golden"),
)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_TELLING = 1000  # per cent of the limit: beyond this, as of a limit near zero, a percentage says nothing
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_PATTERN = re.compile(
    r"\s*(?:(?P<artifact>.*\S)\s*:)?\s*(?P<metric>[A-Za-z_]+(?:_[0-9.]+)?)(?:\.(?P<end>low|high))?"
    r"\s*(?P<operator>>=|<=|>|<)\s*(?P<number>[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*(?P<unit>%|[A-Za-z]*)\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Gate:
    """A condition that no artifact may meet.

    text: as it was written.  artifact: the name of the one it is about; None: every one.  end: ``low``, ``high``, or empty for the
    estimate itself.  comparison: ``>``, ``>=``, ``<`` or ``<=``.  limit: sizes in bytes, shares from 0 to 1.
    """

    text: str
    artifact: str | None
    metric: str
    end: str
    comparison: str
    limit: float


@dataclass(frozen=True)
class FailedGate:
    """A gate that an artifact crosses; ``value`` is NaN where the figure is not known."""

    gate: Gate
    artifact: str
    value: float

    @property
    def message(self) -> str:
        """What, where, by how much."""
        name = f"{self.gate.metric}.{self.gate.end}" if self.gate.end else self.gate.metric
        if math.isnan(self.value):
            return f"{self.artifact}: {name} is not known here, so the gate {self.gate.text!r} counts as crossed"
        value, limit = _figure(self.gate.metric, self.value), _figure(self.gate.metric, self.gate.limit)
        crossed = f"{self.artifact}: {name} is {value}, and the gate says {self.gate.comparison} {limit}"
        apart = abs(self.value - self.gate.limit)
        if apart == 0:
            return f"{crossed}: exactly at the limit"
        share = 100 * apart / abs(self.gate.limit) if self.gate.limit else math.inf
        part = f" ({share:.0f} % of the limit)" if share >= 100 else f" ({share:.3g} % of the limit)"
        part = part if share < _TELLING else ""
        return f"{crossed}: beyond it by {_figure(self.gate.metric, apart)}{part}"


def parse_gate(text: str) -> Gate:
    """Read a gate as it is written on the command line.  Raises GateError."""
    match = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
    if not match:
        raise GateError(
            f"{text!r} is not a gate: write METRIC, one of > >= < <=, and a number, such as 'kld > 0.02', 'kld.high > 0.02', "
            "'size > 70GB' or 'NAME: agreement < 0.95' for one artifact"
        )
    metric, end, unit = match["metric"], match["end"] or "", match["unit"]
    if metric not in METRICS:
        raise GateError(f"{text!r}: there is no metric {metric!r}; metrics are {', '.join(METRICS)}")
    if end and metric not in _ESTIMATES:
        raise GateError(f"{text!r}: {metric} has no interval, so no {end} end; intervals have {', '.join(_ESTIMATES)}")
    limit = _limit(text, metric, float(match["number"]), unit)
    if not math.isfinite(limit):
        raise GateError(f"{text!r}: the limit is too large for a number")
    if metric in _SHARES and not 0 <= limit <= 1:
        raise GateError(f"{text!r}: {metric} is a share, so the limit must lie between 0 and 1, or between 0 % and 100 %")
    return Gate(text.strip(), match["artifact"], metric, end, match["operator"], limit)


def _limit(text: str, metric: str, number: float, unit: str) -> float:
    """The number in bytes, or as a share."""
    if metric == "size" and unit.lower() in _UNITS:
        return number * _UNITS[unit.lower()]
    if not unit:
        return number
    if unit == "%" and metric in _SHARES:
        return number / 100
    takes = "bytes, kB, MB, GB, TB or GiB" if metric == "size" else "a share or a percentage" if metric in _SHARES else "no unit"
    raise GateError(f"{text!r}: {metric} takes {takes}, not {unit!r}")


def _parsed(gates: Iterable[Gate | str] | Gate | str) -> list[Gate]:
    """One gate or several, each as such or as text."""
    several = [gates] if isinstance(gates, Gate | str) or not isinstance(gates, Iterable) else gates
    return [gate if isinstance(gate, Gate) else parse_gate(gate) for gate in several]


def check_gates(gates: Iterable[Gate | str] | Gate | str, paths: Iterable[str | Path], golden: bool) -> None:
    """Refuse gates that no artifact at these paths can meet: on others, or on a golden set that is not there.  Raises GateError."""
    paths = list(paths)
    for gate in _parsed(gates):
        if gate.artifact is not None and not any(_names(gate.artifact, path) for path in paths):
            known = ", ".join(Path(path).name for path in paths)
            raise GateError(f"{gate.text!r}: no artifact here is called {gate.artifact!r}; there are {known}")
        if gate.metric == "golden" and not golden:
            raise GateError(f"{gate.text!r}: without a golden set there is no such figure; name one with --golden FILE")


def _names(artifact: str, path: str | Path) -> bool:
    """Whether a gate means the artifact at a path: it has the path, however written, its last part, or that without an ending."""
    names = {str(path), Path(path).name, Path(path).expanduser().resolve().name}
    same = os.path.abspath(_at_home(artifact)) == os.path.abspath(_at_home(str(path)))
    return same or artifact in names | {name.removesuffix(".gguf") for name in names}


def _at_home(path: str) -> str:
    """With the home directory in place of ``~``, which no shell replaces within a gate."""
    return f"{Path.home()}{path[1:]}" if path.startswith("~/") else path


def failed_gates(evaluation: Evaluation, gates: Iterable[Gate | str] | Gate | str) -> list[FailedGate]:
    """The gates that artifacts cross, gate by gate; gates may be texts.

    Raises GateError for what is no gate, and for a gate on an artifact that was not evaluated.
    """
    failed = []
    for gate in _parsed(gates):
        meant = [own for own in evaluation.artifacts if gate.artifact in (None, own.name)]
        meant = meant or [own for own in evaluation.artifacts if gate.artifact and _names(gate.artifact, own.path)]
        if not meant:
            known = ", ".join(own.name for own in evaluation.artifacts)
            raise GateError(f"{gate.text!r}: no artifact here is called {gate.artifact!r}; there are {known}")
        for own in meant:
            value = figure(evaluation, own, gate.metric, gate.end)
            if math.isnan(value) or _OPERATORS[gate.comparison](value, gate.limit):
                failed.append(FailedGate(gate, own.name, value))
    return failed


def failure(failed: Sequence[FailedGate]) -> GateError:
    """The error that says which artifacts cross which gates, and by how much."""
    count = "A gate is crossed" if len(failed) == 1 else f"{len(failed)} gates are crossed"
    return GateError("\n  ".join([f"{count}:", *(one.message for one in failed)]))


def figure(evaluation: Evaluation, artifact: ArtifactEvaluation, metric: str, end: str = "") -> float:
    """A metric of an artifact, or an end of its interval; NaN where it is not known.

    ``router_agreement`` is that of the layer where it is lowest, ``router_agreement_mean`` the mean over layers with experts.
    """
    scores = artifact.scores
    if metric in _PERCENTILES:
        return scores.divergence_percentiles.get(_PERCENTILES[metric], math.nan)
    if metric == "bits":
        return artifact.bits_per_weight
    if metric == "size":
        return float(artifact.bytes)
    if metric.startswith("router_agreement"):
        known = [share for share in artifact.router_agreement if share is not None]
        if not known or any(map(math.isnan, known)):
            return math.nan
        return min(known) if metric == "router_agreement" else sum(known) / len(known)
    unknown = Estimate(math.nan, math.nan, math.nan)
    asked = evaluation.golden[1:]  # behind the reference, which may be called like an artifact
    golden = next((answers.accuracy for answers in asked if answers.name == artifact.name), unknown)
    estimates = {"perplexity": scores.perplexity, "ratio": scores.ratio, "kld": scores.divergence, "agreement": scores.agreement}
    estimate = {**estimates, "golden": golden}[metric]
    return {"": estimate.value, "low": estimate.low, "high": estimate.high}[end]


def _figure(metric: str, value: float) -> str:
    """A value or limit of a metric as text."""
    if metric != "size":
        return f"{value:.6g}"
    exponent = min(4, max(0, int(math.log10(abs(value))) // 3)) if abs(value) >= 1 else 0
    return f"{value / 1000**exponent:.6g} {('bytes', 'kB', 'MB', 'GB', 'TB')[exponent]}"
