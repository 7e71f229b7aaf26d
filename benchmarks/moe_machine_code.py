"""Machine code of the Triton kernels for Scout's experts, compiled for an H200 without one, and what can be told by looking at it.

    python benchmarks/moe_machine_code.py                             # every scheme, every tile; writes results/moe_kernels_aot.md
    python benchmarks/moe_machine_code.py --print --schemes int4-g128 --tokens 16,128
    python benchmarks/moe_machine_code.py --json --variants int4-g128:gate_up:16,fp8-block-dynamic:down:128

The launchers themselves say what a launch of Scout's shapes would be compiled for (tensors without memory stand for weights and
rows), so the code is the code that runs.  Registers, stack and shared memory are the assembler's word.  Instructions per weight are
those of the inner loop, on the shortest way around it, of all lanes of all warps, divided by the weights that a turn multiplies: an
H200 issues 3.0e13 of them a second and reads 8.3e12 four-bit weights, so at more than about 3.6 decoding is no longer limited by
memory.  ``programs`` is how many the table of tiles expects on a multiprocessor.  ``waits`` are places in the loop where a warp
group waits for its tensor core; many of them mean that products run one by one.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import heapq
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from quantkit.grid import QuantizedTensor
from quantkit.kernels import device_weights, moe_tiles
from quantkit.kernels.weights import Weight
from quantkit.scheme import Scheme, parse_scheme

HIDDEN, WIDTH, EXPERTS = 5120, 8192, 17
ROWS = 4096
MOST_SHARED = 227 * 1024  # bytes that a program may have
META = torch.device("meta")
TENSOR_CORE = ("HGMMA", "QGMMA", "HMMA", "IMMA", "QMMA")
BF16 = "bf16"  # the name of a plain matrix here
SCHEMES = (
    *(f"int4-{size}{asymmetric}" for size in ("g128", "g64", "g32", "channel") for asymmetric in ("", "-asym")),
    *(f"int8-{size}" for size in ("g128", "g64", "g32", "channel", "channel-dynamic")),
    "fp8-channel-dynamic",
    "fp8-block-dynamic",
    BF16,
    "Q8_0",
    "Q4_K",
    "Q6_K",
)
TRITON_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One compilation.  part: ``gate_up`` or ``down``.  rounded: activations are quantized too, where the scheme does that."""

    scheme: str
    part: str
    tokens: int
    rounded: bool = True


@dataclasses.dataclass(frozen=True)
class Code:
    """What the machine code of a variant is like."""

    variant: Variant
    outputs: int
    warps: int
    residents: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: dict[str, int]
    waits: int
    loop: int
    per_weight: float


def variants(schemes: Iterable[str], parts: Iterable[str], tokens: Iterable[int]) -> Iterator[Variant]:
    """Every combination; of schemes that quantize activations also without."""
    for scheme in schemes:
        for part in parts:
            for count in tokens:
                yield Variant(scheme, part, count)
                if scheme.endswith("-dynamic") and scheme.startswith("fp8"):
                    yield Variant(scheme, part, count, rounded=False)


# ---------------------------------------------------------------------------------------------------- what is compiled


