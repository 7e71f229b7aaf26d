"""The forward pass against transformers' Llama 4, logits by logits, in every way a config can steer it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import forward, language_model, layer_pass
from quantkit import team as team_module
from quantkit.checkpoint import Checkpoint
from quantkit.errors import CalibrationError
from quantkit.language_model import Unobserved, embed, head, hidden_states, logits
from quantkit.layer_pass import LayerPass, Samples
from quantkit.llama4 import Unit, units
from quantkit.team import Team
from tests.reference_model import load_reference, make_coarse, make_matrices_coarse, reference_logits
from tests.tiny_models import write_tiny_model

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"
TOLERANCE = 1e-4
VISIBLE = 1e-2  # what a wrong setting must at least move

ALTERNATING: dict[str, Any] = {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}
TUNED: dict[str, Any] = {**ALTERNATING, "floor_scale": 4, "attn_scale": 0.1}  # temperature acts from the fourth token on


def scaling(low: float, high: float) -> dict[str, Any]:
    """Wavelengths are 6, 14, 32, 74, ...: with a band from 16 to 64 there are some below, inside and above it."""
    return {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": 64,
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "scout": ("scout", {"num_hidden_layers": 4}),
    "scout, chunks of 16": ("scout", {**TUNED, "attention_chunk_size": 16}),
    "scout, chunks of 32, step": ("scout", {**TUNED, "attention_chunk_size": 32, "rope_scaling": scaling(1.0, 1.0)}),
    "scout, smooth band": ("scout", {**TUNED, "rope_scaling": scaling(1.0, 4.0)}),
    "scout, no temperature": ("scout", {**TUNED, "attn_temperature_tuning": False}),
    "scout, no qk norm": ("scout", {**TUNED, "use_qk_norm": False, "attention_chunk_size": 32}),
    "scout, large epsilon": ("scout", {**ALTERNATING, "rms_norm_eps": 0.1}),
    "scout, two experts a token": ("scout", {**TUNED, "num_experts_per_tok": 2, "num_local_experts": 6}),
    "scout, one key head": ("scout", {**TUNED, "num_attention_heads": 8, "num_key_value_heads": 1}),
    "scout, as many key heads": ("scout", {**TUNED, "num_key_value_heads": 4, "head_dim": 16}),
    "scout, wide heads": ("scout", {**TUNED, "head_dim": 64}),  # heads together are wider than the hidden state
    "scout, tied": ("scout", {**TUNED, "tie_word_embeddings": True}),  # said in the text section alone
    "maverick": ("maverick", {"attention_chunk_size": 32}),
    "maverick, qk norm": ("maverick", {**TUNED, "use_qk_norm": True, "rope_scaling": scaling(1.0, 4.0)}),
    "maverick, bias": ("maverick", {**TUNED, "attention_bias": True, "attention_chunk_size": 16}),
    "maverick, three experts a token": ("maverick", {"num_experts_per_tok": 3, "moe_layers": [0, 3]}),
    "text": ("text", {**TUNED, "attention_chunk_size": 32}),
    "text, tied": ("text", {**TUNED, "tie_word_embeddings": True}),
    "text, tied, bias": ("text", {**TUNED, "tie_word_embeddings": True, "attention_bias": True, "vocab_size": 1000}),
    "text, dense": ("text", {**TUNED, "moe_layers": []}),
}
SEEDS = (0, 1, 2)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def some_tokens(samples: int = 3, length: int = 100, vocabulary: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


def scale_embedding(directory: Path, factor: float) -> None:
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        scaled = {name: tensor * factor if "embed_tokens" in name else tensor for name, tensor in tensors.items()}
        save_file(scaled, path, metadata={"format": "pt"})


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


# ------------------------------------------------------------------------------------------------------------- logits


def test_logits_of_the_demo_model() -> None:
    tokens = some_tokens(2, 150, 2048)
    with Checkpoint.open(DEMO) as checkpoint:
        ours = logits(checkpoint, tokens, threads=2)
    assert difference(ours, reference_logits(load_reference(DEMO), tokens)) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    kind, overrides = CASES[case]
    for seed in SEEDS:
        directory = tmp_path / str(seed)
        write_tiny_model(directory, kind, seed, **overrides)
        if overrides.get("tie_word_embeddings"):  # else the logits are ten times as large as those of the other models
            scale_embedding(directory, 0.1)
        tokens = some_tokens(vocabulary=overrides.get("vocab_size", 256), seed=seed)
        with Checkpoint.open(directory) as checkpoint:
            ours = logits(checkpoint, tokens, threads=2)
        theirs = reference_logits(load_reference(directory), tokens)
        assert theirs.std() > 0.3, "the model says next to nothing, so nothing is compared"
        assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_of_weights_in_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "maverick", dtype=dtype)
    with Checkpoint.open(tmp_path) as checkpoint:
        ours = logits(checkpoint, some_tokens(), threads=1)
    assert difference(ours, reference_logits(load_reference(tmp_path), some_tokens())) <= TOLERANCE


WRONG: dict[str, dict[str, Any]] = {
    "chunk one longer": {"attention_chunk_size": 33},
    "chunks of half the size": {"attention_chunk_size": 16},
    "no chunks": {"attention_chunk_size": 8192},
    "no temperature": {"temperature_tuning": False},
    "temperature from later on": {"floor_scale": 8.0},
    "more temperature": {"attn_scale": 0.2},
    "no qk norm": {"use_qk_norm": False},
    "another theta": {"rope_theta": 10_000.0},
    "rope everywhere": {"rope_layers": (True,) * 4},
    "rope the other way round": {"rope_layers": (False, True, False, True)},
    "one expert a token": {"experts_per_token": 1},
    "three experts a token": {"experts_per_token": 3},
    "no scaling": {"rope_scaling": None},
    "a step for a band": {"rope_scaling": {"high_freq_factor": 1.0}},
    "a longer context": {"rope_scaling": {"original_max_position_embeddings": 128}},
    "another factor": {"rope_scaling": {"factor": 2.0}},
    "another epsilon": {"rms_norm_eps": 0.02},
}


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which every setting acts."""
    directory = tmp_path_factory.mktemp("steered")
    settings = {"attention_chunk_size": 32, "num_experts_per_tok": 2, "rms_norm_eps": 0.01, "rope_scaling": scaling(1.0, 4.0)}
    write_tiny_model(directory, "scout", **TUNED, **settings)
    return directory


