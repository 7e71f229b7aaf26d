"""Calibration against hooks on transformers' modules, in float64: what each unit receives, and what a cold expert is lent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from triangles import mirror

import quantkit
from quantkit import calibration
from quantkit.calibrate import open_corpus
from quantkit.calibration import CalibrationOptions, Seen, run_layers
from quantkit.calibration_state import CalibrationState
from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.corpus import Corpus
from quantkit.coverage import heat_map_svg
from quantkit.errors import CalibrationError
from quantkit.evidence import Evidence
from quantkit.formats import compressed_tensors
from quantkit.grid import cover_peak, dequantize
from quantkit.llama4 import Unit, units
from quantkit.statistics import Statistics, load_statistics
from quantkit.team import Team
from tests.artifact_files import digests, entries
from tests.reference_model import load_reference, reference_cache
from tests.speaking_models import (
    EVERYWHERE,
    options,
    random_tokens,
    write_random_texts,
    write_speaking_model,
    write_texts,
)
from tests.tiny_models import write_files

KINDS = ("code.python", "prose.en")
SETTINGS: dict[str, Any] = {
    "attention_chunk_size": 16,
    "floor_scale": 4,
    "no_rope_layers": [1, 0, 1, 0],
    "num_hidden_layers": 4,
}
TOLERANCE = 1e-4  # of a Hessian, relative to its diagonal; both sides run the model in float32

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module", params=["scout", "maverick"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = 2 if request.param == "maverick" else 1
    return write_speaking_model(tmp_path_factory.mktemp(request.param), request.param, 4, num_experts_per_tok=chosen, **SETTINGS)


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking_model(tmp_path_factory.mktemp("scout"), "scout", 5)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


# -------------------------------------------------------------------------------------------------------------- the oracle


@dataclass
class Hooked:
    """What the modules of a model receive for a corpus, samples one after the other.

    inputs: of each module, by name, ``[tokens, features]``, experts fused: ``[experts, tokens, hidden]``.  logits: of each router,
    float64 ``[tokens, experts]``, by layer.  peaks: largest key and value of each layer.
    """

    model: Any
    inputs: dict[str, torch.Tensor]
    logits: dict[int, torch.Tensor]
    peaks: dict[int, tuple[float, float]]


@torch.no_grad()
def run_hooked(model: Any, corpus: Corpus) -> Hooked:
    parts: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            parts.setdefault(name, []).append(arguments[0].flatten(0, -2).clone())
            if name.endswith("router"):
                parts.setdefault(f"{name} logits", []).append(result[-1].clone())

        return keep

    watched = ("_proj", "router", "experts")
    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name.endswith(watched)]
    samples = [row[:length].to(torch.int64)[None] for row, length in zip(corpus.tokens, corpus.lengths.tolist(), strict=True)]
    caches = [reference_cache(model, sample) for sample in samples]
    for handle in handles:
        handle.remove()
    experts = model.config.num_local_experts
    inputs, logits = {}, {}
    for name, pieces in parts.items():
        if name.endswith("experts"):
            inputs[name] = torch.cat([piece.view(experts, -1, piece.shape[-1]) for piece in pieces], 1)
        elif name.endswith("logits"):
            logits[int(name.split(".")[2])] = torch.cat(pieces).to(torch.float64)
        else:
            inputs[name] = torch.cat(pieces)
    peaks = {
        layer: tuple(max(float(getattr(cache.layers[layer], part).abs().max()) for cache in caches) for part in ("keys", "values"))
        for layer in range(model.config.num_hidden_layers)
    }
    return Hooked(model, inputs, logits, peaks)  # type: ignore[arg-type]


def chosen_experts(hooked: Hooked, layer: int) -> torch.Tensor:
    """bool ``[tokens, experts]``."""
    logits = hooked.logits[layer]
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    return chosen.scatter_(1, logits.topk(hooked.model.config.num_experts_per_tok).indices, True)


def expected_rows(hooked: Hooked, unit: Unit, lent: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, weights) that a unit receives, float64.  lent: tokens lent to the expert."""
    key = unit.key.removeprefix("language_model.")
    if unit.expert is None:
        rows = hooked.inputs[unit.matrices[0].name.removeprefix("language_model.")].to(torch.float64)
        return rows, torch.ones(len(rows), dtype=torch.float64)
    assert unit.layer is not None
    base = key[: key.index(".experts.")]
    own = chosen_experts(hooked, unit.layer)[:, unit.expert].nonzero()[:, 0]
    lent = torch.empty(0, dtype=torch.int64) if lent is None else lent
    tokens = torch.cat([own, lent])
    scores = hooked.logits[unit.layer][tokens, unit.expert].sigmoid()
    rows = hooked.inputs[f"{base}.router"][tokens].to(torch.float64) * scores[:, None]
    if key.endswith("down_proj"):
        wide = hooked.model.get_submodule(f"{base}.experts").gate_up_proj[unit.expert].detach().to(torch.float64)
        gate, up = (rows @ wide).chunk(2, -1)
        rows = functional.silu(gate) * up
    weights = torch.ones(len(tokens), dtype=torch.float64)
    weights[len(own) :] = calibration.BORROWED_WEIGHT
    return rows, weights


