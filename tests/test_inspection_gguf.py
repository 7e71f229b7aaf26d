"""Inspection of GGUF files: ours, others', other architectures, importance files, parts of a split model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.convert import convert
from quantkit.errors import CheckpointError
from quantkit.gguf_header import GGUFValueType, MetadataEntry, build_header
from quantkit.inspection import Inspection, inspect
from quantkit.recipe import Recipe, Rule

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"
RECIPE = Recipe("tiny", (Rule("Q4_1", roles=("routed_expert", "lm_head")), Rule("keep")), format="gguf")
PARAMETERS = 15_443_968  # of the demo model


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO, [RECIPE], tmp_path_factory.mktemp("whole")).artifacts[0].directory


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO, [RECIPE], tmp_path_factory.mktemp("parts"), max_shard_bytes=6_000_000).artifacts[0].directory


def write(path: Path, architecture: str, tensors: dict[str, np.ndarray[Any, Any]], **keys: Any) -> Path:
    """A file by the gguf package; matrices as Q8_0, vectors as F32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        name = key.replace("__", ".")
        if isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, value)
    for name, tensor in tensors.items():
        kind = GGMLQuantizationType.Q8_0 if tensor.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rows(inspection: Inspection) -> dict[str, tuple[tuple[str, ...], int, int]]:
    return {row.role: (row.schemes, row.tensors, row.parameters) for row in inspection.roles}


def test_an_artifact_by_role(artifact: Path) -> None:
    result = inspect(artifact)
    assert (result.kind, result.format, result.parameters, result.notes) == ("artifact", "gguf", PARAMETERS, ())
    by_role = {row.role: row for row in result.roles}
    assert by_role["routed_expert"].schemes == ("Q4_1",)
    assert by_role["routed_expert"].bits_per_weight == 5
    assert by_role["routed_expert"].parameters == 4 * 16 * 3 * 256 * 256
    assert by_role["attention"].schemes == ("BF16",)
    assert by_role["norm"].schemes == by_role["router"].schemes == ("F32",)
    assert by_role["vision"].schemes == ("BF16", "F32")
    facts = dict(result.facts)
    assert facts["file type"] == "Q4_1"
    assert facts["quantized by"] == "quantkit"
    assert facts["context length"] == "32,768"
    assert facts["tokenizer"] == "gpt2 llama4, 2,048 tokens"
    assert facts["chat template"] == "yes"
    assert facts["vision: projector"] == "llama4"
    assert "4 layers, 16 experts, 1 for a token, hidden size 256; vision tower" in result.model
    assert dict(result.files) == {path.name: path.stat().st_size for path in artifact.glob("*.gguf")}


def test_single_files(artifact: Path) -> None:
    [vision] = artifact.glob("mmproj-*")
    [model] = set(artifact.glob("*.gguf")) - {vision}
    parts = [inspect(path) for path in (model, vision)]
    assert [part.kind for part in parts] == ["artifact", "unquantized"]
    assert sum(part.parameters for part in parts) == PARAMETERS
    assert set(rows(parts[1])) == {"vision", "projector"}
    assert not set(rows(parts[0])) & set(rows(parts[1]))
    assert [part.notes for part in parts] == [(), ()]


def test_a_split_model_and_one_of_its_files(in_parts: Path, artifact: Path) -> None:
    whole, single = inspect(in_parts), inspect(artifact)
    assert rows(whole) == rows(single) and whole.model == single.model
    files = sorted(in_parts.glob("tiny-*.gguf"))
    assert dict(whole.facts)["split"] == f"{len(files)} of {len(files)} files"
    parts = [inspect(path) for path in files]
    assert sum(part.parameters for part in parts) == sum(inspect(path).parameters for path in artifact.glob("tiny-*.gguf"))
    assert parts[1].notes == (f"file 2 of the {len(files)} of a split model: inspect the directory for all of it",)
    assert parts[1].model == "unknown architecture"


