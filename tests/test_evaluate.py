"""What evaluations promise: the same figures whatever happens on the way, and an error instead of a figure that means nothing."""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quantkit import evaluation_cache
from quantkit.errors import ArtifactError, CheckpointError, CorpusError, Interrupted, OutputError, RecipeError
from quantkit.evaluate import EvaluationProgress, evaluate
from quantkit.evaluation import ArtifactEvaluation, Evaluation
from tests.evaluation_models import COUNT, WINDOW, Made, make_maverick, make_scout, small
from tests.gguf_models import DEMO, write_source

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {
        "scout": make_scout(tmp_path_factory.mktemp("scout"), ("w4a16-rtn", "fp8-dynamic", "Q8_0")),
        "maverick": make_maverick(tmp_path_factory.mktemp("maverick"), ("w4a16-rtn",)),
    }


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_model_does_not_differ_from_itself(made: dict[str, Made], cache: Path) -> None:
    found = small(made["maverick"], [made["maverick"].source], cache)
    [one] = found.artifacts
    assert one.scores.divergence.value == 0 and one.scores.divergence_percentiles["100"] == 0
    assert one.scores.agreement.value == one.scores.ratio.value == 1 and one.scores.probability_shift_square == 0
    assert one.router_agreement == (None, 1.0, None, 1.0) and one.format == "unquantized" and one.bits_per_weight == 16


# ---------------------------------------------------------------------------------------------- what must not change figures


def comparable(found: Evaluation) -> str:
    """All but times."""
    content = found.to_dict()
    content.pop("seconds")
    for artifact in content["artifacts"]:
        artifact.pop("seconds")
    return json.dumps(content, sort_keys=True)


