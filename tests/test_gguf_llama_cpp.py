"""GGUF files in llama.cpp: what it computes from them, compared with transformers.

Files in F32 show that names, shapes, rotary factors and keys are right: nothing is rounded, so logits agree but for the order of
sums.  Of each quantized type two things are checked.  llama.cpp's own decoder must find exactly the values that ours finds, in
every tensor of the file; that is the sharp test of the bytes.  And its logits must be those of transformers with these values, as
far as llama.cpp's own rounding lets them: it rounds what it multiplies with quantized weights to 8 bits (that with F16 and BF16
weights to these types), which no file can change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer

import quantkit
from quantkit.calibration import CalibrationOptions
from quantkit.convert import convert
from quantkit.ggml import TYPES
from tests.gguf_models import DEMO, MAVERICK, SMOOTHED, load_values, pure, stored_tensors, stored_values, text_file, write_source
from tests.llama_cpp import Llama, ggml_dequantize
from tests.reference_model import load_reference, reference_logits

WINDOW = 200
QUANTIZED = [name for name, kind in TYPES.items() if not kind.floating]
NEEDS_IMPORTANCE = {name for name in QUANTIZED if name.startswith(("IQ1", "IQ2", "IQ3"))}
TEXT = (Path(__file__).parent.parent / "LICENSE").read_text()

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def random_window(seed: int = 0) -> list[int]:
    return torch.randint(0, 2000, (WINDOW,), generator=torch.Generator().manual_seed(seed)).tolist()


def their_logits(path: Path, tokens: list[int]) -> torch.Tensor:
    model = Llama(path)
    logits = model.logits(tokens)
    model.close()
    return logits


# ----------------------------------------------------------------------------------------------------------- nothing rounded

SOURCES: dict[str, dict[str, Any]] = {
    "scout": {"kind": "scout"},
    "maverick": {"kind": "maverick", **MAVERICK},
    "text only": {"kind": "text"},
    "tied": {"kind": "text", "tie_word_embeddings": True},
    "smoothed": {"kind": "scout", "rope_scaling": SMOOTHED},
    "unscaled": {"kind": "scout", "rope_scaling": None},
    "two experts a token": {"kind": "scout", "num_experts_per_tok": 2},
    "one expert": {"kind": "scout", "num_local_experts": 1},
    "every second layer": {"kind": "scout", "interleave_moe_layer_step": 2, "num_hidden_layers": 5},
}


@pytest.mark.parametrize("name", SOURCES)
def test_logits_of_a_file_in_float32_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Without any rounding they differ by what the order of sums leaves, for random weights and tokens."""
    source = write_source(tmp_path / "source", seed=3, **SOURCES[name])
    [made] = convert(source, "F32", tmp_path).artifacts
    tokens = random_window()
    expected = reference_logits(load_reference(source), torch.tensor([tokens]))[0]
    found = their_logits(text_file(made.directory), tokens)
    spread = float(expected.std())  # 1, of tied embeddings 16
    assert spread > 0.5
    assert float((found - expected).abs().max()) <= 2e-5 * spread