@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_sees_a_wrong_setting(wrong: str, steered: Path) -> None:
    tokens = some_tokens()
    theirs = reference_logits(load_reference(steered), tokens)
    with Checkpoint.open(steered) as checkpoint:
        assert difference(logits(checkpoint, tokens, threads=1), theirs) <= TOLERANCE
        changes = dict(WRONG[wrong])
        if changes.get("rope_scaling"):
            assert checkpoint.config.rope_scaling is not None
            changes["rope_scaling"] = dataclasses.replace(checkpoint.config.rope_scaling, **changes["rope_scaling"])
        checkpoint.config = dataclasses.replace(checkpoint.config, **changes)
        assert difference(logits(checkpoint, tokens, threads=1), theirs) > VISIBLE


def test_random_models_use_all_their_experts(steered: Path) -> None:
    """Else a comparison of logits says little about routing."""
    chosen: dict[int, torch.Tensor] = {}

    class Watcher(Unobserved):
        def routed(self, layer: int, tokens: torch.Tensor, routing: forward.Routing) -> None:
            chosen[layer] = torch.bincount(routing.experts.reshape(-1), minlength=4)

    with Checkpoint.open(steered) as checkpoint, Team(1) as one:
        run_layers(checkpoint, some_tokens(), one, Watcher())
    assert len(chosen) == 4
    assert all((counts > 20).all() for counts in chosen.values())


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1.0, 4.0), (None, None)])
def test_rotary_frequencies(low: float | None, high: float | None, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "text", rope_scaling=None if low is None or high is None else scaling(low, high))
    with Checkpoint.open(tmp_path) as checkpoint:
        ours = forward.rotary_frequencies(checkpoint.config)
        plain = forward.rotary_frequencies(dataclasses.replace(checkpoint.config, rope_scaling=None))
    torch.testing.assert_close(ours, load_reference(tmp_path).model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    ratios = ours / plain
    untouched, divided = torch.isclose(ratios, torch.tensor(1.0)), torch.isclose(ratios, torch.tensor(1 / 8))
    regimes = (bool(untouched.any()), bool((~untouched & ~divided).any()), bool(divided.any()))
    assert regimes == {None: (True, False, False), 1.0: (True, False, True), 4.0: (True, True, True)}[high]


# ---------------------------------------------------------------------------------------------------- ways to compute it


def run_layers(
    checkpoint: Checkpoint, tokens: torch.Tensor, team: Team, observer: layer_pass.Observer, *, sequential: bool = False
) -> torch.Tensor:
    """What leaves the last layer: float32 ``[samples, length, hidden]``."""
    config = checkpoint.config
    samples = Samples.of(torch.full((tokens.shape[0],), tokens.shape[1]), tokens.shape[1])
    hidden = torch.empty(tokens.numel(), config.hidden_size)
    embed(checkpoint, tokens.reshape(-1), hidden)
    output = torch.full_like(hidden, torch.nan)
    scratch = torch.full((len(hidden), max(config.hidden_size, config.num_heads * config.head_dim)), torch.nan)
    for layer in range(config.num_layers):
        parts = [unit for unit in units(config) if unit.layer == layer]
        LayerPass(checkpoint, parts, layer, samples, team, observer, sequential=sequential).run(hidden, output, scratch)
        hidden, output = output, hidden.fill_(torch.nan)
        scratch.fill_(torch.nan)
    return hidden.view(*tokens.shape, -1)


@pytest.fixture(scope="module", params=["scout", "maverick"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    write_tiny_model(directory, request.param, **TUNED, attention_chunk_size=32, attention_bias=True, num_experts_per_tok=2)
    return directory


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Portions and tiles of sizes that divide nothing."""
    monkeypatch.setattr(layer_pass, "PORTION", 37)
    monkeypatch.setattr(language_model, "PORTION", 5)
    monkeypatch.setattr(language_model, "TABLE_ROWS", 29)
    monkeypatch.setattr(team_module, "TILE", 42)


@pytest.mark.parametrize("threads", [1, 3])
def test_logits_in_small_portions(threads: int, source: Path, small_portions: None) -> None:
    with Checkpoint.open(source) as checkpoint:
        ours = logits(checkpoint, some_tokens(), threads=threads)
    assert difference(ours, reference_logits(load_reference(source), some_tokens())) <= TOLERANCE


@pytest.mark.parametrize("portions", [True, False])
def test_bits_do_not_depend_on_the_number_of_threads(portions: bool, source: Path, request: pytest.FixtureRequest) -> None:
    if portions:
        request.getfixturevalue("small_portions")
    before = torch.get_num_threads()
    with Checkpoint.open(source) as checkpoint:
        torch.set_num_threads(2)  # what torch is set to must not matter either
        results = [logits(checkpoint, some_tokens(5, 70), threads=threads) for threads in (1, 2, 3)]
        torch.set_num_threads(1)
        results.append(logits(checkpoint, some_tokens(5, 70), threads=2))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_samples_of_different_lengths(source: Path) -> None:
    """Each gives what it gives alone, whatever its padding holds; rows of padding are not written."""
    lengths = (100, 1, 37, 0, 64)
    tokens = some_tokens(5, 100)
    samples = Samples.of(torch.tensor(lengths), 100)
    with Checkpoint.open(source) as checkpoint, Team(2) as two:
        hidden = hidden_states(checkpoint, tokens.reshape(-1), samples, two).view(5, 100, -1)
        for sample, length in enumerate(lengths):
            if not length:
                continue
            theirs = reference_logits(load_reference(source), tokens[sample : sample + 1, :length])[0]
            ours = torch.cat([portion for _, portion in head(checkpoint, hidden[sample, :length], two)], 1)
            assert difference(ours, theirs) <= TOLERANCE

        config = checkpoint.config
        rows = torch.randn(500, config.hidden_size, generator=torch.Generator().manual_seed(0))
        padding = torch.ones(500, dtype=torch.bool)
        padding[samples.tokens] = False
        parts = [unit for unit in units(config) if unit.layer == 1]
        outputs = []
        for filling in (0.0, torch.nan):
            output = torch.full_like(rows, 7.0)
            scratch = torch.full((500, 128), filling)
            given = rows.masked_fill(padding[:, None], filling)
            LayerPass(checkpoint, parts, 1, samples, two, Unobserved()).run(given, output, scratch)
            assert (output[padding] == 7.0).all()
            outputs.append(output)
        assert torch.equal(*outputs)
        assert torch.isfinite(outputs[1]).all()


@pytest.mark.parametrize("portions", [True, False])
def test_sequential_without_replacement_changes_no_bit(portions: bool, source: Path, request: pytest.FixtureRequest) -> None:
    if portions:
        request.getfixturevalue("small_portions")
    with Checkpoint.open(source) as checkpoint, Team(2) as two:
        at_once = run_layers(checkpoint, some_tokens(), two, Unobserved())
        in_turn = run_layers(checkpoint, some_tokens(), two, Unobserved(), sequential=True)
    assert torch.equal(at_once, in_turn)
    assert torch.isfinite(at_once).all()


class Coarse(Unobserved):
    """Replaces every unit."""

    def complete(self, unit: Unit, weights: Sequence[torch.Tensor], digests: Sequence[str]) -> list[torch.Tensor] | None:
        return [make_coarse(weight) for weight in weights]


def test_sequential_goes_on_with_what_the_observer_returns(source: Path) -> None:
    tokens = some_tokens()
    model = load_reference(source)
    original = reference_logits(model, tokens)
    make_matrices_coarse(model)
    replaced = reference_logits(model, tokens)
    assert difference(original, replaced) > 0.1
    with Checkpoint.open(source) as checkpoint, Team(2) as two:
        for sequential, expected in ((True, replaced), (False, original)):
            hidden = run_layers(checkpoint, tokens, two, Coarse(), sequential=sequential)
            ours = torch.cat([portion for _, portion in head(checkpoint, hidden.flatten(0, 1), two)], 1)
            assert difference(ours.view(expected.shape), expected) <= TOLERANCE


# ------------------------------------------------------------------------------------------------- embedding and head


@pytest.mark.parametrize("kind", ["scout", "text"])
@pytest.mark.parametrize("portions", [True, False])
def test_embedding_is_copied_exactly(kind: str, portions: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if portions:
        request.getfixturevalue("small_portions")
    write_tiny_model(tmp_path, kind)
    tokens = torch.cat([some_tokens(1, 300)[0], torch.tensor([0, 255, 28, 29, 30, 255, 0]), torch.full((50,), 7)])
    out = torch.full((len(tokens), 128), torch.nan)
    with Checkpoint.open(tmp_path) as checkpoint:
        embed(checkpoint, tokens, out)
        embed(checkpoint, tokens[:0], out[:0])
    assert torch.equal(out, load_reference(tmp_path).model.embed_tokens.weight[tokens])


@pytest.mark.parametrize("wrong", [-1, 256, 1 << 40])
def test_an_id_outside_the_vocabulary_is_refused(wrong: int, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "text")
    tokens = some_tokens(1, 9)[0]
    tokens[5] = tokens[7] = wrong
    out = torch.full((9, 128), 3.0)
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CalibrationError) as error:
        embed(checkpoint, tokens, out)
    assert f"token 5 has id {wrong}, but the model's vocabulary has 256 ids (2 of 9 tokens" in str(error.value)
    assert (out == 3.0).all()


def test_head_gives_the_vocabulary_in_portions(steered: Path, small_portions: None) -> None:
    rows = torch.randn(11, 128, generator=torch.Generator().manual_seed(0))
    with Checkpoint.open(steered) as checkpoint, Team(2) as two:
        portions = list(head(checkpoint, rows, two))
    assert [first for first, _ in portions] == list(range(0, 256, 29))
    model = load_reference(steered)
    with torch.no_grad():
        theirs = model.lm_head(model.model.norm(rows))
    assert difference(torch.cat([portion for _, portion in portions], 1), theirs) <= 1e-5
