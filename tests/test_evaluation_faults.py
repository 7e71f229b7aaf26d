"""Whatever is wrong with arguments, artifact or reference: one clear error of the right class and exit code, and no figure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from quantkit.convert import convert
from quantkit.errors import (
    AlreadyQuantizedError,
    ArtifactError,
    CalibrationError,
    CheckpointError,
    CorpusError,
    OutputError,
    RecipeError,
)
from quantkit.evaluate import evaluate
from quantkit.report.words import text_facts
from quantkit_cli.evaluation import compare_command, evaluate_command
from tests.evaluation_models import Made, make_scout, small
from tests.gguf_models import DEMO

app = typer.Typer()
app.command("eval")(evaluate_command)
app.command("compare")(compare_command)

FEW = ("--window", "32", "--windows", "2", "--workers", "1", "--resamples", "0", "--quiet")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_scout(tmp_path_factory.mktemp("made"), ("fp8-dynamic", "Q8_0", "F16", "packed-int4"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in several files."""
    return convert(DEMO, "w4a16-rtn", tmp_path_factory.mktemp("shards"), max_shard_bytes=200_000).artifacts[0].directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(result: Any) -> str:
    """What a command said, without the breaks and the frame of its lines."""
    return " ".join(result.output.replace("│", " ").split())


# ----------------------------------------------------------------------------------------------------------- damaged files


def damage(path: Path, what: str) -> None:
    """One way in which copying goes wrong, for a file."""
    data = path.read_bytes()
    if what == "missing":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:24] + bytes(255 - byte for byte in data[24:64]) + data[64:])


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
    ("name", "pattern", "what", "says"),
    [
        ("shards", "model-00002-of-*.safetensors", "truncated", "are missing. Copy it again, or convert again."),
        ("shards", "model-00002-of-*.safetensors", "missing", "Copy them again, or convert again."),
        ("shards", "*.index.json", "truncated", "Copy it again, or convert again."),
        ("Q8_0", "tiny-scout*.gguf", "header", "or convert again."),
        ("packed-int4", "*.packed", "header", "or convert again."),
        ("packed-int4", "*.packed", "truncated", "or convert again."),
    ],
)
def test_a_damaged_artifact_is_the_artifacts_fault(
    name: str, pattern: str, what: str, says: str, manifest: bool, made: Made, shards: Path, tmp_path: Path, cache: Path
) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(shards if name == "shards" else made.artifact(name), artifact)
    if not manifest:
        (artifact / "manifest.json").unlink()
    damage(sorted(artifact.glob(pattern))[0], what)
    result = run("eval", artifact, "--reference", DEMO, "--cache", cache, *FEW)
    assert result.exit_code == 7, result.output
    said = " ".join(result.output.split())
    assert says in said and "ownload" not in said and str(artifact) in said


