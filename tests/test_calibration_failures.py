"""What calibration stops at: values that are not finite, too few tokens, too little memory; layer, unit and sample are named."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import quantkit
from quantkit.errors import CalibrationError, LedgerError, WeightError
from quantkit_cli.app import app
from tests.artifact_files import digests
from tests.speaking_models import LENGTH, options, write_random_texts, write_speaking_model, write_texts
from tests.tiny_models import write_files

BASE = "language_model.model.layers"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking_model(tmp_path_factory.mktemp("sound"), "scout", 7)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


def changed(sound: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the model with other weights."""
    tensors = {name: tensor.clone() for path in sound.glob("*.safetensors") for name, tensor in load_file(path).items()}
    change(tensors)
    shutil.copytree(sound, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    write_files(directory, tensors)
    return directory


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and error message of the command line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.exit_code, json.loads(result.stdout)["error"]["message"] if result.exit_code else ""


def given(texts: Path) -> tuple[object, ...]:
    return ("--calibration", texts, "--sequence-length", LENGTH, "--packing", "documents", "--json")


# ----------------------------------------------------------------------------------------------------- values not finite


def _huge(tensors: dict[str, torch.Tensor], name: str, place: Any = ...) -> None:
    tensors[name][place] = 1e38


@pytest.mark.parametrize(
    ("tensor", "place", "message"),
    [
        ("1.feed_forward.experts.gate_up_proj", 2, r"layer 1, input of \S*layers.1.feed_forward.experts.2.down_proj: NaN or inf"),
        ("0.feed_forward.shared_expert.up_proj.weight", ..., r"layer 0, input of \S*layers.0.feed_forward.shared_expert.down_proj"),
        ("1.self_attn.v_proj.weight", ..., r"layer 1, input of \S*layers.1.self_attn.o_proj: NaN or infinite"),
        ("1.self_attn.q_proj.weight", ..., r"layer 1, input of \S*layers.1.self_attn.o_proj: NaN or infinite"),
        ("0.feed_forward.router.weight", ..., r"layer 0, input of router: NaN or infinite"),
        ("0.self_attn.o_proj.weight", ..., r"layer 0, input of router: NaN or infinite"),
    ],
)
def test_an_overflow_names_layer_unit_and_sample(
    tensor: str, place: Any, message: str, sound: Path, texts: Path, tmp_path: Path
) -> None:
    source = changed(sound, tmp_path / "source", lambda tensors: _huge(tensors, f"{BASE}.{tensor}", place))
    with pytest.raises(CalibrationError, match=message + r".* at token \d+ of sample \d+ \((code.python|prose.en), document \d+"):
        quantkit.convert(source, ["w4a16-gptq"], tmp_path / "out", calibration=options(texts))
    code, told = run("calibrate", source, "-o", tmp_path / "statistics", *given(texts))
    assert code == 9 and "check the source, or leave the text out" in told
    code, told = run("convert", source, "--to", "w4a16-gptq", "--to", "fp8-static", "-o", tmp_path / "other", *given(texts))
    assert code == 9 and "of sample" in told
    left = [path.name for folder in ("out", "other", ".") for path in (tmp_path / folder).iterdir()]
    assert all(name.endswith(".partial") or name in ("source", "out", "other") for name in left), "nothing under a final name"


def test_outputs_of_a_layer_that_overflow_are_met_by_the_next(sound: Path, texts: Path, tmp_path: Path) -> None:
    name = f"{BASE}.0.feed_forward.experts.down_proj"
    source = changed(sound, tmp_path / "source", lambda tensors: _huge(tensors, name))
    with pytest.raises(CalibrationError, match=r"layer 1, input of \S*layers.1.self_attn.qkv: NaN or infinite at token"):
        quantkit.calibrate(source, tmp_path / "statistics", calibration=options(texts))
    with pytest.raises(LedgerError, match=r"layers.0.feed_forward.experts.0.down_proj: error or scales are not finite"):
        quantkit.convert(source, ["w4a16-gptq"], tmp_path / "out", calibration=options(texts))


def test_the_sample_is_the_one_that_holds_the_token(sound: Path, tmp_path: Path) -> None:
    """An embedding that is infinite: of a token that stands in one text, in one place."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.embed_tokens.weight"][77, 3] = torch.inf

    source = changed(sound, tmp_path / "source", change)
    texts = write_texts(tmp_path / "texts.jsonl", [("prose", [5, 6, 7]), ("prose", [8, 9, 10, 11, 77, 12]), ("prose", [13])])
    with pytest.raises(
        CalibrationError, match=r"layer 0, input of \S*qkv: .*at token 5 of sample 1 \(prose, document 2, token 0\)"
    ):
        quantkit.calibrate(source, tmp_path / "statistics", calibration=options(texts))
    harmless = write_texts(tmp_path / "harmless.jsonl", [("prose", [5, 6, 7])])
    quantkit.calibrate(source, tmp_path / "others", calibration=options(harmless))
    with pytest.raises(WeightError, match="embed_tokens"):  # an artifact would hold it
        quantkit.convert(source, ["w4a16-gptq"], tmp_path / "out", calibration=options(harmless))


def test_activations_whose_square_overflows_are_named(sound: Path, texts: Path, tmp_path: Path) -> None:
    """They are finite, but their mean square is not."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{BASE}.0.feed_forward.experts.gate_up_proj"][1] *= 1e12

    source = changed(sound, tmp_path / "source", change)
    with pytest.raises(CalibrationError, match=r"layers.0.feed_forward.experts.*(down_proj|expert 1)"):
        quantkit.convert(source, ["w4a16-gptq"], tmp_path / "out", calibration=options(texts))
    with pytest.raises(CalibrationError, match=r"mean_square of \S*layers.0.feed_forward.experts.1.down_proj"):
        quantkit.calibrate(source, tmp_path / "statistics", calibration=options(texts))
    assert run("calibrate", source, "-o", tmp_path / "statistics", "--restart", *given(texts))[0] == 9


