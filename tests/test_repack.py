"""Repacking: bytes that come back, weights that stay the same, what does not fit, kills, and the command."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from quantkit.convert import convert
from quantkit.errors import ArtifactError, Interrupted, OutputError, RecipeError, ResumeError
from quantkit.formats import compressed_tensors, packed
from quantkit.grid import dequantize
from quantkit.packed_files import PackedFiles
from quantkit.recipe import Recipe, Rule
from quantkit.repack import repack
from quantkit.scheme import parse_scheme
from quantkit.tensor_files import TensorFiles
from quantkit.verify import verify
from quantkit_cli.repack import repack_command
from tests.artifact_files import digests, run_killed
from tests.calibrated_artifact import write_calibrated
from tests.tiny_models import write_tiny_model

# As different as compressed-tensors allows: an encoding for each role and layer, experts kept, zero points, blocks, FP4.
MIXED = Recipe(
    "mixed",
    (
        Rule("int4-g32-asym", roles=("routed_expert",), layers="0"),
        Rule("keep", roles=("routed_expert",), layers="1"),
        Rule("fp8-block-dynamic", roles=("routed_expert",), layers="2"),
        Rule("nvfp4", roles=("routed_expert",)),
        Rule("mxfp4", roles=("shared_expert",), layers="0"),
        Rule("int8-channel-dynamic", roles=("shared_expert",), layers="1"),
        Rule("int8-g128", roles=("shared_expert",)),
        Rule("int4-channel", roles=("attention",), layers="0"),
        Rule("fp8-channel-dynamic", roles=("attention",), layers="1"),
        Rule("keep"),
    ),
)
STATIC = Recipe("static", (Rule("fp8-tensor-static", roles=("routed_expert", "attention")), Rule("keep")), kv_cache="fp8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "tiny"
    write_tiny_model(directory, "scout", seed=5, num_hidden_layers=4)
    return directory


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In safetensors."""
    return convert(source, MIXED, tmp_path_factory.mktemp("artifact")).artifacts[0].directory


@pytest.fixture(scope="module")
def repacked(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repack(artifact, tmp_path_factory.mktemp("repacked") / "mixed", workers=1).directory


def different(one: Path, two: Path) -> list[str]:
    """Names of files that are not the same in both."""
    left, right = digests(one), digests(two)
    return sorted(name for name in left | right if left.get(name) != right.get(name))


def test_there_and_back_gives_the_same_bytes(artifact: Path, repacked: Path, source: Path, tmp_path: Path) -> None:
    verify(repacked, source, sample=1000)
    result = repack(repacked, tmp_path / "back", "compressed-tensors", workers=2)
    assert different(artifact, tmp_path / "back") == ["manifest.json"]
    assert (result.format, result.units_resumed) == ("compressed-tensors", 0)
    assert result.bytes == sum(path.stat().st_size for path in (tmp_path / "back").iterdir())
    verify(tmp_path / "back", source, sample=1000)


def test_the_other_way_around(source: Path, tmp_path: Path) -> None:
    made = convert(source, "packed-int4", tmp_path).artifacts[0].directory
    repack(made, tmp_path / "safetensors", "compressed-tensors")
    direct = convert(source, "w4a16-rtn", tmp_path).artifacts[0].directory
    assert different(direct, tmp_path / "safetensors") == ["ledger.json", "manifest.json"]  # which name the recipe
    repack(tmp_path / "safetensors", tmp_path / "back")
    assert different(made, tmp_path / "back") == ["manifest.json"]


def test_static_scales_and_those_of_a_kv_cache_go_along(source: Path, tmp_path: Path) -> None:
    made = write_calibrated(source, STATIC, tmp_path, max_shard_bytes=5_000_000_000)
    repack(made, tmp_path / "packed")
    verify(tmp_path / "packed", source, sample=1000)
    with PackedFiles.open(tmp_path / "packed") as files, TensorFiles.open(made) as plain:
        name = "language_model.model.layers.2.self_attn"
        block = files.read_block(name)
        assert torch.equal(block[f"{name}.k_scale"], plain.read(f"{name}.k_scale"))
        assert torch.equal(block[f"{name}.q_proj.input_scale"], plain.read(f"{name}.q_proj.input_scale"))
    repack(tmp_path / "packed", tmp_path / "back", "compressed-tensors")
    with TensorFiles.open(tmp_path / "back") as back, TensorFiles.open(made) as plain:
        assert back.tensors.keys() == plain.tensors.keys()
        for name in plain.tensors:
            one, two = back.read(name), plain.read(name)
            assert one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8)), name