@pytest.mark.parametrize("what", ["truncated", "missing"])
def test_a_damaged_reference_is_the_references_fault(what: str, made: Made, tmp_path: Path, cache: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(DEMO, reference)
    damage(reference / "model-00002-of-00003.safetensors", what)
    result = run("eval", made.artifact("fp8-dynamic"), "--reference", reference, "--cache", cache, *FEW)
    assert result.exit_code == 3, result.output
    assert "ownload" in result.output


def test_an_artifact_that_changes_while_it_is_measured(made: Made, tmp_path: Path, cache: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(made.artifact("fp8-dynamic"), artifact)

    def progress(event: Any) -> None:
        if event.phase == "artifact" and event.layer == 1:
            (artifact / "model.safetensors").write_bytes((artifact / "model.safetensors").read_bytes()[:5000])

    with pytest.raises(ArtifactError, match="has changed since it was opened"):
        small(made, [artifact], cache, progress=progress)


def test_files_that_change_before_the_golden_set_is_asked(made: Made, shards: Path, tmp_path: Path, cache: Path) -> None:
    """The evaluation itself comes from the cache then, so the questions are the first to read them."""
    reference, artifact = tmp_path / "reference", tmp_path / "artifact"
    shutil.copytree(DEMO, reference)
    shutil.copytree(shards, artifact)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"kind": "exact", "prompt": "one two", "answer": "three", "max_tokens": 2}\n')
    options: dict[str, Any] = {"window": 32, "windows": 2, "workers": 1, "resamples": 0, "cache": cache}
    evaluate(artifact, reference, **options)

    def truncating(file: Path, phase: str, name: str) -> Any:
        def progress(event: Any) -> None:
            if (event.phase, event.model) == (phase, name) and event.tokens == 0:
                file.write_bytes(file.read_bytes()[:5000])

        return progress

    for file, name, kind in (
        (next(artifact.glob("model-00002-of-*.safetensors")), "artifact", ArtifactError),
        (reference / "model-00002-of-00003.safetensors", "reference", CheckpointError),
    ):
        whole = file.read_bytes()
        with pytest.raises(kind, match=f"{name}/{file.name} has changed since it was opened") as caught:
            evaluate(artifact, reference, golden=questions, progress=truncating(file, "golden", name), **options)
        assert type(caught.value) is kind and caught.value.exit_code == (7 if kind is ArtifactError else 3)
        file.write_bytes(whole)


@pytest.mark.parametrize(("name", "scheme"), [("fp8-dynamic", "fp8-channel-dynamic"), ("Q8_0", "Q8_0"), ("packed-int4", "int4")])
def test_a_quantized_reference_is_refused(name: str, scheme: str, made: Made, cache: Path) -> None:
    with pytest.raises(
        AlreadyQuantizedError, match=rf"{name}: the reference is quantized \({scheme}.*\)\. Give the BF16 checkpoint"
    ):
        evaluate(made.artifact("fp8-dynamic"), made.artifact(name), window=32, windows=2, cache=cache)
    assert not cache.exists()


def test_a_reference_of_floats_may_be_a_gguf_file(made: Made, tmp_path: Path, cache: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(made.artifact("F16"), reference)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, reference)
    found = evaluate(made.artifact("F16"), reference, window=32, windows=2, cache=cache, workers=1, resamples=0)
    assert found.artifacts[0].scores.divergence.value == 0


# --------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argument", "value", "kind"),
    [
        ("seed", -3, CorpusError),
        ("windows", 2.5, CorpusError),
        ("windows", 0, CorpusError),
        ("window", 2, CorpusError),
        ("window", True, CorpusError),
        ("resamples", -1, RecipeError),
        ("batch_tokens", -5, RecipeError),
        ("workers", -1, RecipeError),
    ],
)
def test_numbers_that_mean_nothing(argument: str, value: object, kind: type[Exception], tmp_path: Path, cache: Path) -> None:
    with pytest.raises(kind, match=rf"{argument} is {value}; expected an integer of at least \d"):
        evaluate([tmp_path / "none"], tmp_path / "nowhere", cache=cache, **{argument: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "says"), [("foo", "expected cpu, cuda or cuda:N"), ("cuda:99", "there is no device 'cuda:99'")])
def test_a_device_that_is_not_there(device: str, says: str, made: Made, cache: Path) -> None:
    with pytest.raises(CalibrationError, match=says):
        small(made, ["fp8-dynamic"], cache, device=device)
    assert not cache.exists()
    result = run("eval", made.artifact("fp8-dynamic"), "--reference", DEMO, "--cache", cache, "--device", device, *FEW)
    assert result.exit_code == 9 and says in " ".join(result.output.split())


@pytest.mark.parametrize("option", [("--seed", "-1"), ("--window", "2"), ("--cache-limit", "20 apples"), ("--cache-limit", "0")])
def test_options_out_of_range_are_wrong_usage(option: tuple[str, str], made: Made) -> None:
    for command in ("eval", "compare"):
        assert run(command, made.artifact("fp8-dynamic"), "--reference", DEMO, *option).exit_code == 2


def test_paths_may_be_strings(made: Made, cache: Path) -> None:
    found = evaluate(str(made.artifact("fp8-dynamic")), str(DEMO), window=32, windows=2, cache=str(cache), workers=1)
    assert [one.name for one in found.artifacts] == ["fp8-dynamic"] and cache.is_dir()


def test_one_artifact_under_two_spellings_is_one(made: Made, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "link").symlink_to(made.artifact("Q8_0"))
    [file] = made.artifact("Q8_0").glob("tiny-scout*.gguf")
    for other in (made.output / "fp8-dynamic" / ".." / "Q8_0", tmp_path / "link", file):
        with pytest.raises(RecipeError, match=r"Q8_0 was given twice, the second time as .*\. Give each artifact once"):
            small(made, [made.artifact("Q8_0"), other], cache)