def best_liked(hooked: Hooked, unit: Unit, enough: float) -> torch.Tensor:
    """The tokens that the expert is to be lent, in no order."""
    assert unit.layer is not None and unit.expert is not None
    chosen = chosen_experts(hooked, unit.layer)[:, unit.expert]
    own = int(chosen.sum())
    wanted = max(0, min(int(enough * 256) - own, max(own, 128)))  # the experts of tiny models are 256 wide
    liking = hooked.logits[unit.layer][:, unit.expert].masked_fill(chosen, -torch.inf)
    return liking.argsort(descending=True)[: min(wanted, int((~chosen).sum()))]


# --------------------------------------------------------------------------------------------------------------- evidence


@dataclass
class Keeper:
    """A handler that keeps all evidence and converts nothing."""

    seen: dict[str, Seen] = field(default_factory=dict)

    def wants_hessian(self, unit: Unit) -> bool:
        return True

    def makes_up(self, unit: Unit) -> Sequence[int]:
        return ()

    def became(self, gate_up: Unit, down: Unit) -> Iterator[tuple[int, list[torch.Tensor]]]:
        return iter(())

    def convert(self, unit: Unit, weights: Sequence[torch.Tensor], digests: Sequence[str], seen: Seen) -> None:
        assert seen.evidence.hessian is not None
        evidence = seen.evidence
        copied = Evidence(
            evidence.tokens, evidence.mean_square, evidence.peak, mirror(seen.evidence.hessian.clone()), None, evidence.rows
        )
        self.seen[unit.key] = Seen(copied, seen.received, seen.cache_peaks, {})


def observe(source: Path, chosen: CalibrationOptions, directory: Path) -> tuple[Keeper, Statistics, Corpus]:
    keeper = Keeper()
    with Checkpoint.open(source) as checkpoint, Team(2) as team:
        corpus = open_corpus(checkpoint, chosen)
        state = CalibrationState(directory, {}, (corpus.tokens.numel(), checkpoint.config.hidden_size))
        work = [unit for unit in units(checkpoint.config) if unit.matrices]
        statistics = run_layers(checkpoint, corpus, work, state, team, handler=keeper, first=0)
        state.close()
    return keeper, statistics, corpus


