"""What an observer of a layer pass is shown, against what hooks on transformers' modules see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch.nn import functional

from quantkit import forward, layer_pass
from quantkit.checkpoint import Checkpoint
from quantkit.language_model import embed
from quantkit.layer_pass import Borrowed, LayerPass, Samples
from quantkit.llama4 import Unit, units
from quantkit.team import Team
from tests.reference_model import load_reference, make_coarse, make_matrices_coarse, reference_cache
from tests.tiny_models import write_tiny_model

TOLERANCE = 2e-5
SAMPLES, LENGTH = 3, 70
SETTINGS: dict[str, Any] = {
    "attention_bias": True,
    "attention_chunk_size": 32,
    "floor_scale": 4,
    "no_rope_layers": [1, 0, 1, 0],
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
}

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass
class Recorder:
    """Keeps all that it is told.

    coarse: whether it replaces units.  making_up: whether it asks what shared experts lack then.  lending: what experts borrow, by
    the key of gate and up.
    """

    coarse: bool = False
    making_up: bool = False
    deviations: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    lending: dict[str, Borrowed] = field(default_factory=dict)
    portions: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = field(default_factory=lambda: defaultdict(list))
    routings: dict[int, tuple[torch.Tensor, forward.Routing]] = field(default_factory=dict)
    caches: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    completed: dict[str, tuple[list[torch.Tensor], list[str]]] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)

    def routed(self, layer: int, tokens: torch.Tensor, routing: forward.Routing) -> None:
        assert layer not in self.routings
        self.routings[layer] = tokens, routing

    def lend(self, unit: Unit) -> Borrowed | None:
        assert unit.expert is not None
        assert unit.key.endswith("gate_up_proj")
        return self.lending.get(unit.key)

    def shown(self, unit: Unit, rows: torch.Tensor, tokens: torch.Tensor, weight: float) -> None:
        assert rows.dtype == torch.float32
        assert rows.shape == (len(tokens), unit.matrices[0].shape[1])
        assert 0 < len(tokens) <= layer_pass.PORTION
        self.portions[unit.key].append((tokens.clone(), rows.clone(), weight))
        self.events.append(("shown", unit.key))

    def cached(self, layer: int, keys: torch.Tensor, values: torch.Tensor, sample: int) -> None:
        self.caches[layer, sample] = keys.clone(), values.clone()

    def complete(self, unit: Unit, weights: Sequence[torch.Tensor], digests: Sequence[str]) -> list[torch.Tensor] | None:
        assert unit.key not in self.completed
        self.completed[unit.key] = [weight.clone() for weight in weights], list(digests)
        self.events.append(("complete", unit.key))
        return [make_coarse(weight) for weight in weights] if self.coarse else None

    def became(self, gate_up: Unit, down: Unit) -> Iterator[tuple[int, list[torch.Tensor]]]:
        assert "shared_expert" in gate_up.key and "shared_expert" in down.key
        if self.making_up:
            yield 3, [make_coarse(weight) for unit in (gate_up, down) for weight in self.completed[unit.key][0]]

    def deviated(self, number: int, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        assert number == 3
        self.deviations.append((tokens.clone(), rows.clone()))

    def routed_rows(self, key: str, weight: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, rows) that were shown with this weight, in order of the tokens."""
        parts = [(tokens, rows) for tokens, rows, given in self.portions.get(key, []) if given == weight]
        if not parts:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        tokens = torch.cat([tokens for tokens, _ in parts])
        order = torch.argsort(tokens)
        return tokens[order], torch.cat([rows for _, rows in parts])[order]


