"""Tile-parallel linear algebra against torch in float64, in tiles so small that every block boundary occurs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from triangles import mirror

from quantkit import team as team_module
from quantkit.team import Team, add_gram, factor_upper, multiply, spans

THREADS = (1, 2, 3)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team_module, "TILE", 32)
    monkeypatch.setattr(team_module, "FACTOR_BLOCK", 24)


@pytest.fixture
def two_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positive_definite(size: int) -> torch.Tensor:
    """A Gram matrix of correlated inputs, with the damping that calibration adds."""
    rows = normal(2 * size, size) @ (torch.eye(size) + 0.1 * normal(size, size, seed=1))
    return rows.t() @ rows / len(rows) + 0.05 * torch.eye(size)


# -------------------------------------------------------------------------------------------------------------- team


@pytest.mark.parametrize("threads", THREADS)
def test_every_item_is_worked_on_once(threads: int) -> None:
    seen: list[int] = []
    with Team(threads) as team:
        team.run(seen.append, range(100))
        assert sorted(seen) == list(range(100))
        team.run(seen.append, [])
    assert len(seen) == 100


@pytest.mark.parametrize("threads", THREADS)
def test_torch_has_one_thread_inside_and_its_old_number_after(threads: int, two_torch_threads: None) -> None:
    inside: list[int] = []
    with Team(threads) as team:
        team.run(lambda _: inside.append(torch.get_num_threads()), range(8))
        assert torch.get_num_threads() == 1
    assert inside == [1] * 8
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", THREADS)
def test_a_failing_item_is_heard_of_and_torch_gets_its_threads_back(threads: int, two_torch_threads: None) -> None:
    def work(item: int) -> None:
        if item == 3:
            raise ArithmeticError("item 3")

    with pytest.raises(ArithmeticError, match="item 3"), Team(threads) as team:
        team.run(work, range(10))
    assert torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("quantkit-team")]


def test_work_is_spread_over_the_threads() -> None:
    meeting = threading.Barrier(3, timeout=30)  # passed only when three items are worked on at the same time
    arrived: list[int] = []
    with Team(3) as team:
        team.run(lambda _: arrived.append(meeting.wait()), range(3))
    assert sorted(arrived) == [0, 1, 2]


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 4), (4, 4), (9, 4), (12, 4)])
def test_spans_cover_everything_once(count: int, size: int) -> None:
    parts = spans(count, size)
    assert [number for part in parts for number in range(part.start, part.stop)] == list(range(count))
    assert all(part.stop - part.start == size for part in parts[:-1])


# ---------------------------------------------------------------------------------------------------------- routines


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (16, 8, 64), (17, 40, 65), (100, 33, 130)])
@pytest.mark.parametrize("transposed", [False, True])
def test_multiply(rows: int, inner: int, columns: int, transposed: bool, small_tiles: None) -> None:
    left = normal(rows, inner)
    right = normal(columns, inner, seed=1).t() if transposed else normal(inner, columns, seed=1)
    out = torch.full((rows, columns), torch.nan)
    with Team(2) as team:
        assert multiply(team, left, right, out) is out
    torch.testing.assert_close(out.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 100])
def test_gram_matrices_add_up(width: int, small_tiles: None) -> None:
    portions = [normal(count, width, seed=count) for count in (50, 1, 7)]
    upper = torch.ones(width, width).triu().bool()
    total = torch.zeros(width, width).masked_fill_(~upper, torch.nan)  # what is below does not matter
    with Team(2) as team:
        for rows in portions:
            add_gram(team, rows, total)
    everything = torch.cat(portions).double()
    expected = everything.t() @ everything
    torch.testing.assert_close(total[upper].double(), expected[upper], rtol=1e-5, atol=1e-4)
    mirrored = mirror(total)
    assert mirrored is total
    assert torch.equal(total, total.t())
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1, 23, 24, 25, 48, 100, 131])
def test_factor_upper(size: int, small_tiles: None) -> None:
    matrix = positive_definite(size)
    factor = matrix.clone()
    below = torch.ones(size, size).tril(-1).bool()
    factor[below] = torch.nan  # not to be read
    with Team(2) as team:
        assert factor_upper(team, factor)
    upper = factor.masked_fill(below, 0).double()
    assert torch.isfinite(upper).all()
    assert (upper.diagonal() > 0).all()
    torch.testing.assert_close(upper @ upper.t(), matrix.double(), rtol=0, atol=2e-5)
    # The factorization is unique: the lower one of the matrix turned over, turned over.
    expected = torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1)
    torch.testing.assert_close(upper, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("at", [0, 30, 99])
def test_what_is_not_positive_definite_is_told(at: int, small_tiles: None) -> None:
    matrix = positive_definite(100)
    matrix[at, at] = -1.0
    with Team(2) as team:
        assert not factor_upper(team, matrix)
        assert not factor_upper(team, torch.zeros(100, 100))
        assert not factor_upper(team, torch.full((100, 100), torch.nan))


def assert_threads_change_no_bit(left: torch.Tensor, right: torch.Tensor, matrix: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A product, its Gram matrix, and the factor of what ``matrix`` makes of that."""
    results = []
    for threads in THREADS:
        with Team(threads) as team:
            product = multiply(team, left, right, torch.empty(left.shape[0], right.shape[1]))
            gram = torch.zeros(right.shape[1], right.shape[1])
            add_gram(team, product, gram)
            factor = matrix(mirror(gram))
            assert factor_upper(team, factor)
        results.append((product, gram, factor))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_bits_do_not_depend_on_the_number_of_threads(small_tiles: None) -> None:
    assert_threads_change_no_bit(normal(100, 70), normal(70, 130, seed=1), lambda _: positive_definite(131))


def test_bits_do_not_depend_on_the_number_of_threads_in_real_tiles() -> None:
    """Large enough that BLAS would split it among threads if it had them."""
    assert_threads_change_no_bit(
        normal(600, 700), normal(700, 2100, seed=1), lambda gram: gram[:1100, :1100] + 1000 * torch.eye(1100)
    )


def test_threads_leave_blas_to_themselves() -> None:
    """A new thread would begin with a BLAS of all cores, which adds up the last rows of small products otherwise."""
    left = torch.randn(11, 256, generator=torch.Generator().manual_seed(4))
    right = torch.randn(256, 64, generator=torch.Generator().manual_seed(5))
    found: list[tuple[int, torch.Tensor]] = []
    with Team(1) as team:
        team.run(lambda _: found.append((torch.get_num_threads(), left @ right)), range(1))
    with Team(3) as team:
        team.run(lambda _: found.append((torch.get_num_threads(), left @ right)), range(30))
    assert all(threads == 1 and torch.equal(product, found[0][1]) for threads, product in found)
