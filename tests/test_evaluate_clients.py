"""Evaluations against what clients compute: transformers and llama.cpp run the same windows, and loops turn logits into figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4ForConditionalGeneration

from quantkit.convert import convert
from quantkit.evaluate import evaluate
from quantkit.windows import Convention, Windows, load_windows
from tests.evaluation_models import COUNT, WINDOW, Made, make_maverick, make_scout, small
from tests.gguf_models import DEMO, text_file, write_source
from tests.llama_cpp import Llama
from tests.reference_model import reference_logits

Logits = Callable[[list[int]], torch.Tensor]  # of one window, float32 [length, vocabulary]
COMPRESSED = ("w4a16-rtn", "fp8-dynamic", "w8a8-rtn")
GGUF = ("F32", "Q8_0", "Q4_K_M")

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {
        "scout": make_scout(tmp_path_factory.mktemp("scout"), (*COMPRESSED, *GGUF)),
        "maverick": make_maverick(tmp_path_factory.mktemp("maverick"), COMPRESSED),
        "maverick of llama.cpp": make_maverick(tmp_path_factory.mktemp("maverick"), GGUF[:2], 128),
    }


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------------------------------- the oracle


@dataclass(frozen=True)
class Figures:
    perplexity: float
    ratio: float
    divergence: float
    agreement: float
    shift: float


def figures(windows: Windows, reference: Logits, artifact: Logits) -> Figures:
    """Position by position, from logits in float64."""
    losses, apart, divergences, agreements, shifts = [], [], [], [], []
    for tokens, length in zip(windows.tokens.tolist(), windows.lengths, strict=True):
        ours, theirs = (run(tokens[:length]).double().log_softmax(-1) for run in (reference, artifact))
        for position in range(windows.first, length - 1):
            right = tokens[position + 1]
            p, q = ours[position], theirs[position]
            losses.append(-float(q[right]))
            apart.append(float(p[right] - q[right]))
            divergences.append(float((p.exp() * (p - q)).sum()))
            agreements.append(float(p.argmax() == q.argmax()))
            shifts.append(float(q[right].exp() - p[right].exp()))
    count = len(losses)
    mean = [math.fsum(values) / count for values in (losses, apart, divergences, agreements, shifts)]
    return Figures(math.exp(mean[0]), math.exp(mean[1]), *mean[2:])


def load(path: Path) -> Any:
    """The whole model: of quantized ones it is that which expands the weights when it first runs."""
    model: Any = Llama4ForConditionalGeneration.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def by_transformers(path: Path) -> Logits:
    """Inside a mixture of experts inputs have two dimensions, and there compressed-tensors rounds all tokens with one scale, so
    that a token's result depends on its neighbours.  Serving engines have a scale for each token, as the scheme says; so has the
    library where inputs have three dimensions, which they are given here."""
    model = load(path)

    def deepen(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        module.flat = inputs[0].dim() == 2
        return (inputs[0][None] if module.flat else inputs[0], *inputs[1:])

    def flatten(module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output[0] if module.flat else output

    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.register_forward_pre_hook(deepen)
            module.register_forward_hook(flatten)
    return lambda tokens: reference_logits(model, torch.tensor([tokens]))[0]


@pytest.mark.parametrize("model", ["scout", "maverick"])
def test_compressed_tensors_artifacts_are_what_transformers_makes_of_them(model: str, made: dict[str, Made], cache: Path) -> None:
    windows = load_windows(None, DEMO, window=WINDOW, windows=COUNT)
    found = small(made[model], COMPRESSED, cache)
    assert found.windows == COUNT and found.text["digest"] == windows.digest
    reference = by_transformers(made[model].source)
    for name, artifact in zip(COMPRESSED, found.artifacts, strict=True):
        expected = figures(windows, reference, by_transformers(made[model].artifact(name)))
        scores = artifact.scores
        assert scores.positions == COUNT * (WINDOW - 1)
        assert scores.perplexity.value == pytest.approx(expected.perplexity, rel=1e-3), name
        assert scores.ratio.value == pytest.approx(expected.ratio, rel=1e-3), name
        # Where activations are rounded, sums in another order round a few of them the other way, and a few tokens to other experts.
        tolerance = 2e-2 if name == "w4a16-rtn" else 0.2
        assert scores.divergence.value == pytest.approx(expected.divergence, rel=tolerance, abs=1e-5), name
        assert scores.agreement.value == pytest.approx(expected.agreement, abs=1e-2), name
        assert scores.probability_shift.value == pytest.approx(expected.shift, abs=1e-4), name
        assert artifact.format == "compressed-tensors" and len(artifact.fallbacks) == 0


@pytest.mark.parametrize("convention", ["full", "llama.cpp"])
@pytest.mark.parametrize("model", ["scout", "maverick of llama.cpp"])
def test_gguf_files_are_what_llama_cpp_makes_of_them(
    model: str, convention: Convention, made: dict[str, Made], cache: Path
) -> None:
    """It rounds what it multiplies with quantized weights to 8 bits, and nothing with weights in F32."""
    windows = load_windows(None, DEMO, window=WINDOW, windows=COUNT, convention=convention)
    names = [name for name in GGUF if made[model].artifact(name).exists()]
    found = small(made[model], names, cache, convention=convention)
    reference = by_transformers(made[model].source)
    for name, artifact in zip(names, found.artifacts, strict=True):
        llama = Llama(text_file(made[model].artifact(name)), threads=1)
        expected = figures(windows, reference, llama.logits)
        llama.close()
        scores = artifact.scores
        assert scores.positions == COUNT * (WINDOW - 1 if convention == "full" else WINDOW // 2 - 1)
        tolerance = 1e-5 if name == "F32" else 1e-2
        assert scores.perplexity.value == pytest.approx(expected.perplexity, rel=tolerance), name
        assert scores.ratio.value == pytest.approx(expected.ratio, rel=tolerance), name
        assert scores.divergence.value == pytest.approx(expected.divergence, rel=0.3, abs=1e-6 if name == "F32" else 6e-3), name


@pytest.mark.parametrize("artifact", ["itself", "w4a16-rtn"])
def test_windows_longer_than_the_attention_chunk(artifact: str, tmp_path: Path, cache: Path) -> None:
    source = write_source(tmp_path / "source", "scout", 5, attention_chunk_size=16, floor_scale=16, max_position_embeddings=512)
    [converted] = convert(source, ["w4a16-rtn"], tmp_path).artifacts
    path = source if artifact == "itself" else converted.directory
    windows = load_windows(None, DEMO, window=75, windows=3)
    found = evaluate([path], source, window=75, windows=3, workers=1, cache=cache, resamples=0)
    expected = figures(windows, by_transformers(source), by_transformers(path))
    assert found.artifacts[0].scores.perplexity.value == pytest.approx(expected.perplexity, rel=1e-4)
    assert found.artifacts[0].scores.divergence.value == pytest.approx(expected.divergence, rel=1e-2, abs=1e-7)


def test_routes_are_compared_layer_by_layer(made: dict[str, Made], cache: Path) -> None:
    """Against the routers' inputs of transformers: hooks see where each token goes."""
    [one] = small(made["scout"], ["w4a16-rtn"], cache).artifacts
    windows = load_windows(None, DEMO, window=WINDOW, windows=COUNT)
    routes = []
    for path in (DEMO, made["scout"].artifact("w4a16-rtn")):
        model = load(path)
        seen: list[torch.Tensor] = []

        def see(_module: Any, _inputs: Any, output: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append(output[1].argmax(-1))

        for name, module in model.named_modules():
            if name.endswith("router"):
                module.register_forward_hook(see)
        for tokens in windows.tokens:
            reference_logits(model, tokens[None])
        routes.append(torch.stack(seen).view(COUNT, 4, WINDOW))
    expected = (routes[0] == routes[1]).double().mean((0, 2))
    assert one.router_agreement == pytest.approx(expected.tolist(), abs=3 / (COUNT * WINDOW))
    assert any(share is not None and share < 1 for share in one.router_agreement)
