"""The mixture of experts of a layer straight from packed weights, on a CUDA device.

    route       logits in float32, the experts of largest logits, the sigmoid
    sort        rows (token, slot) by expert; behind them all tokens once more for the shared expert, which is one more expert
    permute     rows gathered, multiplied by the router's score, rounded to BF16
    gate_up     one launch: both products and SwiGLU, BF16 ``[rows, width]``
    down        one launch: float32 ``[splits, rows, hidden]``; where there are few rows, inputs are cut so that the device is full
    combine     for every token the shared expert's row, then its slots, over all splits, always in that order

Experts of one scheme and shape are one stack and one launch of each, or two where the shared expert, which has all tokens, is
better cut into larger tiles; a mixture of schemes takes one launch for each of them.  Nothing waits for the device, once experts
are prepared: how many tiles of rows there are is known to the device alone (``moe_tiles.Tiles``), and kernels take tiles until
there are none.  No atomics: every row is written by one program.

A kind of weight has three functions, which ``KERNELS`` finds by name in its module:

    gate_up(rows: Rows, weight: DeviceWeight, tiles: Tiles, out [rows, any width >= outputs] BF16)    weight is paired
    matmul(rows: Rows, weight: DeviceWeight, tiles: Tiles, out [splits, rows, outputs] BF16 or float32)
    round_rows(values [rows, padded inputs] BF16, weight: DeviceWeight, expert_of_row: int64 [rows]) -> Rows

    shape_of_tile(weight: DeviceWeight, tokens: int) -> Shape

``out`` of gate_up may be wider than ``outputs``; what lies beyond is left as it is.  Each of the splits of ``matmul`` takes a run
of inputs (zeros where there is none for it), and the caller adds them.  Rows without a tile belong to other stacks: not written.
``round_rows`` is called where a client would round; ``expert_of_row`` is a row's place in the stack, any place for rows of others.
``shape_of_tile`` gives the entry of the table that the launchers use for tiles of so many rows.

This module imports triton, so nothing imports it before there is work for a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as functional

from quantkit import forward
from quantkit.errors import RecipeError
from quantkit.kernels import moe_tiles, moe_triton_rows
from quantkit.kernels.device_mixture import Mixture, Stack, prepare
from quantkit.kernels.device_weights import DeviceWeight, build, padded
from quantkit.kernels.moe_tiles import INPUTS, KnownRows, Rows, Shape, Tiles
from quantkit.kernels.weights import Mlp, Weight
from quantkit.team import spans

PORTION = 16384  # tokens at once: more gain nothing, and their rows take memory
LEAST_CAPABILITY, BEYOND_CAPABILITY = (9, 0), (12, 0)  # the first without BF16 pairs, the last with 99 KiB for a program
Launch = Callable[[Rows, DeviceWeight, Tiles, torch.Tensor], None]

KERNELS = {  # kind of weight -> module with its launchers
    "integer": "quantkit.kernels.moe_triton_integer",
    "fp8": "quantkit.kernels.moe_triton_float",
    "floating": "quantkit.kernels.moe_triton_float",
    "blocks": "quantkit.kernels.moe_triton_blocks",
}


@dataclass(frozen=True)
class Kernels:
    """The functions of a kind; see above."""

    gate_up: Launch
    matmul: Launch
    round_rows: Callable[[torch.Tensor, DeviceWeight, torch.Tensor], Rows]
    shape_of_tile: Callable[[DeviceWeight, int], Shape]


def kernels_of(kind: str) -> Kernels:
    """The launchers of a kind of weight."""
    module = importlib.import_module(KERNELS[kind])
    return cast("Kernels", module)


# --------------------------------------------------------------------------------------------------------------- forward


def dequant_matmul(
    x: torch.Tensor, weight: Weight | DeviceWeight, *, round_activations: bool = True, known_rows: KnownRows | None = None
) -> torch.Tensor:
    """``x [tokens, in]`` BF16 times the transposed weight: BF16 ``[tokens, out]``."""
    x = x.to(torch.bfloat16)
    with _current(x.device):
        there = weight if isinstance(weight, DeviceWeight) else build(weight, x.device)
        _same_device(x, there)
        values = _padded_rows(x, there.padded_inputs)
        if not len(x):
            return x.new_empty((0, there.outputs))
        rows = (known_rows or KnownRows()).all(len(x), x.device)
        out, splits = x.new_empty((len(x), there.outputs)), splits_of(there, [rows.tiles], x.device)
        if splits == 1:
            _multiply(values, there, [rows.tiles], rows.place, round_activations, out[None])
            return out
        parts = torch.empty((splits, *out.shape), device=x.device)
        _multiply(values, there, [rows.tiles], rows.place, round_activations, parts)
        moe_triton_rows.combine(parts, rows.order, out)
        return out


def moe_forward(
    x: torch.Tensor,
    router: torch.Tensor,
    experts: Sequence[Mlp] | Mixture,
    shared_expert: Mlp | None,
    *,
    experts_per_token: int = 1,
    round_activations: bool = True,
) -> tuple[torch.Tensor, forward.Routing]:
    """BF16 ``[tokens, hidden]`` for ``x [tokens, hidden]`` BF16, and where each token went.

    experts: prepared, with the shared one among them, or as they are stored, and then those with tokens are brought to the device.
    """
    x = x.to(torch.bfloat16).contiguous()
    with _current(x.device):
        routing = forward.route(x.to(torch.float32), router.to(x.device, torch.float32), experts_per_token)
        if not len(x):
            return torch.empty_like(x), routing
        if not isinstance(experts, Mixture):
            if shared_expert is None:
                raise RecipeError("moe_forward: experts that are not prepared need a shared expert beside them")
            experts = prepare(experts, shared_expert, x.device, torch.unique(routing.experts).tolist())
        for group in experts.stacks:
            _same_device(x, group.down)
        out = torch.empty_like(x)
        for part in spans(len(x), PORTION):
            portion = forward.Routing(routing.experts[part], routing.scores[part], routing.logits[part])
            _run(x[part], portion, experts, round_activations, out[part])
        return out, routing


def _run(x: torch.Tensor, routing: forward.Routing, mixture: Mixture, round_activations: bool, out: torch.Tensor) -> None:
    """All steps behind the router; writes ``out [tokens, hidden]``."""
    tokens, slots = routing.experts.shape
    order = moe_triton_rows.ordered(routing, mixture.experts)
    values = moe_triton_rows.permute(x, order.tokens, order.scores, padded(x.shape[1], INPUTS))
    width, down = mixture.stacks[0].gate.outputs, mixture.stacks[0].down
    make = torch.empty if width == down.padded_inputs else torch.zeros  # padding is multiplied by zeros, so it must be finite
    inner = make((len(values), down.padded_inputs), dtype=torch.bfloat16, device=x.device)  # of all stacks: rows belong to one
    launches = []
    for group in mixture.stacks:
        tiles = tiles_of(group, order.bounds, tokens, slots, mixture.experts)
        rounded = round_activations and any(weight is not None and _rounds(weight) for weight in (group.gate, group.up, group.down))
        place = torch.searchsorted(group.numbers, order.experts).clamp_(max=len(group.numbers) - 1) if rounded else order.experts
        launches.append((group, tiles, place))
        if group.up is None:
            rows = _rows(values, group.gate, place, round_activations)
            for some in tiles:
                kernels_of(group.gate.kind).gate_up(rows, group.gate, some, inner)
        else:
            gate, up = (_product(values, weight, tiles, place, round_activations) for weight in (group.gate, group.up))
            mine = (order.experts[:, None] == group.numbers).any(1, keepdim=True)  # isin may wait for the device
            inner[:, :width] = torch.where(mine, functional.silu(gate) * up, inner[:, :width])
    splits = [splits_of(group.down, tiles, x.device) for group, tiles, _ in launches]
    make = torch.empty if min(splits) == max(splits) else torch.zeros
    parts = make((max(splits), len(values), x.shape[1]), device=x.device)
    for (group, tiles, place), count in zip(launches, splits, strict=True):
        _multiply(inner, group.down, tiles, place, round_activations, parts[:count])
    moe_triton_rows.combine(parts, order.places, out)


def tiles_of(group: Stack, bounds: torch.Tensor, tokens: int, slots: int, experts: int) -> list[Tiles]:
    """Tiles of a stack's rows, of an ``Order`` with these ``bounds``.

    They are of one size, for one launch.  But where the shared expert, which has all tokens, fills the largest tiles and the others
    do not, it has a launch of its own: in tiles of 16 its weights alone would be unpacked as often as those of all others.

    How many there can be is told from all ``experts`` of the layer, and so is what depends on it, into how many parts sums are cut:
    the result has the same bits whether all experts lie on the device or those with tokens.
    """
    size, larger = moe_tiles.tokens_of_tile(tokens * slots, experts), moe_tiles.tokens_of_tile(tokens, 1)
    most, everyone = min(experts, tokens * slots) + tokens * slots // size, -(-tokens // larger)
    members = range(len(group.numbers))
    if not group.routed:
        return [moe_triton_rows.cut(bounds, group.numbers, members, larger, everyone)]
    if group.shared and larger == moe_tiles.TOKENS[-1] > size:
        routed, shared = members[: group.routed], members[group.routed :]
        return [
            moe_triton_rows.cut(bounds, group.numbers, routed, size, most),
            moe_triton_rows.cut(bounds, group.numbers, shared, larger, everyone),
        ]
    return [moe_triton_rows.cut(bounds, group.numbers, members, size, most + (-(-tokens // size) if group.shared else 0))]


def splits_of(weight: DeviceWeight, tiles: Sequence[Tiles], device: torch.device) -> int:
    """Into how many parts inputs are cut, so that the smallest of these launches keeps the device busy."""

    def splits(some: Tiles) -> int:
        shape = kernels_of(weight.kind).shape_of_tile(weight, some.tokens)
        programs = moe_tiles.multiprocessors(device) * shape.residents
        return moe_tiles.splits(some.most * -(-weight.rows // shape.outputs), weight.padded_inputs // INPUTS, programs)

    return max(splits(some) for some in tiles)


def _product(
    values: torch.Tensor, weight: DeviceWeight, tiles: Sequence[Tiles], place: torch.Tensor, round_activations: bool
) -> torch.Tensor:
    """float32 ``[rows, outputs]``; rows without a tile hold anything."""
    parts = torch.empty((splits_of(weight, tiles, values.device), len(values), weight.outputs), device=values.device)
    _multiply(values, weight, tiles, place, round_activations, parts)
    return parts.sum(0)


def _multiply(
    values: torch.Tensor,
    weight: DeviceWeight,
    tiles: Sequence[Tiles],
    place: torch.Tensor,
    round_activations: bool,
    out: torch.Tensor,
) -> None:
    rows = _rows(values, weight, place, round_activations)
    for some in tiles:
        kernels_of(weight.kind).matmul(rows, weight, some, out)


def _rows(values: torch.Tensor, weight: DeviceWeight, place: torch.Tensor, round_activations: bool) -> Rows:
    if round_activations and _rounds(weight):
        return kernels_of(weight.kind).round_rows(values, weight, place)
    return Rows(values)


def _rounds(weight: DeviceWeight) -> bool:
    """Whether clients quantize what is multiplied with it."""
    return weight.scheme is not None and (weight.scheme.dynamic_activations or weight.scheme.static_activations)


def _padded_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    return functional.pad(x, (0, width - x.shape[1])).contiguous() if width != x.shape[1] else x.contiguous()


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The device that kernels are launched on.  Raises RecipeError where they cannot run."""
    check_device(device)
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def check_device(device: torch.device) -> None:
    """Raises RecipeError where kernels cannot run."""
    if device.type != "cuda":
        return
    capability = _capability(device)
    if not LEAST_CAPABILITY <= capability < BEYOND_CAPABILITY:
        raise RecipeError(
            f"products straight from packed weights on {device}: the GPU is of compute capability {capability[0]}.{capability[1]}, "
            "and the kernels need the instructions and the shared memory of 9.0 to 11.x (H100, H200, B200); use the CPU"
        )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _same_device(x: torch.Tensor, weight: DeviceWeight) -> None:
    """A kernel that is launched on one GPU cannot be given the memory of another."""
    if weight.codes.device != x.device:
        raise RecipeError(f"inputs are on {x.device} and prepared weights on {weight.codes.device}: bring both to the same device")
