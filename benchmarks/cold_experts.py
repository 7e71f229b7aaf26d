"""What helps an expert that received few tokens: lending it others, shrinking its Hessian toward that of its layer, or both?

    python benchmarks/cold_experts.py --model MODEL --calibration TEXT --evaluation TEXT TEXT ... [--samples 4 16 50]

GPTQ at INT4 in groups of 128 on a small model in memory; KL divergence as in ``quality.py``, mean over ``--draws`` draws of the
calibration windows.  Lending is what quantkit does: tokens that the router would have sent next, scaled by the expert's own score,
each counting a share.  Shrinking adds so many pseudo-rows of the Hessian of all routed rows of the layer; the layer's down Hessian
takes a pass over all experts before the first is quantized, which is why it would have to win clearly.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from small_model import Reference, SmallModel, Weights, divergence, mlp, reference, windows

from quantkit import forward, grid
from quantkit.evidence import Evidence
from quantkit.methods.gptq import quantize
from quantkit.scheme import Scheme, parse_scheme
from quantkit.team import Team
from quantkit.workspace import Workspace

LENGTH = 256
SCHEME = parse_scheme("int4-g128")


@dataclass(frozen=True)
class Treatment:
    """lend: tokens up to this many times the inputs of the down projection.  weight: of a lent token.  shrink: pseudo-rows.

    bounded: at most as many as the expert has, or half the inputs, as quantkit does.
    """

    label: str
    lend: float = 0.0
    weight: float = 0.25
    shrink: float = 0.0
    bounded: bool = False


TREATMENTS = [
    Treatment("nothing"),
    Treatment("lent, up to twice the inputs, bounded (quantkit)", lend=2.0, bounded=True),
    Treatment("lent, up to the inputs", lend=1.0),
    Treatment("lent, up to twice the inputs", lend=2.0),
    Treatment("lent, up to twice the inputs, counted in full", lend=2.0, weight=1.0),
    Treatment("shrunk, 64 pseudo-rows", shrink=64.0),
    Treatment("shrunk, 256 pseudo-rows", shrink=256.0),
    Treatment("lent, up to twice the inputs, and shrunk, 64", lend=2.0, shrink=64.0),
]


def learned(
    team: Team, workspace: Workspace, weights: list[torch.Tensor], hessian: torch.Tensor, rows: float, missing: torch.Tensor | None
) -> list[torch.Tensor]:
    """What GPTQ stores for matrices that share their input."""
    assert isinstance(SCHEME, Scheme)
    diagonal = hessian.diagonal()
    evidence = Evidence(int(rows), diagonal, diagonal, hessian, missing, rows)
    found = quantize(weights, SCHEME, clip_search=True, workspace=workspace, evidence=evidence, team=team)
    return [grid.dequantize(quantized).clone() for quantized, _ in found]


def calibrated(model: SmallModel, chosen: torch.Tensor, treatment: Treatment, team: Team) -> Weights:
    """The model's feed-forward weights after GPTQ with that treatment."""
    config, workspace = model.config, Workspace()
    result = dict(model.matrices)
    hidden = model.tensors["model.embed_tokens.weight"][chosen]
    for layer in range(config.num_layers):
        hidden = model.attended(layer, hidden, model.matrices)
        rows = model.feed_forward_rows(layer, hidden)
        base = f"model.layers.{layer}.feed_forward"
        shared = f"{base}.shared_expert" if config.moe_layers[layer] else base
        added = mlp(model.matrices, shared, rows)
        _learn(model, result, shared, rows, torch.ones(len(rows)), None, (0.0, None, None), team, workspace)
        if config.moe_layers[layer]:
            lacking = added - mlp(result, shared, rows)
            routing = model.route(layer, rows)
            own = [(routing.experts[:, 0] == expert).nonzero()[:, 0] for expert in range(config.num_experts)]
            scaled = rows * routing.scores[:, :1]
            inner = torch.empty(len(rows), config.expert_width)
            for expert, places in enumerate(own):
                inner[places] = _inner(model.matrices, f"{base}.experts.{expert}", scaled[places])
            pooled = (treatment.shrink, scaled.t() @ scaled / len(rows), inner.t() @ inner / len(rows))
            for expert, places in enumerate(own):
                name = f"{base}.experts.{expert}"
                borrowed = _borrowed(routing, expert, len(places), treatment, config.expert_width)
                scores = torch.sigmoid(routing.logits[borrowed, expert])[:, None]
                shown = torch.cat([scaled[places], rows[borrowed] * scores])
                weight = torch.cat([torch.ones(len(places)), torch.full((len(borrowed),), treatment.weight)])
                asked = torch.cat([lacking[places], torch.zeros(len(borrowed), lacking.shape[1])])
                enough = len(places) >= config.expert_width // 4
                _learn(model, result, name, shown, weight, asked if enough else None, pooled, team, workspace)
                added[places] += mlp(model.matrices, name, scaled[places])
        hidden = hidden + added.view(hidden.shape)
    return result