@pytest.fixture(scope="module", params=["scout", "maverick"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    write_tiny_model(directory, request.param, seed=4, **SETTINGS)
    return directory


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_pass, "PORTION", 43)


def the_tokens() -> torch.Tensor:
    return torch.randint(0, 256, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(9))


def run(checkpoint: Checkpoint, tokens: torch.Tensor, observer: Recorder, *, sequential: bool = False) -> torch.Tensor:
    config = checkpoint.config
    samples = Samples.of(torch.full((tokens.shape[0],), tokens.shape[1]), tokens.shape[1])
    hidden = torch.empty(tokens.numel(), config.hidden_size)
    embed(checkpoint, tokens.reshape(-1), hidden)
    output, scratch = (
        torch.empty_like(hidden),
        torch.empty(len(hidden), max(config.hidden_size, config.num_heads * config.head_dim)),
    )
    with Team(2) as team:
        for layer in range(config.num_layers):
            parts = [unit for unit in units(config) if unit.layer == layer]
            LayerPass(checkpoint, parts, layer, samples, team, observer, sequential=sequential).run(hidden, output, scratch)
            hidden, output = output, hidden
    return hidden


# ------------------------------------------------------------------------------------------------------------- inputs


@torch.no_grad()
def hooked(model: Any, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Run the model; the first input and the last output of every module, by name, ``[tokens, features]``."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            inputs[name] = arguments[0].flatten(0, -2).clone()
            outputs[name] = (result[-1] if isinstance(result, tuple) else result).flatten(0, -2).clone()

        return keep

    watched = ("_proj", "router", "experts")
    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name.endswith(watched)]
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("sequential", [False, True])
def test_every_unit_is_shown_what_its_module_receives(sequential: bool, source: Path) -> None:
    """In sequence with replacements, that is what modules of the replaced model receive."""
    model = load_reference(source)
    if sequential:
        make_matrices_coarse(model)
    inputs, outputs = hooked(model, the_tokens())
    recorder = Recorder(coarse=True)
    with Checkpoint.open(source) as checkpoint:
        run(checkpoint, the_tokens(), recorder, sequential=sequential)
        config = checkpoint.config
    all_tokens = torch.arange(SAMPLES * LENGTH)
    compared, idle = set(), set()
    for unit in (unit for unit in units(config) if unit.matrices):
        key = unit.key.removeprefix("language_model.")
        tokens, rows = recorder.routed_rows(unit.key)
        if unit.expert is None:
            expected_tokens, expected = all_tokens, inputs[unit.matrices[0].name.removeprefix("language_model.")]
        else:
            base = key[: key.index(".experts.")]
            scored = inputs[f"{base}.experts"].view(config.num_experts, SAMPLES * LENGTH, -1)[unit.expert]
            expected_tokens = (scored != 0).any(1).nonzero()[:, 0]  # the score of all others is 0
            expected = scored[expected_tokens]
            if key.endswith("down_proj"):
                wide = model.get_submodule(f"{base}.experts").gate_up_proj[unit.expert].detach()
                gate, up = (expected @ wide).chunk(2, -1)
                expected = functional.silu(gate) * up
        assert torch.equal(tokens, expected_tokens), unit.key
        if not len(tokens):
            idle.add(unit.key)
            continue
        torch.testing.assert_close(rows, expected, rtol=0, atol=TOLERANCE, msg=lambda text, key=unit.key: f"{key}: {text}")
        compared.add(unit.key)
    assert compared == set(recorder.portions) == set(recorder.completed) - idle
    assert len(idle) < len(compared) / 4
    for layer, (tokens, routing) in recorder.routings.items():
        assert torch.equal(tokens, all_tokens)
        logits = outputs[f"model.layers.{layer}.feed_forward.router"]
        torch.testing.assert_close(routing.logits, logits, rtol=0, atol=TOLERANCE)
        largest, experts = torch.topk(logits, 2)
        assert torch.equal(routing.experts, experts)
        torch.testing.assert_close(routing.scores, largest.sigmoid(), rtol=0, atol=TOLERANCE)
    assert [layer for layer in range(4) if config.moe_layers[layer]] == list(recorder.routings)


@pytest.mark.parametrize("sequential", [False, True])
def test_units_complete_in_order_after_all_was_shown(sequential: bool, source: Path) -> None:
    recorder = Recorder()
    with Checkpoint.open(source) as checkpoint:
        run(checkpoint, the_tokens(), recorder, sequential=sequential)
        expected = [unit.key for unit in units(checkpoint.config) if unit.matrices]
    assert [key for event, key in recorder.events if event == "complete"] == expected
    done = set()
    for event, key in recorder.events:
        assert key not in done
        if event == "complete":
            done.add(key)


def test_an_observer_gets_the_stored_weights_and_their_digests(source: Path) -> None:
    stored = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    recorder = Recorder()
    with Checkpoint.open(source) as checkpoint:
        run(checkpoint, the_tokens(), recorder)
        parts = [unit for unit in units(checkpoint.config) if unit.matrices]
    for unit in parts:
        weights, digests = recorder.completed[unit.key]
        for matrix, weight, digest in zip(unit.matrices, weights, digests, strict=True):
            tensor = stored[matrix.tensor] if matrix.expert is None else stored[matrix.tensor][matrix.expert]
            assert digest == xxhash.xxh3_64_hexdigest(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            if matrix.expert is not None:
                halves = {"gate_proj": slice(0, 256), "up_proj": slice(256, 512), "down_proj": slice(None)}
                tensor = tensor[:, halves[matrix.projection]].t()
            assert torch.equal(weight, tensor)


# ----------------------------------------------------------------------------------------------------------- borrowing


@pytest.mark.parametrize("sequential", [False, True])
def test_borrowed_tokens_are_shown_and_change_nothing(sequential: bool, source: Path) -> None:
    layer, expert, weight = 1, 2, 0.25
    model = load_reference(source)
    inputs, outputs = hooked(model, the_tokens())
    base = f"model.layers.{layer}.feed_forward"
    scores = outputs[f"{base}.router"].sigmoid()[:, expert]
    strangers = (~(torch.topk(outputs[f"{base}.router"], 2).indices == expert).any(1)).nonzero()[:, 0]
    borrowed = strangers[torch.argsort(scores[strangers], descending=True)][:50]  # more than a portion, in no order
    with Checkpoint.open(source) as checkpoint:
        prefix = checkpoint.config.prefix
        keys = [f"{prefix}{base}.experts.{expert}.{projection}" for projection in ("gate_up_proj", "down_proj")]
        lending, alone = Recorder(lending={keys[0]: Borrowed(borrowed, weight)}), Recorder()
        with_borrowed = run(checkpoint, the_tokens(), lending, sequential=sequential)
        without = run(checkpoint, the_tokens(), alone, sequential=sequential)
    assert torch.equal(with_borrowed, without)

    order = torch.sort(borrowed).values
    scored = inputs[f"{base}.router"][order] * scores[order, None]
    gate, up = (scored @ model.get_submodule(f"{base}.experts").gate_up_proj[expert].detach()).chunk(2, -1)
    for key, expected in zip(keys, (scored, functional.silu(gate) * up), strict=True):
        tokens, rows = lending.routed_rows(key, weight)
        assert torch.equal(tokens, order)
        torch.testing.assert_close(rows, expected, rtol=0, atol=TOLERANCE)
    for key in alone.portions:  # all else is shown as it is without
        for one, other in zip(lending.routed_rows(key), alone.routed_rows(key), strict=True):
            assert torch.equal(one, other)
        assert {given for _, _, given in lending.portions[key]} == ({1.0, weight} if key in keys else {1.0})


@pytest.mark.parametrize("sequential", [False, True])
def test_experts_without_tokens_complete_too(sequential: bool, source: Path) -> None:
    """And they may borrow even then."""
    with Checkpoint.open(source) as checkpoint:
        tokens = the_tokens()[:1, :1]  # one token: two experts of a layer work, all others are idle
        experts = [unit for unit in units(checkpoint.config) if unit.expert is not None and len(unit.matrices) == 2]
        lending = Recorder(lending={unit.key: Borrowed(torch.tensor([0]), 0.5) for unit in experts})
        alone = Recorder()
        outputs = [run(checkpoint, tokens, recorder, sequential=sequential) for recorder in (lending, alone)]
        every = {unit.key for unit in units(checkpoint.config) if unit.matrices}
    assert torch.equal(*outputs)
    assert set(alone.completed) == set(lending.completed) == every
    busy = [unit for unit in experts if unit.key in alone.portions]
    assert len(busy) == 2 * len(alone.routings)
    assert all(len(lending.routed_rows(unit.key, 0.5)[0]) == 1 for unit in experts)


# ------------------------------------------------------------------------------------------------------- shared expert


@pytest.mark.parametrize("sequential", [False, True])
def test_what_a_shared_expert_lacks_is_original_less_replacement(sequential: bool, source: Path) -> None:
    """For the inputs that the pass sees; the pass itself stays as it is."""
    model, replaced = load_reference(source), load_reference(source)
    make_matrices_coarse(replaced)
    inputs, _ = hooked(replaced if sequential else model, the_tokens())
    recorder, alone = Recorder(coarse=True, making_up=True), Recorder(coarse=True)
    with Checkpoint.open(source) as checkpoint:
        outputs = [run(checkpoint, the_tokens(), observer, sequential=sequential) for observer in (recorder, alone)]
        layers = [layer for layer in range(4) if checkpoint.config.moe_layers[layer]]
    assert torch.equal(*outputs) and alone.deviations == []
    tokens, rows = (torch.cat(parts) for parts in zip(*recorder.deviations, strict=True))
    assert torch.equal(tokens, torch.arange(SAMPLES * LENGTH).repeat(len(layers)))
    for layer, found in zip(layers, rows.split(SAMPLES * LENGTH), strict=True):
        name = f"model.layers.{layer}.feed_forward.shared_expert"
        seen = inputs[f"{name}.gate_proj"]
        with torch.no_grad():
            expected = model.get_submodule(name)(seen) - replaced.get_submodule(name)(seen)
        assert float(expected.abs().max()) > 1e-2
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


# --------------------------------------------------------------------------------------------------------------- cache


def test_cached_keys_and_values_are_those_of_a_cache(source: Path) -> None:
    recorder = Recorder()
    with Checkpoint.open(source) as checkpoint:
        run(checkpoint, the_tokens(), recorder)
    cache = reference_cache(load_reference(source), the_tokens())
    assert set(recorder.caches) == {(layer, sample) for layer in range(4) for sample in range(SAMPLES)}
    for (layer, sample), (keys, values) in recorder.caches.items():
        for ours, theirs in ((keys, cache.layers[layer].keys), (values, cache.layers[layer].values)):
            expected = theirs[sample].transpose(0, 1)  # [length, heads, head_dim]
            assert expected.shape == (LENGTH, 2, 32)
            torch.testing.assert_close(ours.view(expected.shape), expected, rtol=0, atol=TOLERANCE)
