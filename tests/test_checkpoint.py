"""Checkpoint: every fault is found from headers and named; what is read is what the safetensors library reads."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import tiny_models
import torch
import xxhash
from huggingface_hub import errors as hub_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import Checkpoint, TensorFiles, load_config
from quantkit.errors import AlreadyQuantizedError, CheckpointError, QuantkitError, UnsupportedModelError
from quantkit.llama4 import Unit, WeightMatrix, inventory, units
from quantkit.workspace import Workspace

INDEX = "model.safetensors.index.json"
EXPERTS = "language_model.model.layers.1.feed_forward.experts."


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scout")
    tiny_models.write_tiny_model(directory, "scout", shard_bytes=800_000)
    return directory


@pytest.fixture
def scout(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint of several shards to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "scout"))


def contents(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, as the library reads them."""
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def shard_of(directory: Path, name: str) -> Path:
    return directory / str(json.loads((directory / INDEX).read_text())["weight_map"][name])


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def edit_shard(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------ reading


def logical(matrix: WeightMatrix, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix as transformers would use it in ``x @ W.T``."""
    stored = tensors[matrix.tensor]
    if matrix.expert is None:
        return stored
    gate, up = stored[matrix.expert].chunk(2, dim=-1) if matrix.projection != "down_proj" else (None, None)
    return {"gate_proj": gate, "up_proj": up, "down_proj": stored[matrix.expert]}[matrix.projection].T  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["scout", "maverick", "text"])
@pytest.mark.parametrize("shard_bytes", [500_000, 10**9])
def test_every_matrix_and_copy_is_read_as_the_library_reads_it(kind: str, shard_bytes: int, tmp_path: Path) -> None:
    tiny_models.write_tiny_model(tmp_path, kind, shard_bytes=shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 10**9)
    expected, workspace = contents(tmp_path), Workspace()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config_text == (tmp_path / "config.json").read_text()
        assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }
        for unit in units(checkpoint.config):
            weights, digests = checkpoint.read_unit(unit, workspace)
            assert len(weights) == len(digests) == len(unit.matrices)
            for matrix, weight, digest in zip(unit.matrices, weights, digests, strict=True):
                assert tuple(weight.shape) == matrix.shape
                assert torch.equal(weight, logical(matrix, expected)), matrix.name
                assert torch.equal(weight, checkpoint.read_matrix(matrix))
                source = expected[matrix.tensor]
                stored = source if matrix.expert is None else source[matrix.expert]
                assert digest == xxhash.xxh3_64_hexdigest(stored.contiguous().view(torch.uint8).numpy())
                assert weight.stride(0 if matrix.expert is not None else 1) == 1
            for tensor in unit.copies:
                raw = b"".join(bytes(chunk) for chunk in checkpoint.chunks(tensor.name, 1000))
                assert raw == bytes(expected[tensor.name].reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_models.write_tiny_model(tmp_path, "text", dtype=dtype)
    expected = contents(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.read_slice(name), tensor)


def test_slices_land_in_the_buffer_that_is_given(scout: Path) -> None:
    name = f"{EXPERTS}down_proj"
    with Checkpoint.open(scout) as checkpoint:
        buffer = np.full(100_000, 7, np.uint8)
        tensor = checkpoint.read_slice(name, 2, buffer)
        assert tensor.data_ptr() == buffer.ctypes.data
        assert torch.equal(tensor, contents(scout)[name][2])
        assert (buffer[tensor.nbytes :] == 7).all()
        for expert in (-1, 4):
            with pytest.raises(IndexError):
                checkpoint.read_slice(name, expert)


def test_experts_of_one_unit_are_read_once(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read.append(len(buffers[0])) or original(fd, buffers, offset))
    with Checkpoint.open(scout) as checkpoint:
        gate_up = next(unit for unit in units(checkpoint.config) if unit.expert == 3)
        checkpoint.read_unit(gate_up, Workspace())
        assert read == [2 * sum(matrix.shape[0] * matrix.shape[1] for matrix in gate_up.matrices)]


def test_short_reads_are_continued(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, expected = f"{EXPERTS}gate_up_proj", contents(scout)[f"{EXPERTS}gate_up_proj"]
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: original(fd, [buffers[0][:999]], offset))
    with Checkpoint.open(scout) as checkpoint:
        assert torch.equal(checkpoint.read_slice(name, 1), expected[1])


def test_threads_do_not_disturb_each_other(scout: Path) -> None:
    expected = contents(scout)
    with Checkpoint.open(scout) as checkpoint, ThreadPoolExecutor(8) as pool:
        names = [name for name in expected for _ in range(4)]
        for name, tensor in zip(names, pool.map(checkpoint.read_slice, names), strict=True):
            assert torch.equal(tensor, expected[name])


def test_chunks_share_one_bounded_buffer(scout: Path) -> None:
    with Checkpoint.open(scout) as checkpoint:
        chunks = checkpoint.chunks("language_model.lm_head.weight", 4096)
        first, second = next(chunks), next(chunks)
        assert len(first) == len(second) == 4096
        assert np.frombuffer(first, np.uint8).ctypes.data == np.frombuffer(second, np.uint8).ctypes.data


def test_closing_lets_go_of_every_file(scout: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Checkpoint.open(scout) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read_slice(name)
        assert len(os.listdir("/proc/self/fd")) == before + len(list(scout.glob("*.safetensors")))
    assert len(os.listdir("/proc/self/fd")) == before


def test_symlinked_snapshot(scout: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    scout.rename(blobs)
    for item in blobs.iterdir():
        (snapshot / item.name).symlink_to(Path("../../blobs") / item.name)
    with Checkpoint.open(snapshot) as checkpoint:
        expected = contents(blobs)
        assert all(torch.equal(checkpoint.read_slice(name), tensor) for name, tensor in expected.items())
        assert "LICENSE" in {path.name for path in checkpoint.carried_files()}


# ---------------------------------------------------------------------------------------------------- faults on reading


def vanish(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"), [(vanish, "No such file"), (truncate, "has changed since"), (rewrite, "has changed since")]
)
def test_shard_harmed_after_opening(harm: Callable[[Path], None], message: str, scout: Path) -> None:
    name = f"{EXPERTS}gate_up_proj"
    shard = shard_of(scout, name)
    with Checkpoint.open(scout) as checkpoint:
        harm(shard)
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint.read_slice(name, 2)
        assert all(part in str(caught.value) for part in (shard.name, name, "expert 2"))
        with pytest.raises(CheckpointError, match=message):
            list(checkpoint.chunks(name))


def test_shard_truncated_after_its_first_read(scout: Path) -> None:
    name = f"{EXPERTS}gate_up_proj"
    with Checkpoint.open(scout) as checkpoint:
        checkpoint.read_slice(name, 0)
        truncate(shard_of(scout, name))
        with pytest.raises(CheckpointError, match=rf"has changed .*{name}, expert 1"):
            checkpoint.read_slice(name, 1)


def test_end_of_file_within_a_tensor(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)
    message = r"is truncated: tensor .*down_proj, expert 3 lacks 65,536 bytes"
    with Checkpoint.open(scout) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.read_slice(f"{EXPERTS}down_proj", 3)


def test_device_that_fails(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with Checkpoint.open(scout) as checkpoint, pytest.raises(CheckpointError, match=r"Input/output error, at tensor .*q_proj"):
        checkpoint.read_slice("language_model.model.layers.0.self_attn.q_proj.weight")


# ---------------------------------------------------------------------------------------------------- faults on opening


def test_all_differences_from_the_config_come_in_one_error(scout: Path) -> None:
    base, extra = "language_model.model.layers.0.", "language_model.model.extra.weight"
    routers = [f"language_model.model.layers.{layer}.feed_forward.router.weight" for layer in (0, 1)]

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if f"{base}self_attn.q_proj.weight" in tensors:
            del tensors[f"{base}self_attn.q_proj.weight"]
        for name in routers:
            if name in tensors:
                tensors[name] = tensors[name].T.contiguous()
        if f"{base}input_layernorm.weight" in tensors:
            tensors[f"{base}input_layernorm.weight"] = torch.ones(128, dtype=torch.int64)
            tensors[extra] = torch.ones(3)

    for shard in scout.glob("*.safetensors"):
        edit_shard(shard, edit)
    norm_shard = shard_of(scout, f"{base}input_layernorm.weight").name
    edit_index(scout, lambda index: (index.pop(f"{base}self_attn.q_proj.weight"), index.update({extra: norm_shard})))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(scout)
    message = str(caught.value)
    for part in (
        f"missing (1): {base}self_attn.q_proj.weight",
        f"not expected (1): {extra}",
        f"wrong shape (2): {routers[0]} is [128, 4], expected [4, 128], {routers[1]}",
        f"wrong dtype (1): {base}input_layernorm.weight is I64",
    ):
        assert part in message


def test_long_listings_are_cut_and_counted(scout: Path) -> None:
    edit_config(scout, lambda config: config["text_config"].update(num_hidden_layers=40, moe_layers=list(range(40))))
    with pytest.raises(CheckpointError, match=r"missing \(\d+\): .* and \d+ more") as caught:
        Checkpoint.open(scout)
    assert len(str(caught.value)) < 4000


SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / SHARDS[1]).unlink(), rf"missing \(1 of 4\): {SHARDS[1]}"),
        (lambda d: (d / SHARDS[1]).rename(d / "x.safetensors"), r"missing \(1 of 4\).*\n.*not listed \(1\): x"),
        (lambda d: shutil.copy(d / SHARDS[0], d / "copy.safetensors"), r"not listed \(1\): copy\.safetensors"),
        (lambda d: (d / INDEX).unlink(), r"holds model-00001.* but no model\.safetensors\.index\.json"),
        (lambda d: (d / INDEX).write_text("{"), r"index\.json is damaged"),
        (lambda d: (d / INDEX).write_text("[]"), r"index\.json is damaged: it holds \[\]"),
        (lambda d: (d / INDEX).write_text("{}"), "no weight_map"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": 1}}'), "puts tensor 'a' into 1"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'), "which is no shard's name"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "model.bin"}}'), "which is no shard's name"),
        (lambda d: truncate(d / SHARDS[2]), rf"{SHARDS[2]}: truncated: 2 of [\d,]+ bytes"),
        (lambda d: [truncate(path) for path in d.glob("*.safetensors")], "4 of 4 safetensors files are damaged"),
        (lambda d: (d / SHARDS[0]).write_bytes(b"<html>login</html>"), "not a safetensors file"),
        (lambda d: [path.unlink() for path in (*d.glob("*.safetensors"), d / INDEX)], "holds no safetensors files"),
        (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "not UTF-8"),
        (lambda d: (d / "config.json").write_text('{"a": 1, "a": 2}'), "occurs twice"),
        (lambda d: (d / "config.json").write_text(" " * (17 << 20)), "larger than"),
        (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "model_type 'bert'"),
    ],
)
def test_each_damage_is_named(harm: Callable[[Path], object], message: str, scout: Path) -> None:
    assert sorted(path.name for path in scout.glob("*.safetensors")) == SHARDS
    harm(scout)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(scout)
    assert str(scout) in str(caught.value)


def test_lying_index(scout: Path) -> None:
    name = f"{EXPERTS}down_proj"
    true = shard_of(scout, name).name
    false = next(path.name for path in sorted(scout.glob("*.safetensors")) if path.name != true)
    edit_index(scout, lambda index: index.update({name: false}))
    with pytest.raises(CheckpointError, match=rf"not where the index says \(1\): {name} \(in {true}; index: {false}\)"):
        Checkpoint.open(scout)
    edit_index(scout, lambda index: index.pop(name))
    with pytest.raises(CheckpointError, match=rf"{name} \(in {true}; index: not listed\)"):
        Checkpoint.open(scout)
    edit_index(scout, lambda index: index.update({name: true, "ghost": true}))
    with pytest.raises(CheckpointError, match=rf"in no shard \(1\): ghost \(index: {true}\)"):
        Checkpoint.open(scout)


def test_tensor_stored_twice(scout: Path) -> None:
    name = f"{EXPERTS}down_proj"
    true, other = shard_of(scout, name), next(path for path in sorted(scout.glob("*.safetensors")) if path != shard_of(scout, name))
    edit_shard(other, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(CheckpointError, match=rf"stored twice \(1\): {name} \(in .* and .*\)") as caught:
        Checkpoint.open(scout)
    assert true.name in str(caught.value)
    assert other.name in str(caught.value)


def test_both_a_single_file_and_an_index(scout: Path) -> None:
    save_file({"a": torch.ones(1)}, scout / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not listed \(1\): model\.safetensors"):
        Checkpoint.open(scout)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        (f"{EXPERTS}0.gate_proj.weight_packed", torch.int32, "tensor of compressed-tensors"),
        ("language_model.model.layers.0.feed_forward.shared_expert.up_proj.qweight", torch.int32, "GPTQ or AWQ"),
        (f"{EXPERTS}gate_up_proj_weight_scale", torch.float32, "ModelOpt"),
        (f"{EXPERTS}gate_up_proj_scale", torch.float32, "fbgemm"),
        ("language_model.model.layers.0.feed_forward.shared_expert.up_proj.weight.absmax", torch.float32, "bitsandbytes"),
        ("some.weight", torch.float8_e4m3fn, "some.weight is stored as F8_E4M3"),
        ("some.weight", torch.int8, "stored as I8"),
    ],
)
def test_quantized_tensors_are_named(name: str, dtype: torch.dtype, message: str, scout: Path) -> None:
    shard = scout / SHARDS[0]
    edit_shard(shard, lambda tensors: tensors.update({name: torch.ones(4).to(dtype)}))
    edit_index(scout, lambda index: index.update({name: shard.name}))
    with pytest.raises(AlreadyQuantizedError, match=message):
        Checkpoint.open(scout)


def test_quantized_config_is_named_before_anything_else(scout: Path) -> None:
    edit_config(scout, lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    (scout / INDEX).unlink()
    with pytest.raises(AlreadyQuantizedError, match="gptq, 4"):
        Checkpoint.open(scout)


def test_modelopt_file(scout: Path) -> None:
    (scout / "hf_quant_config.json").write_text("{}")
    with pytest.raises(AlreadyQuantizedError, match="ModelOpt"):
        Checkpoint.open(scout)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-Q4_K_M.gguf", "GGUF"),
        ("consolidated.00.pth", "Meta's own layout"),
        ("pytorch_model-00001-of-00002.bin", "pickled weights"),
    ],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_other_formats_are_named(name: str, message: str, with_config: bool, scout: Path, tmp_path: Path) -> None:
    directory = tmp_path / "other"
    directory.mkdir()
    (directory / name).write_bytes(b"x")
    if with_config:
        shutil.copy(scout / "config.json", directory)
    with pytest.raises(UnsupportedModelError, match=message):
        Checkpoint.open(directory)


def test_sources_that_are_no_directory(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "m.safetensors").write_bytes(b"x")
    for source, message in (
        (tmp_path / "m.gguf", "is a GGUF file"),
        (tmp_path / "m.safetensors", "is a file. Give the directory"),
        (tmp_path / "gone", "there is no directory"),
        ("", "holds no|has no config"),
        ("no-such-name", "there is no directory no-such-name"),
        ("a/b/c", "there is no directory a/b/c"),
        ("a\0b/c", "there is no directory"),
        ("x" * 5000, "there is no directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(source)


def test_revision_of_a_directory(scout: Path) -> None:
    with pytest.raises(CheckpointError, match=r"revision \(main\) is for hub repositories only"):
        Checkpoint.open(scout, "main")


def test_load_config_alone(scout: Path, tmp_path: Path) -> None:
    text, config, directory = load_config(scout)
    assert text == (scout / "config.json").read_text()
    assert directory == scout
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(scout / "config.json", alone)
    assert load_config(alone) == (text, config, None)
    assert load_config(alone / "config.json") == (text, config, None)
    with pytest.raises(CheckpointError, match=r"gone/config\.json|no directory"):
        load_config(tmp_path / "gone" / "config.json")


def test_config_text_keeps_every_character(scout: Path) -> None:
    text = (scout / "config.json").read_text().replace("\n", "\r\n").replace("1e-05", "0.00001000") + "\n\n"
    (scout / "config.json").write_bytes(text.encode())
    with Checkpoint.open(scout) as checkpoint:
        assert checkpoint.config_text == text


# ----------------------------------------------------------------------------------------------------------- identity


def test_carried_files(scout: Path) -> None:
    for name in ("LICENSE-MIT.txt", "Notice", "processor_config.json", "tokenizer.model"):
        (scout / name).write_text("carried")
    for name in ("training.json", "requirements.txt", "adapter.bin"):
        (scout / name).write_text("not carried")
    (scout / "tokenizer").mkdir()
    with Checkpoint.open(scout) as checkpoint:
        assert [path.name for path in checkpoint.carried_files()] == [
            "LICENSE",
            "LICENSE-MIT.txt",
            "Notice",
            "USE_POLICY.md",
            "chat_template.jinja",
            "generation_config.json",
            "preprocessor_config.json",
            "processor_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ]


def identity(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with Checkpoint.open(directory) as checkpoint:
        return json.loads(json.dumps(checkpoint.fingerprint())), json.loads(json.dumps(checkpoint.provenance()))


def test_fingerprint_and_provenance(scout: Path, tmp_path: Path) -> None:
    fingerprint, provenance = identity(scout)
    assert identity(scout) == (fingerprint, provenance)
    copied = Path(shutil.copytree(scout, tmp_path / "copy", copy_function=shutil.copyfile))
    assert identity(copied)[1] == provenance
    shard = shard_of(scout, f"{EXPERTS}down_proj")
    os.utime(shard, ns=(1, 1))
    assert identity(scout)[0] != fingerprint
    assert identity(scout)[1] == provenance
    edit_config(copied, lambda config: config.update(note="another model"))
    assert identity(copied)[1] != provenance


def test_provenance_sees_another_header(scout: Path) -> None:
    provenance = identity(scout)[1]
    shard = scout / SHARDS[0]
    tensors = load_file(shard)
    save_file(tensors, shard, metadata={"format": "PT"})
    assert identity(scout)[1] != provenance


# --------------------------------------------------------------------------------------------------------------- the hub


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


# ---------------------------------------------------------------------------------------------------------- TensorFiles


def test_tensor_files_of_any_dtype(tmp_path: Path) -> None:
    tensors = {
        "packed": torch.arange(6, dtype=torch.int32).view(2, 3),
        "scale": torch.ones(3).to(torch.float8_e4m3fn),
        "shape": torch.tensor([5, 7]),
        "codes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.ones(0, 4),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with TensorFiles.open(source) as files:
            assert set(files.tensors) == set(tensors)
            assert [path.name for path in files.paths] == ["model.safetensors"]
            for name, tensor in tensors.items():
                found = files.read(name)
                assert found.dtype == tensor.dtype
                assert found.shape == tensor.shape
                assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else found == tensor
                assert files.tensors[name].elements == tensor.numel()
                assert sum(len(chunk) for chunk in files.chunks(name)) == tensor.nbytes


def test_dtype_that_is_not_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with TensorFiles.open(tmp_path) as files, pytest.raises(CheckpointError, match="tensor x is C64"):
        files.read("x")


# ------------------------------------------------------------------------------------------------------------ mutations


def opened_or_refused(directory: Path) -> None:
    """Opens, and then everything is read; or a documented error with a message of bounded length."""
    try:
        with Checkpoint.open(directory) as checkpoint:
            assert set(checkpoint.tensors) == {tensor.name for tensor in inventory(checkpoint.config)}
            for unit in units(checkpoint.config):
                checkpoint.read_unit(unit, Workspace())
    except QuantkitError as error:
        assert str(error)
        assert len(str(error)) < 20_000


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("victim")
    tiny_models.write_tiny_model(directory, "text", shard_bytes=300_000, num_hidden_layers=1, num_local_experts=2, vocab_size=8)
    return directory


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_in_any_small_text(victim: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([victim / "config.json", victim / INDEX, *sorted(victim.glob("*.safetensors"))]))
    original = path.read_bytes()
    limit = 8 + int.from_bytes(original[:8], "little") if path.suffix == ".safetensors" else len(original)
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(mutated)
        opened_or_refused(victim)
    finally:
        path.write_bytes(original)


TREES = st.recursive(
    st.none() | st.integers(-(2**70), 2**70) | st.text(max_size=6) | st.sampled_from([SHARDS[0], "/etc/x", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(TREES, st.sampled_from(["whole", "weight_map", "entry"]), st.integers(0, 8))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_index(victim: Path, tree: Any, place: str, number: int) -> None:
    path = victim / INDEX
    original = path.read_text()
    content = json.loads(original)
    if place == "whole":
        content = tree
    elif place == "weight_map":
        content["weight_map"] = tree
    else:
        content["weight_map"][sorted(content["weight_map"])[number]] = tree
    try:
        path.write_text(json.dumps(content))
        opened_or_refused(victim)
    finally:
        path.write_text(original)


def test_units_that_hold_copies_read_no_matrix(scout: Path) -> None:
    with Checkpoint.open(scout) as checkpoint:
        unit: Unit = next(unit for unit in units(checkpoint.config) if unit.copies)
        assert checkpoint.read_unit(unit, Workspace()) == ([], [])
