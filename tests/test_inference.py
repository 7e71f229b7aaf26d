"""Stored models at work: against the whole-model arithmetic that is itself compared with transformers, in every format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit import convert, forward
from quantkit import inference as inference_module
from quantkit.checkpoint import Checkpoint
from quantkit.errors import ArtifactError
from quantkit.inference import Inference, KeyValueCache
from quantkit.language_model import logits as reference_logits
from quantkit.layer_pass import Samples
from quantkit.stored_model import open_model
from quantkit.team import Team
from tests.tiny_models import write_tiny_model

DEMO = Path(__file__).resolve().parent.parent / "demo/tiny-scout"


def run(inference: Inference, tokens: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
    """Logits ``[samples, length, vocabulary]``."""
    count, length = tokens.shape
    samples = Samples.of(torch.full((count,), length), length)
    hidden = inference.embed(tokens.reshape(-1))
    for number in range(inference.config.num_layers):
        inference.layer(number, hidden, samples, cache)
    if cache is not None:
        cache.advance(samples)
    return inference.logits(hidden, torch.empty(count * length, inference.config.vocab_size)).view(count, length, -1)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 2000, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artifacts")
    convert(DEMO, ["w4a16-rtn", "packed-int4", "F32", "BF16"], output)
    return output


def test_checkpoint_gives_the_reference_logits(tokens: torch.Tensor) -> None:
    with Checkpoint.open(DEMO) as checkpoint:
        expected = reference_logits(checkpoint, tokens, threads=1)
    with open_model(DEMO) as model, Team(2) as team:
        found = run(Inference(model, team), tokens)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_exact_gguf_files_give_the_same_logits(tokens: torch.Tensor, artifacts: Path) -> None:
    with open_model(DEMO) as model, Team(1) as team:
        expected = run(Inference(model, team), tokens)
    for name in ("F32", "BF16"):
        with open_model(artifacts / name) as model, Team(1) as team:
            assert model.format == "gguf"
            assert (run(Inference(model, team), tokens) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_packed_artifacts_give_the_logits_of_the_same_numbers_elsewhere(tokens: torch.Tensor, artifacts: Path) -> None:
    found = {}
    for name in ("w4a16-rtn", "packed-int4"):
        with open_model(artifacts / name) as model, Team(1) as team:
            found[model.format] = run(Inference(model, team), tokens)
    assert torch.equal(found["packed"], found["compressed-tensors"])


def test_texts_are_continued_as_if_given_at_once(tokens: torch.Tensor, artifacts: Path) -> None:
    with open_model(artifacts / "w4a16-rtn") as model, Team(1) as team:
        inference = Inference(model, team)
        expected = run(inference, tokens)
        cache = KeyValueCache([0] * len(tokens))
        parts = [run(inference, part, cache) for part in tokens.split([17, 1, 1, 21], 1)]
        assert (torch.cat(parts, 1) - expected).abs().max() < 2e-5 * expected.abs().max()
        assert cache.lengths == [40, 40, 40]


def test_a_token_beyond_the_vocabulary_is_an_error() -> None:
    with open_model(DEMO) as model, Team(1) as team, pytest.raises(ArtifactError, match="has no token 5000"):
        Inference(model, team).embed(torch.tensor([3, 5000]))


@pytest.mark.parametrize("attended", [1, 1 << 20])
@pytest.mark.parametrize("layer", [0, 1])
def test_long_windows_are_attended_to_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int, attended: int) -> None:
    """The same bits: by chunks where the layer has them, else by heads; all threads at once, or one at a time."""
    write_tiny_model(tmp_path, num_attention_heads=6, attention_chunk_size=8, floor_scale=4, no_rope_layers=[1, 0])
    torch.manual_seed(0)
    with open_model(tmp_path) as model, Team(3) as team:
        inference, config = Inference(model, team), model.config
        heads = (config.num_heads, config.num_key_value_heads, config.num_key_value_heads)
        query, key, value = (torch.randn(2 * 21, count * config.head_dim) for count in heads)
        samples = [slice(0, 21), slice(21, 42)]
        expected = torch.cat([forward.attend(config, layer, query[part], key[part], value[part]) for part in samples])
        monkeypatch.setattr(inference_module, "PORTION", 80)
        monkeypatch.setattr(inference_module, "ATTENDED", attended)
        found = inference._gather(layer, [(0, 21), (21, 21)], query.clone(), key, value)
    assert torch.equal(found, expected)
