"""Products with stored weights on the CPU, in float32.

A weight matrix is never expanded as a whole: a thread takes ``TILE`` rows of it, dequantizes them into its own buffer, which stays
in the cache, and multiplies all tokens with them there.  That is as fast as a product with a float32 matrix in memory, from one
token to thousands, and needs no memory for one.  Up to ``dot_cpu.MOST`` tokens do without the buffer.  A small matrix has few
tiles, so tokens are cut as well, into blocks by which all threads have work.  Sizes of tiles and blocks follow from shapes alone,
and each belongs to one thread, so results do not depend on the number of threads.

A gated MLP takes its tokens in portions, so that what lies between its matrices stays within ``PORTION_BYTES``:

    rows    tokens gathered, multiplied by the router's score, rounded if the client rounds them
    inner   silu(gate) * up, tile by tile: a thread computes both for the same outputs and keeps only the product
    down    tile by tile, added to the rows of the result that the tokens came from
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch

from quantkit import forward
from quantkit.grid import QuantizedTensor
from quantkit.kernels.activations import round_in_place, rounds_inputs, same_inputs
from quantkit.kernels.dequantize import Prepared, prepare
from quantkit.kernels.dot_cpu import MOST, dots, fits, prepare_floating
from quantkit.kernels.exponential import exponential
from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_bfloat16, load_float32, store
from quantkit.kernels.simd import floats
from quantkit.kernels.weights import Mlp, Weight, shape_of
from quantkit.team import Team, spans
from quantkit.workspace import Workspace

T = TypeVar("T")

TILE = 256  # rows of a weight that are dequantized and multiplied at once
SMALL_TILE, FEW = 64, 64  # the same for at most so many tokens
PORTION_BYTES = 256 << 20  # rows, inner and the tiles' buffers
COUNTED = 2  # threads whose buffers count as part of a portion: it must not depend on how many there are
GATHERED = 64 * 5120  # numbers that a thread gathers and rounds at a time
ENOUGH, LEAST_BLOCK = 32, 512  # tiles times blocks, if blocks have at least so many tokens

Factor = Prepared | torch.Tensor  # a weight as tiles are made of it
Cut = tuple[slice, slice]  # rows of a weight, and the tokens that are multiplied with them


def dequant_matmul(
    x: torch.Tensor, weight: Weight, *, round_activations: bool, team: Team | None, workspace: Workspace | None
) -> torch.Tensor:
    """x: float32 ``[tokens, in]``.  Returns float32 ``[tokens, out]``."""
    workspace = workspace or Workspace()
    x = x.to(torch.float32).contiguous()
    out = torch.empty(x.shape[0], shape_of(weight)[0])
    with _working(team) as workers:
        if round_activations and rounds_inputs(weight):
            x = _gather(workers, workspace.tensor("rows", torch.float32, *x.shape), x, None, None, weight)
        factor = _factor(weight, len(x))
        tile = _tile_of(len(x), factor)

        def work(at: Cut, buffers: list[torch.Tensor]) -> None:
            rows, part = at
            _multiply(x[part], factor, rows, buffers[0], out[part, rows])

        _on_slots(workers, workspace, work, _cuts(out.shape[1], tile, len(x)), (tile * x.shape[1],))
    return out


def moe(
    x: torch.Tensor,
    routing: forward.Routing,
    experts: Sequence[Mlp],
    shared: Mlp,
    *,
    round_activations: bool,
    team: Team | None,
    workspace: Workspace | None,
) -> torch.Tensor:
    """x: float32 ``[tokens, hidden]``.  Returns float32 ``[tokens, hidden]``; each expert is asked for once, in order."""
    workspace = workspace or Workspace()
    x = x.to(torch.float32).contiguous()
    result = torch.zeros_like(x)
    with _working(team) as workers:
        run = _Run(workers, workspace, round_activations)
        run.add(x, shared, torch.arange(len(x)), None, result)
        for expert in torch.unique(routing.experts).tolist():
            tokens, slots = torch.eq(routing.experts, expert).nonzero(as_tuple=True)
            run.add(x, experts[expert], tokens, routing.scores[tokens, slots], result)
    return result


class _Run:
    """One mixture of experts: what all its MLPs share."""

    def __init__(self, team: Team, workspace: Workspace, round_activations: bool) -> None:
        self._team, self._workspace, self._round = team, workspace, round_activations

    def add(self, x: torch.Tensor, weights: Mlp, tokens: torch.Tensor, scores: torch.Tensor | None, result: torch.Tensor) -> None:
        """Add the MLP's outputs for ``x[tokens]``, times ``scores``, to ``result[tokens]``."""
        width, hidden = shape_of(weights.gate)
        factors = tuple(_factor(weight, len(tokens)) for weight in (weights.gate, weights.up, weights.down))
        two = self._round and not same_inputs(weights.gate, weights.up)
        each = 4 * (hidden * (1 + two) + width + 2 * COUNTED * TILE)
        for part in spans(len(tokens), max(16, PORTION_BYTES // each)):
            self._portion(x, weights, factors, tokens[part], None if scores is None else scores[part], two, result)

    def _portion(
        self,
        x: torch.Tensor,
        weights: Mlp,
        factors: tuple[Factor, ...],
        tokens: torch.Tensor,
        scores: torch.Tensor | None,
        two: bool,
        result: torch.Tensor,
    ) -> None:
        (width, hidden), count = shape_of(weights.gate), len(tokens)
        gate, up, down = factors
        tile = _tile_of(count, *factors)
        rows = self._rows("rows", x, tokens, scores, weights.gate)
        others = self._rows("other rows", x, tokens, scores, weights.up) if two else rows
        inner = self._workspace.tensor("inner", torch.float32, count, width)

        def gate_up(at: Cut, buffers: list[torch.Tensor]) -> None:
            (outputs, part), shape = at, _shape(at)
            one, other = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers[1:])
            _multiply(rows[part], gate, outputs, buffers[0], one)
            _multiply(others[part], up, outputs, buffers[0], other)
            _gated(one.numpy(), other.numpy(), inner[part].numpy(), outputs.start)

        def add_down(at: Cut, buffers: list[torch.Tensor]) -> None:
            (outputs, part), shape = at, _shape(at)
            product = buffers[1][: shape[0] * shape[1]].view(shape)
            _multiply(inner[part], down, outputs, buffers[0], product)
            _add(product.numpy(), tokens[part].numpy(), result.numpy(), outputs.start)

        for outputs, work in ((width, gate_up), (hidden, add_down)):
            if self._round and work is add_down:
                self._team.run(lambda part: round_in_place(inner[part], weights.down), _gathered(count, width))
            cuts = _cuts(outputs, tile, count)
            most = max((shape[0] * shape[1] for shape in map(_shape, cuts)), default=0)
            _on_slots(self._team, self._workspace, work, cuts, (tile * max(width, hidden), most, most))

    def _rows(self, name: str, x: torch.Tensor, tokens: torch.Tensor, scores: torch.Tensor | None, weight: Weight) -> torch.Tensor:
        out = self._workspace.tensor(name, torch.float32, len(tokens), x.shape[1])
        return _gather(self._team, out, x, tokens, scores, weight if self._round else None)


def _working(team: Team | None) -> AbstractContextManager[Team]:
    return Team(1) if team is None else nullcontext(team)


def _tile_of(tokens: int, *factors: Factor) -> int:
    """Rows of a weight at once: few for few tokens, unless what is taken is a short run of each of its columns."""
    turned = any(not isinstance(factor, Prepared) and factor.stride(0) == 1 for factor in factors)
    return SMALL_TILE if tokens <= FEW and not turned else TILE


def _on_slots(
    team: Team,
    workspace: Workspace,
    work: Callable[[T, list[torch.Tensor]], None],
    items: Iterable[T],
    sizes: tuple[int, ...],
) -> None:
    """Call ``work`` for every item on the team's threads, each with float32 buffers of these sizes that no other call has."""
    free: SimpleQueue[list[torch.Tensor]] = SimpleQueue()
    for slot in range(team.threads):
        free.put([workspace.tensor(f"tile {slot} {number}", torch.float32, size) for number, size in enumerate(sizes)])

    def one(item: T) -> None:
        buffers = free.get()
        try:
            work(item, buffers)
        finally:
            free.put(buffers)

    team.run(one, items)


def _gather(
    team: Team, out: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor | None, scores: torch.Tensor | None, weight: Weight | None
) -> torch.Tensor:
    """``out = x[tokens] * scores``, rounded as the client of ``weight`` does it; None: all of them, times 1, not rounded."""

    def work(part: slice) -> None:
        if tokens is None:
            out[part].copy_(x[part])
        else:
            torch.index_select(x, 0, tokens[part], out=out[part])
        if scores is not None:
            out[part].mul_(scores[part, None])
        if weight is not None:
            round_in_place(out[part], weight)

    team.run(work, _gathered(*out.shape))
    return out


def _gathered(rows: int, columns: int) -> list[slice]:
    return spans(rows, max(64, GATHERED // columns))


def _cuts(outputs: int, tile: int, tokens: int) -> list[Cut]:
    """Tiles of a weight's rows, each with all tokens, or with one block of them after the other where tiles are few."""
    tiles = spans(outputs, tile)
    blocks = -(-ENOUGH // max(1, len(tiles)))
    return [(rows, part) for rows in tiles for part in spans(tokens, max(LEAST_BLOCK, -(-tokens // blocks)))]


def _shape(cut: Cut) -> tuple[int, int]:
    """Tokens and outputs."""
    outputs, part = cut
    return part.stop - part.start, outputs.stop - outputs.start


def _factor(weight: Weight, tokens: int) -> Factor:
    """How so many tokens are multiplied with a weight: floating ones, ggml's too, as tensors, others with their steps."""
    if isinstance(weight, QuantizedTensor):
        if weight.scheme.number != "ggml" or not weight.scheme.block_type.floating:
            return prepare(weight)
        weight = weight.codes
    few = prepare_floating(weight) if tokens <= MOST else None
    return weight if few is None or not fits(few, tokens) else few


def _multiply(x: torch.Tensor, factor: Factor, rows: slice, buffer: torch.Tensor, out: torch.Tensor) -> None:
    """``out [tokens, rows] = x @ weight[rows]^T``; ``buffer`` holds at least as many numbers as that part of the weight."""
    columns = factor.columns if isinstance(factor, Prepared) else factor.shape[1]
    if x.shape[1] != columns:
        raise ValueError(f"inputs of {x.shape[1]} columns for a weight with {columns} inputs")
    if isinstance(factor, Prepared) and fits(factor, len(x)):
        dots(x, factor, rows, out)
    else:
        torch.mm(x, _transposed(factor, rows, buffer), out=out)


def _transposed(factor: Factor, rows: slice, buffer: torch.Tensor) -> torch.Tensor:
    """Those rows of a weight, transposed, float32 ``[in, rows]``; in the buffer unless they are that already."""
    count = rows.stop - rows.start
    if isinstance(factor, Prepared):
        out = buffer[: count * factor.columns].view(count, factor.columns)
        factor.into(out, rows)
        return out.t()
    part = factor[rows]
    if part.dtype == torch.float32:
        return part.t()
    columns = part.shape[1]
    if part.stride(0) == 1:  # in the file of a fused expert the outputs of an input are neighbours: they stay so
        out = buffer[: count * columns].view(columns, count)
        if part.dtype == torch.bfloat16:
            _widen(part.t().view(torch.int16).numpy(), out.numpy())
        else:
            out.copy_(part.t())
        return out
    return buffer[: count * columns].view(count, columns).copy_(part).t()


# ---------------------------------------------------------------------------------------------------------------- kernels


@kernel
def _widen(values: Any, out: Any) -> None:
    """BF16 bits ``[inputs, outputs]``, outputs contiguous, to float32; torch is slow where rows are not one behind the other."""
    whole = values.shape[1] // 16 * 16
    for row in range(values.shape[0]):
        source, target = values[row], out[row]
        for index in range(0, whole, 16):
            store(target, index, load_bfloat16(source, index))
        if whole < values.shape[1]:
            tail = np.zeros(16, np.int16)
            wide = np.empty(16, np.float32)
            for index in range(whole, values.shape[1]):
                tail[index - whole] = source[index]
            store(wide, 0, load_bfloat16(tail, 0))
            for index in range(whole, values.shape[1]):
                target[index] = wide[index - whole]


@compiled
def _silu_times(gate: Any, up: Any) -> Any:
    return gate / (floats(1.0) + exponential(floats(0.0) - gate)) * up


@kernel
def _gated(gate: Any, up: Any, out: Any, first: int) -> None:
    """``out[:, first:]`` = silu(gate) * up; gate, up: ``[tokens, outputs]``."""
    width = gate.shape[1]
    whole = width // 16 * 16
    one, other = np.zeros(16, np.float32), np.zeros(16, np.float32)
    for token in range(gate.shape[0]):
        left, right, target = gate[token], up[token], out[token]
        for index in range(0, whole, 16):
            store(target, first + index, _silu_times(load_float32(left, index), load_float32(right, index)))
        if whole < width:
            for index in range(whole, width):
                one[index - whole], other[index - whole] = left[index], right[index]
            store(one, 0, _silu_times(load_float32(one, 0), load_float32(other, 0)))
            for index in range(whole, width):
                target[first + index] = one[index - whole]


@kernel
def _add(product: Any, tokens: Any, result: Any, first: int) -> None:
    """Add ``product [tokens, outputs]`` to those rows of ``result``, from column ``first`` on."""
    for row in range(tokens.size):
        target = result[tokens[row]]
        for index in range(product.shape[1]):
            target[first + index] += product[row, index]
