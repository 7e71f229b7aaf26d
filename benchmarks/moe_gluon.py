"""An experiment: INT4 products for many tokens with specialized warps, in Gluon, beside quantkit's own kernel.

    python benchmarks/moe_gluon.py --compile          # machine code for an H200, without one; needs Triton 3.6
    python benchmarks/moe_gluon.py                    # on a GPU: is it right, and how fast are both

In Triton's own language all warps of a program meet at a barrier in every step, so while one warp group unpacks weights the other
does too, and the tensor core rests.  Here one warp fetches, and two warp groups of four warps, with 64 outputs each, wait only for
what they need: one unpacks while the other multiplies.  Gluon changes from release to release (this is 3.6's) and cannot be
interpreted, hence not tested without a GPU; so this stays outside of the library until a GPU has shown that it is right and worth
it.

INT4, symmetric, in groups of 128, tiles of 128 rows; whole tiles of 128 outputs, as Scout and Maverick have them.
"""

from __future__ import annotations

import argparse

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quantkit.kernels import device_weights, moe_tiles, moe_triton_integer
from quantkit.kernels.moe_triton_integer import instructions
from quantkit.scheme import parse_scheme

ROWS, OUTPUTS, STEP, BUFFERS = 128, 128, 128, 4
CONSUMER_REGISTERS = 232
HIDDEN, WIDTH, EXPERTS = 5120, 8192, 17
UNPACK = gl.constexpr(instructions(4, 8, 1))


# ruff: noqa: N803, N806
@gluon.jit
def joined(one, other, HEIGHT: gl.constexpr, LENGTH: gl.constexpr):
    """Two tiles ``[HEIGHT, LENGTH]`` side by side."""
    return gl.reshape(gl.permute(gl.join(one, other), (0, 2, 1)), (HEIGHT, 2 * LENGTH))


@gluon.jit
def unpacked(words, HEIGHT: gl.constexpr, OPERAND: gl.constexpr):
    """``words [HEIGHT, 16]`` as BF16 numbers ``[HEIGHT, 128]`` in the registers where the tensor core wants them."""
    p0, p1, p2, p3, p4, p5, p6, p7 = gl.inline_asm_elementwise(
        UNPACK,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [words],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )
    low = joined(joined(p0, p1, HEIGHT, 16), joined(p2, p3, HEIGHT, 16), HEIGHT, 32)
    high = joined(joined(p4, p5, HEIGHT, 16), joined(p6, p7, HEIGHT, 16), HEIGHT, 32)
    return gl.convert_layout(joined(low, high, HEIGHT, 64), OPERAND, assert_trivial=True)