def test_figures_depend_neither_on_threads_nor_on_the_cache(
    made: dict[str, Made], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("w4a16-rtn", "Q8_0")
    first = comparable(small(made["scout"], names, tmp_path / "one", workers=1))
    assert comparable(small(made["scout"], names, tmp_path / "two", workers=3)) == first
    assert comparable(small(made["scout"], names, tmp_path / "one")) == first
    files = sorted((tmp_path / "one").glob("*/*"))
    assert sorted(path.name for path in files) == ["scores-00000", "scores-00000", "states-00000"]
    caplog.set_level(logging.WARNING)
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    assert comparable(small(made["scout"], names, tmp_path / "one")) == first
    assert caplog.text.count("is damaged; what it held is computed again") == 3
    # One of several artifacts is new: the others' scores are taken, and nothing changes.
    alone = small(made["scout"], names[1:], tmp_path / "three")
    both = small(made["scout"], names, tmp_path / "three")
    assert comparable(both) == first and alone.artifacts[0].scores == both.artifacts[1].scores


def test_sweeps_change_nothing_that_counts(made: dict[str, Made], tmp_path: Path) -> None:
    whole = small(made["scout"], ["w4a16-rtn"], tmp_path / "one").artifacts[0]
    parts = small(made["scout"], ["w4a16-rtn"], tmp_path / "two", batch_tokens=3 * WINDOW).artifacts[0]
    assert len(list((tmp_path / "two").rglob("scores-*"))) == 3
    assert parts.scores.perplexity.value == pytest.approx(whole.scores.perplexity.value, rel=1e-5)
    assert parts.scores.divergence.value == pytest.approx(whole.scores.divergence.value, rel=1e-2)
    assert parts.router_agreement == pytest.approx(whole.router_agreement, abs=2e-3)


def test_what_files_hold_decides_what_is_used_again(made: dict[str, Made], tmp_path: Path, cache: Path) -> None:
    """Another conversion under the same name is computed, and rounding of activations is no detail either."""
    artifact = tmp_path / "artifact"
    shutil.copytree(made["scout"].artifact("fp8-dynamic"), artifact)
    first = small(made["scout"], [artifact], cache).artifacts[0]
    unrounded = small(made["scout"], [artifact], cache, round_activations=False).artifacts[0]
    assert 0 < unrounded.scores.divergence.value < first.scores.divergence.value
    shutil.rmtree(artifact)
    shutil.copytree(made["scout"].artifact("w4a16-rtn"), artifact)
    assert small(made["scout"], [artifact], cache).artifacts[0].scores.divergence.value > 2 * first.scores.divergence.value


def _changed_copy(source: Path, target: Path) -> Path:
    """A copy of a file or directory with other weights, still finite; names, sizes and times are those of the original."""
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    for path in [target] if target.is_file() else sorted(target.glob("model-*.safetensors")):
        data = bytearray(path.read_bytes())
        for place in range(len(data) // 2, len(data), 501):
            data[place] ^= 128
        path.write_bytes(data)
        original = source if source.is_file() else source / path.name
        shutil.copystat(original, path)
    return target


def test_files_of_equal_names_sizes_and_times_are_told_apart_by_their_content(made: dict[str, Made], tmp_path: Path) -> None:
    """As in image layers and archives that set all times to one."""
    [file] = made["scout"].artifact("Q8_0").glob("tiny-scout*.gguf")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [shutil.copy2(file, tmp_path / "a" / "model.gguf"), _changed_copy(file, tmp_path / "b" / "model.gguf")]
    good, bad = (one.scores.divergence.value for one in small(made["scout"], paths, tmp_path / "cache").artifacts)
    [alone] = small(made["scout"], paths[1:], tmp_path / "other").artifacts
    assert bad == alone.scores.divergence.value and bad > 2 * good > 0
    # The same of references.
    other = _changed_copy(DEMO, tmp_path / "tiny-scout")
    caches = [tmp_path / "cache", tmp_path / "other"]
    found = [evaluate(paths[0], other, window=WINDOW, windows=COUNT, workers=1, resamples=20, cache=cache) for cache in caches]
    assert comparable(found[0]) == comparable(found[1])
    assert found[0].artifacts[0].scores.divergence.value > 2 * good


@pytest.mark.parametrize("count", [1, 3])
def test_a_stopped_run_goes_on(count: int, made: dict[str, Made], tmp_path: Path) -> None:
    first = comparable(small(made["scout"], ["w4a16-rtn"], tmp_path / "one"))
    stop, seen = threading.Event(), 0

    def progress(event: EvaluationProgress) -> None:
        nonlocal seen
        seen += event.phase == "artifact"
        if seen == count:
            stop.set()

    with pytest.raises(Interrupted, match="goes on from there"):
        small(made["scout"], ["w4a16-rtn"], tmp_path / "two", progress=progress, stop=stop)
    assert bool(list((tmp_path / "two").rglob("unfinished-*"))) == (count > 1)
    events: list[EvaluationProgress] = []
    assert comparable(small(made["scout"], ["w4a16-rtn"], tmp_path / "two", progress=events.append)) == first
    layers = [event.layer for event in events if event.phase == "artifact"]
    assert layers == [0, 1, 2, 3, 4][layers[0] :] and layers[0] == count - 1
    assert not list((tmp_path / "two").rglob("unfinished-*"))


def test_interrupts_from_the_keyboard(made: dict[str, Made], cache: Path) -> None:
    def progress(event: EvaluationProgress) -> None:
        if event.phase == "scores":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        small(made["scout"], ["w4a16-rtn"], cache, progress=progress)


def test_progress_counts_up_to_the_end(made: dict[str, Made], cache: Path) -> None:
    events: list[EvaluationProgress] = []
    small(made["scout"], ["w4a16-rtn", "Q8_0"], cache, progress=events.append, batch_tokens=3 * WINDOW)
    phases = [event.phase for event in events]
    assert phases.index("check") < phases.index("reference") < phases.index("artifact") < phases.index("scores")
    for name in ("tiny-scout", "w4a16-rtn", "Q8_0"):
        done = [event.tokens for event in events if event.model == name and event.phase in ("reference", "artifact")]
        assert done == sorted(done) and done[0] == 0 and done[-1] == 4 * COUNT * WINDOW
        assert {event.tokens_total for event in events if event.model == name and event.phase != "check"} >= {4 * COUNT * WINDOW}
    for name in ("w4a16-rtn", "Q8_0"):
        scored = [(event.tokens, event.tokens_total) for event in events if event.model == name and event.phase == "scores"]
        assert sum(done == 0 for done, _ in scored) == sum(done == total for done, total in scored) == -(-COUNT // 3)
    drawn = [event for event in events if event.phase == "intervals"]
    assert events[-len(drawn) :] == drawn and len(drawn) > 2 and {event.model for event in drawn} == {""}
    assert [event.tokens for event in drawn] == list(range(drawn[-1].tokens_total + 1))
    assert all(earlier.seconds <= later.seconds for earlier, later in pairwise(events))


def test_the_bootstrap_can_be_stopped(made: dict[str, Made], cache: Path) -> None:
    stop = threading.Event()

    def progress(event: EvaluationProgress) -> None:
        if event.phase == "intervals" and event.tokens:
            stop.set()

    with pytest.raises(Interrupted, match="goes on from there"):
        small(made["scout"], ["w4a16-rtn"], cache, progress=progress, stop=stop)


# ------------------------------------------------------------------------------------------------------------------ errors


def test_a_flipped_bit_is_an_error_and_no_figure(made: dict[str, Made], tmp_path: Path, cache: Path) -> None:
    for name, pattern in (("w4a16-rtn", "*.safetensors"), ("Q8_0", "tiny-scout*.gguf")):
        shutil.copytree(made["scout"].artifact(name), tmp_path / name)
        [file] = (tmp_path / name).glob(pattern)
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1
        file.write_bytes(data)
        for path in (tmp_path / name, *([file] if name == "Q8_0" else [])):
            with pytest.raises(ArtifactError, match=rf"(?s){name}.* is not what its manifest says: .*another sha256"):
                small(made["scout"], [path], cache)


def test_another_model_is_an_error(made: dict[str, Made], tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is another model than the reference .*: they differ in num_experts: 16 against 8"):
        small(made["maverick"], [made["scout"].artifact("w4a16-rtn")], cache)
    with pytest.raises(ArtifactError, match="num_experts: 16 against 8; moe_layers"):
        small(made["maverick"], [made["scout"].artifact("Q8_0")], cache)
    source = write_source(tmp_path / "smoothed", "scout", num_local_experts=16, rope_theta=10000.0)
    with pytest.raises(ArtifactError, match="differ in the rotary frequencies"):
        evaluate([made["scout"].artifact("Q8_0")], source, window=32, windows=2, cache=cache)


def test_another_tokenizer_is_an_error(made: dict[str, Made], tmp_path: Path, cache: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(DEMO, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = (token for token, number in vocabulary.items() if number in (300, 301))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("w4a16-rtn", "Q8_0"):
        with pytest.raises(ArtifactError, match=r"has another tokenizer than .*: token 300 is .* \(2 differ\)"):
            evaluate([made["scout"].artifact(name)], other, window=32, windows=2, cache=cache)


def test_a_tokenizer_written_in_another_way_is_the_same(made: dict[str, Made], tmp_path: Path, cache: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(DEMO, other)
    (other / "tokenizer.json").write_text(json.dumps(json.loads((other / "tokenizer.json").read_text()), indent=7))
    found = evaluate([made["scout"].artifact("w4a16-rtn")], other, window=32, windows=2, cache=cache, workers=1)
    assert found.windows == 2


@pytest.mark.parametrize("which", ["artifact", "reference", "head"])
def test_values_that_are_not_finite(which: str, made: dict[str, Made], tmp_path: Path, cache: Path) -> None:
    """Somebody else's files, without a manifest: a damaged scale is told with its layer and window."""
    source = DEMO if which != "reference" else made["scout"].artifact("w4a16-rtn")
    damaged = tmp_path / "damaged"
    shutil.copytree(DEMO if which == "reference" else made["scout"].artifact("w4a16-rtn"), damaged)
    (damaged / "manifest.json").unlink(missing_ok=True)
    wanted = {"artifact": "layers.2.self_attn.o_proj.weight", "reference": "layers.2.self_attn.o_proj.weight", "head": "lm_head"}
    [(file, name)] = [(path, name) for path in damaged.glob("*.safetensors") for name in load_file(path) if wanted[which] in name]
    tensors = load_file(file)
    tensors[name].view(-1)[5] = math.inf
    save_file(tensors, file, metadata={"format": "pt"})
    kind = CheckpointError if which == "reference" else ArtifactError
    what = "logits of window" if which == "head" else r"hidden states after layer 2 of window"
    artifact, reference = (source, damaged) if which == "reference" else (damaged, source)
    with pytest.raises(kind, match=rf"damaged: {what} .*, document 1, token 0 are not finite"):
        evaluate([artifact], reference, window=32, windows=2, cache=cache, workers=1)


def test_a_cache_that_cannot_be_written(made: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"write to the evaluation cache .*a part of this path is a file"):
        small(made["scout"], ["w4a16-rtn"], tmp_path / "file" / "cache")

    def full(descriptor: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_cache, "allocate_file", full)
    with pytest.raises(OutputError, match=r"states-00000: the disk is full: .* choose a cache directory \(--cache\)"):
        small(made["scout"], ["w4a16-rtn"], tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").glob("*/*") if path.is_file()]


def test_arguments_that_mean_nothing(made: dict[str, Made], cache: Path) -> None:
    with pytest.raises(RecipeError, match="No artifact was given"):
        small(made["scout"], [], cache)
    with pytest.raises(RecipeError, match="given twice"):
        small(made["scout"], ["w4a16-rtn", "w4a16-rtn"], cache)
    with pytest.raises(CorpusError, match="no convention"):
        small(made["scout"], ["w4a16-rtn"], cache, convention="other")


def test_artifacts_of_one_name_are_told_apart(made: dict[str, Made], tmp_path: Path, cache: Path) -> None:
    paths = []
    for parent, name in (("a", "fp8-dynamic"), ("b", "w4a16-rtn")):
        paths.append(tmp_path / parent / "same")
        shutil.copytree(made["scout"].artifact(name), paths[-1])
    found: tuple[ArtifactEvaluation, ...] = small(made["scout"], paths, cache).artifacts
    assert [one.name for one in found] == [str(path) for path in paths]


def test_an_artifact_called_like_the_reference_is_told_apart(
    made: dict[str, Made], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    shutil.copytree(made["scout"].artifact("w4a16-rtn"), tmp_path / "out" / DEMO.name)
    monkeypatch.chdir(tmp_path / "out")
    for path in (tmp_path / "out" / DEMO.name, Path(DEMO.name)):
        [found] = small(made["scout"], [path], cache).artifacts
        assert found.name == str(tmp_path / "out" / DEMO.name)