def test_another_architecture_by_type(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": np.ones((8, 64), np.float32), "blk.0.attn_q.weight": np.ones((64, 64), np.float32)}
    tensors["output_norm.weight"] = np.ones(64, np.float32)
    keys = {"general__name": "A\nmodel", "qwen3__block_count": 1, "qwen3__expert_count": 8, "qwen3__expert_used_count": 2}
    path = write(tmp_path / "m.gguf", "qwen3", tensors, general__file_type=7, **keys)
    result = inspect(path)
    assert rows(result) == {"Q8_0": (("Q8_0",), 2, 72 * 64), "F32": (("F32",), 1, 64)}
    assert result.model == "qwen3, 1 layers, 8 experts, 2 for a token"
    assert dict(result.facts) == {"name": r"'A\nmodel'", "file type": "Q8_0"}
    path.rename(tmp_path / "sha256-0123")
    assert rows(inspect(tmp_path / "sha256-0123")) == rows(result)


def test_an_importance_file(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_q.weight.in_sum2": np.ones(64, np.float32), "blk.0.attn_q.weight.counts": np.ones(1, np.float32)}
    keys: dict[str, Any] = {"imatrix__datasets": ["a.txt", "b.txt"], "imatrix__chunk_count": 100, "imatrix__chunk_size": 512}
    path = write(tmp_path / "imatrix.gguf", "", tensors, general__type="imatrix", **keys)
    result = inspect(path)
    assert result.kind == "importance"
    assert result.model == "importance of 1 tensors, for llama-quantize"
    assert dict(result.facts) == {"measured on": "a.txt, b.txt", "chunks": "100", "tokens in a chunk": "512"}


def test_several_models_by_file(artifact: Path, tmp_path: Path) -> None:
    [model] = artifact.glob("tiny-*.gguf")
    shutil.copy(model, tmp_path / "a.gguf")
    write(tmp_path / "b.gguf", "llama4", {"output_norm.weight": np.ones(64, np.float32)})
    write(tmp_path / "mmproj-c.gguf", "clip", {"v.class_embd": np.ones(8, np.float32)})
    (tmp_path / "config.json").write_text("{}")  # as publishers put beside their files
    result = inspect(tmp_path)
    assert rows(result)["a.gguf"][0] == ("BF16", "F32", "Q4_1")
    assert rows(result)["b.gguf"] == (("F32",), 1, 64)
    assert rows(result)["mmproj-c.gguf"] == (("F32",), 1, 8)
    assert result.notes[0] == "3 models, or one in several sizes: name one file to see its roles"
    assert "no manifest.json" in result.notes[1]


def test_strange_tensors_and_types(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf", "llama4", {"output_norm.weight": np.ones(64, np.float32), "blk.0.new": np.ones(32, np.float32)}
    )
    result = inspect(path)
    assert rows(result) == {"norm": (("F32",), 1, 64), "other": (("F32",), 1, 32)}
    assert result.notes == ("1 tensors are not Llama 4 tensors, blk.0.new first",)
    entries = [MetadataEntry("general.architecture", GGUFValueType.STRING, "x")]
    header, _, _ = build_header(entries, [("w", "F32", (16,))])
    unknown = header.replace(
        b"\x10" + bytes(7) + bytes(4), b"\x10" + bytes(7) + (200).to_bytes(4, "little")
    )  # type after the shape
    assert unknown != header
    path.write_bytes(unknown + bytes(40))
    result = inspect(path)
    assert rows(result) == {"type 200": (("type 200",), 1, 16)}
    assert "types that quantkit does not know" in result.notes[0] and result.kind == "artifact"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 64, b"no model at all, but text" * 9])
def test_what_cannot_be_read_is_a_documented_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    for target in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            inspect(target)


def test_the_command_line(artifact: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "quantkit_cli", *arguments], capture_output=True, text=True, check=False)

    shown = run("inspect", str(artifact))
    assert shown.returncode == 0 and "routed expert  Q4_1" in shown.stdout and "2,048 tokens" in shown.stdout
    found = json.loads(run("inspect", str(artifact), "--json").stdout)
    assert found["format"] == "gguf" and found["facts"]["file type"] == "Q4_1"
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    broken = run("inspect", str(tmp_path / "m.gguf"))
    assert broken.returncode == 3 and "m.gguf" in broken.stderr and "Traceback" not in broken.stderr


KEYS = [
    "general.type",
    "general.architecture",
    "general.name",
    "general.file_type",
    "llama4.block_count",
    "llama4.expert_count",
    "llama4.expert_used_count",
    "llama4.context_length",
    "clip.projector_type",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.chat_template",
    "imatrix.datasets",
    "split.no",
    "split.count",
    "split.tensors.count",
]
VALUES = st.one_of(
    st.builds(
        lambda text: (GGUFValueType.STRING, text, None), st.sampled_from(["llama4", "clip", "imatrix", "model", "\0\n", "x" * 500])
    ),
    st.builds(lambda number: (GGUFValueType.INT64, number, None), st.integers(-3, 2**40)),
    st.builds(lambda number: (GGUFValueType.UINT16, number, None), st.integers(0, 3)),
    st.builds(lambda number: (GGUFValueType.FLOAT32, number, None), st.floats(width=32)),
    st.builds(lambda flag: (GGUFValueType.BOOL, flag, None), st.booleans()),
    st.builds(lambda texts: (GGUFValueType.ARRAY, tuple(texts), GGUFValueType.STRING), st.lists(st.text("ab\n"), min_size=1)),
    st.builds(lambda numbers: (GGUFValueType.ARRAY, tuple(numbers), GGUFValueType.INT64), st.lists(st.integers(0, 9), min_size=1)),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES), st.sampled_from(["model.gguf", "model-00001-of-00001.gguf"]))
def test_values_of_any_type_are_shown_or_refused_and_nothing_else(
    tmp_path: Path, values: dict[str, tuple[GGUFValueType, Any, GGUFValueType | None]], name: str
) -> None:
    entries = [MetadataEntry(key, kind, value, items) for key, (kind, value, items) in values.items()]
    header, _, size = build_header(entries, [("output_norm.weight", "F32", (8,)), ("blk.0.attn_q.weight", "Q8_0", (2, 32))])
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / name).write_bytes(header + bytes(size - len(header)))
    inspected = inspect(tmp_path / name)
    assert inspected.parameters == 72
    assert all(text.isprintable() for fact in inspected.facts for text in fact) and inspected.model.isprintable()
    try:
        assert inspect(tmp_path).parameters == 72
    except CheckpointError as error:
        assert "split" in str(error)
