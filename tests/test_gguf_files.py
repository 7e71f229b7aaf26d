"""GGUF files opened together: files of the gguf package, whole and split, and everything that does not belong together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.errors import CheckpointError
from quantkit.gguf_files import GgufFiles, file_sets, is_gguf
from quantkit.gguf_header import GGUFValueType, MetadataEntry
from tests.gguf_models import change_metadata

TENSORS = {f"blk.{number}.attn_q.weight": np.random.default_rng(number).standard_normal((4, 64), np.float32) for number in range(5)}
STACK = np.random.default_rng(9).standard_normal((3, 4, 64)).astype(np.float32)  # [experts, out, in]
SPLIT_NAMES = [f"model-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]


def write_model(path: Path, split: int = 0, architecture: str = "llama4", **tensors: np.ndarray[Any, Any]) -> None:
    """Write a file, or several of ``split`` tensors each, by the gguf package; the stack as Q8_0."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_uint32(f"{architecture}.block_count", 5)
    for name, tensor in (tensors or TENSORS).items():
        writer.add_tensor(name, tensor)
    if not tensors:
        writer.add_tensor(
            "blk.0.ffn_up_exps.weight", gguf.quantize(STACK, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def split(tmp_path: Path) -> Path:
    directory = tmp_path / "split"
    directory.mkdir()
    write_model(directory / "model.gguf", split=2)
    assert sorted(path.name for path in directory.iterdir()) == SPLIT_NAMES
    return directory


@pytest.mark.parametrize("parts", [0, 2, 4])
def test_files_of_the_gguf_package_are_read_whole_and_split(tmp_path: Path, parts: int) -> None:
    write_model(tmp_path / "model.gguf", split=parts)
    with GgufFiles.open(tmp_path) as files:
        assert set(files.tensors) == {*TENSORS, "blk.0.ffn_up_exps.weight"}
        assert len(files.paths) == {0: 1, 2: 3, 4: 2}[parts]
        for name, tensor in TENSORS.items():
            assert files.read(name).numpy().tobytes() == tensor.tobytes()
            assert b"".join(map(bytes, files.chunks(name, 100))) == tensor.tobytes()
        for expert in range(3):
            part = f"blk.0.ffn_up_exps.weight[{expert}]"
            expected = gguf.quantize(STACK[expert], GGMLQuantizationType.Q8_0)
            assert np.array_equal(files.read(part).numpy(), expected)
            assert b"".join(map(bytes, files.chunks(part, 34))) == expected.tobytes()
            assert files.locate(part).shape == (4, 64)
        for missing in ("blk.0.ffn_up_exps.weight[3]", "blk.0.ffn_up_exps.weight[-1]", "blk.0.ffn_up_exps.weight[]", "x[0]", "[0]"):
            with pytest.raises(CheckpointError, match="no file holds"):
                files.locate(missing)
        [found] = files.sets
        assert (found.kind, found.architecture, found.complete, found.value("llama4.block_count")) == ("model", "llama4", True, 5)


def test_one_file_of_a_split_is_a_set_that_is_not_complete(split: Path) -> None:
    [found] = file_sets(split / SPLIT_NAMES[1])
    assert (found.split, found.complete, found.architecture, len(found.tensors)) == ((1, 3), False, "", 2)


def test_other_models_in_the_directory_are_sets_of_their_own(split: Path) -> None:
    write_model(split / "mmproj-model-F16.gguf", architecture="clip", **{"v.class_embd": np.zeros(4, np.float32)})
    assert [(found.kind, len(found.tensors)) for found in file_sets(split)] == [("mmproj", 1), ("model", 6)]
    with GgufFiles.open(split) as files:
        assert len(files.tensors) == 7
    write_model(split / "other.gguf")
    assert len(file_sets(split)) == 3
    with pytest.raises(CheckpointError, match=r"other.gguf both hold .*different models, or one in two sizes"):
        GgufFiles.open(split)


def _swap(directory: Path) -> None:
    first, second = (directory / name for name in SPLIT_NAMES[:2])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _uint16(key: str, value: int) -> MetadataEntry:
    return MetadataEntry(key, GGUFValueType.UINT16, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / SPLIT_NAMES[1]).unlink(), rf"missing \(1 of 3\): {SPLIT_NAMES[1]}"),
        (_swap, rf"{SPLIT_NAMES[0]}: split.no is 1; expected 0"),
        (lambda d: shutil.copy(d / SPLIT_NAMES[0], d / SPLIT_NAMES[2]), rf"{SPLIT_NAMES[2]}: split.no is 0; expected 2"),
        (
            lambda d: shutil.copy(d / SPLIT_NAMES[0], d / "model-00004-of-00003.gguf"),
            "numbered beyond 3: model-00004-of-00003.gguf",
        ),
        (lambda d: (d / SPLIT_NAMES[2]).rename(d / "last.gguf"), "last.gguf is one of 3 files, but is not named"),
        (
            lambda d: change_metadata(d / SPLIT_NAMES[0], lambda keys: keys.update({"split.count": _uint16("split.count", 4)})),
            "split.count is 4; expected 3",
        ),
        (
            lambda d: change_metadata(
                d / SPLIT_NAMES[1],
                lambda keys: keys.update({"split.tensors.count": MetadataEntry("split.tensors.count", GGUFValueType.INT32, 5)}),
            ),
            "split.tensors.count is 5; expected 6",
        ),
        (
            lambda d: change_metadata(
                d / SPLIT_NAMES[1],
                lambda keys: keys.update({"split.no": MetadataEntry("split.no", GGUFValueType.UINT32, 1)}),
            ),
            "split.no is UINT32; expected UINT16",
        ),
        (lambda d: change_metadata(d / SPLIT_NAMES[1], lambda keys: keys.pop("split.no")), "split.no is missing; expected UINT16"),
        (lambda d: [(d / name).write_bytes(b"GGUF") for name in SPLIT_NAMES[:2]], "2 of 3 gguf files are damaged"),
    ],
)
def test_files_of_a_split_that_do_not_belong_together_are_named(
    split: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(split)
    with pytest.raises(CheckpointError, match=message):
        file_sets(split)


def test_a_tensor_in_two_files_of_a_split_is_an_error(split: Path) -> None:
    other = split.parent / "other"
    other.mkdir()
    write_model(other / "model.gguf", split=2, **{name: np.zeros((4, 64), np.float32) for name in [*TENSORS, "x"][::-1]})
    shutil.copy(other / SPLIT_NAMES[1], split / SPLIT_NAMES[1])
    shutil.copy(other / SPLIT_NAMES[2], split / SPLIT_NAMES[2])
    with pytest.raises(CheckpointError, match=rf"{SPLIT_NAMES[2]} and {SPLIT_NAMES[0]} both hold blk"):
        file_sets(split)


def test_a_file_that_changes_while_it_is_read_is_noticed(split: Path) -> None:
    with GgufFiles.open(split) as files:
        name = next(iter(TENSORS))
        files.tensors[name].path.write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match="has changed since it was opened"):
            files.read(name)


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no GGUF files"):
        file_sets(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        file_sets(tmp_path / "missing.gguf")
    assert not is_gguf(tmp_path) and not is_gguf(tmp_path / "missing.gguf")
    write_model(tmp_path / "blob.gguf")
    assert is_gguf(tmp_path) and is_gguf(tmp_path / "blob.gguf")
    (tmp_path / "blob.gguf").rename(tmp_path / "sha256-0123")  # as Ollama names them
    assert is_gguf(tmp_path / "sha256-0123") and not is_gguf(tmp_path)
    (tmp_path / ".hidden.gguf").write_bytes(b"")
    assert not is_gguf(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_split_ends_in_sound_sets_or_one_error(split: Path, data: st.DataObject) -> None:
    """Flipped and cut headers, and files under each other's names."""
    before = {path: path.read_bytes() for path in split.iterdir()}
    try:
        for path in data.draw(st.lists(st.sampled_from(sorted(before)), min_size=1, max_size=3)):
            content = bytearray(before[data.draw(st.sampled_from([path, path, *sorted(before)]))])
            place = data.draw(st.integers(0, min(len(content) - 1, 400)))
            content[place] ^= data.draw(st.integers(0, 255))
            path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content), place, len(content) - 1]))])
        try:
            with GgufFiles.open(split) as files:
                for name in files.tensors:
                    assert files.read(name).numel() == files.tensors[name].nbytes
        except CheckpointError:
            pass
    finally:
        for path, whole in before.items():
            path.write_bytes(whole)