@gluon.jit
def fetch(weights, rows, words, values, full, empty, weight_row, first_row, steps, BUFFERS: gl.constexpr, BYTES: gl.constexpr):
    """The warp that keeps the buffers full."""
    for step in range(steps):
        place = step % BUFFERS
        mbarrier.wait(empty.index(place), ((step // BUFFERS) & 1) ^ 1)
        mbarrier.expect(full.index(place), BYTES)
        tma.async_copy_global_to_shared(weights, [weight_row, step * 16], full.index(place), words.index(place))
        tma.async_copy_global_to_shared(rows, [first_row, step * 128], full.index(place), values.index(place))


@gluon.jit
def consume(
    PART: gl.constexpr,
    words,
    values,
    full,
    empty,
    scales,
    out,
    first_row,
    last_row,
    first_output,
    weight_rows,
    width,
    steps,
    HEIGHT: gl.constexpr,
    ROWS: gl.constexpr,
    BUFFERS: gl.constexpr,
    RESULT: gl.constexpr,
    OPERAND: gl.constexpr,
    STORE: gl.constexpr,
    GATED: gl.constexpr,
):
    """A warp group that multiplies ``HEIGHT`` outputs from ``PART`` on: it unpacks the next step while this one is multiplied."""
    output = first_output + PART + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, RESULT))
    total = gl.zeros((HEIGHT, ROWS), gl.float32, layout=RESULT)
    nothing = gl.zeros((HEIGHT, ROWS), gl.float32, layout=RESULT)
    mbarrier.wait(full.index(0), 0)
    weight = unpacked(words.index(0).slice(PART, HEIGHT, dim=0).load(OPERAND), HEIGHT, OPERAND)
    scale = gl.load(scales + output).to(gl.float32)
    for step in range(steps - 1):
        place = step % BUFFERS
        found = warpgroup_mma(weight, values.index(place).permute((1, 0)), nothing, use_acc=False, is_async=True)
        after = (step + 1) % BUFFERS
        mbarrier.wait(full.index(after), ((step + 1) // BUFFERS) & 1)
        next_weight = unpacked(words.index(after).slice(PART, HEIGHT, dim=0).load(OPERAND), HEIGHT, OPERAND)
        next_scale = gl.load(scales + (step + 1) * weight_rows + output).to(gl.float32)
        found, weight = warpgroup_mma_wait(0, deps=(found, weight))
        mbarrier.arrive(empty.index(place))
        total += found * gl.expand_dims(scale, 1)
        weight = next_weight
        scale = next_scale
    found = warpgroup_mma(weight, values.index((steps - 1) % BUFFERS).permute((1, 0)), nothing, use_acc=False, is_async=True)
    found = warpgroup_mma_wait(0, deps=(found,))
    total += found * gl.expand_dims(scale, 1)
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(total, (HEIGHT // 16, 2, 8, ROWS)), (0, 2, 3, 1)))
        inner = gl.reshape(gate / (1.0 + gl.exp(-gate)) * up, (HEIGHT // 2, ROWS))
        result = gl.convert_layout(inner, STORE)
        target = (first_output + PART) // 2 + gl.arange(0, HEIGHT // 2, layout=gl.SliceLayout(1, STORE))
    else:
        result = gl.convert_layout(total, STORE)
        target = first_output + PART + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, STORE))
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, STORE))
    place_of = out + gl.expand_dims(row, 0).to(gl.int64) * width + gl.expand_dims(target, 1)
    gl.store(place_of, result.to(out.dtype.element_ty), mask=gl.expand_dims(row < last_row, 0))


@gluon.jit
def multiply(
    rows,
    weights,
    scales,
    out,
    experts,
    firsts,
    lasts,
    count,
    all_rows,
    inputs,
    matrices,
    weight_rows,
    width,
    ROWS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    BUFFERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    GATED: gl.constexpr,
):
    """One tile of rows and one block of outputs; blocks beyond the tiles that there are have nothing to do."""
    WORDS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([OUTPUTS, 16], gl.int32)
    VALUES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 128], gl.bfloat16)
    RESULT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RESULT, k_width=2)
    STORE: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [1, 4], [0, 1])
    blocks = weight_rows // OUTPUTS
    tiles = gl.load(count)
    number = gl.program_id(0)
    first = number // (8 * blocks) * 8
    size = gl.minimum(tiles - first, 8)
    if number < tiles * blocks:
        within = number % (8 * blocks)
        tile = first + within % size
        block = within // size
        expert = gl.load(experts + tile)
        first_row = gl.load(firsts + tile)
        last_row = gl.load(lasts + tile)
        steps = inputs // 128
        weight_map = tma.make_tensor_descriptor(
            weights, [matrices * weight_rows, inputs // 8], [inputs // 8, 1], [OUTPUTS, 16], WORDS
        )
        row_map = tma.make_tensor_descriptor(rows, [all_rows, inputs], [inputs, 1], [ROWS, 128], VALUES)
        words = gl.allocate_shared_memory(gl.int32, [BUFFERS, OUTPUTS, 16], WORDS)
        values = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, ROWS, 128], VALUES)
        full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
        for place in gl.static_range(BUFFERS):
            mbarrier.init(full.index(place), count=1)
            mbarrier.init(empty.index(place), count=2)
        fence_async_shared()
        HALF: gl.constexpr = OUTPUTS // 2
        BYTES: gl.constexpr = OUTPUTS * 16 * 4 + ROWS * 128 * 2
        mine = scales + expert.to(gl.int64) * steps * weight_rows
        first_output = block * OUTPUTS
        weight_row = expert * weight_rows + first_output
        gl.warp_specialize(
            [
                (
                    consume,
                    (
                        0,
                        words,
                        values,
                        full,
                        empty,
                        mine,
                        out,
                        first_row,
                        last_row,
                        first_output,
                        weight_rows,
                        width,
                        steps,
                        HALF,
                        ROWS,
                        BUFFERS,
                        RESULT,
                        OPERAND,
                        STORE,
                        GATED,
                    ),
                ),
                (
                    consume,
                    (
                        HALF,
                        words,
                        values,
                        full,
                        empty,
                        mine,
                        out,
                        first_row,
                        last_row,
                        first_output,
                        weight_rows,
                        width,
                        steps,
                        HALF,
                        ROWS,
                        BUFFERS,
                        RESULT,
                        OPERAND,
                        STORE,
                        GATED,
                    ),
                ),
                (fetch, (weight_map, row_map, words, values, full, empty, weight_row, first_row, steps, BUFFERS, BYTES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


def compile_it(gated: bool) -> str:
    """Resources of the machine code."""
    import moe_machine_code
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = multiply.arg_names
    kinds = {"rows": "*bf16", "weights": "*i32", "scales": "*bf16", "out": "*bf16" if gated else "*fp32"}
    kinds |= dict.fromkeys(("experts", "firsts", "lasts", "count"), "*i32")
    kinds |= dict.fromkeys(("all_rows", "inputs", "matrices", "weight_rows", "width"), "i32")
    constants = {"ROWS": ROWS, "OUTPUTS": OUTPUTS, "BUFFERS": BUFFERS, "REGISTERS": CONSUMER_REGISTERS, "GATED": gated}
    aligned = [name for name in kinds if name not in ("matrices", "all_rows")]
    source = GluonASTSource(
        multiply,
        {name: kinds.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    registers, stack, listing = moe_machine_code.disassembled(result)
    loop = moe_machine_code.inner_loop(moe_machine_code.parsed(listing))
    waits = sum(name.startswith("WARPGROUP.DEPBAR") for name in loop)
    barriers = sum(name.startswith("BAR") for name in loop)
    spills = sum(name.startswith(("LDL", "STL")) for name, _, _ in moe_machine_code.parsed(listing))
    per_weight = len(loop) * 128 / (OUTPUTS // 2 * STEP)
    return (
        f"{registers} registers, {stack} bytes of stack, {spills} spills, {result.metadata.shared} bytes shared; "
        f"a turn: {len(loop)} instructions ({per_weight:.2f} per weight), {waits} waits, {barriers} barriers"
    )


def launch(rows: moe_tiles.Rows, weight: device_weights.DeviceWeight, tiles: moe_tiles.Tiles, out: torch.Tensor) -> None:
    """out: ``[rows, width]``, BF16 of a pair and float32 otherwise."""
    assert tiles.tokens == ROWS and weight.rows % OUTPUTS == 0 and weight.inputs % STEP == 0
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=out.device))  # of descriptors
    multiply[(tiles.most * (weight.rows // OUTPUTS),)](
        rows.values,
        weight.codes,
        weight.tables["scales"],
        out,
        tiles.expert,
        tiles.first,
        tiles.last,
        tiles.count,
        len(rows.values),
        weight.inputs,
        weight.matrices,
        weight.rows,
        out.shape[1],
        ROWS=ROWS,
        OUTPUTS=OUTPUTS,
        BUFFERS=BUFFERS,
        REGISTERS=CONSUMER_REGISTERS,
        GATED=weight.paired,
        num_warps=4,
    )


def compare(tokens: int, gated: bool) -> str:
    """Both kernels for Scout's experts, the shared one included, tokens spread evenly: largest difference, and speeds."""
    device = torch.device("cuda")
    torch.manual_seed(tokens)
    inputs, outputs = (HIDDEN, WIDTH) if gated else (WIDTH, HIDDEN)
    height = EXPERTS * outputs * (2 if gated else 1)
    words = torch.randint(-(2**31), 2**31, (height, inputs // 8), dtype=torch.int32, device=device)
    scales = torch.rand(EXPERTS * inputs // 128, height // EXPERTS, device=device).mul_(0.005).to(torch.bfloat16)
    scheme = parse_scheme("int4-g128")
    weight = device_weights.DeviceWeight("integer", scheme, EXPERTS, gated, outputs, inputs, words, {"scales": scales})
    counts = torch.full((EXPERTS,), tokens // (EXPERTS - 1), device=device)
    counts[-1] = tokens
    ends = counts.cumsum(0)
    total = int(ends[-1])
    tiles = moe_tiles.cut(ends - counts, ends, ROWS, total // ROWS + EXPERTS)
    rows = moe_tiles.Rows(torch.randn(total, inputs, device=device).to(torch.bfloat16))
    kind = torch.bfloat16 if gated else torch.float32
    ours, other = (torch.zeros(total, outputs, dtype=kind, device=device) for _ in range(2))

    def usual() -> None:
        moe_triton_integer.gate_up(rows, weight, tiles, ours) if gated else moe_triton_integer.matmul(
            rows, weight, tiles, ours[None]
        )

    usual()
    launch(rows, weight, tiles, other)
    difference = float((ours.to(torch.float32) - other.to(torch.float32)).abs().max() / ours.to(torch.float32).abs().max())
    work = 2 * total * inputs * height // EXPERTS
    speeds = [work / triton.testing.do_bench(call) / 1e9 for call in (usual, lambda: launch(rows, weight, tiles, other))]
    return f"{difference:.1e} of the largest result apart; {speeds[0]:.0f} TFLOP/s in Triton, {speeds[1]:.0f} in Gluon"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="machine code only; needs no GPU")
    parser.add_argument("--tokens", default="4096,16384", help="separated by commas")
    chosen = parser.parse_args()
    if not triton.__version__.startswith("3.6."):
        parser.error(f"this is written for Triton 3.6, and here is {triton.__version__}")
    for gated in (True, False):
        part = "gate_up" if gated else "down"
        if chosen.compile:
            print(part, compile_it(gated))
            continue
        for tokens in map(int, chosen.tokens.split(",")):
            print(part, tokens, "tokens:", compare(tokens, gated), flush=True)


if __name__ == "__main__":
    main()