def assert_near(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.dtype == torch.float32
    assert float(((found.to(torch.float64) - expected).abs() / scale.clamp(min=1e-12)).max()) < tolerance


@pytest.mark.parametrize("enough", [0.0, 0.15, 1.0])
def test_evidence_is_what_transformers_modules_receive(
    source: Path, texts: Path, tmp_path: Path, enough: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what an expert with too few tokens is lent: those it likes best, each counting a quarter."""
    monkeypatch.setattr(calibration, "ENOUGH_ROWS", enough)
    keeper, statistics, corpus = observe(source, options(texts), tmp_path / "state")
    hooked = run_hooked(load_reference(source), corpus)
    with Checkpoint.open(source) as checkpoint:
        work = [unit for unit in units(checkpoint.config) if unit.matrices]
    tokens = int(corpus.lengths.sum())
    assert list(keeper.seen) == list(statistics.inputs) == [unit.key for unit in work]
    lent_to = 0
    for unit in work:
        seen = keeper.seen[unit.key]
        lent = best_liked(hooked, unit, enough) if unit.expert is not None else torch.empty(0, dtype=torch.int64)
        lent_to += len(lent) > 0
        rows, weights = expected_rows(hooked, unit, lent)
        assert seen.received.borrowed == len(lent)
        assert seen.received.tokens == seen.evidence.tokens == len(rows) - len(lent)
        assert seen.evidence.rows == pytest.approx(float(weights.sum()))
        total = max(float(weights.sum()), 1e-30)
        hessian = (rows * weights[:, None]).t() @ rows / total
        assert seen.evidence.hessian is not None
        diagonal = hessian.diagonal()
        assert_near(seen.evidence.hessian, hessian, torch.outer(diagonal, diagonal).sqrt())
        assert_near(seen.evidence.mean_square, diagonal, diagonal)
        peak = rows.abs().amax(0) if len(rows) else torch.zeros(rows.shape[1], dtype=torch.float64)
        assert_near(seen.evidence.peak, peak, peak)
        kept = statistics.inputs[unit.key]
        assert torch.equal(kept.mean_square, seen.evidence.mean_square) and torch.equal(kept.peak, seen.evidence.peak)
        assert kept.hessian is None and kept.tokens == seen.evidence.tokens
        if unit.expert is None:
            assert (seen.received.tokens, seen.received.score_mass) == (tokens, float(tokens))
        elif unit.layer is not None:
            own = chosen_experts(hooked, unit.layer)[:, unit.expert]
            mass = float(hooked.logits[unit.layer][own, unit.expert].sigmoid().sum())
            assert seen.received.score_mass == pytest.approx(mass, rel=1e-5)
    assert (lent_to > 0) == (enough > 0)


def test_counts_of_experts_are_those_of_the_reference_s_router(source: Path, texts: Path, tmp_path: Path) -> None:
    _, statistics, corpus = observe(source, options(texts), tmp_path / "state")
    hooked = run_hooked(load_reference(source), corpus)
    assert statistics.kinds == corpus.kinds == KINDS
    kinds = torch.cat([row[:length] for row, length in zip(corpus.token_kinds, corpus.lengths.tolist(), strict=True)])
    assert sorted(statistics.experts) == sorted(hooked.logits)
    for layer, counts in statistics.experts.items():
        logits, chosen = hooked.logits[layer], chosen_experts(hooked, layer)
        assert torch.equal(counts.tokens, chosen.sum(0))
        for kind in range(len(KINDS)):
            assert torch.equal(counts.kinds[:, kind], chosen[kinds == kind].sum(0))
        torch.testing.assert_close(counts.score_mass, (logits.sigmoid() * chosen).sum(0), rtol=1e-5, atol=0)
        first_not_chosen = logits.masked_fill(chosen, -torch.inf).amax(1, keepdim=True)
        margins = ((logits - first_not_chosen) * chosen).sum(0) / chosen.sum(0).clamp(min=1)
        torch.testing.assert_close(counts.margin, margins, rtol=1e-4, atol=1e-5)
        wanted = torch.minimum(512 - counts.tokens, counts.tokens.clamp(min=128))  # experts are 256 wide
        assert torch.equal(counts.borrowed, torch.minimum(wanted, len(logits) - counts.tokens).clamp(min=0))
    for layer, expected in hooked.peaks.items():
        assert statistics.cache_peaks[layer] == pytest.approx(expected, rel=1e-5)


def test_a_sum_in_float32_is_near_that_in_float64() -> None:
    """20,000 rows with channels of very different size: within 3e-6 of the diagonal, some 50 units in the last place."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 64, generator=generator) * torch.logspace(-3, 3, 64) + 0.1
    sums = calibration._Inputs(64, torch.zeros(64, 64), {})
    with Team(2) as team:
        for part in torch.split(rows[:12_000], 4096):
            sums.add(team, part, 1.0, {})
        for part in torch.split(rows[12_000:], 4096):
            sums.add(team, part, 0.25, {})
    evidence = sums.evidence(12_000)
    weights = torch.ones(20_000, dtype=torch.float64)
    weights[12_000:] = 0.25
    double = rows.to(torch.float64)
    expected = (double * weights[:, None]).t() @ double / weights.sum()
    diagonal = expected.diagonal()
    assert evidence.hessian is not None
    assert_near(mirror(evidence.hessian), expected, torch.outer(diagonal, diagonal).sqrt(), 3e-6)
    assert_near(evidence.mean_square, diagonal, diagonal, 1e-6)


# ------------------------------------------------------------------------------------------------------------- statistics


def test_statistics_of_a_conversion_are_those_of_calibrate(scout: Path, texts: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int, str]] = []
    result = quantkit.calibrate(
        scout, tmp_path / "alone", calibration=options(texts), progress=lambda *at: done.append(at), workers=1
    )
    convert(scout, ["w4a16-gptq", "fp8-static"], tmp_path / "out", calibration=options(texts), workers=2)
    [beside] = [path for path in (tmp_path / "out").iterdir() if path.name.startswith("calibration-")]
    assert digests(beside) == digests(result.directory) == digests(tmp_path / "alone")
    assert set(digests(beside)) == {"coverage.svg", "statistics.json", "statistics.safetensors"}
    assert (beside / "coverage.svg").read_text(encoding="utf-8") == heat_map_svg(result.statistics)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []
    with Checkpoint.open(scout) as checkpoint:
        keys = [unit.key for unit in units(checkpoint.config) if unit.matrices]
    assert done == [(number, len(keys), key) for number, key in enumerate(keys, 1)]
    assert load_statistics(result.directory).inputs.keys() == set(keys)


def test_static_ranges_from_a_pass_and_from_saved_statistics_are_the_same(scout: Path, texts: Path, tmp_path: Path) -> None:
    saved = quantkit.calibrate(scout, tmp_path / "saved", calibration=options(texts))
    [made] = convert(scout, ["fp8-static"], tmp_path / "pass", calibration=options(texts)).artifacts
    given = CalibrationOptions(statistics=saved.directory)
    [reused] = convert(scout, ["fp8-static"], tmp_path / "saved-statistics", calibration=given).artifacts
    assert digests(made.directory) == digests(reused.directory)
    stored = load_file(made.directory / "model.safetensors")
    name = "language_model.model.layers.1.feed_forward.experts.2.down_proj"
    peak = float(saved.statistics.inputs[name].peak.max())
    assert torch.equal(stored[f"{name}.input_scale"], cover_peak(peak))
    with pytest.raises(CalibrationError, match="w4a16-gptq: its method needs Hessians"):
        convert(scout, ["fp8-static", "w4a16-gptq"], tmp_path / "other", calibration=given)


def test_scales_of_the_cache_cover_the_reference_s_keys_and_values(scout: Path, texts: Path, tmp_path: Path) -> None:
    [made] = convert(scout, [EVERYWHERE], tmp_path / "out", calibration=options(texts)).artifacts
    with Checkpoint.open(scout) as checkpoint:
        corpus = open_corpus(checkpoint, options(texts))
    hooked = run_hooked(load_reference(scout), corpus)
    stored = {name: tensor for path in made.directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for layer, peaks in hooked.peaks.items():
        for part, peak in zip("kv", peaks, strict=True):
            scale = float(stored[f"language_model.model.layers.{layer}.self_attn.{part}_scale"])
            assert peak <= 448 * scale * (1 + 1e-5) and 448 * scale < peak * (1 + 2**-6)


# ------------------------------------------------------------------------------------------------------------ cold experts


@dataclass(frozen=True)
class Starved:
    """A model in whose layer 0 expert 1 receives one token again and again, expert 2 nothing, expert 3 one token."""

    source: Path
    texts: Path
    router_inputs: torch.Tensor  # float64 [tokens, hidden]
    layer_experts: torch.Tensor  # int64 [tokens]


REPEATED = 9  # how often one token makes up the second text; expert 3 receives the last token of the third


@pytest.fixture(scope="module", params=[(2.0, -2.0), (-4.0, -7.0)], ids=["usual-scores", "low-scores"])
def starved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Starved:
    """Routers are solved for from what they receive: attention in layer 0 does not depend on them.

    The parameters are the logits of chosen experts and of others.  With low ones experts add little to what the shared one gives.
    """
    high, low = request.param
    directory = tmp_path_factory.mktemp("starved")
    source = write_speaking_model(directory / "source", "scout", 6)
    texts = write_texts(
        directory / "texts.jsonl",
        [("text", random_tokens(39, 1)), ("text", [1] * REPEATED), ("text", random_tokens(29, 3))],
    )
    with Checkpoint.open(source) as checkpoint:
        corpus = open_corpus(checkpoint, options(texts))
    inputs = run_hooked(load_reference(source), corpus).inputs["model.layers.0.feed_forward.router"].to(torch.float64)
    experts = torch.zeros(len(inputs), dtype=torch.int64)
    lengths = corpus.lengths.tolist()
    order = [int(name.split(",")[1].split()[1]) for name in corpus.sample_names]  # number of the document of each sample
    starts = {document: sum(lengths[:place]) for place, document in enumerate(order)}
    experts[list(starts.values())] = 1  # first tokens are all the same, too
    experts[starts[2] : starts[2] + REPEATED] = 1
    experts[starts[3] + 29] = 3
    wanted = torch.full((len(inputs), 4), low, dtype=torch.float64)
    wanted[torch.arange(len(inputs)), experts] = high
    router = torch.linalg.pinv(inputs, rtol=1e-4) @ wanted  # [hidden, experts]
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    tensors["language_model.model.layers.0.feed_forward.router.weight"] = router.t().contiguous().to(torch.bfloat16)
    for path in (*source.glob("*.safetensors"), *source.glob("*.index.json")):
        path.unlink()
    write_files(source, tensors)
    return Starved(source, texts, inputs, experts)


def weights_of(directory: Path, source: Path) -> dict[str, torch.Tensor]:
    """All matrices of an artifact as its bytes give them, float64 ``[out, in]``."""
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    stored = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    values = {}
    with Checkpoint.open(source) as checkpoint:
        for matrix in (matrix for unit in units(checkpoint.config) for matrix in unit.matrices):
            scheme = compressed_tensors.scheme_of(section, matrix.name)
            if scheme is None:
                values[matrix.name] = stored[f"{matrix.name}.weight"].to(torch.float64)
            else:
                values[matrix.name] = dequantize(compressed_tensors.decode(matrix.name, stored, scheme)).to(torch.float64)
    return values


def source_weights(source: Path) -> dict[str, torch.Tensor]:
    values = {}
    with Checkpoint.open(source) as checkpoint:
        for unit in units(checkpoint.config):
            if unit.matrices:
                weights, _ = checkpoint.read_unit(unit, quantkit.convert.__globals__["Workspace"]())
                values |= {matrix.name: weight.to(torch.float64) for matrix, weight in zip(unit.matrices, weights, strict=True)}
    return values


def mlp(weights: dict[str, torch.Tensor], name: str, rows: torch.Tensor) -> torch.Tensor:
    gate, up, down = (weights[f"{name}.{projection}_proj"] for projection in ("gate", "up", "down"))
    return (functional.silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()


def test_experts_that_see_little_are_finite_honest_and_better_than_rounded(starved: Starved, tmp_path: Path) -> None:
    """Measured: the outputs of shared and routed expert together.

    For experts with tokens those tokens; for the one without, and again for all, every token of the layer as if it were sent there.
    """
    made = {
        artifact.name: artifact.directory
        for artifact in convert(
            starved.source, ["w4a16-gptq", "w4a16-rtn"], tmp_path / "out", calibration=options(starved.texts)
        ).artifacts
    }
    exact = source_weights(starved.source)
    learned, plain = (weights_of(made[name], starved.source) for name in ("w4a16-gptq", "w4a16-rtn"))
    assert all(bool(weight.isfinite().all()) for weight in learned.values())
    base = "language_model.model.layers.0.feed_forward"
    router = load_file_tensor(starved.source, f"{base}.router.weight").to(torch.float64)
    rows, total = starved.router_inputs, len(starved.router_inputs)
    scores = (rows @ router.t()).sigmoid()
    assert torch.equal(scores.argmax(1), starved.layer_experts)

    ledger = entries(made["w4a16-gptq"])
    for expert, own in ((1, REPEATED + 2), (2, 0), (3, 1)):
        for projection, inputs in (("gate", 128), ("up", 128), ("down", 256)):
            entry = ledger[f"{base}.experts.{expert}.{projection}_proj"]
            lent = min(max(own, 128), total - own)  # half of 256 inputs, or as many as its own
            assert (entry.tokens, entry.borrowed) == (own, lent)
            counted = own + calibration.BORROWED_WEIGHT * lent
            few = 0.3 * max(0.0, inputs / counted - 1)  # too few to make up for anything
            assert entry.damping == pytest.approx(0.01 + few, rel=1e-5)
            assert entry.score_mass == pytest.approx(float(scores[starved.layer_experts == expert, expert].sum()), rel=1e-3)
            assert entry.method == "gptq" and 0 < entry.output_error < 0.3
        for tokens in (starved.layer_experts == expert, torch.ones(total, dtype=torch.bool)):
            if not tokens.any():
                continue
            shared, scaled = rows[tokens], rows[tokens] * scores[tokens, expert, None]

            both = [
                mlp(weights, f"{base}.shared_expert", shared) + mlp(weights, f"{base}.experts.{expert}", scaled)
                for weights in (exact, learned, plain)
            ]
            errors = [float((found - both[0]).norm()) for found in both[1:]]
            assert errors[0] < errors[1], (expert, int(tokens.sum()), errors)
            if expert == 2:  # nothing that it should make up for: better by itself, too
                alone = [
                    mlp(weights, f"{base}.experts.2", scaled) - mlp(exact, f"{base}.experts.2", scaled)
                    for weights in (learned, plain)
                ]
                assert float(alone[0].norm()) < 0.8 * float(alone[1].norm())


def load_file_tensor(source: Path, name: str) -> torch.Tensor:
    with Checkpoint.open(source) as checkpoint:
        return checkpoint.read_slice(name)