def test_an_artifact_given_twice_is_wrong_usage(made: Made, tmp_path: Path, cache: Path) -> None:
    one = made.artifact("fp8-dynamic")
    result = run("compare", one, f"{one}/", "--reference", DEMO, "--cache", cache, "-o", tmp_path / "report", *FEW)
    assert result.exit_code == 2 and "given twice" in said(result)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["artifacts", "reference", "text", "golden", "cache"])
@pytest.mark.parametrize("value", ["", 5, b"demo", "a\0b", "\ud800", "a text " * 99, ["", 3], object(), None])
def test_what_is_no_path(name: str, value: Any, made: Made, cache: Path) -> None:
    if value is None and name in ("text", "golden", "cache"):
        return  # has a meaning
    given: dict[str, Any] = {"artifacts": made.artifact("fp8-dynamic"), "reference": DEMO, "cache": cache} | {name: value}
    with pytest.raises(RecipeError, match=r"(an artifact|reference|text|golden|cache) is .*; expected a path"):
        evaluate(**given)
    assert not cache.exists()


@pytest.mark.parametrize("option", ["--reference", "--text", "--golden", "--cache"])
def test_an_empty_path_is_wrong_usage(option: str, made: Made) -> None:
    one = str(made.artifact("fp8-dynamic"))
    assert run("eval", one, "--reference", DEMO, option, "").exit_code == 2
    result = run("eval", "", "--reference", DEMO)
    assert result.exit_code == 2 and "expected a path" in said(result)


def test_paths_of_any_kind(made: Made, cache: Path) -> None:
    class Elsewhere:
        def __init__(self, path: Path) -> None:
            self.path = path

        def __fspath__(self) -> str:
            return str(self.path)

    one = Elsewhere(made.artifact("fp8-dynamic"))
    found = evaluate(iter([one]), Elsewhere(DEMO), window=32, windows=2, cache=Elsewhere(cache), workers=1, resamples=0)
    assert [own.name for own in found.artifacts] == ["fp8-dynamic"] and found.reference_path == str(DEMO)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("progress", 5), ("stop", 5), ("round_activations", "no"), ("revision", 5), ("workers", "two"), ("resamples", [1])],
)
def test_other_arguments_of_the_wrong_kind(argument: str, value: Any, made: Made, cache: Path) -> None:
    with pytest.raises(RecipeError, match=rf"{argument} is .*; expected "):
        small(made, ["fp8-dynamic"], cache, **{argument: value})


def test_a_cache_that_is_a_file(made: Made, cache: Path) -> None:
    cache.write_text("")
    result = run("eval", made.artifact("fp8-dynamic"), "--reference", DEMO, "--cache", cache, *FEW)
    assert result.exit_code == 5 and "cache is a file: name a directory for the cache" in said(result)


def test_a_packed_file_in_place_of_its_directory(made: Made, cache: Path) -> None:
    file = made.artifact("packed-int4") / "model.packed"
    with pytest.raises(ArtifactError, match=r"model\.packed is a file of .* packed format\. Give the directory that holds it"):
        small(made, [file], cache)


