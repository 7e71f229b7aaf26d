"""The mixture of experts in Triton's interpreter, against float64: products with integer codes, and all from router to output.

Kernels run in a process of their own: this file, run as a program.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from expert_products import OUTPUT_ROUNDING, SUM_ROUNDING, exact, worst_deviation
from hypothesis import given
from hypothesis import strategies as st
from instructions_by_hand import halves, run
from torch.utils._python_dispatch import TorchDispatchMode
from triton_programs import interpreted_by, main, needs_triton

from quantkit.grid import QuantizedTensor
from quantkit.kernels import device_mixture, device_weights, moe_tiles, planes
from quantkit.kernels.activations import rounded_inputs
from quantkit.kernels.weights import Mlp, Weight
from quantkit.scheme import Scheme, parse_scheme

CPU = torch.device("cpu")
BITS = {"int2": 2, "int3": 3, "int4": 4, "int5": 5, "int6": 6, "int8": 8}
LOADS = {  # rows of each of four experts, rows of a tile
    "empty experts": ((0, 5, 0, 3), 16),
    "one row": ((0, 0, 1, 0), 16),
    "all rows to one": ((0, 37, 0, 0), 32),
    "many rows": ((70, 1, 0, 65), 64),
    "more than a piece": ((0, 130, 3, 0), 128),
}
PRODUCTS = {  # scheme, hidden and width, loads; sizes that no tile divides
    "int4-g128": ((256, 128), tuple(LOADS)),
    "int4-g128-asym": ((256, 128), ("empty experts", "many rows")),
    "int4-g64": ((192, 64), ("empty experts", "more than a piece")),
    "int4-g64-asym": ((192, 64), ("one row", "all rows to one")),
    "int4-g32": ((160, 96), ("one row", "more than a piece")),
    "int4-g32-asym": ((160, 96), ("empty experts", "many rows")),
    "int4-channel": ((208, 72), tuple(LOADS)),
    "int4-channel-asym": ((208, 72), ("empty experts", "more than a piece")),
    "int8-g128": ((256, 128), ("empty experts", "many rows")),
    "int8-g64": ((192, 64), ("one row", "all rows to one")),
    "int8-g32": ((160, 96), ("empty experts", "more than a piece")),
    "int8-channel": ((212, 76), ("empty experts", "all rows to one")),
    "int8-channel-dynamic": ((212, 76), ("empty experts", "one row", "many rows")),
    "int2-g32-asym": ((160, 96), ("empty experts",)),
    "int2-channel": ((144, 72), ("all rows to one",)),
    "int3-g64-asym": ((192, 64), ("empty experts",)),
    "int3-g128": ((128, 128), ("all rows to one",)),
    "int5-g128": ((128, 128), ("empty experts",)),
    "int6-g32": ((160, 96), ("empty experts",)),
    "int6-channel": ((144, 72), ("all rows to one",)),
}
MIXTURES = {  # schemes of (gate, up, down) in turn over experts, of the shared expert, tokens, slots, where tokens go
    "one scheme": ((("int4-g32",) * 3,), ("int4-g32",) * 3, 13, 1, "anywhere"),
    "two slots": ((("int4-g32",) * 3,), ("int4-g32",) * 3, 9, 2, "anywhere"),
    "one token": ((("int4-g32-asym",) * 3,), ("int4-g32-asym",) * 3, 1, 1, "anywhere"),
    "all on one": ((("int8-channel",) * 3,), ("int8-channel",) * 3, 40, 1, "one"),
    "the shared expert by itself": ((("int8-channel",) * 3,), ("int8-channel",) * 3, 96, 1, "anywhere"),
    "mixed": ((("int4-g32",) * 3, ("int2-g32", "int2-g32", "int6-g32"), (None,) * 3), ("int8-g32",) * 3, 11, 2, "anywhere"),
    "gate and up differ": ((("int4-g32", "int6-g32", "int8-channel"),), ("int4-g32",) * 3, 7, 1, "anywhere"),
    "rounded": ((("int8-channel-dynamic",) * 3, ("fp8-channel-dynamic",) * 3), ("int8-channel-dynamic",) * 3, 9, 1, "anywhere"),
    "no token": ((("int4-g32",) * 3,), ("int4-g32",) * 3, 0, 1, "anywhere"),
    "every kind": ([(kind,) * 3 for kind in ("Q4_K", "Q6_K", "Q8_0", "fp8-block-dynamic", None)], ("Q4_K",) * 3, 7, 2, "anywhere"),
}
EXPERTS, HIDDEN, WIDTH = 5, 160, 96
LARGE = {"every kind": (256, 256)}  # hidden, width where blocks want them
INNER_ROUNDING = 2e-4  # the same where inputs were rounded to BF16 on the way, and some of them to the other side


def matrix(name: str | None, rows: int, columns: int) -> Weight:
    """A random weight as it is stored: any code, any zero point; values about 0.05."""
    if name is None:
        return (torch.randn(rows, columns) * 0.05).to(torch.bfloat16)
    scheme = parse_scheme(name)
    assert scheme is not None
    if scheme.number == "ggml":
        return blocks(scheme, rows, columns)
    shape = scheme.scale_shape(rows, columns)
    if scheme.number == "fp8":
        codes = torch.randn(rows, columns).mul_(30).to(torch.float8_e4m3fn)
        return QuantizedTensor(scheme, codes, (torch.rand(shape) + 0.5).mul_(0.0015).to(torch.bfloat16))
    half = 1 << (BITS[scheme.number] - 1)
    codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(shape) + 0.5).mul_(0.1 / half).to(torch.bfloat16)
    zero_point = None if scheme.symmetric else torch.randint(-half, half, shape, dtype=torch.int8)
    return QuantizedTensor(scheme, codes, scale, zero_point)


def blocks(scheme: Scheme, rows: int, columns: int) -> QuantizedTensor:
    """A random weight of one of llama.cpp's types."""
    kind = scheme.block_type
    codes = torch.randint(kind.codes[0], kind.codes[1] + 1, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(rows, columns // kind.block) + 0.5).mul_(0.05 / kind.codes[1])
    if not kind.group:
        return QuantizedTensor(scheme, codes, scale.to(torch.float16))
    lowest, highest = max(kind.group_scales[0], -63), min(kind.group_scales[1], 63)
    group_scale = torch.randint(lowest, highest + 1, (rows, columns // kind.group), dtype=torch.int8)
    scale = scale.mul_(1 / 30).to(torch.float16)
    if not kind.minimum:
        return QuantizedTensor(scheme, codes, scale, group_scale=group_scale)
    group_minimum = torch.randint(0, 64, group_scale.shape, dtype=torch.int8)
    minimum = torch.rand(scale.shape).mul_(0.002).to(torch.float16)
    return QuantizedTensor(scheme, codes, scale, group_scale=group_scale, minimum=minimum, group_minimum=group_minimum)


# ------------------------------------------------------------------------------------------------- in the other process


def products() -> dict[str, Any]:
    """By scheme and load: errors of gate_up and matmul in units of what rounding explains, and whether nothing else is written."""
    from quantkit.kernels import moe_triton_integer

    found: dict[str, Any] = {}
    for number, (name, ((hidden, width), loads)) in enumerate(PRODUCTS.items()):
        torch.manual_seed(number)
        sizes = ((width, hidden), (width, hidden), (hidden, width))
        gates, ups, downs = ([matrix(name, *size) for _ in range(4)] for size in sizes)
        pair = device_weights.stack([device_weights.build(gate, CPU, up) for gate, up in zip(gates, ups, strict=True)])
        last = device_weights.stack([device_weights.build(down, CPU) for down in downs])
        for load in loads:
            counts, tokens = LOADS[load]
            ends = torch.tensor(counts).cumsum(0)
            first, total = ends - torch.tensor(counts), int(ends[-1])
            tiles = moe_tiles.cut(first, ends, tokens, total // tokens + 4)
            outcome: dict[str, Any] = {"kept": True}
            for part, weight, matrices in (("gate_up", pair, gates), ("matmul", last, downs)):
                x = torch.randn(total, weight.inputs).to(torch.bfloat16)
                given_rows = torch.nn.functional.pad(x, (0, weight.padded_inputs - weight.inputs)).contiguous()
                rows = moe_tiles.Rows(given_rows)
                if name.endswith("dynamic"):
                    rows = moe_triton_integer.round_rows(given_rows, weight, torch.zeros(total))
                out = torch.full((total + 1, weight.outputs + 8), 7.0, dtype=torch.bfloat16)
                if part == "gate_up":
                    moe_triton_integer.gate_up(rows, weight, tiles, out)
                    outcome["kept"] &= bool((out[:, weight.outputs :] == 7.0).all() and (out[total:] == 7.0).all())
                    result = out[:total, : weight.outputs].to(torch.float64)
                else:
                    parts = torch.full((2, total, weight.outputs), float("nan"))
                    moe_triton_integer.matmul(rows, weight, tiles, parts)
                    result = parts.sum(0, dtype=torch.float64)
                others = ups if part == "gate_up" else None
                worst = worst_deviation(result, x, counts, matrices, others, rounded_inputs)
                outcome[part] = worst
            found[f"{name}: {load}"] = outcome
    return found


class Waiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations that wait for a GPU, which no CUDA graph can hold."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        if name in ("_local_scalar_dense", "_unique2", "isin", "nonzero", "masked_select", "repeat_interleave"):
            self.found.add(name)
        return function(*args, **(kwargs or {}))


class Asked(Sequence[Mlp]):
    def __init__(self, experts: list[Mlp]) -> None:
        self.experts, self.asked = experts, [-1]

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, number: Any) -> Any:
        self.asked.append(number)
        return self.experts[number]


def mlp_of(names: Sequence[str | None], hidden: int, width: int) -> Mlp:
    sizes = ((width, hidden), (width, hidden), (hidden, width))
    return Mlp(*(matrix(name, *size) for name, size in zip(names, sizes, strict=True)))


def expected(x: torch.Tensor, mlp: Mlp) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert gives for BF16 rows, float64, with its inner values in BF16; and what their rounding may do to it."""
    here = rounded_inputs(x.to(torch.float32), mlp.gate).to(torch.float64)
    gate, up = here @ exact(mlp.gate).t(), here @ exact(mlp.up).t()
    inner = (gate * torch.sigmoid(gate) * up).to(torch.bfloat16)
    # a number on the brink goes to the other side, and with it, where inputs are quantized, by a step
    scheme = mlp.down.scheme if isinstance(mlp.down, QuantizedTensor) else None
    share = 2e-3 if scheme is not None and scheme.dynamic_activations else INNER_ROUNDING
    last = rounded_inputs(inner.to(torch.float32), mlp.down).to(torch.float64)
    return last @ exact(mlp.down).t(), share * (last.abs() @ exact(mlp.down).abs().t())


def mixtures() -> dict[str, Any]:
    """By mixture: the error in units of what rounding explains; who was asked for; whether other ways give the same bits."""
    from quantkit.kernels import dispatch, moe_triton

    found: dict[str, Any] = {}
    for number, (name, (kinds, shared_names, tokens, slots, where)) in enumerate(MIXTURES.items()):
        torch.manual_seed(number)
        hidden, width = LARGE.get(name, (HIDDEN, WIDTH))
        experts = Asked([mlp_of(kinds[expert % len(kinds)], hidden, width) for expert in range(EXPERTS)])
        shared = mlp_of(shared_names, hidden, width)
        router = torch.randn(EXPERTS, hidden) * 0.1
        x = torch.randn(tokens, hidden).to(torch.bfloat16)
        if where == "one":
            router[2], x[:, 0] = 0.0, 1.0
            router[2, 0] = 100.0
        given_settings: dict[str, Any] = {"experts_per_token": slots, "backend": "triton"}
        result, routing = dispatch.moe_forward(x, router, experts, shared, **given_settings)
        ready = device_mixture.prepare(experts.experts, shared, CPU)
        moe_triton.PORTION = max(6, tokens // 3)  # tokens at once
        with Waiting() as waiting:
            again, _ = dispatch.moe_forward(x, router, ready, None, **given_settings)
        moe_triton.PORTION = 16384
        wide = x.to(torch.float64)
        logits = wide @ router.to(torch.float64).t()
        total, slack = expected(x, shared)
        for token in range(tokens):
            for expert in torch.topk(logits[token], slots).indices.tolist():
                score = torch.sigmoid((x[token].to(torch.float32) @ router.t())[expert])
                row = (x[token].to(torch.float32) * score).to(torch.bfloat16)
                values, spread = expected(row[None], experts.experts[expert])
                total[token] += values[0]
                slack[token] += spread[0]
        slack += total.abs() * OUTPUT_ROUNDING
        found[name] = {
            "deviation": float(((result.to(torch.float64) - total).abs() / slack).max()) if tokens else 0.0,
            "asked": experts.asked[1:],
            "wanted": sorted(set(torch.topk(logits, slots).indices.flatten().tolist())),
            "routed": torch.equal(routing.experts, torch.topk(logits, slots).indices),
            "same": torch.equal(result, again),
            "waits": sorted(waiting.found),
            "shape": list(result.shape) == [tokens, hidden] and result.dtype == torch.bfloat16,
        }
    return found


def single() -> dict[str, Any]:
    """A product by itself: deviation for several numbers of rows; a prepared weight gives the same bits, without waiting."""
    from quantkit.kernels import dispatch

    found = {}
    weight = matrix("int4-g64-asym", 72, 192)
    for rows in (0, 1, 33):
        x = torch.randn(rows, 192).to(torch.bfloat16)
        result = dispatch.dequant_matmul(x, weight, backend="triton")
        ready = device_weights.build(weight, CPU)
        with Waiting() as waiting:
            again = dispatch.dequant_matmul(x, ready, backend="triton")
        product = x.to(torch.float64) @ exact(weight).t()
        slack = product.abs() * OUTPUT_ROUNDING + SUM_ROUNDING * (x.abs().to(torch.float64) @ exact(weight).abs().t())
        worst = float(((result.to(torch.float64) - product).abs() / slack).max()) if rows else 0.0
        found[str(rows)] = [worst, torch.equal(result, again) and not waiting.found, list(result.shape)]
    return found


def refusals() -> dict[str, str]:
    """What is said where kernels cannot run."""
    from quantkit.errors import RecipeError
    from quantkit.kernels import dispatch, moe_triton

    weight, found = matrix("int4-g64", 64, 128), {}
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    elsewhere = device_weights.build(torch.empty(64, 128, device="meta"), torch.device("meta"))
    mlp = Mlp(weight, weight, torch.zeros(128, 64))
    mixture = device_mixture.Mixture(1, (device_mixture.Stack(torch.arange(2), 1, elsewhere, None, elsewhere),))
    torch.cuda.get_device_capability = lambda device: (8, 6)  # type: ignore[assignment, misc]
    asked: dict[str, Callable[[], object]] = {
        "old GPU": partial(moe_triton._current, torch.device("cuda", 1)),
        "product": lambda: dispatch.dequant_matmul(x, elsewhere, backend="triton"),
        "mixture": lambda: dispatch.moe_forward(x, torch.zeros(1, 128), mixture, None, backend="triton"),
        "no shared expert": lambda: dispatch.moe_forward(x, torch.zeros(1, 128), [mlp], None, backend="triton"),
    }
    for name, work in asked.items():
        try:
            work()
        except RecipeError as error:
            found[name] = str(error)
    return found


def orders() -> dict[str, Any]:
    """By case: whether one program sorts rows as torch does; tiles of a stack by one program beside those of ``moe_tiles``."""
    from quantkit.forward import Routing
    from quantkit.kernels import moe_triton_rows

    found = {}
    for tokens, slots, experts in ((1, 1, 16), (5, 2, 3), (64, 1, 128), (17, 4, 16)):
        torch.manual_seed(tokens)
        choices = torch.stack([torch.randperm(experts)[:slots] for _ in range(tokens)]).clamp(max=max(2, experts - 3))
        routing = Routing(choices, torch.rand(tokens, slots), torch.empty(0))
        one, other = moe_triton_rows.ordered(routing, experts), moe_triton_rows.sorted_by_torch(routing, experts)
        numbers = torch.tensor([*range(1, experts, 2), experts])
        tiles = moe_triton_rows.cut(one.bounds, numbers, range(len(numbers)), 16, len(numbers) + tokens)
        wanted = moe_tiles.cut(one.bounds[numbers], one.bounds[numbers + 1], 16, len(numbers) + tokens)
        count = int(wanted.count)
        found[f"{tokens} {slots} {experts}"] = {
            "order": [name for name in vars(one) if not torch.equal(getattr(one, name), getattr(other, name))],
            "tiles": int(tiles.count) == count
            and all(
                torch.equal(getattr(tiles, name)[:count], getattr(wanted, name)[:count]) for name in ("expert", "first", "last")
            ),
        }
    return found


def assembly() -> dict[str, Any]:
    from quantkit.kernels import moe_triton_integer

    wanted = [(4, 8, 1), (4, None, 1), (2, 2, 1), (2, None, 1), (2, 2, 16), (4, 0, 1), (2, 0, 1), (8, 128, 1)]
    return {f"{plane} {offset} {step}": moe_triton_integer.instructions(plane, offset, step) for plane, offset, step in wanted}


def interpret() -> dict[str, Any]:
    """Everything that runs in the interpreter, in one process."""
    import triton_arithmetic

    torch.set_num_threads(1)
    triton_arithmetic.make_exact()
    return {
        "products": products(),
        "mixtures": mixtures(),
        "single": single(),
        "orders": orders(),
        "assembly": assembly(),
        "refusals": refusals(),
    }


# ------------------------------------------------------------------------------------------------------------- products


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return interpreted_by(__file__)  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_float64(interpreted: dict[str, Any], name: str) -> None:
    for load in PRODUCTS[name][1]:
        found = interpreted["products"][f"{name}: {load}"]
        assert found["gate_up"] <= 1 and found["matmul"] <= 1, load
        assert found["kept"], f"{load}: what lies beyond rows and outputs is left alone"


@needs_triton
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_what_its_experts_give(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted["mixtures"][name]
    assert found["deviation"] <= 1
    assert found["routed"] and found["shape"]
    assert found["same"], "prepared experts, and tokens in portions, give the same bits"
    assert found["waits"] == [], "prepared experts are multiplied without the host"
    assert found["asked"] == found["wanted"], "only experts with tokens are asked for, in order, once each"


@needs_triton
def test_a_product_by_itself(interpreted: dict[str, Any]) -> None:
    for rows, (worst, same, shape) in interpreted["single"].items():
        assert worst <= 1 and same and shape == [int(rows), 72], rows


@needs_triton
def test_where_kernels_cannot_run_it_is_said(interpreted: dict[str, Any]) -> None:
    found = interpreted["refusals"]
    assert "cuda:1" in found["old GPU"] and "8.6" in found["old GPU"] and "9.0" in found["old GPU"]
    assert "cpu" in found["product"] and "meta" in found["product"] and found["mixture"] == found["product"]
    assert "shared expert" in found["no shared expert"]


@needs_triton
def test_one_program_sorts_and_cuts_as_torch_does(interpreted: dict[str, Any]) -> None:
    for name, found in interpreted["orders"].items():
        assert found["order"] == [] and found["tiles"], name


# --------------------------------------------------------------------------------------------------------- instructions


@needs_triton
@pytest.mark.parametrize("name", ["4 8 1", "4 None 1", "2 2 1", "2 None 1", "2 2 16", "4 0 1", "2 0 1", "8 128 1"])
def test_instructions_unpack_what_arithmetic_says(interpreted: dict[str, Any], name: str) -> None:
    plane, step = int(name.split()[0]), int(name.split()[2])
    offset = -128 if "None" in name else int(name.split()[1])
    generator = torch.Generator().manual_seed(plane)
    mask = (1 << plane) - 1
    every = torch.arange(mask + 1)
    for fields in (every.repeat(64), torch.randint(0, mask + 1, (4096,), generator=generator)):
        words = fields[: len(fields) // (64 // plane) * (64 // plane)].view(-1, 2, 32 // plane)  # [lanes, two words, fields]
        shifts = plane * torch.arange(32 // plane, dtype=torch.int64)
        packed = (words.to(torch.int64) << shifts).sum(-1).numpy().astype(np.uint32)
        found = run(interpreted["assembly"][name], words.shape[2], [packed[:, 0], packed[:, 1]])
        values = torch.stack([halves(pair, torch.bfloat16) for pair in found], 1)  # [lanes, fields, two words]
        assert torch.equal(values, ((words.transpose(1, 2) - offset) * step).to(torch.float64))


# ----------------------------------------------------------------------------------------------- weights, tiles, rounding


@pytest.mark.parametrize("bits", planes.PLANES)
def test_codes_are_packed_on_a_device_as_on_the_cpu(bits: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (9, 300), dtype=torch.int8)
    assert torch.equal(device_weights.pack(codes, bits), torch.from_numpy(planes.pack_planes(codes.numpy(), bits)))


def test_rows_of_gate_and_up_alternate() -> None:
    gate, up = torch.randn(20, 130).to(torch.bfloat16), torch.randn(20, 130).to(torch.bfloat16)
    pair = device_weights.build(gate, CPU, up)
    assert (pair.rows, pair.padded_inputs, pair.outputs, pair.paired) == (48, 256, 20, True)
    for row in range(24):
        for place, source in ((16 * (row // 8) + row % 8, gate), (16 * (row // 8) + 8 + row % 8, up)):
            wanted = source[row] if row < 20 else torch.zeros(130, dtype=torch.bfloat16)
            assert torch.equal(pair.codes[place, :130], wanted) and not pair.codes[place, 130:].any()


def test_a_scheme_without_a_kernel_is_brought_over_in_bf16() -> None:
    scheme = parse_scheme("nvfp4")
    assert scheme is not None
    codes = torch.randint(0, 16, (16, 32), dtype=torch.uint8)
    weight = QuantizedTensor(scheme, codes, torch.rand(16, 2).to(torch.float8_e4m3fn), global_scale=torch.ones(1))
    built = device_weights.build(weight, CPU)
    assert built.kind == "floating"
    assert torch.equal(built.codes[:, :32], exact(weight).to(torch.bfloat16)) and not built.codes[:, 32:].any()


@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=9), tokens=st.sampled_from(moe_tiles.TOKENS), spare=st.integers(0, 3)
)
def test_every_row_is_in_one_tile_of_its_expert(counts: list[int], tokens: int, spare: int) -> None:
    ends = torch.tensor(counts).cumsum(0)
    first = ends - torch.tensor(counts)
    most = max(1, sum(-(-count // tokens) for count in counts) + spare)
    tiles = moe_tiles.cut(first, ends, tokens, most)
    rows = []
    for number in range(int(tiles.count)):
        begin, end, expert = (int(part[number]) for part in (tiles.first, tiles.last, tiles.expert))
        assert 0 < end - begin <= tokens
        rows += [(row, expert) for row in range(begin, end)]
    assert rows == [(row, expert) for expert, _ in enumerate(counts) for row in range(int(first[expert]), int(ends[expert]))]


def test_tiles_are_as_large_as_experts_fill() -> None:
    for rows, experts, tokens in ((1, 16, 16), (0, 16, 16), (400, 16, 32), (1024, 16, 64), (16384, 16, 128), (7, 0, 16)):
        assert moe_tiles.tokens_of_tile(rows, experts) == tokens


@given(blocks=st.integers(1, 5000), steps=st.integers(1, 128), programs=st.integers(1, 600))
def test_inputs_are_cut_only_where_there_is_room(blocks: int, steps: int, programs: int) -> None:
    parts = moe_tiles.splits(blocks, steps, programs)
    assert 1 <= parts <= moe_tiles.MOST_SPLITS
    assert parts == 1 or (blocks * parts < 4 * programs and steps // parts >= moe_tiles.LEAST_STEPS)


def test_the_library_does_without_triton() -> None:
    code = (
        "import sys, torch, quantkit.kernels.dispatch as dispatch\n"
        "assert 'triton' not in sys.modules; sys.modules['triton'] = None\n"
        "from quantkit.errors import RecipeError\n"
        "try: dispatch.dequant_matmul(torch.zeros(1, 8), torch.zeros(8, 8), backend='triton')\n"
        "except RecipeError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quantkit[cuda]" in result.stdout


if __name__ == "__main__":
    main({"interpret": interpret})
