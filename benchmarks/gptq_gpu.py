"""GPTQ on a CUDA GPU: is it right, and how fast is each of its parts beside what the arithmetic alone would take?

    python benchmarks/gptq_gpu.py [--toy] [--experts 16] [--tokens 4096]

First correctness, on inputs that are new in every run: the block kernel against the CPU's, bit for bit; the Gram matrix against
float64; whole experts against the method on the CPU; the error of the search for llama.cpp's types against the CPU's; the same
codes twice.  Then the time of a Scout expert of true shape (gate and up ``[16384, 5120]``, down ``[5120, 8192]``) part by part, of
a layer of 16 experts, and of the search.  Weights are random.

It needs a CUDA GPU with 40 GiB free, Triton, and no network, and takes less than ten minutes.  Without a GPU it says "not measured"
where a time would stand; with ``--toy`` it then runs at small size in Triton's interpreter, to show that it works.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch

from quantkit.evidence import Evidence
from quantkit.kernels import gptq as cpu_kernel
from quantkit.methods import blocks, blocks_gpu, gptq, gptq_gpu, rtn
from quantkit.scheme import Scheme, parse_scheme
from quantkit.team import Team, add_gram
from quantkit.workspace import Workspace

FP32_RATE = 50e12  # FLOP/s that floors are computed with: an assumption about an H200, not a measurement
SHAPES = {"gate and up": (5120, (8192, 8192)), "down": (8192, (5120,))}
TOY_SHAPES = {"gate and up": (48, (32, 32)), "down": (32, (48,))}
VARIANTS = ((8, 32), (8, 64), (8, 128), (16, 64))  # inputs held in registers, rows of a program
MOST_DIFFERENT = 0.01  # share of codes
MOST_ERROR = 1.01  # squared, of the CPU's, where types of llama.cpp are searched for
SEARCHED = (*blocks_gpu.SYMMETRIC, *blocks_gpu.MINIMUM)


def seconds(device: torch.device, work: Callable[[], object], repetitions: int = 3) -> float | None:
    """The shortest of some runs after one that does not count; None without a GPU, where it runs once."""
    work()
    if device.type != "cuda":
        return None
    times = []
    for _ in range(repetitions):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value * 1e3:,.2f} ms"


def experts_of(
    count: int, inputs: int, heights: tuple[int, ...], tokens: int, device: torch.device
) -> tuple[list[list[torch.Tensor]], list[Evidence]]:
    """Random experts and what they received; Hessians stay on the device."""
    weights = [[(torch.randn(height, inputs) * 0.02).to(torch.bfloat16) for height in heights] for _ in range(count)]
    evidence = []
    for _ in range(count):
        rows = torch.randn(tokens, inputs, device=device) * (0.1 + torch.rand(inputs, device=device))
        rows += torch.randn(tokens, 1, device=device)  # inputs hang together
        with gptq_gpu.full_precision():
            total = torch.mm(rows.t(), rows)
        mean_square, peak = rows.square().mean(0).cpu(), rows.abs().amax(0).cpu()
        evidence.append(Evidence(tokens, mean_square, peak, total.div_(tokens).triu(), rows=float(tokens)))
    return weights, evidence


# ------------------------------------------------------------------------------------------------------------ correctness


def block_arguments(experts: int, inputs: int, rows: int, groups: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random arguments of the block kernel."""
    places = torch.stack([torch.randperm(inputs) for _ in range(experts)])
    values = {
        "errors": torch.randn(experts, inputs, rows),
        "corrections": torch.randn(experts, inputs, rows) * 0.1,
        "factor": torch.randn(experts, inputs, inputs) * 0.05,
        "variances": torch.rand(experts, inputs) + 0.1,
        "scales": torch.rand(experts, groups, rows) * 0.3 + 0.1,
        "zero_points": torch.randint(-8, 8, (experts, groups, rows)).to(torch.float32),
        "groups": places // (inputs // groups),
        "places": places,
        "codes": torch.zeros(experts, inputs, rows, dtype=torch.int8),
        "sums": torch.zeros(experts, 3, rows, dtype=torch.float64),
    }
    return {name: value.to(device) for name, value in values.items()}


