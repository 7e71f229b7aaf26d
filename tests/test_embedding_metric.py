"""The embedding by what the first layer reads of it: the metric by itself, and artifacts whose embedding it rounded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import unit_work
from quantkit.calibration import CalibrationOptions
from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.embedding_metric import MANY, SHARE_OF_OTHERS, embedding_evidence
from quantkit.errors import QuantkitError
from quantkit.llama4 import units
from quantkit.methods.gptq import DAMPING, usual_damping
from quantkit.recipe import Recipe, Rule
from quantkit.team import Team
from quantkit.verify import verify
from tests.artifact_files import entries
from tests.gguf_models import stored_values, text_file, write_source

CALIBRATION = CalibrationOptions(samples=2, sequence_length=128)
FIRST = "language_model.model.layers.0."
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first layer reads some channels much more than others, as trained ones do."""
    directory = tmp_path_factory.mktemp("source")
    even = write_source(directory / "Even", seed=3, num_hidden_layers=1)
    norm = torch.exp(0.7 * torch.randn(256, generator=torch.Generator().manual_seed(4)))
    return change(even, directory / "Tiny", {f"{FIRST}input_layernorm.weight": norm})


@pytest.fixture(scope="module")
def artifacts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    result = convert(source, ["Q4_K_M", "Q4_K_M-gptq"], tmp_path_factory.mktemp("made"), calibration=CALIBRATION, workers=1)
    return {made.name: made.directory for made in result.artifacts}


def tensors(source: Path) -> dict[str, torch.Tensor]:
    return {name: value.to(torch.float64) for path in source.glob("*.safetensors") for name, value in load_file(path).items()}


def readers(source: Path) -> torch.Tensor:
    """What queries, keys and values of the first layer make of a row, but for its size: float64 ``[hidden, outputs]``."""
    weights = tensors(source)
    stacked = torch.cat([weights[f"{FIRST}self_attn.{name}_proj.weight"] for name in "qkv"])
    return (stacked * weights[f"{FIRST}input_layernorm.weight"]).t()


def metric_of(source: Path) -> torch.Tensor:
    """The upper triangle that the library forms."""
    with Checkpoint.open(source) as checkpoint:
        [first] = [unit for unit in units(checkpoint.config) if unit.layer == 0 and unit.key.endswith("self_attn.qkv")]
        with Team(2) as team:
            evidence = embedding_evidence(checkpoint, first, f"{FIRST}input_layernorm.weight", team)
    assert evidence.hessian is not None
    assert torch.equal(evidence.mean_square, evidence.hessian.diagonal()) and evidence.missing is None
    assert usual_damping(evidence) == DAMPING and evidence.rows == MANY
    return evidence.hessian.triu()


def embedding_of(directory: Path) -> torch.Tensor:
    return stored_values(text_file(directory))["token_embd.weight"].to(torch.float64)


def error_as_read(source: Path, embedding: torch.Tensor) -> float:
    """Relative L2 error of queries, keys and values of all words."""
    exact, read = tensors(source)[EMBEDDING], readers(source)
    return float(((exact - embedding) @ read).norm() / (exact @ read).norm())


