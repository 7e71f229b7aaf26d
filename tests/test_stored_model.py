"""Stored models: what is opened from which path, sizes beside the files' own, values beside decoders of others, wrong files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize as gguf_dequantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit import ArtifactError, CheckpointError, UnsupportedModelError, convert
from quantkit.grid import QuantizedTensor, dequantize
from quantkit.stored_model import StoredModel, open_model

DEMO = Path(__file__).resolve().parent.parent / "demo/tiny-scout"
TARGETS = {"w4a16-rtn": "compressed-tensors", "packed-int4": "packed", "Q4_K_M": "gguf"}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artifacts")
    convert(DEMO, list(TARGETS), output)
    return output


def values(model: StoredModel, name: str) -> torch.Tensor:
    """The stored values of a matrix, by its name without prefix."""
    [matrix] = [matrix for unit in model.units for matrix in unit.matrices if matrix.name.endswith(name)]
    weight = model.read(matrix)
    return dequantize(weight) if isinstance(weight, QuantizedTensor) else weight.to(torch.float32)


def table(model: StoredModel, name: str) -> torch.Tensor:
    parts = [(first, rows.clone()) for first, rows in model.rows(f"{model.config.prefix}{name}", 300)]
    assert [first for first, _ in parts] == list(range(0, model.config.vocab_size, 300))
    return torch.cat([rows for _, rows in parts])


def test_a_checkpoint_is_read_as_it_is() -> None:
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(DEMO.glob("*.safetensors")):
        stored |= load_file(path)
    with open_model(DEMO) as model:
        assert (model.format, model.name) == ("unquantized", "tiny-scout")
        text = {name: tensor for name, tensor in stored.items() if name.startswith("language_model.")}
        assert model.parameters == sum(tensor.numel() for tensor in text.values())
        assert model.bytes == sum(tensor.nbytes for tensor in text.values())
        fused = stored["language_model.model.layers.1.feed_forward.experts.gate_up_proj"]
        assert torch.equal(values(model, "layers.1.feed_forward.experts.5.up_proj"), fused[5, :, 256:].t().float())
        assert torch.equal(table(model, "lm_head.weight"), stored["language_model.lm_head.weight"].float())
        assert torch.equal(model.vector("language_model.model.norm.weight"), stored["language_model.model.norm.weight"].float())


@pytest.mark.parametrize("target", TARGETS)
def test_artifacts_tell_their_format_and_size(artifacts: Path, target: str) -> None:
    with open_model(artifacts / target) as model, open_model(DEMO) as source:
        assert (model.format, model.name) == (TARGETS[target], target)
        assert model.parameters == source.parameters and model.config.vision is None
        sizes = model.stored_bytes()
        assert set(sizes) == set(model.schemes) and sum(sizes.values()) == model.bytes
        prefix = "language_model."  # which GGUF files do not know
        assert {name.removeprefix(prefix) for name in sizes} == {name.removeprefix(prefix) for name in source.stored_bytes()}
        assert 0.2 < model.bytes / source.bytes < 0.5


def test_sizes_of_safetensors_are_those_of_its_tensors(artifacts: Path) -> None:
    total = 0
    for path in (artifacts / "w4a16-rtn").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys() if name.startswith("language_model."))  # noqa: SIM118
    with open_model(artifacts / "w4a16-rtn") as model:
        assert model.bytes == total


def test_values_of_gguf_are_those_of_its_own_package(artifacts: Path) -> None:
    [path] = [path for path in (artifacts / "Q4_K_M").glob("*.gguf") if not path.name.startswith("mmproj")]
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    with open_model(path) as model:
        assert model.name == path.stem
        down = stored["blk.2.ffn_down_exps.weight"]
        expected = torch.from_numpy(gguf_dequantize(down.data[7], down.tensor_type))
        assert torch.equal(values(model, "layers.2.feed_forward.experts.7.down_proj"), expected)
        embedding = stored["token_embd.weight"]
        assert torch.equal(
            table(model, "model.embed_tokens.weight"), torch.from_numpy(gguf_dequantize(embedding.data, embedding.tensor_type))
        )
        total = sum(tensor.n_bytes for name, tensor in stored.items() if name != "rope_freqs.weight")
        assert model.bytes == total


def test_frequencies_are_those_of_the_source(artifacts: Path) -> None:
    with open_model(artifacts / "Q4_K_M") as model, open_model(DEMO) as source:
        assert (model.frequencies - source.frequencies).abs().max() < 1e-7 * source.frequencies.max()


def test_what_is_no_model_is_told(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no directory"):
        open_model(tmp_path / "nothing")
    [vision] = (artifacts / "Q4_K_M").glob("mmproj*.gguf")
    with pytest.raises(ArtifactError, match="no Llama 4 text model"):
        open_model(vision)
    text = tmp_path / "notes.txt"
    text.write_text("nothing")
    with pytest.raises((CheckpointError, UnsupportedModelError), match=r"notes\.txt"):
        open_model(text)


def test_an_artifact_that_lacks_a_tensor_is_told(artifacts: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(artifacts / "w4a16-rtn", tmp_path / "damaged")
    [path] = damaged.glob("*.safetensors")
    tensors = load_file(path)
    name = "language_model.model.layers.0.feed_forward.experts.3.up_proj.weight_scale"
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=r"experts\.3\.up_proj\.weight_scale is missing"):
        open_model(damaged)
