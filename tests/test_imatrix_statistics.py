"""Importance files in terms of our statistics: the way to our units and back, experts without tokens, what a file does not tell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.errors import CalibrationError
from quantkit.evidence import Evidence
from quantkit.imatrix import (
    Imatrix,
    Importance,
    has_peaks,
    imatrix_from_statistics,
    read_imatrix,
    statistics_from_imatrix,
)
from quantkit.llama4 import Llama4Config, parse_config, units
from quantkit.statistics import Statistics
from tests.importance_files import tensors_by_gguf, written
from tests.sample_statistics import PROVENANCE, sample_statistics
from tests.tiny_models import tiny_config

DEMO = Path(__file__).resolve().parent.parent / "demo" / "tiny-scout"
SCOUT = parse_config(json.loads((DEMO / "config.json").read_text()))
MAVERICK = parse_config(tiny_config("maverick"))
CONFIGS = {"scout": SCOUT, "maverick": MAVERICK}


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=3e-7, atol=0)


# The names of a layer's units, and what GGUF calls the tensors that share their input; written out once more, as the oracle.
ATTENTION = {"self_attn.qkv": ("attn_q", "attn_k", "attn_v"), "self_attn.o_proj": ("attn_output",)}
SPARSE = {
    "feed_forward.shared_expert.gate_up_proj": ("ffn_gate_shexp", "ffn_up_shexp"),
    "feed_forward.shared_expert.down_proj": ("ffn_down_shexp",),
}
DENSE = {"feed_forward.gate_up_proj": ("ffn_gate", "ffn_up"), "feed_forward.down_proj": ("ffn_down",)}
EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}


def named(config: Llama4Config) -> dict[str, tuple[str, int]]:
    """Tensor and row for every unit that is calibrated, through the first of its matrices; all in plain sight."""
    found: dict[str, tuple[str, int]] = {}
    for layer in range(config.num_layers):
        base = f"{config.prefix}model.layers.{layer}."
        plain = ATTENTION | (SPARSE if config.moe_layers[layer] else DENSE)
        found |= {base + module: (f"blk.{layer}.{stems[0]}.weight", 0) for module, stems in plain.items()}
        if config.moe_layers[layer]:
            for expert in range(config.num_experts):
                for projection, stems in EXPERTS.items():
                    key = f"{base}feed_forward.experts.{expert}.{projection}"
                    found[key] = (f"blk.{layer}.{stems[0]}.weight", expert)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_unit_goes_to_its_tensors_and_comes_back(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    statistics = sample_statistics(config)
    assert named(config).keys() == statistics.inputs.keys()
    path = written(tmp_path, imatrix_from_statistics(statistics, config))
    values = tensors_by_gguf(path)
    for key, (tensor, row) in named(config).items():
        evidence = statistics.inputs[key]
        sums, counts = values[f"{tensor}.in_sum2"], values[f"{tensor}.counts"]
        assert counts.reshape(-1)[row] == evidence.tokens
        assert np.allclose(sums.reshape(counts.size, -1)[row], evidence.tokens * evidence.mean_square.numpy(), rtol=1e-6)
    for layer in range(config.num_layers):
        plain = ATTENTION | (SPARSE if config.moe_layers[layer] else DENSE)
        for stems in [*plain.values(), *(EXPERTS.values() if config.moe_layers[layer] else ())]:
            first = values[f"blk.{layer}.{stems[0]}.weight.in_sum2"]
            assert all(np.array_equal(first, values[f"blk.{layer}.{stem}.weight.in_sum2"]) for stem in stems)
    back = statistics_from_imatrix(read_imatrix(path), config, PROVENANCE)
    assert back.inputs.keys() == statistics.inputs.keys()
    for key, evidence in statistics.inputs.items():
        assert back.inputs[key].tokens == evidence.tokens
        assert close(back.inputs[key].mean_square, evidence.mean_square)


def test_what_an_importance_file_does_not_tell_is_marked(tmp_path: Path) -> None:
    statistics = sample_statistics(SCOUT)
    path = written(tmp_path, imatrix_from_statistics(statistics, SCOUT))
    back = statistics_from_imatrix(read_imatrix(path), SCOUT, PROVENANCE)
    assert has_peaks(statistics) and not has_peaks(back)
    assert not back.cache_peaks and all(evidence.peak.numel() == 0 for evidence in back.inputs.values())
    assert back.kinds == ("imatrix",)
    assert back.description["source"] == PROVENANCE
    assert back.description["corpus"]["source"] == "imatrix" and back.description["corpus"]["samples"] == 7
    assert back.experts.keys() == statistics.experts.keys()
    for layer, counts in back.experts.items():
        gate = [
            back.inputs[f"{SCOUT.prefix}model.layers.{layer}.feed_forward.experts.{e}.gate_up_proj"].tokens
            for e in range(SCOUT.num_experts)
        ]
        assert counts.tokens.tolist() == gate and torch.equal(counts.kinds.sum(1), counts.tokens)


def with_expert(statistics: Statistics, layer: int, expert: int, tokens: int, mean_square: float | None) -> Statistics:
    """The same statistics, with another expert's input; None keeps the mean square."""
    inputs = dict(statistics.inputs)
    for projection in EXPERTS:
        key = f"{SCOUT.prefix}model.layers.{layer}.feed_forward.experts.{expert}.{projection}"
        old = inputs[key]
        square = old.mean_square if mean_square is None else torch.full_like(old.mean_square, mean_square)
        inputs[key] = Evidence(tokens, square, old.peak)
    return Statistics(inputs, statistics.experts, statistics.cache_peaks, statistics.kinds, statistics.description)