def test_weights_stand_for_the_same_numbers(artifact: Path, repacked: Path) -> None:
    with PackedFiles.open(repacked) as files, TensorFiles.open(artifact) as plain:
        assert len(files.schemes) == 3 * 4 * 3 + 4 * 3 + 2 * 4
        for name, scheme_name in files.schemes.items():
            scheme = parse_scheme(scheme_name)
            assert scheme is not None
            one = packed.decode(name, {key: files.read(key) for key in files.tensors if key.startswith(f"{name}.")}, scheme)
            stored = {key: plain.read(key) for key in plain.tensors if key.startswith(f"{name}.")}
            assert torch.equal(dequantize(one), dequantize(compressed_tensors.decode(name, stored, scheme))), name


def test_the_manifest_says_where_it_comes_from(artifact: Path, repacked: Path) -> None:
    before, after = (json.loads((path / "manifest.json").read_text()) for path in (artifact, repacked))
    former = {
        "format": "compressed-tensors",
        "manifest": digests(artifact)["manifest.json"],
        "quantkit_version": before["quantkit_version"],
    }
    assert after.pop("repacked") == [former]
    for key in ("format", "files"):
        assert before.pop(key) != after.pop(key)
    assert before.pop("recipe") | {"format": "packed"} == after.pop("recipe")
    assert before == after


@pytest.mark.parametrize("workers", [2, 5])
def test_files_are_split_as_asked_and_do_not_depend_on_workers(
    artifact: Path, repacked: Path, tmp_path: Path, workers: int
) -> None:
    repack(artifact, tmp_path / "whole", workers=workers)
    assert different(repacked, tmp_path / "whole") == []
    repack(artifact, tmp_path / "split", max_shard_bytes=500_000, workers=workers)
    assert len(list((tmp_path / "split").glob("model-*-of-*.packed"))) > 2
    verify(tmp_path / "split")
    repack(tmp_path / "split", tmp_path / "back", "compressed-tensors")
    assert different(artifact, tmp_path / "back") == ["manifest.json"]


# ------------------------------------------------------------------------------------------------------------------ refused


def test_all_that_does_not_fit_is_listed(source: Path, tmp_path: Path) -> None:
    odd = Recipe(
        "odd",
        (
            Rule("int8-g128", name=r"layers\.0\.feed_forward\.experts\.2\."),
            Rule("int4-g128", roles=("routed_expert",)),
            Rule("Q8_0", roles=("attention", "embedding")),
            Rule("keep"),
        ),
        format="packed",
    )
    made = convert(source, odd, tmp_path).artifacts[0].directory
    with pytest.raises(RecipeError) as caught:
        repack(made, tmp_path / "out", "compressed-tensors")
    said = str(caught.value)
    assert "must have one scheme" in said and "layers.0.feed_forward.experts" in said
    assert "Q8_0 is a type of GGUF files" in said and "language_model.model.embed_tokens.weight has Q8_0" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


