"""The hub, without a network: a cache on disk in the hub's own layout, and the hub's functions replaced by ones that fail."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from four_shards import EXPERTS, SHARDS, contents, edit_config, write_four_shards
from huggingface_hub import errors as hub_errors

from quantkit.checkpoint import Checkpoint, load_config
from quantkit.errors import AlreadyQuantizedError, CheckpointError
from quantkit.hub import NEEDED, is_carried


@pytest.fixture
def scout(tmp_path: Path) -> Path:
    return write_four_shards(tmp_path / "scout")


@pytest.fixture
def cache(scout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds owner/tiny at main = 1111..., and no network."""
    commit = "1" * 40
    root = tmp_path / "hub"
    repository = root / "models--owner--tiny"
    snapshot = repository / "snapshots" / commit
    for directory in (repository / "blobs", repository / "refs", snapshot):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for item in sorted(scout.iterdir()):
        shutil.copy(item, repository / "blobs" / item.name)
        (snapshot / item.name).symlink_to(Path("../../blobs") / item.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_repository_from_the_cache(cache: Path) -> None:
    with Checkpoint.open("owner/tiny") as checkpoint:
        assert checkpoint.directory.resolve() == cache.resolve()
        assert checkpoint.provenance()["repository"] == "owner/tiny"
        assert checkpoint.provenance()["commit"] == cache.name
        assert torch.equal(checkpoint.read_slice(f"{EXPERTS}down_proj"), contents(cache)[f"{EXPERTS}down_proj"])
    assert load_config("owner/tiny", cache.name)[0] == (cache / "config.json").read_text()


def test_offline_and_not_in_the_cache(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a local directory nor complete in the local cache"):
        Checkpoint.open("owner/other")
    with pytest.raises(CheckpointError, match="owner/tiny at revision v2"):
        Checkpoint.open("owner/tiny", "v2")


def test_snapshot_that_lacks_a_shard(cache: Path) -> None:
    (cache / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=r"missing \(1 of 4\)|neither a local directory nor complete"):
        Checkpoint.open("owner/tiny")


def test_a_local_directory_goes_before_the_hub(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "owner" / "tiny")
    with Checkpoint.open("owner/tiny") as checkpoint:
        assert checkpoint.directory == Path("owner/tiny")
        assert "commit" not in checkpoint.provenance()


def test_what_is_asked_of_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def one_file(repository: str, name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(cache / name)

    def snapshot(repository: str, **options: Any) -> str:
        asked.append(("snapshot", options))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    Checkpoint.open("owner/tiny", "v1").close()
    assert [name for name, _ in asked] == ["config.json", "snapshot"]
    assert all(options["revision"] == "v1" for _, options in asked)
    patterns = {key: asked[1][1][key] for key in ("allow_patterns", "ignore_patterns")}
    files = [path.name for path in cache.iterdir()]
    others = ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "pytorch_model.bin", "a.png"]
    kept = list(huggingface_hub.utils.filter_repo_objects([*files, *others], **patterns))
    assert sorted(kept) == sorted(files)


def test_every_carried_file_is_downloaded() -> None:
    names = ["tokenizer.json", "Tokenizer.model", "chat_template.JINJA", "merges.txt", "vocab.json", "COPYING", "Copying.md"]
    names += ["license", "LICENCE-MIT.txt", "Use_Policy.md", "NOTICE", "preprocessor_config.json", "generation_config.json"]
    assert all(is_carried(name) for name in names)
    assert list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=list(NEEDED))) == names
    assert not any(is_carried(name) for name in ("README.md", "config.json", "model.safetensors.index.json", "licenses", "x.txt"))


def test_a_misspelt_path_is_not_asked_of_the_hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    for misspelt in ("scout/tini", "./scot", "../scot", "~/scot", "a/b/c"):
        with pytest.raises(CheckpointError, match="there is no directory"):
            Checkpoint.open(misspelt)
    monkeypatch.setenv("HOME", str(tmp_path))
    with Checkpoint.open("~/scout") as checkpoint:
        assert checkpoint.directory == tmp_path / "scout"


def test_a_quantized_repository_is_refused_before_its_weights_are_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(cache, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("weights were asked for"))
    with pytest.raises(AlreadyQuantizedError, match="fp8"):
        Checkpoint.open("owner/tiny")


def without_response(kind: type[Exception]) -> Exception:
    """A hub error as it would come from an answer of the server, which there is none of here."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error.\nmore lines",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (without_response(hub_errors.GatedRepoError), r"owner/tiny at revision v1 is gated: accept its licence"),
        (without_response(hub_errors.RepositoryNotFoundError), "neither a local directory nor a repository"),
        (without_response(hub_errors.RevisionNotFoundError), "has no revision v1"),
        (without_response(hub_errors.EntryNotFoundError), "lacks a file"),
        (without_response(hub_errors.LocalEntryNotFoundError), "the hub cannot be reached: 401 Client Error"),
        (without_response(hub_errors.HfHubHTTPError), r"cannot be downloaded: 401 Client Error\. Run the same command again"),
        (hub_errors.HFValidationError("bad name"), "bad name"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("Data processing error"), "Data processing error"),
        (ConnectionError("reset by peer"), "reset by peer"),
    ],
)
def test_hub_errors_become_one_error(error: Exception, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, **__: str(cache / name))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open("owner/tiny", "v1")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=message):
        load_config("owner/tiny", "v1")
