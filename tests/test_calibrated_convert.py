"""Calibrated conversion end to end: clients, company of targets, resumption, faults, the same bytes whatever happens."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import quantkit
from benchmarks.client_check import check
from benchmarks.client_reference import write_reference
from quantkit import datafiles, unit_work
from quantkit.calibrate import open_corpus
from quantkit.calibration import CalibrationOptions
from quantkit.calibration_state import CalibrationState
from quantkit.checkpoint import Checkpoint
from quantkit.convert import Progress, convert
from quantkit.errors import CalibrationError, Interrupted, OutputError, ResumeError
from quantkit.llama4 import units
from quantkit.recipe import PRESETS, Recipe
from quantkit.statistics import load_statistics
from quantkit.verify import verify
from quantkit_cli.app import app
from tests.artifact_files import digests, entries
from tests.reference_model import load_reference
from tests.speaking_models import (
    ASYMMETRIC,
    EVERYWHERE,
    LENGTH,
    options,
    write_random_texts,
    write_speaking_model,
)
from tests.test_calibration import run_hooked

CALIBRATED = [name for name, recipe in PRESETS.items() if recipe.needs_calibration]
BOTH: list[str | Recipe] = ["w4a16-gptq", "fp8-dynamic"]

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass(frozen=True)
class Models:
    """Sources by kind, and texts."""

    sources: dict[str, Path]
    texts: Path

    @property
    def options(self) -> CalibrationOptions:
        return options(self.texts)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    directory = tmp_path_factory.mktemp("models")
    sources = {kind: write_speaking_model(directory / kind, kind, 8) for kind in ("scout", "maverick")}
    return Models(sources, write_random_texts(directory / "texts.jsonl"))


@pytest.fixture(scope="module")
def straight(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Digests of the artifacts of one uninterrupted run, by name."""
    output = tmp_path_factory.mktemp("straight")
    result = convert(models.sources["scout"], BOTH, output, calibration=models.options, workers=1)
    return {artifact.name: digests(artifact.directory) for artifact in result.artifacts}


def stopping_after(count: int) -> tuple[threading.Event, Callable[[Progress], None]]:
    """An event, and what sets it as soon as so many units with matrices are done."""
    stop, seen = threading.Event(), [0]

    def watch(event: Progress) -> None:
        seen[0] += event.phase == "calibrate"
        if seen[0] >= count:
            stop.set()

    return stop, watch


def stop_after(
    count: int, source: Path, to: Sequence[str | Recipe], output: Path, given: CalibrationOptions, **others: Any
) -> None:
    stop, watch = stopping_after(count)
    with pytest.raises(Interrupted, match="same command"):
        convert(source, to, output, calibration=given, progress=watch, stop=stop, **others)
    assert all(path.name.endswith(".partial") or path.name.startswith("calibration-") for path in output.iterdir())


# ------------------------------------------------------------------------------------------------------------------ clients


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_every_calibrated_preset_loads_and_computes_what_its_bytes_say(kind: str, models: Models, tmp_path: Path) -> None:
    """In transformers, with nothing missing, unexpected or new; all made in one pass."""
    source = models.sources[kind]
    recipes = [*CALIBRATED, ASYMMETRIC] if kind == "scout" else CALIBRATED
    planned = quantkit.plan(source, recipes, calibration=models.options)
    predicted = {artifact.name: artifact.file_sizes for artifact in planned.artifacts}
    result = convert(source, recipes, tmp_path / "out", calibration=models.options)
    assert [artifact.name for artifact in result.artifacts] == [*CALIBRATED, *(["asymmetric"] if kind == "scout" else [])]
    for artifact in result.artifacts:
        assert {path.name: path.stat().st_size for path in artifact.directory.iterdir()} == predicted[artifact.name]
        assert all(item.ok for item in verify(artifact.directory, source, sample=64).checks)
        if artifact.name == "asymmetric":
            continue  # transformers with compressed-tensors 0.20 cannot load it, see test_clients
        write_reference(artifact.directory, source, tmp_path / artifact.name)
        found = check(artifact.directory, tmp_path / artifact.name)
        assert found["problems"] == {}
        assert found["logits"] <= 1e-3
        if found["activations"] is not None:
            assert 0 < found["activations"] < 0.5