def change(source: Path, directory: Path, values: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint with other values in some tensors."""
    directory.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            content = load_file(path)
            for name in values.keys() & content.keys():
                content[name] = values[name].to(content[name].dtype).expand_as(content[name]).contiguous()
            save_file(content, directory / path.name, metadata={"format": "pt"})
        else:
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


# --------------------------------------------------------------------------------------------------------------- the metric


def test_the_metric_is_what_the_first_layer_reads_and_a_share_of_the_identity(source: Path) -> None:
    read = readers(source)
    exact = read @ read.t()
    exact = exact / exact.diagonal().mean()
    expected = (exact + SHARE_OF_OTHERS * torch.eye(len(exact), dtype=torch.float64)) / (1 + SHARE_OF_OTHERS)
    assert float(expected.diagonal().mean()) == pytest.approx(1.0)
    assert torch.allclose(metric_of(source).to(torch.float64), expected.triu(), rtol=1e-5, atol=1e-6)


def test_where_the_first_layer_reads_nothing_all_directions_are_alike(source: Path, tmp_path: Path) -> None:
    silent = change(source, tmp_path / "silent", {f"{FIRST}self_attn.{name}_proj.weight": torch.zeros(()) for name in "qkv"})
    metric = metric_of(silent)
    assert torch.equal(metric, torch.diag(metric.diagonal())) and bool((metric.diagonal() == metric[0, 0]).all())
    assert float(metric[0, 0]) > 0


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight", "input_layernorm.weight"])
def test_a_damaged_first_layer_is_an_error(name: str, source: Path, tmp_path: Path) -> None:
    damaged = change(source, tmp_path / "damaged", {f"{FIRST}{name}": torch.tensor(torch.nan)})
    with pytest.raises(QuantkitError):
        convert(damaged, "Q4_K_M-gptq", tmp_path / "out", calibration=CALIBRATION, workers=1)
    assert not (tmp_path / "out" / "Q4_K_M-gptq").exists()


# ------------------------------------------------------------------------------------------------------------- what it gains


def test_queries_keys_and_values_are_nearer_than_rounded_ones(source: Path, artifacts: dict[str, Path]) -> None:
    """At little cost for other readers: the error of the rows themselves grows less than that of the outputs falls."""
    exact = tensors(source)[EMBEDDING]
    learned, plain = (embedding_of(artifacts[name]) for name in ("Q4_K_M-gptq", "Q4_K_M"))
    gain = error_as_read(source, learned) / error_as_read(source, plain)
    cost = float((exact - learned).norm() / (exact - plain).norm())
    assert gain < 0.85
    assert 1 <= cost < 1 / gain


def test_the_ledger_says_how_the_embedding_was_rounded(source: Path, artifacts: dict[str, Path]) -> None:
    found = entries(artifacts["Q4_K_M-gptq"])
    exact, stored = tensors(source)[EMBEDDING], embedding_of(artifacts["Q4_K_M-gptq"])
    entry = found[EMBEDDING]
    assert (entry.method, entry.applied, entry.tokens) == ("gptq", "Q4_K", 0)
    assert entry.damping == pytest.approx(DAMPING)
    assert entry.relative_error == pytest.approx(float((exact - stored).norm() / exact.norm()), rel=1e-4)
    metric = metric_of(source).to(torch.float64)
    metric = metric + metric.triu(1).t()
    noise, power = (float(torch.trace(part @ metric @ part.t())) for part in (exact - stored, exact))
    assert entry.output_error == pytest.approx((noise / power) ** 0.5, rel=0.05)  # power of a sample of the rows
    assert (found[HEAD].method, found[HEAD].output_error) == ("rtn", 0.0)
    plain = entries(artifacts["Q4_K_M"])
    assert [plain[name].method for name in (EMBEDDING, HEAD)] == ["rtn", "rtn"]
    assert all(check.ok for check in verify(artifacts["Q4_K_M-gptq"], source, sample=64).checks)


def test_the_head_is_what_it_is_without_gptq(artifacts: dict[str, Path]) -> None:
    learned, plain = (stored_values(text_file(artifacts[name]))["output.weight"] for name in ("Q4_K_M-gptq", "Q4_K_M"))
    assert torch.equal(learned, plain)


def test_a_rule_can_ask_for_it_alone(source: Path, artifacts: dict[str, Path], tmp_path: Path) -> None:
    """All else stays rtn, and the bytes are those of the whole recipe."""
    recipe = Recipe("mine", (Rule("Q4_K", roles=("embedding",), method="gptq"),), format="gguf", mixture="Q4_K_M")
    [made] = convert(source, recipe, tmp_path, calibration=CALIBRATION).artifacts
    methods = {entry.method for entry in entries(made.directory).values() if entry.name != EMBEDDING and entry.applied != "keep"}
    assert methods == {"rtn"}
    assert torch.equal(embedding_of(made.directory), embedding_of(artifacts["Q4_K_M-gptq"]))


# -------------------------------------------------------------------------------------------------------- portions, workers


def digest(directory: Path) -> str:
    return hashlib.sha256(text_file(directory).read_bytes()).hexdigest()


def test_portions_change_next_to_nothing(
    source: Path, artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are rounded each for itself; products of other sizes may round a sum otherwise, and then a tie."""
    monkeypatch.setattr(unit_work, "LEARNED_STREAM_BYTES", 1)  # 16 rows at a time
    [made] = convert(source, "Q4_K_M-gptq", tmp_path, calibration=CALIBRATION).artifacts
    portions, whole = embedding_of(made.directory), embedding_of(artifacts["Q4_K_M-gptq"])
    assert np.mean((portions != whole).any(1).numpy()) < 0.01
    assert error_as_read(source, portions) == pytest.approx(error_as_read(source, whole), rel=1e-3)
    entry, other = (entries(directory)[EMBEDDING] for directory in (made.directory, artifacts["Q4_K_M-gptq"]))
    assert entry.relative_error == pytest.approx(other.relative_error, rel=1e-3)
    assert entry.damping == other.damping


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_do_not_depend_on_workers(workers: int, source: Path, artifacts: dict[str, Path], tmp_path: Path) -> None:
    [made] = convert(source, "Q4_K_M-gptq", tmp_path, calibration=CALIBRATION, workers=workers).artifacts
    assert digest(made.directory) == digest(artifacts["Q4_K_M-gptq"])
