"""Verification must pass what is whole and name what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.convert import convert
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.recipe import parse_recipe
from quantkit.verify import verify
from tests.artifact_files import sign_again
from tests.mutated_json import any_json, check_verification, places

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"
EXPERT = "language_model.model.layers.2.feed_forward.experts.4.down_proj"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO, ["w4a16-rtn"], tmp_path_factory.mktemp("artifact")).artifacts[0].directory


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def list_files(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest["files"])
    (directory / "manifest.json").write_text(json.dumps(manifest))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    [path] = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    sign_again(directory)


def test_a_whole_artifact_passes_with_and_without_its_source(artifact: Path) -> None:
    assert [check.name for check in verify(artifact).checks] == ["manifest", "headers", "tensors", "scales", "ledger", "sample"]
    result = verify(artifact, DEMO, sample=1000)
    assert [check.name for check in result.checks][-1] == "source"
    assert result.sampled == 4 * 17 * 3


def test_a_flipped_byte_is_found_by_its_hash(copy: Path) -> None:
    [path] = copy.glob("*.safetensors")
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ArtifactError, match=r"model.safetensors has another sha256"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        *(
            (lambda d, name=name: (d / name).write_text("x"), f"{name} is not listed")
            for name in (
                "x.bin",
                "x.pt",
                "x.pth",
                "modeling.py",
                "x.gguf",
                "X.GGUF",
                "model.safetensors.index.json",
                ".x.safetensors",
            )
        ),
        (lambda d: list_files(d, lambda files: files.pop("config.json")), "config.json is not listed"),
        (lambda d: list_files(d, lambda files: files.update({"a" * 300: {"size": 1}})), "aaa is missing"),
        (lambda d: list_files(d, lambda files: files.update({"a\0b": {"size": 1}})), r"'a.x00b' is listed, which is no file name"),
        (lambda d: list_files(d, lambda files: files.update({"../x": {"size": 1}})), r"'\.\./x' is listed, which is no file name"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json has 2 bytes"),
        (lambda d: (d / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda d: (d / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
        (lambda d: (d / "manifest.json").write_text("{}"), "lists no files"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x00" * 100), "headers"),
        (lambda d: (d / "config.json").unlink(), "not an artifact"),
    ],
)
def test_damaged_files_are_named(copy: Path, change: Callable[[Path], object], message: str) -> None:
    change(copy)
    with pytest.raises(ArtifactError, match=message):
        verify(copy)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{EXPERT}.weight_scale"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["language_model.model.layers.2.feed_forward.experts.99.down_proj.weight"] = torch.zeros(1)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{EXPERT}.weight_scale"] = tensors[f"{EXPERT}.weight_scale"].T.contiguous()


def _retype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{EXPERT}.weight_scale"] = tensors[f"{EXPERT}.weight_scale"].half()


def _spoil_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{EXPERT}.weight_scale"][3, 1] = float("nan")


def _negate_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{EXPERT}.weight_scale"][3, 1] *= -1


def _swap_experts(tensors: dict[str, torch.Tensor]) -> None:
    for end in ("weight_packed", "weight_scale"):
        other = EXPERT.replace("experts.4", "experts.5")
        tensors[f"{EXPERT}.{end}"], tensors[f"{other}.{end}"] = tensors[f"{other}.{end}"], tensors[f"{EXPERT}.{end}"]


def _touch_router(tensors: dict[str, torch.Tensor]) -> None:
    tensors["language_model.model.layers.2.feed_forward.router.weight"][0, 0] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, f"{EXPERT}.weight_scale is missing"),
        (_add, "experts.99.down_proj.weight is not expected"),
        (_reshape, r"weight_scale is BF16 \[2, 256\]; expected BF16 \[256, 2\]"),
        (_retype, "weight_scale is F16"),
        (_spoil_scale, f"{EXPERT}.weight_scale holds a scale that is not finite"),
        (_negate_scale, "not finite and positive"),
        (_swap_experts, r"experts\.[45]\.down_proj: relative error to the source is .*; the ledger says"),
        (_touch_router, "router.weight is kept but differs"),
    ],
)
def test_wrong_tensors_are_found_behind_a_valid_manifest(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    edit(copy, change)
    with pytest.raises(ArtifactError, match=message):
        verify(copy, DEMO, sample=1000)


def test_a_ledger_that_says_something_else_is_found(copy: Path) -> None:
    path = copy / "ledger.json"
    path.write_text(path.read_text().replace('"applied": "int4-g128"', '"applied": "keep"', 1))
    sign_again(copy)
    with pytest.raises(ArtifactError, match="asked int4-g128, applied keep"):
        verify(copy)


def test_the_wrong_source_is_refused(artifact: Path, tmp_path: Path) -> None:
    from tests.tiny_models import write_tiny_model

    write_tiny_model(tmp_path / "other", "scout", seed=5)
    with pytest.raises(ArtifactError, match=r"not the source of this artifact|differs from the source"):
        verify(artifact, tmp_path / "other")


def test_a_source_that_cannot_be_opened_says_nothing_against_the_artifact(artifact: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        verify(artifact, tmp_path / "nowhere")
    (copy / "ledger.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"(?s)ledger.*source: there is no directory"):
        verify(copy, tmp_path / "nowhere")


def test_a_file_is_not_an_artifact(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is a file\. Give the directory of the artifact"):
        verify(artifact / "config.json")


def test_a_source_is_not_an_artifact() -> None:
    with pytest.raises(ArtifactError, match=r"manifest.json cannot be read"):
        verify(DEMO)


def test_what_uploads_and_downloads_leave_does_no_harm(copy: Path) -> None:
    (copy / "README.md").write_text("model card")
    (copy / ".gitattributes").write_text("x")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    detail = verify(copy).checks[0].detail
    assert detail.endswith("not listed, and not read by loaders: .cache, .gitattributes, README.md")


def test_a_publication_that_was_cut_short_is_to_be_completed(copy: Path) -> None:
    (copy / "journal.jsonl").write_text("")
    with pytest.raises(ArtifactError, match=r"journal.jsonl is left: publishing was cut short") as caught:
        verify(copy)
    assert "Run the same convert command again" in str(caught.value)
    assert "Do not use it" not in str(caught.value)


def test_a_name_too_long_for_a_file_is_no_artifact() -> None:
    with pytest.raises(ArtifactError, match="is not an artifact"):
        verify("a" * 300)


# ------------------------------------------------------------------------------------------------------ kept routed experts

KEEPS = """
name = "keeps"
[[rules]]
roles = ["routed_expert"]
layers = "1"
scheme = "keep"
[[rules]]
roles = ["routed_expert"]
scheme = "int4-g128"
[[rules]]
scheme = "keep"
"""
KEPT_EXPERT = "language_model.model.layers.1.feed_forward.experts.3"


@pytest.fixture(scope="module")
def with_kept_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = parse_recipe(KEEPS, "keeps.toml")
    return convert(DEMO, [recipe], tmp_path_factory.mktemp("kept")).artifacts[0].directory


@pytest.fixture
def kept_copy(with_kept_experts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_kept_experts, tmp_path / "copy"))


def test_kept_experts_are_compared_with_the_source(with_kept_experts: Path) -> None:
    kept = sum(entry["applied"] == "keep" for entry in json.loads((with_kept_experts / "ledger.json").read_text())["tensors"])
    assert kept > 16 * 3
    assert verify(with_kept_experts, DEMO).checks[-1].detail.startswith(f"{kept} kept tensors equal the source")


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_a_kept_expert_that_differs_is_found(kept_copy: Path, projection: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{KEPT_EXPERT}.{projection}.weight"][-1, -1] += 1

    edit(kept_copy, change)
    with pytest.raises(ArtifactError, match=rf"{KEPT_EXPERT}\.{projection} is kept but differs from the source"):
        verify(kept_copy, DEMO)


def test_a_kept_tensor_of_equal_bytes_and_another_dtype_is_found(kept_copy: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{KEPT_EXPERT}.up_proj.weight"] = tensors[f"{KEPT_EXPERT}.up_proj.weight"].view(torch.float16)

    edit(kept_copy, change)
    with pytest.raises(ArtifactError, match=rf"{KEPT_EXPERT}\.up_proj is kept but differs from the source"):
        verify(kept_copy, DEMO)


@pytest.mark.parametrize("name", [f"{KEPT_EXPERT}.down_proj", "language_model.model.norm.weight"])
def test_a_ledger_with_another_source_digest_is_found(kept_copy: Path, name: str) -> None:
    ledger = json.loads((kept_copy / "ledger.json").read_text())
    [entry] = [entry for entry in ledger["tensors"] if entry["name"] == name]
    entry["source_digest"] = "0" * 16
    (kept_copy / "ledger.json").write_text(json.dumps(ledger))
    sign_again(kept_copy)
    assert verify(kept_copy).checks[-1].ok
    with pytest.raises(ArtifactError, match=rf"{name} is kept and equals the source, but the ledger does not say so"):
        verify(kept_copy, DEMO)


# --------------------------------------------------------------------------------------------------------- malformed JSON

_json = any_json("re:(", "keep", 10**400)


@pytest.fixture(scope="module")
def spare(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(artifact, tmp_path_factory.mktemp("spare") / "copy"))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["config.json", "ledger.json", "manifest.json"]))
def test_mutated_json_fails_verification_and_nothing_else(artifact: Path, spare: Path, data: st.DataObject, name: str) -> None:
    content = json.loads((artifact / name).read_text())
    part = content["quantization_config"] if name == "config.json" else content
    container, key = data.draw(st.sampled_from(places(part)))
    container[key] = data.draw(_json)
    check_verification(artifact, spare, name, content, DEMO)