def test_what_gptq_stores_is_nearer_in_its_outputs_and_farther_in_its_weights(models: Models, tmp_path: Path) -> None:
    result = convert(models.sources["scout"], ["w4a16-gptq", "w4a16-rtn"], tmp_path, calibration=models.options)
    learned, plain = (entries(artifact.directory) for artifact in result.artifacts)
    quantized = [name for name, entry in learned.items() if entry.method == "gptq"]
    assert len(quantized) == 2 * 3 * (4 + 1)
    for name in quantized:
        assert learned[name].relative_error > plain[name].relative_error
        assert learned[name].output_error > 0 and learned[name].damping >= 0.01 and plain[name].damping == 0
        assert learned[name].tokens + learned[name].borrowed > 0 == plain[name].tokens


# ------------------------------------------------------------------------------------------------------- company of targets


def test_bytes_depend_neither_on_company_nor_on_order_nor_on_workers(models: Models, tmp_path: Path) -> None:
    source, together = models.sources["maverick"], ["w4a16-gptq", "fp8-static", ASYMMETRIC, EVERYWHERE, "fp8-dynamic", "w8a8-rtn"]
    result = convert(source, together, tmp_path / "together", calibration=models.options, workers=2)
    expected = {artifact.name: digests(artifact.directory) for artifact in result.artifacts}
    turned = convert(source, together[::-1], tmp_path / "turned", calibration=models.options, workers=3)
    assert {artifact.name: digests(artifact.directory) for artifact in turned.artifacts} == expected
    for target in together:
        [alone] = convert(source, [target], tmp_path / "alone", calibration=models.options, workers=1).artifacts
        assert digests(alone.directory) == expected[alone.name]
    [free] = convert(source, ["fp8-dynamic"], tmp_path / "free").artifacts  # no calibration at all
    assert digests(free.directory) == expected["fp8-dynamic"]


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_workers(workers: int, models: Models, straight: dict[str, dict[str, str]], tmp_path: Path) -> None:
    result = convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options, workers=workers)
    assert {artifact.name: digests(artifact.directory) for artifact in result.artifacts} == straight


# --------------------------------------------------------------------------------------------------------------- sequential


def artifact_s_model(artifact: Path, source: Path, directory: Path) -> Any:
    """transformers' model with the artifact's dequantized weights in float32."""
    write_reference(artifact, source, directory)
    return load_reference(directory)