def test_an_empty_text(made: Made, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.txt").write_text(" \n")
    with pytest.raises(CorpusError, match="is empty") as caught:
        small(made, ["fp8-dynamic"], cache, text=tmp_path / "text.txt")
    assert "calibrate" not in str(caught.value)


def test_a_window_longer_than_the_text_is_as_long_as_the_text(made: Made, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four")
    found = small(made, ["fp8-dynamic"], cache, text=tmp_path / "text.txt", window=30_000, windows=None)
    assert found.windows == 1 and 3 < found.window < 40
    assert found.artifacts[0].scores.positions == found.window - 1
    note = f"no text fills a window of 30,000 tokens; the longest has {found.window}"
    assert dict(text_facts(found))["Windows"].endswith(f"positions predicted; {note}")
    options = ("--reference", DEMO, "--cache", cache, "--resamples", 0, "--text", tmp_path / "text.txt", "--window", 30_000)
    result = run("eval", made.artifact("fp8-dynamic"), *options, "--quiet", "--json")
    assert result.exit_code == 0 and result.stderr == f"Note: {note}\n"
    assert json.loads(result.stdout)["text"]["window_reduced_to"] == found.window


def test_a_cache_with_strange_things_in_it(made: Made, cache: Path) -> None:
    small(made, ["fp8-dynamic"], cache)
    [scores] = cache.rglob("scores-*")
    scores.unlink()
    scores.mkdir()
    with pytest.raises(OutputError, match=r"scores-00000 is no file, as the cache needs. Remove it, or .*--cache"):
        small(made, ["fp8-dynamic"], cache)
    scores.rmdir()
    scores.parent.rmdir()
    scores.parent.write_text("")
    with pytest.raises(OutputError, match="is no directory, as the cache needs"):
        small(made, ["fp8-dynamic"], cache)


# ------------------------------------------------------------------------------------------------------------ what is skipped


def test_calibrations_and_reports_are_skipped(made: Made, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "statistics.json").write_text("{}")
    one, report = made.artifact("fp8-dynamic"), tmp_path / "report"
    options = ("--reference", DEMO, "--cache", cache, "-o", report, *FEW)
    result = run("compare", tmp_path / "calibration", one, *options)
    assert result.exit_code == 0, result.output
    assert f"Skipped: {tmp_path / 'calibration'} (a cal" in result.stderr
    as_json = run("compare", one, tmp_path / "calibration", report, *options, "--force", "--json")
    assert json.loads(as_json.stdout)["skipped"] == [str(tmp_path / "calibration"), str(report)]
    for paths in ((tmp_path / "calibration",), (tmp_path / "calibration", report)):
        nothing = run("compare", *paths, *options, "--force")
        assert nothing.exit_code == 7 and "Give the directory" in said(nothing)
    too_long = run("compare", "a" * 300, one, *options, "--force", "--json")
    assert too_long.exit_code == 2 and "expected a path" in said(too_long)
    with pytest.raises(CheckpointError):
        evaluate(one, tmp_path / "calibration", cache=cache)


@pytest.mark.parametrize("what", ["empty", "unfinished", "unfinished GGUF"])
def test_a_failed_conversion_passes_no_gate(what: str, made: Made, tmp_path: Path, cache: Path) -> None:
    """``out/*`` names what it left, too."""
    left = tmp_path / ("empty" if what == "empty" else "artifact.partial")
    left.mkdir()
    if what != "empty":
        (left / "journal.jsonl").write_text("")
        source = made.artifact("fp8-dynamic") / "config.json"
        (left / ("config.json" if what == "unfinished" else "model.gguf")).write_bytes(source.read_bytes())
    arguments = (made.artifact("fp8-dynamic"), left, "--reference", DEMO, "--cache", cache, "-o", tmp_path / "report", *FEW)
    result = run("compare", *arguments, "--fail-if", "kld > 10")
    assert result.exit_code == 7 and str(left) in "".join(result.stderr.split("\n")), result.output
    assert what == "empty" or "was not finished" in " ".join(result.stderr.split())


def test_a_report_is_not_written_into_an_artifact(made: Made, cache: Path) -> None:
    one = made.artifact("fp8-dynamic")
    result = run("compare", one, "--reference", DEMO, "--cache", cache, "-o", one, *FEW)
    assert result.exit_code == 5 and "name another for the report" in " ".join(result.stderr.split())


def test_what_is_longer_than_the_model_knows_is_refused_before_any_work(made: Made, tmp_path: Path, cache: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    long = {"prompt": "The history of the city. " * 6000, "kind": "exact", "answer": "b"}
    questions.write_text(json.dumps({"prompt": "a", "kind": "exact", "answer": "b"}) + "\n" + json.dumps(long) + "\n")
    common = ("eval", made.artifact("Q8_0"), "--reference", DEMO, "--cache", cache, *FEW)
    result = run(*common, "--golden", questions)
    assert result.exit_code == 8, result.output
    assert "questions.jsonl line 2: the question has" in said(result) and "the 32,768 positions" in said(result)
    result = run(*common, "--window", "32769")
    assert result.exit_code == 8 and "A window of 32,769 tokens is more than the 32,768 positions" in said(result)
    assert not cache.exists()