# --------------------------------------------------------------------------------------------------------- too few tokens


def test_too_few_tokens_fail_by_name_and_may_be_accepted_later(sound: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("convert", sound, "--to", "w4a16-gptq", "-o", out, *given(texts))
    code, told = run(*command, "--min-expert-tokens", 1000)
    assert code == 9
    assert "layer 0: 4 experts received fewer than 1000 tokens: expert 0 (" in told and "Calibrate on more samples" in told
    assert [path.name for path in out.iterdir() if not path.name.endswith(".partial")] == []
    assert run(*command)[0] == 0
    quantkit.convert(sound, ["w4a16-gptq"], tmp_path / "straight", calibration=options(texts))
    assert digests(out / "w4a16-gptq") == digests(tmp_path / "straight" / "w4a16-gptq")
    assert run("calibrate", sound, "-o", tmp_path / "statistics", *given(texts), "--min-expert-tokens", 1000)[0] == 9


def test_a_minimum_also_holds_for_layers_that_were_done_before_it_was_set(sound: Path, texts: Path, tmp_path: Path) -> None:
    """By a run that was interrupted, or that failed at something else."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        _huge(tensors, f"{BASE}.1.self_attn.v_proj.weight")

    source = changed(sound, tmp_path / "source", change)
    for _ in range(2):
        with pytest.raises(CalibrationError, match="layer 1, input of"):
            quantkit.calibrate(source, tmp_path / "out", calibration=options(texts))
    with pytest.raises(CalibrationError, match="layer 0: 4 experts received fewer than 1000 tokens"):
        quantkit.calibrate(source, tmp_path / "out", calibration=options(texts, minimum_expert_tokens=1000))


# ----------------------------------------------------------------------------------------------------------------- memory


def test_too_little_memory_shows_before_the_first_layer(
    sound: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["quantkit.calibrate"], "available_memory", lambda: 1000)
    with pytest.raises(CalibrationError, match=r"calibration needs \d+\.\d GB of memory .* and 0\.0 GB are free"):
        quantkit.convert(sound, ["w4a16-gptq"], tmp_path / "out", calibration=options(texts))
    assert not list((tmp_path / "out").glob("*/hidden-*.bin"))