def test_in_a_sequential_pass_later_layers_see_what_earlier_ones_became(models: Models, tmp_path: Path) -> None:
    source, given = models.sources["scout"], options(models.texts, sequential=True)
    [made] = convert(source, ["w4a16-gptq"], tmp_path / "out", calibration=given).artifacts
    [beside] = (path for path in (tmp_path / "out").iterdir() if path.name.startswith("calibration-"))
    statistics = load_statistics(beside)
    with Checkpoint.open(source) as checkpoint:
        corpus, work = open_corpus(checkpoint, given), [unit for unit in units(checkpoint.config) if unit.matrices]
    hooked = run_hooked(artifact_s_model(made.directory, source, tmp_path / "reference"), corpus)
    compared = 0
    for unit in work:
        name = unit.matrices[0].name.removeprefix("language_model.")
        if name in hooked.inputs:
            expected = hooked.inputs[name].square().mean(0)
            torch.testing.assert_close(statistics.inputs[unit.key].mean_square, expected, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == 2 * 4
    [reference] = convert(source, ["w4a16-gptq"], tmp_path / "usual", calibration=models.options).artifacts
    assert digests(reference.directory) != digests(made.directory)


def test_sequential_artifacts_are_independent_of_each_other_and_resume(models: Models, tmp_path: Path) -> None:
    source, given = models.sources["scout"], options(models.texts, sequential=True)
    targets: list[str | Recipe] = ["w4a16-gptq", "fp8-dynamic", EVERYWHERE]
    seen: list[Progress] = []
    result = convert(source, targets, tmp_path / "together", calibration=given, progress=seen.append)
    expected = {artifact.name: digests(artifact.directory) for artifact in result.artifacts}
    assert max(event.units_done for event in seen) == seen[-1].units_total
    for target in targets:
        [alone] = convert(source, [target], tmp_path / "alone", calibration=given).artifacts
        assert digests(alone.directory) == expected[alone.name]
    for count in (3, 17, 26, 40):
        output = tmp_path / f"stopped-{count}"
        stop_after(count, source, targets, output, given)
        resumed = convert(source, targets, output, calibration=given)
        assert {artifact.name: digests(artifact.directory) for artifact in resumed.artifacts} == expected
        assert not list(output.glob("*.partial"))
    stop_after(3, source, targets, tmp_path / "mixed", given)
    with pytest.raises(ResumeError, match=r"calibration.sequential: was true, is now false"):
        convert(source, targets, tmp_path / "mixed", calibration=models.options)


# --------------------------------------------------------------------------------------------------------------- resumption


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(artifact, unit) of everything that is quantized from now on."""
    calls: list[tuple[str, str]] = []
    original = unit_work.quantize_unit

    def counting(checkpoint: Any, unit: Any, weights: Any, digests: Any, run: Any, *others: Any) -> None:
        calls.append((run.plan.name, unit.key))
        original(checkpoint, unit, weights, digests, run, *others)

    monkeypatch.setattr("quantkit.calibrated.quantize_unit", counting)
    return calls


@pytest.mark.parametrize("count", [1, 2, 5, 9, 13, 14, 20, 24])
def test_a_stopped_run_resumes_to_the_same_bytes_and_does_nothing_twice(
    count: int, models: Models, straight: dict[str, dict[str, str]], counted: list[tuple[str, str]], tmp_path: Path
) -> None:
    source = models.sources["scout"]
    stop_after(count, source, BOTH, tmp_path, models.options)
    before = len(counted)
    seen: list[Progress] = []
    result = convert(source, BOTH, tmp_path, calibration=models.options, progress=seen.append)
    assert {artifact.name: digests(artifact.directory) for artifact in result.artifacts} == straight
    assert before >= 2 * count
    assert len(counted) == len(set(counted)), "nothing is quantized twice"
    assert len(counted) == 2 * 2 * (2 + 2 + 2 * 4)  # artifacts, layers, units of attention, shared and routed experts
    assert seen[0].units_resumed >= count
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_stopped_again_and_again_ends_like_any_other(
    models: Models, straight: dict[str, dict[str, str]], counted: list[tuple[str, str]], tmp_path: Path
) -> None:
    for _ in range(6):
        stop_after(3, models.sources["scout"], BOTH, tmp_path, models.options)
    result = convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options)
    assert {artifact.name: digests(artifact.directory) for artifact in result.artifacts} == straight
    assert len(counted) == len(set(counted))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink])
@pytest.mark.parametrize("pattern", ["hidden-00001.bin", "hidden-*.bin", "layer-00000/statistics.*", "journal.jsonl"])
def test_damaged_state_is_computed_again(
    damage: Callable[[Path], None], pattern: str, models: Models, straight: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Or refused, where it is not known whose state it is."""
    stop_after(17, models.sources["scout"], BOTH, tmp_path, models.options)  # in the second layer
    [state] = tmp_path.glob("calibration-*.partial")
    damaged = list(state.glob(pattern))
    assert damaged
    for path in damaged:
        damage(path)
    if (pattern, damage) == ("journal.jsonl", Path.unlink):
        with pytest.raises(OutputError, match="not known to be an unfinished calibration"):
            convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options)
        return
    result = convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options)
    assert {artifact.name: digests(artifact.directory) for artifact in result.artifacts} == straight


def test_another_corpus_or_seed_does_not_resume(models: Models, straight: dict[str, dict[str, str]], tmp_path: Path) -> None:
    source = models.sources["scout"]
    stop_after(17, source, BOTH, tmp_path, models.options)
    other = write_random_texts(tmp_path / "other.jsonl", seed=1)
    for changed in (options(other), options(models.texts, seed=3, samples=4), options(models.texts, sequence_length=20)):
        with pytest.raises(ResumeError, match=r"calibration(.|\n)*--restart"):
            convert(source, BOTH, tmp_path, calibration=changed)
    fresh = convert(source, BOTH, tmp_path / "fresh", calibration=options(other))
    restarted = convert(source, BOTH, tmp_path, calibration=options(other), restart=True)
    for one, two in zip(fresh.artifacts, restarted.artifacts, strict=True):
        assert digests(one.directory) == digests(two.directory)
    assert digests(fresh.artifacts[0].directory) != straight["w4a16-gptq"]
    assert digests(fresh.artifacts[1].directory) == straight["fp8-dynamic"]


