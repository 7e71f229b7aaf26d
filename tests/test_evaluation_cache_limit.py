"""The bound on the cache of evaluations: what goes first, what stays whatever happens, and what is said of it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import evaluation_cache
from quantkit.errors import OutputError, RecipeError
from quantkit.evaluation import Evaluation
from quantkit.evaluation_cache import LIMIT_BYTES, EvaluationCache
from tests.evaluation_models import Made, make_scout, small

KEYS = [f"{number:016x}" for number in range(8)] + [f"{number:016x}-{0:016x}" for number in range(8)]


def add(directory: Path, folder: str, size: int = 1000, used: float = 0.0, name: str = "states-00000") -> int:
    """An entry of about ``size`` bytes in a folder last used at that time; gives the bytes of the file."""
    with EvaluationCache(directory) as cache:
        cache.save(f"{folder}/{name}", {"bytes": torch.zeros(size, dtype=torch.uint8)})
    os.utime(directory / folder, (used, used))
    return (directory / folder / name).stat().st_size


def used_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def folders(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, used in ((0, 30.0), (1, 10.0), (2, 40.0), (3, 20.0)):
        size = add(tmp_path, KEYS[number], used=used)
    limit = 3 * size + 100
    with EvaluationCache(tmp_path, limit) as cache:
        cache.hold([KEYS[1], KEYS[5]])  # one that is there, one that is not; the first is used now
        assert folders(tmp_path) == {KEYS[0], KEYS[1], KEYS[2]} and used_bytes(tmp_path) == 3 * size
        cache.save(f"{KEYS[5]}/scores-00000", {"bytes": torch.zeros(1000, dtype=torch.uint8)})
        assert folders(tmp_path) == {KEYS[1], KEYS[2], KEYS[5]} and used_bytes(tmp_path) <= limit
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert f"The evaluation cache {tmp_path} may hold 0.000 GB" in caplog.messages[0]
    with EvaluationCache(tmp_path) as cache:
        entry = cache.open(f"{KEYS[2]}/states-00000")
        assert entry is not None
        entry.close()


@settings(max_examples=80, deadline=None)
@given(
    present=st.dictionaries(st.sampled_from(KEYS), st.tuples(st.integers(0, 3000), st.integers(0, 10**9)), max_size=8),
    own=st.sets(st.sampled_from(KEYS)),
    others=st.sets(st.sampled_from(KEYS)),
    limit=st.integers(0, 15_000),
    needed=st.none() | st.integers(0, 4000),
)
def test_the_oldest_that_nobody_uses_go_and_no_more_than_that(
    present: dict[str, tuple[int, int]], own: set[str], others: set[str], limit: int, needed: int | None
) -> None:
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        sizes = {key: add(directory, key, size, used) for key, (size, used) in present.items()}
        with EvaluationCache(directory) as other, EvaluationCache(directory, limit) as cache:
            other.hold(others)
            cache.hold(own)
            kept = dict(sizes)
            idle = sorted((used, key) for key, (_, used) in present.items() if key not in own | others)
            if len({used for used, _ in idle}) < len(idle):
                return  # which of two of one age goes first is open

            def expect(more: int) -> None:
                while idle and sum(kept.values()) + more > limit:
                    del kept[idle.pop(0)[1]]

            expect(0)
            assert folders(directory) == set(kept)
            if needed is not None:
                cache.save("f" * 16 + "/states-00000", {"bytes": torch.zeros(needed, dtype=torch.uint8)})
                written = (directory / ("f" * 16) / "states-00000").stat().st_size
                expect(written)
                assert folders(directory) == {*kept, "f" * 16}
                assert used_bytes(directory) == sum(kept.values()) + written


def test_what_is_not_ours_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    size = add(cache, KEYS[0])
    outside = tmp_path / "outside"
    add(outside, KEYS[1])
    (cache / KEYS[0] / "notes.txt").write_bytes(bytes(50_000))
    (cache / KEYS[0] / "states-00001").write_bytes(bytes(50_000))  # named as ours are
    (cache / KEYS[0] / "states-00002").symlink_to(outside / KEYS[1] / "states-00000")
    os.mkfifo(cache / KEYS[0] / "states-00003")
    (cache / KEYS[0] / "states-00004").mkdir()
    (cache / KEYS[2]).symlink_to(outside / KEYS[1])
    (cache / KEYS[3]).write_bytes(bytes(50_000))
    (cache / "photographs").mkdir()
    (cache / "photographs" / "states-00000").write_bytes(evaluation_cache.MAGIC)
    (cache / "states-00000").write_bytes(evaluation_cache.MAGIC)
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    with EvaluationCache(cache, size) as store:
        store.hold([])
        assert {path: path.lstat().st_ino for path in tmp_path.rglob("*")} == before
    with EvaluationCache(cache, size - 1) as store:
        store.hold([])
    after = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    assert before.keys() - after.keys() == {cache / KEYS[0] / "states-00000"} and after.items() <= before.items()


def test_what_killed_runs_were_writing_goes_with_their_folder(tmp_path: Path) -> None:
    add(tmp_path, KEYS[0])
    (tmp_path / KEYS[0] / "unfinished-00000.123.tmp").write_bytes(bytes(5000))
    with EvaluationCache(tmp_path, 4000) as cache:
        cache.hold([])
    assert not folders(tmp_path)


def test_another_process_keeps_what_it_uses(tmp_path: Path) -> None:
    for key in KEYS[:2]:
        add(tmp_path, key)
    program = (
        "import sys; from pathlib import Path; from quantkit.evaluation_cache import EvaluationCache\n"
        f"cache = EvaluationCache(Path({str(tmp_path)!r})); cache.hold([{KEYS[0]!r}]); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with EvaluationCache(tmp_path, 0) as cache:
            cache.hold([])
        assert folders(tmp_path) == {KEYS[0]}
        holder.kill()
    with EvaluationCache(tmp_path, 0) as cache:
        cache.hold([])
    assert not folders(tmp_path)


def test_a_folder_that_was_emptied_and_made_again_is_held_again(tmp_path: Path) -> None:
    with EvaluationCache(tmp_path) as cache, EvaluationCache(tmp_path, 0) as greedy:
        for _ in range(3):
            cache.save(f"{KEYS[0]}/states-00000", {"bytes": torch.zeros(10)})
            greedy.hold([])
            assert folders(tmp_path) == {KEYS[0]}
            cache.remove(f"{KEYS[0]}/states-00000")
            assert not folders(tmp_path)


def test_a_removal_that_ends_half_way_leaves_whole_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("states-00000", "states-00001", "scores-00000"):
        add(tmp_path, KEYS[0], name=name)
    removed: list[Path] = []
    unlink = Path.unlink

    def deadly(path: Path, missing_ok: bool = False) -> None:
        if removed:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)
        removed.append(path)

    monkeypatch.setattr(Path, "unlink", deadly)
    with EvaluationCache(tmp_path, 0) as cache, pytest.raises(KeyboardInterrupt):
        cache.hold([])
    monkeypatch.undo()
    with EvaluationCache(tmp_path) as cache:
        left = sorted(path.name for path in (tmp_path / KEYS[0]).iterdir())
        assert len(left) == 2
        for name in left:
            entry = cache.open(f"{KEYS[0]}/{name}")
            assert entry is not None
            entry.close()
    with EvaluationCache(tmp_path, 0) as cache:
        cache.hold([])
    assert not folders(tmp_path)


def test_without_locks_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(tmp_path, KEYS[0])

    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with EvaluationCache(tmp_path, 0) as cache:
        cache.hold([KEYS[1]])
        cache.save(f"{KEYS[1]}/states-00000", {"bytes": torch.zeros(10)})
    assert folders(tmp_path) == {KEYS[0], KEYS[1]}
    assert [message for message in caplog.messages if "more than the limit" in message]


# -------------------------------------------------------------------------------------------------------------- evaluations


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_scout(tmp_path_factory.mktemp("made"), ("fp8-dynamic",))


def figures(evaluation: Evaluation) -> str:
    return repr([(one.scores, one.kinds, one.router_agreement) for one in evaluation.artifacts])


def test_an_evaluation_keeps_the_cache_within_its_limit(made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "cache"
    first = small(made, ["fp8-dynamic"], cache)
    size = used_bytes(cache)
    before = folders(cache)
    small(made, ["fp8-dynamic"], cache, seed=1, cache_limit=4 * size)  # the artifact's states lie there for a while
    assert before < folders(cache)
    second = folders(cache) - before
    assert not caplog.messages
    limit = 3 * size + size // 2
    small(made, ["fp8-dynamic"], cache, cache_limit=limit)  # the first is used again
    small(made, ["fp8-dynamic"], cache, seed=2, cache_limit=limit)
    assert used_bytes(cache) <= limit and before <= folders(cache) and not second <= folders(cache)
    assert caplog.messages and all("have been removed" in message for message in caplog.messages)
    caplog.clear()
    tight = small(made, ["fp8-dynamic"], cache, cache_limit=1)
    assert folders(cache) == before and figures(tight) == figures(first)
    assert [message for message in caplog.messages if "more than the limit: what is being evaluated needs them" in message]


def test_a_full_disk_is_one_error_that_says_what_may_go(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    add(cache, KEYS[0], 1_000_000)

    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluation_cache, "allocate_file", full)
    with pytest.raises(OutputError) as caught:
        small(made, ["fp8-dynamic"], cache)
    said = str(caught.value)
    assert "states-00000: the disk is full: free some space, or choose a cache directory (--cache) on another disk" in said
    assert "the same command again" in said
    assert (
        f"the cache {cache} holds 0.001 GB, 0.001 GB of them for other evaluations: a smaller --cache-limit removes those" in said
    )


def test_a_limit_that_means_nothing(made: Made, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cache_limit is -1; expected an integer of at least 0"):
        small(made, ["fp8-dynamic"], tmp_path, cache_limit=-1)
    assert LIMIT_BYTES == 20_000_000_000