def _learn(
    model: SmallModel,
    result: Weights,
    name: str,
    rows: torch.Tensor,
    weight: torch.Tensor,
    asked: torch.Tensor | None,
    pooled: tuple[float, torch.Tensor | None, torch.Tensor | None],
    team: Team,
    workspace: Workspace,
) -> None:
    """Quantize gate, up and down of one MLP from these rows."""
    inner = _inner(model.matrices, name, rows)
    pseudo, layer_wide, layer_narrow = pooled
    total = float(weight.sum()) + pseudo
    missing = None if asked is None else (asked * weight[:, None]).t() @ inner / total
    hessians = []
    for inputs, layer in ((rows, layer_wide), (inner, layer_narrow)):
        hessian = (inputs * weight[:, None]).t() @ inputs
        if layer is not None:
            hessian += pseudo * layer
        if total <= 0:
            hessian, total = torch.eye(inputs.shape[1]), 1.0
        hessians.append(hessian / total)
    gate, up, down = (model.matrices[f"{name}.{part}_proj"] for part in ("gate", "up", "down"))
    wide = learned(team, workspace, [gate, up], hessians[0], total, None)
    (narrow,) = learned(team, workspace, [down], hessians[1], total, missing)
    for part, value in zip(("gate", "up", "down"), (*wide, narrow), strict=True):
        result[f"{name}.{part}_proj"] = value


def _inner(weights: Weights, name: str, rows: torch.Tensor) -> torch.Tensor:
    return forward.gated(rows @ weights[f"{name}.gate_proj"].t(), rows @ weights[f"{name}.up_proj"].t())


def _borrowed(routing: forward.Routing, expert: int, own: int, treatment: Treatment, width: int) -> torch.Tensor:
    wanted = int(treatment.lend * width) - own
    if treatment.bounded:
        wanted = min(wanted, max(own, width // 2))
    others = (routing.experts[:, 0] != expert).nonzero()[:, 0]
    return others[routing.logits[others, expert].argsort(descending=True)[: max(0, wanted)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/tiny-scout"))
    parser.add_argument("--calibration", type=Path, required=True, help="a plain text")
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True, help="plain texts")
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16, 50, 500])
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    load, started = common.load_average(), time.monotonic()
    with torch.no_grad(), Team(2) as team:
        model = SmallModel.read(arguments.model)
        text = windows(arguments.model, [arguments.calibration], LENGTH)
        truth: Reference = reference(model, windows(arguments.model, arguments.evaluation, LENGTH, most=24))
        rows = []
        for treatment in TREATMENTS:
            cells = [treatment.label]
            for count in arguments.samples:
                draws = arguments.draws if count < 500 else 1
                found = []
                for draw in range(draws):
                    places = [(i * len(text) // count + 3 * draw) % len(text) for i in range(count)]
                    found.append(divergence(model, calibrated(model, text[places], treatment, team), truth)[0])
                cells.append(f"{sum(found) / draws:.6f}" + (f" ({min(found):.6f} to {max(found):.6f})" if draws > 1 else ""))
            rows.append(cells)
            print(" | ".join(cells), f"[{time.monotonic() - started:.0f} s]", flush=True)
    note = (
        "Mean KL divergence from BF16; of several draws of the calibration windows: mean (least to largest). Samples of 256 tokens."
    )
    table = common.table(["treatment", *(f"{count} samples" for count in arguments.samples)], rows)
    common.write_results("cold_experts.md", common.header("Cold experts", Path.cwd(), load) + f"\n{note}\n\n{table}")


if __name__ == "__main__":
    main()