def test_a_restart_does_all_again(
    models: Models, straight: dict[str, dict[str, str]], counted: list[tuple[str, str]], tmp_path: Path
) -> None:
    stop_after(17, models.sources["scout"], BOTH, tmp_path, models.options)
    counted.clear()
    result = convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options, restart=True)
    assert {artifact.name: digests(artifact.directory) for artifact in result.artifacts} == straight
    assert len(counted) == 2 * 24
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("more", [ASYMMETRIC, "w4a16-rtn"], ids=["calibrated", "data-free"])
@pytest.mark.parametrize("count", [5, 17])
def test_a_target_may_join_a_run_that_was_stopped(
    count: int,
    more: str | Recipe,
    models: Models,
    straight: dict[str, dict[str, str]],
    counted: list[tuple[str, str]],
    tmp_path: Path,
) -> None:
    source = models.sources["scout"]
    stop_after(count, source, BOTH, tmp_path, models.options)
    result = convert(source, [more, *BOTH], tmp_path, calibration=models.options)
    made = {artifact.name: digests(artifact.directory) for artifact in result.artifacts}
    joined = result.artifacts[0]
    assert made.items() >= straight.items() and len(counted) == len(set(counted)) == 3 * 24
    [alone] = convert(source, [more], tmp_path / "alone", calibration=models.options).artifacts
    assert digests(alone.directory) == made[joined.name]


def test_a_later_target_uses_a_calibration_that_is_finished(
    models: Models, straight: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Its statistics stay as they are."""
    source = models.sources["scout"]
    convert(source, ["w4a16-gptq"], tmp_path, calibration=models.options)
    [beside] = tmp_path.glob("calibration-*")
    before = digests(beside)
    convert(source, ["fp8-static", "fp8-dynamic"], tmp_path, calibration=models.options)
    assert [path.name for path in tmp_path.glob("calibration-*")] == [beside.name]
    assert digests(beside) == before
    assert digests(tmp_path / "w4a16-gptq") == straight["w4a16-gptq"]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("cleaned", [[], ["hidden-*.bin"], ["hidden-*.bin", "layer-*/*", "layer-*", "scratch-*"]])
def test_a_kill_while_a_calibration_is_cleaned_up_leaves_nothing_behind(
    cleaned: list[str], models: Models, straight: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The statistics are published; of what is then removed the journal goes last."""

    def remove(state: CalibrationState) -> None:
        for pattern in cleaned:
            for path in state.directory.glob(pattern):
                path.rmdir() if path.is_dir() else path.unlink()
        raise Killed

    monkeypatch.setattr(CalibrationState, "remove", remove)
    with pytest.raises(Killed):
        convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options)
    monkeypatch.undo()
    assert list(tmp_path.glob("calibration-*.partial"))
    result = convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options)
    assert {artifact.name: digests(artifact.directory) for artifact in result.artifacts} == straight
    assert not list(tmp_path.glob("*.partial"))


def test_a_kill_while_statistics_are_replaced_loses_none(models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    convert(models.sources["scout"], ["w4a16-gptq"], tmp_path, calibration=models.options)
    [statistics] = tmp_path.glob("calibration-*")
    before, original = digests(statistics), Path.rename

    def rename(path: Path, target: Path) -> None:
        if target == statistics:
            raise Killed
        original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        convert(models.sources["scout"], ["fp8-static"], tmp_path, calibration=models.options)
    monkeypatch.undo()
    convert(models.sources["scout"], ["fp8-static"], tmp_path, calibration=models.options)
    assert digests(statistics) == before
    assert not list(tmp_path.glob("*.partial"))


# ------------------------------------------------------------------------------------------------------------ disk, progress


@pytest.mark.parametrize("name", ["hidden-00000", "hidden-00001", "scratch-context", "scratch-deviation-0"])
def test_a_full_disk_is_one_error_and_the_run_resumes(
    name: str, models: Models, straight: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = datafiles.allocate_file

    def full(descriptor: int, size: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor, size)

    monkeypatch.setattr("quantkit.calibration_state.allocate_file", full)
    with pytest.raises(OutputError, match=rf"{name}.*disk is full.*run the same command again"):
        convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".partial")] == []
    monkeypatch.undo()
    result = convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options)
    assert {artifact.name: digests(artifact.directory) for artifact in result.artifacts} == straight


def test_two_runs_into_one_output_exclude_each_other(models: Models, tmp_path: Path) -> None:
    def interfere(event: Progress) -> None:
        if event.phase == "calibrate" and not refused:
            with pytest.raises(OutputError, match="is being written by process"):
                convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options)
            with pytest.raises(OutputError, match="is being written by process"):  # another artifact of the same calibration
                convert(models.sources["scout"], ["fp8-static"], tmp_path, calibration=models.options)
            refused.append(True)

    refused: list[bool] = []
    convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options, progress=interfere)
    assert refused


