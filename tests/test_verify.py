"""Verification must pass what is whole and name what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.convert import convert
from quantkit.errors import ArtifactError
from quantkit.verify import verify

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"
EXPERT = "language_model.model.layers.2.feed_forward.experts.4.down_proj"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO, ["w4a16-rtn"], tmp_path_factory.mktemp("artifact")).artifacts[0].directory


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def sign_again(directory: Path) -> None:
    """Make the manifest agree with changed files, so that the checks behind it are what finds the change."""
    import hashlib

    manifest = json.loads((directory / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
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
        (lambda d: (d / "extra.txt").write_text("x"), "extra.txt is not listed"),
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


def test_a_source_is_not_an_artifact() -> None:
    with pytest.raises(ArtifactError, match=r"manifest.json cannot be read"):
        verify(DEMO)
