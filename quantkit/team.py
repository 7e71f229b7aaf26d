"""Threads that work on the tiles of one computation, and the few dense routines that calibration spends its time in.

BLAS libraries choose how to split a product by the number of threads, so their results differ from one machine load to the next.
Here every routine is cut into tiles of fixed size, each of which is computed by one thread that has BLAS to itself: the bytes do
not depend on how many threads there are, so a resumed run and a run on more cores give the same artifact.

With a device (a GPU) whole products go there and back instead, in full float32; then the bytes depend on the device and its
libraries.

All matrices are float32 and lie on the CPU; products accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, TypeVar

import torch

from quantkit.errors import CalibrationError

T = TypeVar("T")

TILE = 1024  # rows and columns of the tiles that threads take
FACTOR_BLOCK = 256  # columns that are factored at once
SAMPLED_ROWS = 128  # at least, from which the size of outputs is told


class Team:
    """``threads`` threads, each with a single-threaded BLAS while the team exists.  A context manager.

    device: where large products are computed; None for the threads themselves.  Where it has too little memory for what was done in
    the block, leaving that raises CalibrationError.  check: called before every tile; what it raises ends the work, so that a layer
    of hours can be stopped within seconds.
    """

    def __init__(self, threads: int, device: torch.device | None = None, check: Callable[[], None] | None = None) -> None:
        self.threads = threads
        self.device = device
        self._check = check
        self._torch_threads = torch.get_num_threads()
        self._executor: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        torch.set_num_threads(1)
        if self.threads > 1:
            # BLAS keeps the number of its threads by thread: a new one would begin with as many as there are cores.
            self._executor = ThreadPoolExecutor(self.threads, "quantkit-team", torch.set_num_threads, (1,))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
        torch.set_num_threads(self._torch_threads)
        if self.device is not None and isinstance(error, torch.OutOfMemoryError):
            raise CalibrationError(
                f"{self.device} has too little memory ({error}). End other programs that use the GPU, take shorter sequences, or "
                "compute on the CPU; the same command goes on from the last layer that is finished."
            ) from error

    def run(self, work: Callable[[T], object], items: Iterable[T]) -> None:
        """Call ``work`` for every item; the calls must not depend on each other.  Raises what the first failing one raised."""

        def checked(item: T) -> None:
            if self._check is not None:
                self._check()
            work(item)

        if self._executor is None:
            for item in items:
                checked(item)
            return
        futures = [self._executor.submit(checked, item) for item in items]
        wait(futures)
        for future in futures:
            future.result()


def spans(count: int, size: int = TILE) -> list[slice]:
    """``range(count)`` cut into slices of ``size``, the last one shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def multiply(team: Team, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out = left @ right``, in tiles of fixed size."""
    if team.device is not None:
        return out.copy_(torch.mm(left.to(team.device), right.to(team.device)))
    tiles = [(rows, columns) for rows in spans(left.shape[0], TILE // 2) for columns in spans(right.shape[1], 2 * TILE)]

    def tile(at: tuple[slice, slice]) -> None:
        rows, columns = at
        torch.mm(left[rows], right[:, columns], out=out[rows, columns])

    team.run(tile, tiles)
    return out


def add_gram(team: Team, rows: torch.Tensor, total: torch.Tensor) -> None:
    """Add ``rows^T rows`` to the upper triangle of ``total [in, in]``.  rows: ``[count, in]``."""
    if team.device is not None:
        there = rows.to(team.device)
        total += torch.mm(there.t(), there).to(total.device)
        return
    tiles = spans(rows.shape[1], TILE)

    def add(at: tuple[slice, slice]) -> None:
        one, other = at
        total[at].addmm_(rows[:, one].t(), rows[:, other])

    team.run(add, [(one, other) for number, one in enumerate(tiles) for other in tiles[number:]])


def add_product(team: Team, left: torch.Tensor, right: torch.Tensor, total: torch.Tensor) -> None:
    """Add ``left^T right`` to ``total [left columns, right columns]``.  left, right: ``[count, columns]``."""
    if team.device is not None:
        total += torch.mm(left.to(team.device).t(), right.to(team.device)).to(total.device)
        return

    def add(at: tuple[slice, slice]) -> None:
        one, other = at
        total[at].addmm_(left[:, one].t(), right[:, other])

    team.run(add, [(one, other) for one in spans(left.shape[1], TILE) for other in spans(right.shape[1], TILE)])


def factor_upper(team: Team, matrix: torch.Tensor) -> bool:
    """Replace a symmetric matrix by upper triangular U with ``matrix = U U^T``; False when it is not positive definite.

    This is the Cholesky factorization from the last row to the first.  Only the upper triangle is read; the lower one is left as it
    is.  After a failure the contents are worthless.
    """
    for block in reversed(spans(matrix.shape[0], FACTOR_BLOCK)):
        corner = torch.flip(matrix[block, block], (0, 1))  # turned over, the upper triangle is the lower one
        lower, info = torch.linalg.cholesky_ex(corner.contiguous())
        if int(info):
            return False
        corner = torch.flip(lower, (0, 1)).contiguous()
        matrix[block, block] = corner
        above = spans(block.start, TILE // 2)

        def solve(rows: slice, block: slice = block, corner: torch.Tensor = corner) -> None:
            # X U^T = B, with U the corner: the panel above it
            matrix[rows, block] = torch.linalg.solve_triangular(corner.t(), matrix[rows, block], upper=False, left=False)

        def update(at: tuple[slice, slice], block: slice = block) -> None:
            one, other = at
            matrix[at].addmm_(matrix[one, block], matrix[other, block].t(), alpha=-1)

        team.run(solve, above)
        team.run(update, [(one, other) for number, one in enumerate(above) for other in above[number:]])
    return True


def sampled(weight: torch.Tensor) -> torch.Tensor:
    """At most some 250 rows of a matrix ``[out, in]``, spread evenly."""
    return weight[:: max(1, weight.shape[0] // SAMPLED_ROWS)]


def output_power(team: Team, rows: torch.Tensor, hessian: torch.Tensor) -> float:
    """Mean over ``rows [count, in]``, of w H w^T: the mean square of outputs, or of their errors.  H: upper triangle."""
    parts = spans(hessian.shape[0])
    powers = [0.0] * len(parts)

    def add(number: int) -> None:
        part = parts[number]
        own, corner, later = rows[:, part], hessian[part, part], slice(part.stop, None)
        products = torch.sum(torch.mm(own, corner.triu()) * own, dtype=torch.float64)
        products += torch.sum(torch.mm(own, hessian[part, later]) * rows[:, later], dtype=torch.float64)
        powers[number] = float(2 * products - torch.sum(own.square() * corner.diagonal(), dtype=torch.float64))

    team.run(add, range(len(parts)))
    return sum(powers) / rows.shape[0]
