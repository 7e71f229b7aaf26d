"""Files that hold the checksums of their tensors: written with the units, read back, done again when they are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.writer import publish
from tests.synthetic_artifact import UNITS, begin, contents, finish, make_artifact, run_partly, seal, write_rest

SUMS = "sums.packed"


def test_checksums_are_those_of_the_tensors(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, checksums=True)
    finish(tmp_path / "out", artifact)
    assert contents(tmp_path / "out") == artifact.expected


@pytest.mark.parametrize("count", [1, 3, 6])
def test_they_survive_an_interruption(tmp_path: Path, count: int) -> None:
    artifact = make_artifact(tmp_path, checksums=True)
    run_partly(tmp_path / "out", artifact, count)
    assert finish(tmp_path / "out", artifact) == UNITS[count:]
    assert contents(tmp_path / "out") == artifact.expected


def test_a_lost_file_is_made_again_with_its_checksums(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, checksums=True)
    run_partly(tmp_path / "out", artifact, 4)
    (tmp_path / "out.partial" / SUMS).unlink()
    assert finish(tmp_path / "out", artifact) == UNITS
    assert contents(tmp_path / "out") == artifact.expected


def test_a_damaged_checksum_is_found_and_its_unit_done_again(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, checksums=True)
    run_partly(tmp_path / "out", artifact, 6)
    place = artifact.files[2].checksums["2.sum"]
    with (tmp_path / "out.partial" / SUMS).open("r+b") as file:
        file.seek(place + 5)
        file.write(b"!")
    writer = begin(tmp_path / "out", artifact)
    with pytest.raises(OutputError, match=rf"2\.sum in {SUMS}"):
        seal(writer, artifact)
    writer.close()
    writer = begin(tmp_path / "out", artifact)
    assert write_rest(writer, artifact) == ["unit 2"]
    seal(writer, artifact)
    publish([writer])
    writer.close()
    assert contents(tmp_path / "out") == artifact.expected