def test_an_expert_that_was_only_lent_tokens_is_exported_with_its_estimate(tmp_path: Path) -> None:
    statistics = with_expert(sample_statistics(SCOUT), 0, 3, 0, None)
    values = tensors_by_gguf(written(tmp_path, imatrix_from_statistics(statistics, SCOUT)))
    key = f"{SCOUT.prefix}model.layers.0.feed_forward.experts.3.down_proj"
    assert values["blk.0.ffn_down_exps.weight.counts"][3] == 1
    assert np.array_equal(values["blk.0.ffn_down_exps.weight.in_sum2"][3], statistics.inputs[key].mean_square.numpy())


def test_an_expert_without_anything_is_imported_as_the_weighted_mean_of_the_others(tmp_path: Path) -> None:
    statistics = with_expert(sample_statistics(SCOUT), 0, 3, 0, 0.0)
    statistics = with_expert(statistics, 0, 1, 500, None)
    path = written(tmp_path, imatrix_from_statistics(statistics, SCOUT))
    assert tensors_by_gguf(path)["blk.0.ffn_down_exps.weight.counts"][3] == 0
    keys = [f"{SCOUT.prefix}model.layers.0.feed_forward.experts.{expert}.down_proj" for expert in range(SCOUT.num_experts)]
    others = [statistics.inputs[key] for number, key in enumerate(keys) if number != 3]
    total = sum(evidence.tokens for evidence in others)
    expected = sum(evidence.tokens / total * evidence.mean_square.to(torch.float64) for evidence in others)
    for legacy in (False, True):  # in the older format it has been written there already
        path = written(tmp_path, imatrix_from_statistics(statistics, SCOUT), legacy=legacy)
        back = statistics_from_imatrix(read_imatrix(path), SCOUT, PROVENANCE)
        assert torch.allclose(back.inputs[keys[3]].mean_square.to(torch.float64), expected, rtol=1e-5)
        assert close(back.inputs[keys[1]].mean_square, statistics.inputs[keys[1]].mean_square)
        if not legacy:
            assert back.inputs[keys[3]].tokens == 0 and back.inputs[keys[1]].tokens == 500


def test_ones_for_an_expert_of_the_older_format_mean_that_nothing_is_known(tmp_path: Path) -> None:
    imatrix = imatrix_from_statistics(sample_statistics(SCOUT), SCOUT)
    entries = dict(imatrix.entries)
    name = "blk.1.ffn_down_exps.weight"
    entries[name].mean_square[2] = 1.0
    path = written(tmp_path, Imatrix(entries, chunk_count=5, chunk_size=3), legacy=True)
    back = statistics_from_imatrix(read_imatrix(path), SCOUT, PROVENANCE)
    key = f"{SCOUT.prefix}model.layers.1.feed_forward.experts.2.down_proj"
    others = entries[name].mean_square[torch.arange(SCOUT.num_experts) != 2]
    assert back.inputs[key].tokens == 0
    assert torch.allclose(back.inputs[key].mean_square, others.mean(0), rtol=1e-5)  # all chunks count alike


def test_files_of_another_model_are_refused_with_all_that_differs() -> None:
    imatrix = imatrix_from_statistics(sample_statistics(SCOUT), SCOUT)

    def problems(entries: dict[str, Importance]) -> str:
        with pytest.raises(CalibrationError, match="does not belong to this model") as caught:
            statistics_from_imatrix(Imatrix(entries), SCOUT, PROVENANCE)
        return str(caught.value)

    entries = dict(imatrix.entries)
    removed = entries.pop("blk.0.attn_output.weight")
    assert "no importance of" in problems(entries) and "blk.0.attn_output.weight" in problems(entries)
    entries = imatrix.entries | {"blk.999.attn_q.weight": removed}
    assert "blk.999.attn_q.weight', which the model does not have" in problems(entries)
    wrong = Importance(removed.mean_square[:, :-1], removed.counts)
    assert "instead of" in problems(imatrix.entries | {"blk.0.attn_output.weight": wrong})
    nothing = Importance(torch.zeros_like(removed.mean_square), torch.tensor([0]))
    assert "received no token" in problems(imatrix.entries | {"blk.0.attn_output.weight": nothing})
    # What llama.cpp measures beside our matrices does no harm, and one of several names of an input is enough.
    entries = dict(imatrix.entries)
    del entries["blk.0.attn_q.weight"], entries["blk.0.ffn_gate_exps.weight"]
    entries |= dict.fromkeys(("blk.0.ffn_gate_inp.weight", "output.weight", "token_embd.weight"), removed)
    back = statistics_from_imatrix(Imatrix(entries), SCOUT, PROVENANCE)
    assert back.inputs.keys() == {unit.key for unit in units(SCOUT) if unit.matrices}


def test_chunks_are_as_many_as_hold_the_tokens() -> None:
    statistics = sample_statistics(SCOUT)
    told = imatrix_from_statistics(statistics, SCOUT)
    assert (told.chunk_count, told.chunk_size, told.datasets) == (7, 100, ("bundled",))
    corpus = {"source": "a.txt", "samples": 90, "tokens": 700, "sequence_length": 64}  # documents shorter than the window
    described = dataclasses.replace(statistics, description={"corpus": corpus})
    told = imatrix_from_statistics(described, SCOUT)
    assert (told.chunk_count, told.chunk_size, told.datasets) == (11, 64, ("a.txt",))
    nothing = imatrix_from_statistics(dataclasses.replace(statistics, description={}), SCOUT)
    assert (nothing.chunk_count, nothing.chunk_size, nothing.datasets) == (0, 1, ("unknown",))


def test_statistics_that_lack_a_unit_are_not_exported() -> None:
    with pytest.raises(CalibrationError, match=r"no statistics of .*layers\.1"):
        imatrix_from_statistics(sample_statistics(SCOUT, layers=(0,)), SCOUT)
