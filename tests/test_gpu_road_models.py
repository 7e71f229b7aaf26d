"""The road through a GPU, on simulated devices: whole models, their answers, and an evaluation from beginning to end.

Triton decides at its import whether it interprets, so all this runs in a process of its own: this file, run as a program.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from simulated_device import simulate
from triton_programs import interpreted_by, main, needs_triton

from quantkit.calibration import CalibrationOptions
from quantkit.errors import CalibrationError, RecipeError

MODELS = {"scout": "w4a16-rtn", "maverick": "fp8-dynamic", "text": "nvfp4a16"}  # and the target that runs; the last has no kernel
SMALLER = {"scout": {}, "maverick": {"num_hidden_layers": 2}, "text": {"num_hidden_layers": 1}}
# Of the largest logit: inputs of products are BF16, and where that tips the rounding of one to FP8 it moves by a sixteenth.
EXACT, ROUNDED = 0.02, 0.1
LENGTHS = (7, 5)
QUESTIONS = (
    {"id": "one", "kind": "contains", "prompt": "The history", "answer": "city", "max_tokens": 2},
    {"id": "two", "kind": "contains", "prompt": "def", "answer": "main", "max_tokens": 1},
    {"id": "three", "kind": "choice", "prompt": "a b", "choices": ["c", "de"], "answer": "c"},
)


# ------------------------------------------------------------------------------------------------- in the other process


def run(path: Path, device: torch.device | None, kept: int | None = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two texts, and where their tokens went.  kept: bytes of the model that stay on the device."""
    from quantkit.inference import Inference
    from quantkit.layer_pass import Samples
    from quantkit.stored_model import open_model
    from quantkit.team import Team

    samples = Samples.of(torch.tensor(LENGTHS), max(LENGTHS))
    tokens = torch.randint(4, 200, (samples.count * samples.length,), generator=torch.Generator().manual_seed(2))
    with open_model(path) as model, Team(2) as team:
        inference = Inference(model, team, device=device, kept_bytes=kept)
        hidden = inference.embed(tokens)
        routes = []
        for number in range(inference.config.num_layers):
            routing = inference.layer(number, hidden, samples)
            if routing is not None:
                routes.append(routing.experts.cpu())
        hidden = hidden[samples.tokens]
        logits = inference.logits(hidden, hidden.new_empty(len(hidden), inference.config.vocab_size))
        return logits.cpu(), torch.stack(routes)


def models(directory: Path) -> dict[str, Any]:
    """By model: deviation of logits, whether tokens go where they go on the CPU, memory; whether keeping weights changes bits."""
    from simulated_kernels import simulate_with_kernels

    from quantkit import convert
    from tests.tiny_models import write_tiny_model

    found = {}
    for kind, target in MODELS.items():
        write_tiny_model(directory / kind, kind, num_local_experts=2, **SMALLER[kind])
        [artifact] = convert(directory / kind, target, directory / f"{kind}-out").artifacts
        logits, routes = run(artifact.directory, None)
        with simulate_with_kernels(2) as simulation:
            there, routed = run(artifact.directory, torch.device("cuda"))
            again = there
            if kind == "scout":
                again, _ = run(artifact.directory, torch.device("cuda:1"), kept=None)
            found[kind] = {
                "deviation": float((there - logits).abs().max() / logits.abs().max()),
                "routed": torch.equal(routes, routed),
                "left": simulation.used,
                "most": simulation.most,
                "same": torch.equal(there, again),
            }
    return found


def answers(directory: Path) -> dict[str, Any]:
    """Tokens that follow two prompts, one of which ends before the other, and log likelihoods: of the CPU and of a device."""
    from simulated_kernels import simulate_with_kernels

    from quantkit.encoder import Continuation, Encoder
    from quantkit.generation import Prompt, generate
    from quantkit.golden import keeping_inference
    from quantkit.likelihood import log_likelihoods
    from quantkit.stored_model import open_model
    from quantkit.team import Team

    prompts = [Prompt((1, 17, 30, 5), 3), Prompt((1, 40), 1)]
    continuations = [Continuation((1, 20, 21), (22,)), Continuation((1, 9), (8, 7))]

    def asked(device: torch.device | None) -> tuple[list[list[int]], list[float]]:
        with open_model(directory / "scout") as model, Team(1) as team:
            inference = keeping_inference(model, team, device, None, True)
            generated = generate(inference, prompts, Encoder.load(directory / "scout").tokenizer, frozenset())
            scores = log_likelihoods(inference, continuations)
        return [list(answer.tokens) for answer in generated.answers], [score.value for score in scores]

    expected = asked(None)
    with simulate_with_kernels() as simulation:
        there, left = asked(torch.device("cuda")), list(simulation.used)
    waits: list[int] = []  # so far, when a token came
    with simulate_with_kernels() as simulation, open_model(directory / "scout") as model, Team(1) as team:
        inference = keeping_inference(model, team, torch.device("cuda"), None, True)
        together = [Prompt((1, 17, 30, 5), 4), Prompt((1, 40), 4)]
        tokenizer = Encoder.load(directory / "scout").tokenizer
        generate(inference, together, tokenizer, frozenset(), progress=lambda *_: waits.append(len(simulation.waits)))
        steps = [simulation.waits[waits[place] : waits[place + 2]] for place in (0, 2, 4)]
    return {"expected": expected, "found": there, "left": left, "steps": steps}


