"""The pipeline end to end: sizes as planned, same bytes whatever the workers, one pass for many artifacts."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.convert import Progress, convert, plan
from quantkit.errors import Interrupted, LedgerError, OutputError, RecipeError, ResumeError, WeightError
from quantkit.formats.base import DTYPE_BYTES
from quantkit.recipe import PRESETS, parse_recipe
from quantkit.verify import verify
from tests.artifact_files import digests, stop_after
from tests.tiny_models import write_tiny_model

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"


@pytest.fixture(scope="module")
def maverick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("maverick")
    write_tiny_model(directory, "maverick", seed=1)
    return directory


@pytest.mark.parametrize("name", [name for name, recipe in PRESETS.items() if not recipe.needs_calibration])
@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_every_preset_converts_and_verifies_with_the_planned_sizes(name: str, kind: str, maverick: Path, tmp_path: Path) -> None:
    source = DEMO if kind == "scout" else maverick
    [predicted] = plan(source, [name]).artifacts
    [made] = convert(source, [name], tmp_path).artifacts
    assert {path.name: path.stat().st_size for path in made.directory.iterdir()} == predicted.file_sizes
    result = verify(made.directory, source, sample=64)
    assert all(check.ok for check in result.checks)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bytes_do_not_depend_on_workers_or_on_company(maverick: Path, tmp_path: Path) -> None:
    names = ["w4a16-rtn", "fp8-dynamic", "nvfp4a16"]
    convert(maverick, names, tmp_path / "one", workers=1)
    convert(maverick, names, tmp_path / "many", workers=7)
    for name in names:
        convert(maverick, [name], tmp_path / "alone", workers=2)
        expected = digests(tmp_path / "one" / name)
        assert digests(tmp_path / "many" / name) == expected
        assert digests(tmp_path / "alone" / name) == expected


def test_every_weight_is_read_once_for_all_artifacts(tmp_path: Path, bytes_read: Callable[[], int]) -> None:
    result = convert(DEMO, ["w4a16-rtn", "fp8-dynamic", "w8a16"], tmp_path)
    assert result.source_bytes <= bytes_read() < 1.01 * result.source_bytes


def test_kept_tensors_and_carried_files_are_equal_to_the_source(tmp_path: Path) -> None:
    [made] = convert(DEMO, ["w4a16-rtn"], tmp_path).artifacts
    source: dict[str, torch.Tensor] = {}
    for shard in DEMO.glob("*.safetensors"):
        source |= load_file(shard)
    for path in made.directory.glob("*.safetensors"):
        for name, stored in load_file(path).items():
            if "feed_forward" not in name or "router" in name:
                assert torch.equal(stored.view(torch.uint8), source.pop(name).view(torch.uint8)), name
    assert all("feed_forward" in name for name in source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (made.directory / name).read_bytes() == (DEMO / name).read_bytes()
    config = json.loads((made.directory / "config.json").read_text())
    config.pop("quantization_config")
    assert config == json.loads((DEMO / "config.json").read_text())


def test_progress_counts_every_unit_and_ends_complete(tmp_path: Path) -> None:
    seen: list[Progress] = []
    convert(DEMO, ["fp8-dynamic"], tmp_path, progress=seen.append, workers=3)
    converted = [event for event in seen if event.phase == "convert"]
    assert [event.units_done for event in converted] == list(range(1, len(converted) + 1))
    assert converted[-1].units_done == converted[-1].units_total
    assert converted[-1].bytes_done == converted[-1].bytes_total
    assert any("experts.15" in event.current for event in converted)
    phases = [event.phase for event in seen]
    assert phases == sorted(phases, key=["prepare", "convert", "check"].index)
    assert seen[0].current == "fp8-channel-dynamic"
    assert seen[-1].bytes_done == seen[-1].bytes_total


def test_stop_then_resume_gives_the_same_bytes_and_redoes_nothing(tmp_path: Path) -> None:
    convert(DEMO, ["w4a16-rtn"], tmp_path / "straight")
    stop = threading.Event()

    def stop_soon(event: Progress) -> None:
        if event.units_done == 40:
            stop.set()

    with pytest.raises(Interrupted, match="run the same command again"):
        convert(DEMO, ["w4a16-rtn"], tmp_path / "stopped", progress=stop_soon, stop=stop)
    assert not (tmp_path / "stopped" / "w4a16-rtn").exists()
    seen: list[Progress] = []
    [made] = convert(DEMO, ["w4a16-rtn"], tmp_path / "stopped", progress=seen.append).artifacts
    assert made.units_resumed >= 40
    assert sum(event.phase == "convert" for event in seen) == seen[-1].units_total - made.units_resumed
    assert digests(made.directory) == digests(tmp_path / "straight" / "w4a16-rtn")


def test_a_run_may_be_resumed_with_more_targets(tmp_path: Path) -> None:
    stop_after(20, DEMO, ["w8a8-rtn"], tmp_path)
    first, second = convert(DEMO, ["w8a8-rtn", "mxfp4a16"], tmp_path).artifacts
    assert first.units_resumed >= 20
    assert second.units_resumed == 0
    verify(first.directory, DEMO)
    verify(second.directory, DEMO)


def test_another_recipe_or_source_may_not_resume(tmp_path: Path, maverick: Path) -> None:
    stop_after(20, DEMO, ["w8a8-rtn"], tmp_path)
    with pytest.raises(ResumeError, match="source"):
        convert(maverick, ["w8a8-rtn"], tmp_path)
    [made] = convert(maverick, ["w8a8-rtn"], tmp_path, restart=True).artifacts
    verify(made.directory, maverick)


def test_existing_artifacts_are_kept_unless_forced(tmp_path: Path) -> None:
    [made] = convert(DEMO, ["w8a8-rtn"], tmp_path).artifacts
    before = digests(made.directory)
    with pytest.raises(OutputError, match="--force"):
        convert(DEMO, ["w8a8-rtn"], tmp_path)
    assert digests(made.directory) == before
    convert(DEMO, ["w8a8-rtn"], tmp_path, force=True)
    assert digests(made.directory) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "index", "expected"),
    [
        (
            "language_model.model.layers.1.feed_forward.experts.gate_up_proj",
            (3, 7, 9),
            "layers.1.feed_forward.experts.gate_up_proj.*expert 3",
        ),
        (
            "language_model.model.layers.1.feed_forward.experts.down_proj",
            (2, 0, 0),
            "layers.1.feed_forward.experts.down_proj.*expert 2",
        ),
        (
            "language_model.model.layers.0.feed_forward.shared_expert.up_proj.weight",
            (3, 4),
            "layers.0.feed_forward.shared_expert.up_proj",
        ),
        ("language_model.model.layers.1.feed_forward.router.weight", (0, 0), "layers.1.feed_forward.router"),
        ("language_model.model.layers.1.self_attn.k_proj.weight", (0, 1), "layers.1.self_attn.k_proj"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, tensor: str, index: tuple[int, ...], expected: str, value: float
) -> None:
    source = tmp_path / "source"
    write_tiny_model(source, "scout", seed=2)
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensor in tensors:
            tensors[tensor][index] = value
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(WeightError, match=expected):
        convert(source, ["w4a16-rtn"], tmp_path / "out")
    assert not (tmp_path / "out" / "w4a16-rtn").exists()


def test_an_error_above_the_bound_ends_the_run(tmp_path: Path) -> None:
    recipe = parse_recipe(
        'name = "strict"\nmaximum_error = 0.05\n[[rules]]\nroles = ["routed_expert"]\nscheme = "int4-g128"\n'
        '[[rules]]\nscheme = "keep"',
        "test",
    )
    with pytest.raises(LedgerError, match=r"experts.*above the bound 0.05"):
        convert(DEMO, [recipe], tmp_path)
    assert not (tmp_path / "strict").exists()


def test_layers_may_differ_and_kept_experts_are_spelled_one_by_one(tmp_path: Path) -> None:
    recipe = parse_recipe(
        'name = "mixed"\n[[rules]]\nroles = ["routed_expert", "shared_expert"]\nlayers = "0"\nscheme = "int8-g128"\n'
        '[[rules]]\nlayers = "3"\nscheme = "keep"\n'
        '[[rules]]\nroles = ["routed_expert", "shared_expert"]\nscheme = "int4-g128"\n[[rules]]\nscheme = "keep"',
        "test",
    )
    [made] = convert(DEMO, [recipe], tmp_path).artifacts
    verify(made.directory, DEMO, sample=1000)
    stored: dict[str, torch.Tensor] = {}
    for path in made.directory.glob("*.safetensors"):
        stored |= load_file(path)
    base = "language_model.model.layers."
    assert stored[f"{base}0.feed_forward.experts.1.up_proj.weight_packed"].shape == (256, 256 // 4)
    assert stored[f"{base}1.feed_forward.experts.1.up_proj.weight_packed"].shape == (256, 256 // 8)
    source: dict[str, torch.Tensor] = {}
    for shard in DEMO.glob("*.safetensors"):
        source |= load_file(shard)
    fused = source[f"{base}3.feed_forward.experts.gate_up_proj"]
    for expert in range(16):
        assert torch.equal(stored[f"{base}3.feed_forward.experts.{expert}.gate_proj.weight"], fused[expert, :, :256].T)
        assert torch.equal(stored[f"{base}3.feed_forward.experts.{expert}.up_proj.weight"], fused[expert, :, 256:].T)
    assert f"{base}3.feed_forward.experts.gate_up_proj" not in stored


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    source = tmp_path / "w8a8-rtn"
    shutil.copytree(DEMO, source)
    (source / "manifest.json").write_text('{"quantkit_manifest": 1}')
    before = digests(source)
    with pytest.raises(OutputError, match="holds the source"):
        convert(source, "w8a8-rtn", tmp_path, force=True)
    nested = tmp_path / "fp8-dynamic.partial" / "model"
    shutil.copytree(DEMO, nested)
    with pytest.raises(OutputError, match="holds the source"):
        convert(nested, "fp8-dynamic", tmp_path, restart=True)
    assert digests(source) == before
    assert digests(nested) == digests(DEMO)


def test_a_kill_in_the_last_clean_up_leaves_nothing_that_a_repetition_does_not_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    original = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "journal.jsonl" and path.parent.name == "w8a8-rtn":
            raise Killed
        original(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            convert(DEMO, ["fp8-dynamic", "w8a8-rtn"], tmp_path)
    assert (tmp_path / "w8a8-rtn" / "journal.jsonl").is_file()
    with pytest.raises(OutputError, match="fp8-dynamic exists already"):
        convert(DEMO, ["fp8-dynamic", "w8a8-rtn"], tmp_path)
    for name in ("fp8-dynamic", "w8a8-rtn"):
        verify(tmp_path / name, DEMO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8-dynamic", "w8a8-rtn"]


@pytest.mark.parametrize("workers", [0, -3, 1.5])
def test_wrong_options_are_refused_before_any_output(tmp_path: Path, workers: int) -> None:
    with pytest.raises(RecipeError, match="workers is"):
        convert(DEMO, "w8a8-rtn", tmp_path / "out", workers=workers)
    with pytest.raises(RecipeError, match="shard size"):
        convert(DEMO, "w8a8-rtn", tmp_path / "out", max_shard_bytes=2.5e6)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_another_shard_size_does_not_resume(tmp_path: Path) -> None:
    stop_after(20, DEMO, "w8a8-rtn", tmp_path)
    with pytest.raises(ResumeError, match="max_shard_bytes: was usual, is now 2000000"):
        convert(DEMO, "w8a8-rtn", tmp_path, max_shard_bytes=2_000_000)


def test_an_interrupt_before_the_first_unit_leaves_nothing(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        convert(DEMO, ["w8a8-rtn", "fp8-dynamic"], tmp_path / "out", stop=stop)
    assert not (tmp_path / "out").exists()


def test_data_lies_in_the_order_in_which_it_is_written(tmp_path: Path) -> None:
    """Units follow each other in the file, and every tensor is aligned to its element size."""
    for name in ("fp8-dynamic", "nvfp4a16", "w4a16-rtn-asym"):
        [artifact] = plan(DEMO, name).artifacts
        for file in artifact.files:
            order = sorted(file.tensors, key=lambda tensor: file.offsets[tensor.name])
            assert [tensor.name for tensor in order] == [tensor.name for tensor in file.tensors]
            assert all(file.offsets[tensor.name] % DTYPE_BYTES[tensor.dtype] == 0 for tensor in file.tensors)