def matrix(scheme_name: str, rows: int, columns: int) -> Weight:
    """A weight without memory."""

    def empty(dtype: torch.dtype, share: int) -> torch.Tensor:
        return torch.empty(rows, columns // share, dtype=dtype, device=META)

    if scheme_name == BF16:
        return empty(torch.bfloat16, 1)
    scheme = parse_scheme(scheme_name)
    assert scheme is not None
    if scheme.number == "ggml":
        kind = scheme.block_type
        group = empty(torch.int8, kind.group) if kind.group else None
        minimum = empty(torch.float16, kind.block) if kind.minimum else None
        codes, scale = empty(torch.int8, 1), empty(torch.float16, kind.block)
        return QuantizedTensor(
            scheme, codes, scale, group_scale=group, minimum=minimum, group_minimum=group if kind.minimum else None
        )
    shape = scheme.scale_shape(rows, columns)
    codes = empty(torch.float8_e4m3fn if scheme.number == "fp8" else torch.int8, 1)
    zero_point = None if scheme.symmetric else torch.empty(shape, dtype=torch.int8, device=META)
    return QuantizedTensor(scheme, codes, torch.empty(shape, dtype=torch.bfloat16, device=META), zero_point)


def stacked(scheme: str, part: str) -> device_weights.DeviceWeight:
    """Scout's experts, the shared one included, without memory."""
    if part == "gate_up":
        one = device_weights.build(matrix(scheme, WIDTH, HIDDEN), META, matrix(scheme, WIDTH, HIDDEN))
    else:
        one = device_weights.build(matrix(scheme, HIDDEN, WIDTH), META)
    return device_weights.stack([one] * EXPERTS)


def launch_of(variant: Variant) -> Any:
    """What the launcher would launch for it."""
    from quantkit.kernels.moe_triton import KERNELS

    weight = stacked(variant.scheme, variant.part)
    if variant.scheme == "Q8_0":
        weight = importlib.import_module(KERNELS["blocks"]).as_integer(weight)
    module = importlib.import_module(KERNELS[weight.kind])
    bounds = torch.empty(EXPERTS, dtype=torch.int32, device=META)
    one = torch.empty(1, dtype=torch.int32, device=META)
    tiles = moe_tiles.Tiles(bounds, bounds, bounds, one, EXPERTS, variant.tokens)
    values = torch.empty(ROWS, weight.padded_inputs, dtype=torch.bfloat16, device=META)
    rows: Any = moe_tiles.Rows(values)
    if weight.kind == "blocks":
        halves, sums = values.to(torch.float16), torch.empty(ROWS, values.shape[1] // 16, dtype=torch.float16, device=META)
        rows = module.PreparedRows(halves, torch.empty(ROWS, device=META), sums)
    elif weight.scheme is not None and weight.scheme.dynamic_activations and variant.rounded:
        rows = _rounded(weight.scheme, values)
    splits = 4 if variant.part == "down" and variant.tokens == moe_tiles.TOKENS[0] else 1
    kind = torch.float32 if variant.part == "down" else torch.bfloat16
    out = torch.empty(splits, ROWS, weight.outputs, dtype=kind, device=META)
    return module.launch_of(rows, weight, tiles, out, assembly=True)


def _rounded(scheme: Scheme, values: torch.Tensor) -> moe_tiles.Rows:
    groups = (values.shape[1] // 128,) if scheme.granularity == "block" else ()
    kept = values if scheme.number == "int8" else values.to(torch.float8_e4m3fn)
    return moe_tiles.Rows(kept, torch.empty(*groups, ROWS, device=META))


def compiled_launch(launch: Any, capability: int = 90) -> Any:
    """What Triton makes of a launch, for an H200 or a GPU of another capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature, known = dict.fromkeys(names, "constexpr"), dict(launch.constants)
    aligned = {}
    for place, (value, parameter) in enumerate(zip(launch.arguments, launch.kernel.params, strict=False)):
        whole = isinstance(value, int) and not parameter.do_not_specialize
        if whole and value == 1:  # becomes a constant, as in a launch
            known[parameter.name] = 1
            continue
        signature[parameter.name] = _type_of(value)
        if isinstance(value, torch.Tensor) or (whole and value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in known.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


def compiled(variant: Variant) -> Code:
    """Compile it and look at it."""
    launch = launch_of(variant)
    shape, constants, result = launch.shape, launch.constants, compiled_launch(launch)
    registers, stack, listing = disassembled(result)
    instructions = parsed(listing)
    every = collections.Counter(name.split(".")[0] for name, _, _ in instructions)
    loop = inner_loop(instructions)
    planes = 1 + sum(bool(constants.get(plane, 0)) for plane in ("MIDDLE", "TOP"))
    tokens = constants.get("TOKENS", variant.tokens)
    weights = products_of(loop) * (shape.warps // 4) // tokens // planes  # of a turn
    return Code(
        variant,
        shape.outputs,
        shape.warps,
        shape.residents,
        registers,
        stack,
        every["LDL"] + every["STL"],
        result.metadata.shared,
        {name: every[name] for name in TENSOR_CORE if every[name]},
        sum(name.startswith("WARPGROUP.DEPBAR") for name in loop),
        len(loop),
        len(loop) * 32 * shape.warps / weights,
    )


def disassembled(result: Any) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the listing of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        listing = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)[0]
    return int(registers), int(stack), listing


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TRITON_NAMES[value.dtype]
    if isinstance(value, int):
        return "i32"
    return f"tensordesc<{TRITON_NAMES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"


# --------------------------------------------------------------------------------------------------------- what it is like


def parsed(listing: str) -> list[tuple[str, str, str | None]]:
    """Instructions in their order: name, text, and the label in front of it if there is one."""
    found, label = [], None
    for line in listing.splitlines():
        mark = re.match(r"\s*(\.L_x_\d+):", line)
        if mark:
            label = mark[1]
            continue
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)[^;]*)", line)
        if instruction:
            found.append((instruction[2], instruction[1], label))
            label = None
    return found


def inner_loop(instructions: list[tuple[str, str, str | None]]) -> list[str]:
    """Names of the instructions on the shortest way from a tensor core's instruction around to itself."""
    places = {label: place for place, (_, _, label) in enumerate(instructions) if label}
    starts = sorted(
        {0, *places.values()} | {place + 1 for place, (name, _, _) in enumerate(instructions) if name.startswith("BRA")}
    )
    starts = [start for start in starts if start < len(instructions)]
    blocks = dict(zip(starts, [*starts[1:], len(instructions)], strict=True))

    def following(start: int) -> list[int]:
        name, text, _ = instructions[blocks[start] - 1]
        target = re.search(r"(\.L_x_\d+)", text) if name.startswith("BRA") else None
        after = [places[target[1]]] if target and target[1] in places else []
        ends = name.startswith(("EXIT", "RET")) or (name.startswith("BRA") and not text.startswith("@") and "UP" not in text)
        if not ends and blocks[start] in blocks:
            after.append(blocks[start])
        return after

    best: list[int] = []
    for home in starts:
        if not any(instructions[place][0].startswith(TENSOR_CORE) for place in range(home, blocks[home])):
            continue
        queue, seen = [(0, home, [home])], set()
        while queue:
            length, start, way = heapq.heappop(queue)
            if start in seen and start != home:
                continue
            seen.add(start)
            for after in following(start):
                size = length + blocks[start] - start
                if after == home:
                    if not best or size < sum(blocks[place] - place for place in best):
                        best = way
                    queue.clear()
                    break
                if after not in seen:
                    heapq.heappush(queue, (size, after, [*way, after]))
    return [instructions[place][0] for start in best for place in range(start, blocks[start])]


def products_of(loop: list[str]) -> int:
    """Multiplications that the tensor core of one warp group does in a turn."""
    sizes = [re.search(r"(?:HGMMA|QGMMA)\.(\d+)x(\d+)x(\d+)", name) for name in loop]
    return sum(int(size[1]) * int(size[2]) * int(size[3]) for size in sizes if size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="separated by commas")
    parser.add_argument("--parts", default="gate_up,down", help="gate_up, down, or both")
    parser.add_argument("--tokens", default=",".join(map(str, moe_tiles.TOKENS)), help="rows of a tile, separated by commas")
    parser.add_argument("--variants", help="scheme:part:rows of a tile, separated by commas, instead of all combinations")
    parser.add_argument("--output", default="moe_kernels_aot.md", help="file under results/")
    parser.add_argument("--print", action="store_true", help="print the table, write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON, write nothing")
    chosen = parser.parse_args()
    tokens = [int(count) for count in chosen.tokens.split(",")]
    wanted = list(variants(chosen.schemes.split(","), chosen.parts.split(","), tokens))
    if chosen.variants:
        named = [text.split(":") for text in chosen.variants.split(",")]
        wanted = [variant for scheme, part, count in named for variant in variants([scheme], [part], [int(count)])]
    found = [compiled(variant) for variant in wanted]
    if chosen.json:
        print(json.dumps([dataclasses.asdict(code) for code in found]))
        return
    import common  # the script's own folder is in the path
    import triton

    columns = (
        "scheme",
        "part",
        "tile",
        "warps",
        "programs",
        "registers",
        "spills",
        "shared KB",
        "tensor core",
        "waits",
        "instructions per weight",
    )
    rows = [
        (
            code.variant.scheme + ("" if code.variant.rounded else ", rows as they are"),
            code.variant.part,
            f"{code.variant.tokens} x {code.outputs}",
            code.warps,
            code.residents,
            code.registers,
            code.spills + code.stack,
            f"{code.shared / 1024:.0f}",
            " ".join(f"{count} {name}" for name, count in code.tensor_core.items()),
            code.waits,
            f"{code.per_weight:.2f}",
        )
        for code in found
    ]
    text = common.table(columns, rows)
    if chosen.print:
        print(text)
        return
    title = common.header("Machine code of the mixture-of-experts kernels, sm_90a", common.HERE, common.load_average())
    versions = (
        f"Triton {triton.__version__}, its own assembler.  Scout's shapes; a tile is rows x outputs (gate and up counted both).\n"
    )
    common.write_results(chosen.output, f"{title}\n{versions}\n{text}")


if __name__ == "__main__":
    main()
