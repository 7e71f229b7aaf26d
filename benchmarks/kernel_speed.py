"""Speed of quantization itself, per scheme: weights per second and core, from BF16 in memory to codes, scales and statistics.

    python benchmarks/kernel_speed.py [--seconds 0.5]

Half of a true-shape expert slice of Scout (gate or up, ``[5120 in, 8192 of 16384 out]``, input-major, as it lies in the file) and
the same matrix row-major, as shared experts and dense layers have it.  The clock is the CPU time of the thread, so other work on
the machine disturbs little; the best of several runs counts.  The last column runs the input-major case on two threads at once, by
the wall clock, and wants a quiet machine.  Also shown: how long the kernels take to compile where they have never run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import common
import torch

from quantkit.evidence import Evidence
from quantkit.methods.rtn import quantize
from quantkit.scheme import KEEP, Scheme, parse_scheme, scheme_names
from quantkit.workspace import Workspace

HIDDEN, WIDTH = 5120, 8192
SEEN = Evidence(1, torch.ones(HIDDEN), torch.ones(HIDDEN))  # for static activations; speed does not depend on it
THREADS = 2
FIRST_CALLS = """
import time, torch
from quantkit.methods.rtn import quantize
from quantkit.scheme import parse_scheme
from quantkit.workspace import Workspace
torch.set_num_threads(1)
weight, started = torch.zeros(128, 128), time.thread_time()
for name in ("int4-g128", "int8-channel", "fp8-block-dynamic", "nvfp4"):
    quantize([weight], parse_scheme(name), clip_search=True, workspace=Workspace())
print(time.thread_time() - started)
"""


def fused_slice() -> torch.Tensor:
    """One expert's ``gate_up_proj`` in a buffer such as a worker reads it into."""
    buffer = Workspace().take("slice", HIDDEN * 2 * WIDTH * 2)
    fused = torch.from_numpy(buffer).view(torch.bfloat16).reshape(HIDDEN, 2 * WIDTH)
    torch.manual_seed(0)
    for first in range(0, HIDDEN, 512):
        fused[first : first + 512] = torch.randn(512, 2 * WIDTH) * 0.02
    return fused


def best_time(work: Callable[[], object], clock: Callable[[], float], seconds: float) -> float:
    """The shortest of at least three runs, repeated for that long."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = clock()
        work()
        times.append(clock() - started)
    return min(times)


def rates(scheme: Scheme, clip_search: bool, up: torch.Tensor, seconds: float) -> tuple[float, float, float]:
    """Weights per second: input-major, row-major, and input-major on all threads together."""
    row_major = torch.from_numpy(Workspace().take("copy", 2 * up.numel())).view(torch.bfloat16).reshape(up.shape)
    row_major.copy_(up)
    workspaces = [Workspace() for _ in range(THREADS)]

    def run(weight: torch.Tensor, workspace: Workspace) -> None:
        quantize([weight], scheme, clip_search=clip_search, workspace=workspace, evidence=SEEN)

    one = [best_time(partial(run, weight, workspaces[0]), time.thread_time, seconds) for weight in (up, row_major)]
    with ThreadPoolExecutor(THREADS) as pool:
        together = best_time(lambda: list(pool.map(lambda workspace: run(up, workspace), workspaces)), time.perf_counter, seconds)
    return up.numel() / one[0], up.numel() / one[1], THREADS * up.numel() / together


def compile_seconds() -> tuple[float, float]:
    """CPU time of the first calls without and with machine code on disk."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "NUMBA_CACHE_DIR": directory}
        command = [sys.executable, "-c", FIRST_CALLS]
        runs = [subprocess.run(command, env=environment, check=True, capture_output=True, text=True) for _ in range(2)]
    return float(runs[0].stdout), float(runs[1].stdout)


def main() -> None:
    """Measure every scheme and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each number")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = common.header("Speed of quantization", Path(tempfile.gettempdir()), common.load_average())
    cold, warm = compile_seconds()
    text += f"- compiling all kernels: {cold:.1f} s of CPU time once, {warm:.1f} s to load them afterwards\n\n"
    up = fused_slice()[:, WIDTH:].t()
    rows = []
    for scheme in (scheme for name in scheme_names() if name != KEEP and (scheme := parse_scheme(name))):
        for clip_search in (False, True):
            numbers = rates(scheme, clip_search, up, arguments.seconds)
            rows.append((scheme.name, "yes" if clip_search else "no", *(f"{number / 1e6:,.0f}" for number in numbers)))
    columns = ("scheme", "search", "input-major", "row-major", f"{THREADS} threads, input-major")
    text += "Million weights per second; the first two columns on one core.\n\n" + common.table(columns, rows)
    common.write_results("kernel_speed.md", text)


if __name__ == "__main__":
    main()
