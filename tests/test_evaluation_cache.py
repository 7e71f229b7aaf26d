"""The cache of evaluations: whole entries or none, and what a process that is killed leaves; the code of hidden states."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import evaluation_cache
from quantkit.errors import OutputError
from quantkit.evaluation_cache import EvaluationCache, decode_rows, encode_rows

ARRAYS = {
    "halves": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(torch.float16),
    "routes": torch.arange(14, dtype=torch.int16).view(7, 2, 1),
    "agreement": torch.tensor([True, False, True]),
    "nothing": torch.empty(7, 0, 1, dtype=torch.int16),
    "count": torch.tensor([1 << 40]),
}


def test_an_entry_holds_what_was_saved(tmp_path: Path) -> None:
    cache = EvaluationCache(tmp_path / "cache")
    assert cache.open("folder/one") is None
    cache.save("folder/one", ARRAYS)
    entry = cache.open("folder/one")
    assert entry is not None
    cache.remove("folder/one")  # what is open stays readable
    assert not list((tmp_path / "cache").iterdir())
    with entry:
        for name, array in ARRAYS.items():
            found = entry.read(name)
            assert found.dtype == array.dtype and torch.equal(found, array) and entry.shape(name) == array.shape
        assert torch.equal(entry.read("halves", slice(2, 5)), ARRAYS["halves"][2:5])
    cache.remove("folder/one")


def test_every_flipped_bit_and_every_length_but_the_right_one_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    cache = EvaluationCache(tmp_path)
    cache.save("one", ARRAYS)
    path = tmp_path / "one"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert cache.open("one") is None
    for length in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert cache.open("one") is None
    path.write_bytes(whole + b"\0")
    assert cache.open("one") is None


def test_what_a_killed_run_was_writing_is_removed_when_it_is_old(tmp_path: Path) -> None:
    cache = EvaluationCache(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, age in (("old.1.tmp", 4000), ("new.2.tmp", 10)):
        (tmp_path / "folder" / name).write_bytes(b"half")
        os.utime(tmp_path / "folder" / name, (time.time() - age,) * 2)
    cache.save("folder/one", ARRAYS)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["new.2.tmp", "one"]


def test_a_failed_write_leaves_the_former_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EvaluationCache(tmp_path)
    cache.save("one", ARRAYS)

    def full(descriptor: int, data: object, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_cache, "write_all", full)
    with pytest.raises(OutputError, match="the disk is full"):
        cache.save("one", {"count": torch.tensor([5])})
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    entry = cache.open("one")
    assert entry is not None and torch.equal(entry.read("count"), ARRAYS["count"])
    entry.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-120, 127, width=32), min_size=1, max_size=6),
    st.integers(0, 2**31),
)
def test_rows_of_any_size_keep_eleven_bits(powers: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(len(powers), 40, generator=generator) * 2 - 1
    rows = (unit.double() * 2.0 ** torch.tensor(powers, dtype=torch.float64)[:, None]).to(torch.float32)
    halves, exponents = encode_rows(rows)
    decoded = decode_rows(halves, exponents)
    assert halves.dtype == torch.float16 and exponents.dtype == torch.int16 and bool(torch.isfinite(halves).all())
    largest = rows.abs().amax(-1, keepdim=True).double()
    # Half a unit in the last of 11 bits; values 2**30 times smaller than the largest of the row, or below 2**-115, may vanish.
    bound = (rows.abs().double() * 2.0**-11).maximum(largest * 2.0**-39).clamp_(min=2.0**-124)
    assert bool(((decoded.double() - rows.double()).abs() <= bound).all())
    again = decode_rows(*encode_rows(decoded))  # in another power of two where the largest was rounded up to one
    assert torch.equal(again, decoded) or bool((rows.abs().amax(-1) < 2.0**-80).any())


def test_rows_of_zeros_stay_zeros() -> None:
    halves, exponents = encode_rows(torch.zeros(2, 3))
    assert np.array_equal(decode_rows(halves, exponents).numpy(), np.zeros((2, 3)))


def test_killed_evaluations_go_on_to_the_same_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.evaluation_kills", str(tmp_path), "14"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] > 10