def test_progress_goes_through_its_phases_and_ends_complete(models: Models, tmp_path: Path) -> None:
    seen: list[Progress] = []
    convert(models.sources["scout"], BOTH, tmp_path, calibration=models.options, progress=seen.append)
    with Checkpoint.open(models.sources["scout"]) as checkpoint:
        work = units(checkpoint.config)
    calibrated = [event for event in seen if event.phase == "calibrate"]
    assert [event.current for event in calibrated] == [unit.key for unit in work if unit.matrices]
    assert sorted(event.current for event in seen if event.phase == "convert") == sorted(unit.key for unit in work if unit.copies)
    assert {event.phase for event in seen} == {"prepare", "convert", "calibrate", "check"}
    done = [event.units_done for event in seen if event.phase in ("convert", "calibrate")]
    assert done == list(range(1, len(work) + 1)) and {event.units_total for event in seen} == {len(work)}
    assert calibrated[-1].bytes_done == calibrated[-1].bytes_total and seen[-1].bytes_done == seen[-1].bytes_total
    assert calibrated[-1].units_done == len(work)


def test_the_command_line_makes_the_same(models: Models, straight: dict[str, dict[str, str]], tmp_path: Path) -> None:
    given = ["--calibration", str(models.texts), "--sequence-length", str(LENGTH), "--packing", "documents"]
    targets = ["--to", "w4a16-gptq", "--to", "fp8-dynamic"]
    result = CliRunner().invoke(app, ["convert", str(models.sources["scout"]), *targets, "-o", str(tmp_path), *given])
    assert result.exit_code == 0, result.output
    assert {name: digests(tmp_path / name) for name in straight} == straight
    shown = CliRunner().invoke(app, ["inspect", str(next(iter(tmp_path.glob("calibration-*"))))])
    assert shown.exit_code == 0 and "Coldest experts" in shown.stdout


def test_statistics_of_another_model_are_refused(models: Models, tmp_path: Path) -> None:
    saved = quantkit.calibrate(models.sources["maverick"], tmp_path / "saved", calibration=models.options)
    with pytest.raises(CalibrationError, match="do not belong to this model"):
        convert(
            models.sources["scout"], ["fp8-static"], tmp_path / "out", calibration=CalibrationOptions(statistics=saved.directory)
        )


def test_a_stopped_calibrate_resumes_to_the_same_files(models: Models, tmp_path: Path) -> None:
    """At the layer where it was: units of layers before are not seen again."""
    quantkit.calibrate(models.sources["maverick"], tmp_path / "straight", calibration=models.options)
    stop = threading.Event()

    def watch(done: int, total: int, key: str) -> None:
        if "layers.2." in key:
            stop.set()

    with pytest.raises(Interrupted):
        quantkit.calibrate(models.sources["maverick"], tmp_path / "out", calibration=models.options, progress=watch, stop=stop)
    assert not (tmp_path / "out").exists()
    seen: list[tuple[int, int, str]] = []
    quantkit.calibrate(
        models.sources["maverick"], tmp_path / "out", calibration=models.options, progress=lambda *at: seen.append(at)
    )
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")
    assert "layers.2." in seen[0][2] and seen[-1][0] == seen[-1][1]
    assert [done for done, _, _ in seen] == list(range(seen[0][0], seen[-1][1] + 1))
    with pytest.raises(OutputError, match="--force"):
        quantkit.calibrate(models.sources["maverick"], tmp_path / "out", calibration=models.options)
    other = options(models.texts, samples=2)
    quantkit.calibrate(models.sources["maverick"], tmp_path / "out", calibration=other, force=True)
    assert digests(tmp_path / "out") != digests(tmp_path / "straight")


def test_a_tensor_file_holds_what_the_ledger_says(models: Models, tmp_path: Path) -> None:
    """Codes of a kept tensor are untouched, whatever calibration does beside it."""
    [made] = convert(models.sources["scout"], ["w4a16-gptq"], tmp_path, calibration=models.options).artifacts
    source = {name: tensor for path in models.sources["scout"].glob("*.safetensors") for name, tensor in load_file(path).items()}
    stored = {name: tensor for path in made.directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    kept = [name for name in stored if name in source]
    assert any("router" in name for name in kept) and any("q_proj" in name for name in kept)
    assert all(torch.equal(stored[name], source[name]) for name in kept)