@pytest.fixture(scope="module")
def demo_float(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in F32."""
    [made] = convert(DEMO, "F32", tmp_path_factory.mktemp("float")).artifacts
    return made.directory


@pytest.fixture(scope="module")
def demo_tokens(demo_float: Path) -> list[int]:
    """Some text as tokens of the demo, by llama.cpp's tokenizer."""
    model = Llama(text_file(demo_float), vocab_only=True)
    tokens = model.tokenize(TEXT, add_special=True)[: WINDOW + 56]
    model.close()
    return tokens


def test_logits_of_the_demo_in_float32_are_those_of_transformers(demo_float: Path, demo_tokens: list[int]) -> None:
    expected = reference_logits(load_reference(DEMO), torch.tensor([demo_tokens]))[0]
    found = their_logits(text_file(demo_float), demo_tokens)
    assert float((found - expected).abs().max()) <= 1e-4


# ------------------------------------------------------------------------------------------------------------ quantized types


@dataclass(frozen=True)
class Single:
    """A model with a single expert, so that no rounding can send a token elsewhere, and what calibration saw of it."""

    source: Path
    statistics: CalibrationOptions


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Single:
    directory = tmp_path_factory.mktemp("single")
    source = write_source(directory / "source", seed=5, num_local_experts=1)
    quantkit.calibrate(source, directory / "statistics", calibration=CalibrationOptions(samples=2, sequence_length=64))
    return Single(source, CalibrationOptions(statistics=directory / "statistics"))


def relative_distances(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each token's logits, relative to how large they are."""
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_llama_cpp_finds_the_values_of_every_type(kind: str, single: Single, tmp_path: Path) -> None:
    """Its decoder exactly, its logits within what activations of 8 bits leave.

    That is 0.012 to 0.022 on average and 0.035 at worst over four layers, more where 256 activations share a scale than where 32
    do; what the types themselves cost is 0.014 (Q8_0) to 1.
    """
    method = "importance" if kind in NEEDS_IMPORTANCE else "rtn"
    [made] = convert(single.source, pure(kind, method), tmp_path, calibration=single.statistics).artifacts
    path = text_file(made.directory)
    values = stored_values(path)
    quantized = 0
    for name, (stored, data, shape) in stored_tensors(path).items():
        if stored != "F32":
            assert stored == kind
            theirs = torch.from_numpy(ggml_dequantize(stored, data, shape[-1])).reshape(shape)
            assert torch.equal(values[name], theirs), name
            quantized += 1
    assert quantized == 2 + 4 * (4 + 3 + 3)
    model, tokens = load_reference(single.source), random_window()
    load_values(model, values)
    distances = relative_distances(their_logits(path, tokens), reference_logits(model, torch.tensor([tokens]))[0])
    assert float(distances.mean()) <= 0.03
    assert float(distances.max()) <= 0.05


@pytest.mark.parametrize(("kind", "bound"), [("F16", 1e-3), ("BF16", 1e-2)])
def test_floats_of_16_bits_are_the_source(kind: str, bound: float, single: Single, tmp_path: Path) -> None:
    """BF16 exactly; F16 but for numbers that are tiny there.  llama.cpp rounds activations to the same type."""
    [made] = convert(single.source, kind, tmp_path).artifacts
    model, tokens = load_reference(single.source), random_window()
    source = {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}
    expected = reference_logits(model, torch.tensor([tokens]))[0]
    load_values(model, stored_values(text_file(made.directory)))
    nearest = 0.0 if kind == "BF16" else 2.0**-25
    assert all(float((value - source[name]).abs().max()) <= nearest for name, value in model.state_dict().items())
    assert float(relative_distances(their_logits(text_file(made.directory), tokens), expected).max()) <= bound


@pytest.mark.parametrize(
    ("name", "bound"), [("Q8_0", 0.006), ("Q6_K", 0.02), ("Q4_K_M", 0.04), ("QK4_MOE", 0.02), ("IQ4_XS", 0.06), ("Q3_K_M", 0.09)]
)
def test_what_a_file_type_costs_the_demo_is_as_little_as_it_should(
    name: str, bound: float, demo_tokens: list[int], tmp_path: Path
) -> None:
    """Mean divergence of llama.cpp's predictions from those of transformers with the weights of the source, in nats."""
    [made] = convert(DEMO, name, tmp_path).artifacts
    expected = reference_logits(load_reference(DEMO), torch.tensor([demo_tokens]))[0].double().log_softmax(-1)
    found = their_logits(text_file(made.directory), demo_tokens).double().log_softmax(-1)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert divergence <= bound


# ------------------------------------------------------------------------------------------------------------ files and text


def test_a_split_model_loads_by_its_first_file_and_computes_the_same(
    demo_float: Path, demo_tokens: list[int], tmp_path: Path
) -> None:
    [made] = convert(DEMO, "F32", tmp_path, max_shard_bytes=9_000_000).artifacts
    parts = sorted(path for path in made.directory.glob("*.gguf") if not path.name.startswith("mmproj-"))
    assert len(parts) > 4
    assert [path.name for path in parts] == [
        f"tiny-scout-F32-{number:05d}-of-{len(parts):05d}.gguf" for number in range(1, len(parts) + 1)
    ]
    assert all(path.stat().st_size <= 9_000_000 for path in parts)
    assert torch.equal(their_logits(parts[0], demo_tokens), their_logits(text_file(demo_float), demo_tokens))
    with pytest.raises(RuntimeError):
        Llama(parts[1])
    names = [set(stored_tensors(path)) for path in parts]
    assert sum(map(len, names)) == len(set.union(*names)) == len(stored_tensors(text_file(demo_float)))
    for number, path in enumerate(parts):
        fields = GGUFReader(path).fields
        assert fields["split.no"].contents() == number
        assert fields["split.count"].contents() == len(parts)
        assert fields["split.tensors.count"].contents() == len(set.union(*names))
        assert ("general.architecture" in fields) == (number == 0)


def test_text_template_and_ends_of_generation_arrive(demo_float: Path) -> None:
    model = Llama(text_file(demo_float), vocab_only=True)
    assert model.chat_template() == (DEMO / "chat_template.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    for sample in (
        TEXT[:3000],
        "<|header_start|>user<|header_end|>\n\nÜber 12345 Dinge, 東京, 🙂\r\n\t x  y<|eot|>",
        " it's\n\n I'LL",
    ):
        tokens = tokenizer.encode(sample, add_special_tokens=False)
        assert model.tokenize(sample) == tokens
        assert model.detokenize(tokens) == sample
    assert model.tokenize("a", add_special=True) == tokenizer.encode("a")
    ends = {"<|end_of_text|>", "<|eot|>", "<|eom|>"}
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ends}
    assert None not in ids.values()
    assert {token for token in range(model.vocabulary_size) if model.is_end_of_generation(token)} == set(ids.values())
    model.close()


def test_a_damaged_weight_is_noticed_by_llama_cpp(demo_float: Path, tmp_path: Path) -> None:
    """So the files above were not only mapped, but looked through: a number that is not finite is refused."""
    path = tmp_path / "damaged.gguf"
    data = bytearray(text_file(demo_float).read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match="invalid data"):
        Llama(path)
