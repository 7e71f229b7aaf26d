"""Checkpoint: every fault is found from headers and named; matrices are what transformers would multiply with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import xxhash
from four_shards import EXPERTS, INDEX, SHARDS, contents, edit_config, edit_index, edit_shard, shard_of, truncate, write_four_shards
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import Checkpoint, load_config
from quantkit.errors import AlreadyQuantizedError, CheckpointError, UnsupportedModelError
from quantkit.llama4 import WeightMatrix, units
from quantkit.workspace import Workspace


@pytest.fixture
def scout(tmp_path: Path) -> Path:
    return write_four_shards(tmp_path / "scout")


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


def test_experts_of_one_unit_are_read_once(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read.append(len(buffers[0])) or original(fd, buffers, offset))
    with Checkpoint.open(scout) as checkpoint:
        gate_up = next(unit for unit in units(checkpoint.config) if unit.expert == 3)
        checkpoint.read_unit(gate_up, Workspace())
        assert read == [2 * sum(matrix.shape[0] * matrix.shape[1] for matrix in gate_up.matrices)]


def test_units_that_hold_copies_read_no_matrix(scout: Path) -> None:
    with Checkpoint.open(scout) as checkpoint:
        unit = next(unit for unit in units(checkpoint.config) if unit.copies)
        assert checkpoint.read_unit(unit, Workspace()) == ([], [])


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


def test_a_model_is_called_like_its_directory_or_its_repository_in_the_hub_s_cache(scout: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--a--name" / "snapshots" / "0123abc"
    shutil.copytree(scout, snapshot)
    for directory, expected in ((scout, scout.name), (snapshot, "a--name")):
        with Checkpoint.open(directory) as checkpoint:
            assert checkpoint.model_name == expected


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


def test_carried_files_that_cannot_be_read(scout: Path) -> None:
    tokenizer = scout / "tokenizer.json"
    tokenizer.unlink()
    tokenizer.symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to \.\./blobs/gone, which does not exist"):
        Checkpoint.open(scout)
    tokenizer.unlink()
    os.mkfifo(tokenizer)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no file to read"):
        Checkpoint.open(scout)


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