def differing_bits(experts: int, inputs: int, rows: int, step: int, rows_of_program: int, device: torch.device) -> int:
    """Codes and errors of one block in which the kernels differ; must be 0."""
    from quantkit.kernels import gptq_triton

    given = block_arguments(experts, inputs, rows, inputs // 16, device)
    expected = {name: value.cpu().clone() for name, value in given.items()}
    limits = {"block": slice(0, inputs), "panel_first": 0, "lowest": -8, "highest": 7}
    gptq_triton.launch(**given, **limits, step=step, rows_of_program=rows_of_program)
    different = 0
    for expert in range(experts):
        arrays = {name: value[expert].numpy().reshape(-1) for name, value in expected.items()}
        cpu_kernel.quantize_block(
            arrays["errors"],
            arrays["corrections"],
            arrays["factor"],
            arrays["variances"].astype(np.float64),
            arrays["scales"],
            arrays["zero_points"],
            np.empty(0, np.float32),
            arrays["groups"],
            arrays["places"],
            -8.0,
            7.0,
            gptq.level_table(None),
            arrays["codes"],
            rows,
            0,
            rows,
        )
        for name in ("codes", "errors"):
            different += int((given[name][expert].cpu().numpy().reshape(-1) != arrays[name]).sum())
    return different


def summed(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A Gram matrix as a calibration sums it up: rows and sums lie on the CPU."""
    total = torch.zeros(rows.shape[1], rows.shape[1])
    with Team(1, device if device.type == "cuda" else None) as team:
        add_gram(team, rows, total)
    return total


def gram_error(inputs: int, tokens: int, device: torch.device) -> float:
    """Largest error of a Gram matrix against float64, relative to its largest entry."""
    rows = torch.randn(tokens, inputs)
    total = summed(rows, device)
    exact = rows.double().t() @ rows.double()
    return float((total - exact).triu().abs().max() / exact.abs().max())


def compare_methods(name: str, inputs: int, heights: tuple[int, ...], block: int, device: torch.device) -> tuple[float, float, int]:
    """Two experts by both methods: share of differing codes, largest relative difference of output errors; codes not repeated."""
    scheme, workspace = scheme_of(name), Workspace()
    weights, evidence = experts_of(2, inputs, heights, 2 * inputs, device)
    runs = [
        list(gptq_gpu.quantize_batch(weights, scheme, evidence, device, clip_search=True, workspace=workspace, block=block))
        for _ in range(2)
    ]
    different = total = unsteady = 0
    worst = 0.0
    with Team(os.cpu_count() or 1) as team:
        for expert, seen, first, again in zip(weights, evidence, *runs, strict=True):
            assert seen.hessian is not None
            own = Evidence(seen.tokens, seen.mean_square, seen.peak, seen.hessian.cpu(), rows=seen.rows)
            expected = gptq.quantize(expert, scheme, clip_search=True, workspace=workspace, evidence=own, team=team)
            for (one, mine), (other, theirs), (repeated, _) in zip(first, expected, again, strict=True):
                different += int((one.codes != other.codes).sum())
                unsteady += int((one.codes != repeated.codes).sum())
                total += other.codes.numel()
                worst = max(worst, abs(mine.output_error / theirs.output_error - 1))
    return different / total, worst, unsteady


def search(name: str, weight: torch.Tensor, importance: torch.Tensor, device: torch.device | None) -> tuple[torch.Tensor, float]:
    """Codes and relative output error of a type of llama.cpp, searched for on a device or on the CPU."""
    evidence = Evidence(1, importance, importance)
    with Team(1, device) as team:
        [(quantized, statistics)] = blocks.quantize(
            [weight], scheme_of(name), clip_search=True, workspace=Workspace(), evidence=evidence, team=team
        )
    return quantized.codes.clone(), statistics.output_error


def compare_searches(device: torch.device, toy: bool) -> list[str]:
    """Every type with a kernel against the CPU.  Ends the program when one is worse."""
    lines = []
    weight = (torch.randn(16 if toy else 512, 256 if toy else 2048) * 0.02).to(torch.bfloat16)
    importance = torch.randn(weight.shape[1]).exp()
    for name in ("Q4_0", "Q4_K") if toy else SEARCHED:
        (codes, ours), (again, _), (_, theirs) = (search(name, weight, importance, where) for where in (device, device, None))
        ratio = (ours / theirs) ** 2
        assert ratio < MOST_ERROR and torch.equal(codes, again), f"{name}: {ratio} of the CPU's squared error, or not repeated"
        lines.append(f"- search for {name}: {ratio:.4f} of the CPU's weighted squared error; the same codes twice")
    return lines


def scheme_of(name: str) -> Scheme:
    scheme = parse_scheme(name)
    assert scheme is not None
    return scheme


def check(device: torch.device, toy: bool) -> str:
    """All comparisons.  Ends the program when one fails."""
    inputs, rows = (32, 128) if toy else (128, 1024)
    lines = []
    for step, rows_of_program in VARIANTS[:2] if toy else VARIANTS:
        different = differing_bits(2, inputs, rows, step, rows_of_program, device)
        assert not different, (
            f"block kernel, step {step}, {rows_of_program} rows: {different} codes or errors differ from the CPU's"
        )
        lines.append(f"- block kernel, step {step}, {rows_of_program} rows a program: the CPU's bits")
    error = gram_error(64 if toy else 2048, 200 if toy else 10_000, device)
    assert error < 3e-6, f"Gram matrix: relative error {error}"
    lines.append(f"- Gram matrix: largest error {error:.1e} of the largest entry")
    for name in ("int4-g32", "int4-g32-asym", "int8-channel", *(("Q4_0", "IQ4_NL") if toy else ("Q4_K", "Q6_K", "IQ4_XS"))):
        size, heights, block = (64, (40, 24), 16) if toy else (1024, (512, 256), cpu_kernel.BLOCK)
        share, worst, unsteady = compare_methods(name, size, heights, block, device)
        assert share <= MOST_DIFFERENT and worst < 0.01 and not unsteady, (
            f"{name}: {share} of codes differ, {unsteady} not repeated"
        )
        lines.append(f"- {name}: {share:.2e} of codes differ from the CPU's, output errors by {worst:.1e}; the same codes twice")
    return "\n".join(lines + compare_searches(device, toy)) + "\n"


# ------------------------------------------------------------------------------------------------------------------ times


def search_times(device: torch.device, toy: bool) -> str:
    """The search for each type on one matrix, from main memory and back; and on one CPU core, a part of it."""
    found = []
    shape, part = ((16, 256), 16) if toy else ((8192, 5120), 256)
    weight = (torch.randn(shape) * 0.02).to(torch.bfloat16)
    importance = torch.ones(shape[1])
    for name in ("Q4_0",) if toy else SEARCHED:
        taken = seconds(device, lambda name=name: search(name, weight, importance, device))
        on_cpu = None
        if device.type == "cuda":
            search(name, weight[:16], importance, None)  # compiles
            started = time.perf_counter()
            search(name, weight[:part], importance, None)
            on_cpu = (time.perf_counter() - started) * shape[0] / part
        found.append((name, shown(taken), shown(on_cpu)))
    return common.table((f"search, {shape[0]} x {shape[1]}", "GPU", "one CPU core, from a part"), found)


def kernel_times(experts: int, shapes: dict[str, tuple[int, tuple[int, ...]]], device: torch.device) -> str:
    """One launch of the block kernel for a layer, by variant."""
    from quantkit.kernels import gptq_triton

    found = []
    for name, (inputs, heights) in shapes.items():
        block = min(cpu_kernel.BLOCK, inputs)
        rows = sum(heights) + -sum(heights) % 128
        given = block_arguments(experts, block, rows, max(1, block // 128), device)
        limits = {"block": slice(0, block), "panel_first": 0, "lowest": -8, "highest": 7}
        for step, rows_of_program in VARIANTS:

            def launch(step: int = step, rows_of_program: int = rows_of_program) -> None:
                gptq_triton.launch(**given, **limits, step=step, rows_of_program=rows_of_program)  # noqa: B023

            taken = seconds(device, launch)
            floor = experts * rows * block * block / FP32_RATE
            found.append((f"{name}, step {step}, {rows_of_program} rows", shown(taken), shown(floor)))
    return common.table((f"block of {block} inputs, {experts} experts", "time", "floor"), found)


def factor(sources: torch.Tensor) -> None:
    gptq_gpu._factor_upper(sources.clone(), sources.shape[1], [gptq.DAMPING] * len(sources))


def part_times(tokens: int, shapes: dict[str, tuple[int, tuple[int, ...]]], device: torch.device) -> str:
    """One expert, part by part."""
    found = []
    for name, (inputs, heights) in shapes.items():
        rows = torch.randn(tokens, inputs)
        taken = seconds(device, lambda rows=rows: summed(rows, device))
        found.append((f"{name}: Gram matrix, {tokens} tokens", shown(taken), shown(2 * tokens * inputs * inputs / FP32_RATE)))
        total = summed(rows, device).to(device)
        gram = torch.stack([total.triu() + total.triu(1).t()]) / total.diagonal().mean()
        floor = inputs**3 / 3 / FP32_RATE
        for count in (1, 4):
            sources = gram.repeat(count, 1, 1)
            taken = seconds(device, lambda sources=sources: factor(sources))
            found.append((f"{name}: factorization, {count} together", shown(taken), shown(count * floor)))
        left, right = torch.randn(inputs, inputs, device=device), torch.randn(inputs, sum(heights), device=device)
        with gptq_gpu.full_precision():
            taken = seconds(device, lambda left=left, right=right: torch.mm(left.t(), right))
        products = inputs * inputs * sum(heights) / FP32_RATE
        half = None if taken is None else taken / 2
        found.append((f"{name}: products (half of one square product)", shown(half), shown(products)))
    return common.table(("one expert", "time", "floor"), found)


def whole_times(experts: int, tokens: int, shapes: dict[str, tuple[int, tuple[int, ...]]], device: torch.device, block: int) -> str:
    """Whole experts, from weights and Hessians to codes in main memory; one, and a layer of them."""
    found = []
    for name, (inputs, heights) in shapes.items():
        weights, evidence = experts_of(experts, inputs, heights, tokens, device)
        for count in sorted({1, experts}):
            floor = count * (inputs**3 / 3 + inputs * inputs * sum(heights)) / FP32_RATE
            shares = whole_time(weights[:count], evidence[:count], device, block)
            found.append((f"{name}, {count} experts", *shares, shown(floor)))
        del weights, evidence
    return common.table(("whole", "time", "of it scales, on one CPU core", "GPU memory", "floor"), found)


def whole_time(
    weights: list[list[torch.Tensor]], evidence: list[Evidence], device: torch.device, block: int
) -> tuple[str, str, str]:
    """Time of one batch, time of its scales, largest memory of the GPU."""
    scheme, workspace = scheme_of("int4-g128" if block == cpu_kernel.BLOCK else "int4-channel"), Workspace()

    def work() -> None:
        for _ in gptq_gpu.quantize_batch(weights, scheme, evidence, device, clip_search=False, workspace=workspace, block=block):
            pass

    started = time.perf_counter()
    for expert in weights:
        rtn.quantize(expert, scheme, clip_search=False, workspace=workspace)
    scales = time.perf_counter() - started
    if device.type != "cuda":
        return shown(seconds(device, work)), shown(None), "not measured"
    torch.cuda.reset_peak_memory_stats(device)
    taken = seconds(device, work, 1)
    return shown(taken), shown(scales), f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"


def toolchain(device: torch.device) -> str:
    """GPU, Triton and the assembler that it brings: the same kernel is faster or slower with another."""
    import triton

    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    version = subprocess.run([assembler, "--version"], capture_output=True, text=True, check=True).stdout.split("release ")[-1]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return f"- GPU: {name}\n- triton: {triton.__version__}, ptxas {version.split(',')[0]}\n- CUDA of torch: {torch.version.cuda}\n"


def main() -> None:
    """Check, measure, and on a GPU write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="small sizes; without a GPU in Triton's interpreter")
    parser.add_argument("--experts", type=int, default=16, help="experts of the layer")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens that each expert received")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.toy:
        print("not measured: there is no CUDA GPU; --toy runs at small size in Triton's interpreter")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton is imported only from here on
        torch.set_num_threads(1)
    seed = secrets.randbits(32)
    torch.manual_seed(seed)
    experts, tokens, block = (2, 64, 16) if arguments.toy else (arguments.experts, arguments.tokens, cpu_kernel.BLOCK)
    shapes = TOY_SHAPES if arguments.toy else SHAPES
    text = common.header("GPTQ on a GPU", Path(tempfile.gettempdir()), common.load_average())
    text += toolchain(device) + f"- seed: {seed}\n\n" + check(device, arguments.toy) + "\n"
    text += f"Floors assume {FP32_RATE / 1e12:.0f} TFLOP/s in float32, and arithmetic alone.\n\n"
    text += kernel_times(experts, shapes, device) + "\n" + part_times(tokens, shapes, device) + "\n"
    text += whole_times(experts, tokens, shapes, device, block) + "\n" + search_times(device, arguments.toy)
    if device.type == "cuda" and not arguments.toy:
        common.write_results("gptq_gpu.md", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