def test_widths_that_clients_do_not_know_are_refused(source: Path, tmp_path: Path) -> None:
    recipe = Recipe("low", (Rule("int3-g64", roles=("routed_expert",)), Rule("keep")), format="packed", maximum_error=1.0)
    made = convert(source, recipe, tmp_path).artifacts[0].directory
    with pytest.raises(RecipeError, match="int3-g64"):
        repack(made, tmp_path / "out", "compressed-tensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"to": "gguf"}, "'gguf' is no format to repack to"),
        ({"to": "compressed-tensors"}, "is compressed-tensors already"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_wrong_arguments(artifact: Path, tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        repack(artifact, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_gguf_and_sources_are_refused(source: Path, tmp_path: Path) -> None:
    for to in ("packed", "compressed-tensors"):
        with pytest.raises(ArtifactError, match=r"is no artifact of quantkit: it has no manifest\.json"):
            repack(source, tmp_path / "out", to)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(RecipeError, match="is in GGUF"):
        repack(tmp_path / "gguf", tmp_path / "out")


@pytest.mark.parametrize("to", ["packed", "compressed-tensors"])
def test_what_is_no_artifact_is_called_so(repacked: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(ArtifactError, match=r"nonexistent does not exist\. Give the directory"):
        repack(tmp_path / "nonexistent", tmp_path / "out", to)
    with pytest.raises(ArtifactError, match=r"model\.packed is a file\. Give the directory"):
        repack(repacked / "model.packed", tmp_path / "out", to)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="empty is no artifact of quantkit"):
        repack(tmp_path / "empty", tmp_path / "out", to)
    (tmp_path / "empty" / "manifest.json").write_text('{"format": [1]}')
    with pytest.raises(ArtifactError, match=r"states the format \[1\]; expected one of packed, compressed-tensors"):
        repack(tmp_path / "empty", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_the_output_stays_out_of_the_artifact(artifact: Path, repacked: Path, tmp_path: Path) -> None:
    before = digests(artifact)
    (tmp_path / "link").symlink_to(artifact)
    for output in (artifact / "sub", tmp_path / "link" / "a" / "b"):
        with pytest.raises(OutputError, match="lies in the artifact"):
            repack(artifact, output)
    assert digests(artifact) == before


def test_a_damaged_artifact_is_not_repacked(repacked: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(repacked, tmp_path / "copy"))
    data = bytearray((copy / "model.packed").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.packed").write_bytes(data)
    with pytest.raises(ArtifactError, match="another sha256"):
        repack(copy, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unless_forced(artifact: Path, repacked: Path, tmp_path: Path) -> None:
    repack(artifact, tmp_path / "out")
    with pytest.raises(OutputError, match="--force"):
        repack(artifact, tmp_path / "out", max_shard_bytes=500_000)
    assert different(repacked, tmp_path / "out") == []
    repack(artifact, tmp_path / "out", max_shard_bytes=500_000, force=True)
    assert not (tmp_path / "out" / "model.packed").exists()
    with pytest.raises(OutputError, match="holds the artifact"):
        repack(tmp_path / "out", tmp_path / "out", "compressed-tensors", force=True)


# ------------------------------------------------------------------------------------------------------------- stop, resume


def test_a_stopped_run_resumes_to_the_same_bytes(artifact: Path, repacked: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    seen: list[tuple[str, int, int]] = []

    def tell(progress: Any) -> None:
        seen.append((progress.phase, progress.units_done, progress.units_total))
        if progress.units_done == 20:
            stop.set()

    with pytest.raises(Interrupted):
        repack(artifact, tmp_path / "out", workers=1, progress=tell, stop=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with pytest.raises(ResumeError, match="max_shard_bytes"):
        repack(artifact, tmp_path / "out", max_shard_bytes=500_000)
    result = repack(artifact, tmp_path / "out", progress=tell)
    assert result.units_resumed == 20 and different(repacked, tmp_path / "out") == []
    assert seen[0][1] == 1 and {phase for phase, _, _ in seen} == {"convert", "check"}
    assert seen[-1][1] == seen[-1][2]


KILLED = """
import sys
from pathlib import Path
from quantkit.repack import repack
from tests.crash_points import kill_before
artifact, output, call = sys.argv[1:]
kill_before(int(call))
repack(Path(artifact), Path(output), workers=2)
"""


@pytest.mark.parametrize("call", [30, 200])
def test_a_killed_run_resumes_to_the_same_bytes(call: int, artifact: Path, repacked: Path, tmp_path: Path) -> None:
    run_killed(KILLED, artifact, tmp_path / "out", call)
    assert not (tmp_path / "out").exists()
    repack(artifact, tmp_path / "out")
    assert different(repacked, tmp_path / "out") == [] and [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------------------------------ command


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(repack_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(artifact: Path, repacked: Path, tmp_path: Path) -> None:
    made = run(artifact, "-o", tmp_path / "one", "--json")
    assert made.exit_code == 0, made.output
    answer = json.loads(made.stdout)
    assert (answer["format"], answer["directory"]) == ("packed", str(tmp_path / "one")) and answer["notes"][0]["loads"]
    assert different(repacked, tmp_path / "one") == []
    back = run(tmp_path / "one", "--to", "compressed-tensors", "-o", tmp_path / "two", "-q")
    assert back.stdout.strip() == str(tmp_path / "two")
    again = run(tmp_path / "one", "--to", "compressed-tensors", "-o", tmp_path / "two", "--json")
    assert again.exit_code == OutputError.exit_code and json.loads(again.stdout)["error"]["type"] == "OutputError"
    forced = run(tmp_path / "one", "--to", "compressed-tensors", "-o", tmp_path / "two", "--force", "--max-shard-size", "300kB")
    assert forced.exit_code == 0 and "compressed-tensors" in forced.stdout
    assert (tmp_path / "two" / "model.safetensors.index.json").exists()
