"""Digests of files: those of the libraries, remembered only where nothing can have changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import xxhash

from quantkit import file_digests
from quantkit.file_digests import RememberedDigests, hash_files

OLD = time.time() - 3600


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    directory = tmp_path / "model"
    directory.mkdir()
    found = []
    for number in range(3):
        path = directory / f"part-{number}"
        path.write_bytes(os.urandom(1000 * number))
        os.utime(path, (OLD, OLD))
        found.append(path)
    return found


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the files had been there for long: the time of change of an inode cannot be set."""
    monkeypatch.setattr(file_digests, "_SETTLED_SECONDS", -1.0)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read."""
    read: list[Path] = []
    original = hash_files

    def watched(paths, *arguments):  # type: ignore[no-untyped-def]
        read.extend(paths)
        return original(paths, *arguments)

    monkeypatch.setattr(file_digests, "hash_files", watched)
    return read


def _expected(files: list[Path]) -> list[str]:
    return [xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in files]


def test_digests_are_those_of_the_libraries(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "READ_BYTES", 300)
    told: list[tuple[int, int]] = []
    assert hash_files(files, lambda *at: told.append(at)) == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert told == sorted(told) and told[-1] == (3000, 3000) and len(told) == 11
    assert RememberedDigests(tmp_path / "kept.json").of(files) == _expected(files)


@pytest.mark.usefixtures("settled")
def test_what_did_not_change_is_read_once(files: list[Path], tmp_path: Path, hashed: list[Path]) -> None:
    kept = tmp_path / "kept.json"
    first = RememberedDigests(kept).of(files)
    files.append(files[0].with_name("new"))
    files[-1].write_bytes(b"new")
    moved = files[1].rename(files[1].with_name("moved"))
    hashed.clear()
    os.link(files[0], files[0].with_name("linked"))  # changes the inode
    again = RememberedDigests(kept).of([files[2], files[-1]])
    assert again == [first[2], *_expected(files[-1:])] and hashed == files[-1:]
    assert RememberedDigests(kept).of([moved, files[0]]) == [first[1], first[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "model"]


@pytest.mark.usefixtures("settled")
def test_equal_names_sizes_and_times_do_not_hide_other_content(files: list[Path], tmp_path: Path) -> None:
    digests = RememberedDigests(tmp_path / "kept.json")
    before = digests.of(files)
    flipped = bytearray(files[2].read_bytes())
    flipped[700] ^= 1
    files[2].write_bytes(flipped)
    os.utime(files[2], (OLD, OLD))
    copy = tmp_path / files[1].name
    copy.write_bytes(bytes(1000))
    os.utime(copy, (OLD, OLD))
    after = digests.of([*files, copy])
    assert after == _expected([*files, copy]) and after[:2] == before[:2] and after[2] != before[2] and after[3] != before[1]


def test_what_changed_just_now_is_not_remembered(files: list[Path], tmp_path: Path, hashed: list[Path]) -> None:
    digests = RememberedDigests(tmp_path / "kept.json")
    for _ in range(2):
        assert digests.of(files) == _expected(files)
    assert hashed == [*files, *files] and not (tmp_path / "kept.json").exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 200_000, json.dumps({"1-2-3-4-5": 7}).encode()])
def test_a_damaged_memory_costs_time_only(files: list[Path], tmp_path: Path, content: bytes) -> None:
    kept = tmp_path / "kept.json"
    kept.write_bytes(content)
    for _ in range(2):
        assert RememberedDigests(kept).of(files) == _expected(files)
    assert len(json.loads(kept.read_bytes())) == 3


@pytest.mark.usefixtures("settled")
def test_a_memory_that_cannot_be_written_costs_time_only(
    files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert RememberedDigests(tmp_path / "nowhere" / "kept.json").of(files) == _expected(files)
    assert "files will be read again" in caplog.text


@pytest.mark.usefixtures("settled")
def test_the_oldest_are_forgotten(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "_MOST", 2)
    digests = RememberedDigests(tmp_path / "kept.json")
    for file in files:
        digests.of([file])
    assert list(json.loads((tmp_path / "kept.json").read_bytes()).values()) == _expected(files[1:])


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RememberedDigests(tmp_path / "kept.json").of([tmp_path / "gone"])