def evaluated(directory: Path) -> dict[str, Any]:
    """``evaluate`` with and without a device: figures, answers to golden questions, what the environment says."""
    from simulated_kernels import simulate_with_kernels

    from quantkit import convert
    from quantkit.evaluate import evaluate
    from tests.gguf_models import write_source

    source = write_source(directory / "source", "maverick", 3, num_local_experts=2, use_qk_norm=False, num_hidden_layers=2)
    [artifact] = convert(source, "w4a16-rtn", directory / "out").artifacts
    golden = directory / "golden.jsonl"
    golden.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))

    def figures(device: str) -> dict[str, Any]:
        cache = directory / f"cache-{device}"
        settings: dict[str, Any] = {"window": 12, "windows": 2, "workers": 2, "resamples": 5, "golden": golden}
        result = evaluate(artifact.directory, source, cache=cache, device=device, **settings)
        [one] = result.artifacts
        return {
            "perplexity": one.scores.perplexity.value,
            "divergence": one.scores.divergence.value,
            "agreement": one.scores.agreement.value,
            "routers": [share for share in one.router_agreement if share is not None],
            "answers": [[answer for _, _, answer in given.answers] for given in result.golden],
            "device": result.environment["device"],
        }

    expected = figures("cpu")
    with simulate_with_kernels(memory=1 << 18) as simulation:
        try:
            figures("cuda")
        except CalibrationError as error:
            small, left = str(error), simulation.used
    with simulate_with_kernels() as simulation:
        there = figures("cuda")
        return {"expected": expected, "found": there, "left": [*left, *simulation.used], "small": small}


def interpret() -> dict[str, Any]:
    """Everything, in one process."""
    import triton_arithmetic

    torch.set_num_threads(1)
    triton_arithmetic.make_exact()
    with TemporaryDirectory() as name:
        directory = Path(name)
        return {"models": models(directory), "answers": answers(directory), "evaluated": evaluated(directory)}


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpreted_by(__file__)  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_on_a_device(found: dict[str, Any], kind: str) -> None:
    result = found["models"][kind]
    assert 0 < result["deviation"] < (ROUNDED if MODELS[kind] == "fp8-dynamic" else EXACT)
    assert result["routed"] and result["same"]
    assert result["left"] == [0, 0], "what is on the device goes with the model"
    assert (result["most"][1] > 0) == (kind == "scout"), "nothing is on a device that was not asked for"


@needs_triton
def test_answers_on_a_device(found: dict[str, Any]) -> None:
    (tokens, scores), (found_tokens, found_scores) = found["answers"]["expected"], found["answers"]["found"]
    assert found_tokens == tokens and [len(answer) for answer in tokens] == [3, 1]
    assert found_scores == pytest.approx(scores, abs=0.05)
    assert found["answers"]["left"] == [0]


@needs_triton
def test_a_step_waits_for_its_tokens_alone(found: dict[str, Any]) -> None:
    """Small tensors go to the device while it has nothing to do, at the beginning; at the end the next tokens come back."""
    there = ["copy of (2,) from cpu to cuda:0", "copy of (2, 2) from cpu to cuda:0"]
    assert found["answers"]["steps"] == [[*there, "tolist"]] * 3


@needs_triton
def test_an_evaluation_on_a_device(found: dict[str, Any]) -> None:
    expected, there = found["evaluated"]["expected"], found["evaluated"]["found"]
    assert there["device"] == "Simulated GPU" and expected["device"] == "cpu"
    assert there["perplexity"] == pytest.approx(expected["perplexity"], rel=0.02)
    assert there["divergence"] == pytest.approx(expected["divergence"], rel=0.3)
    assert there["agreement"] == pytest.approx(expected["agreement"], abs=0.2)
    assert len(there["routers"]) == 1 and there["routers"] == pytest.approx(expected["routers"], abs=0.2)
    assert there["answers"] == expected["answers"]
    assert found["evaluated"]["left"] == [0, 0]
    assert "cuda:0 has too little memory (CUDA out of memory" in found["evaluated"]["small"]


def test_a_device_has_its_number() -> None:
    """The current device is a thread's own; what is computed on one is not looked for on another."""
    with simulate(2):
        assert CalibrationOptions(device="cuda").accelerator() == torch.device("cuda:0")
        assert CalibrationOptions(device="cuda:1").accelerator() == torch.device("cuda:1")
        with torch.cuda.device(1):
            assert CalibrationOptions(device="cuda").accelerator() == torch.device("cuda:1")
        assert CalibrationOptions(device="cpu").accelerator() is None


@pytest.mark.parametrize(
    ("device", "count", "says"),
    [
        ("cuda", 0, "there is no device 'cuda' here: expected cpu, or a GPU, and torch sees no CUDA GPU. "),
        ("cuda:1", 1, "torch sees cuda:0."),
        ("cuda:2", 2, "torch sees cuda:0 to cuda:1."),
        ("mps", 1, "there is no device 'mps' here"),
        ("gpu", 1, "expected cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_one_clear_error(device: str, count: int, says: str) -> None:
    with simulate(count), pytest.raises(CalibrationError) as raised:
        CalibrationOptions(device=device).accelerator()
    assert says in str(raised.value)


def test_missing_triton_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.evaluate import evaluate

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "quantkit.kernels.moe_triton", raising=False)
    monkeypatch.delattr("quantkit.kernels.moe_triton", raising=False)
    with simulate(), pytest.raises(RecipeError, match=r"need Triton .*pip install 'quantkit\[cuda\]'"):
        evaluate(tmp_path / "no artifact", tmp_path / "no reference", device="cuda")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main({"interpret": interpret})
