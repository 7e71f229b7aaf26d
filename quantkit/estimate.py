"""What a run costs: memory, disk, time, and which GPUs can hold the result.

Sizes come from the plan and are exact.  Memory is a bound derived from the largest unit and the number of workers.  Time is
an estimate: a probe of about a second measures how fast this machine reads the source, writes to the output's disk, hashes,
and quantizes with each scheme of the plan; the run is as slow as the slowest of disk and cores.  The GPU table divides
weights over tensor-parallel GPUs and states its two assumptions: the share of memory an engine may use and what it needs
beside weights and KV cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.calibration_cost import calibration_memory, calibration_operations, hidden_state_bytes
from quantkit.evidence import Evidence
from quantkit.formats import FORMATS
from quantkit.formats.base import DTYPE_BYTES
from quantkit.llama4 import Llama4Config, Unit
from quantkit.methods import METHODS
from quantkit.plan import ArtifactPlan, Plan
from quantkit.recipe import METHODS_WITH_HESSIANS
from quantkit.scheme import Scheme
from quantkit.team import Team
from quantkit.workspace import Workspace

GPU_GIGABYTES = (24, 48, 80, 141, 192)
GPU_COUNTS = (1, 2, 4, 8)
USABLE_SHARE = 0.92  # of a GPU's memory, what serving engines take by default
OVERHEAD_BYTES = 2_500_000_000  # per GPU: context, CUDA graphs, activations
CALIBRATION_TOKENS = 400_000  # about what the bundled corpus has
COPY_CHUNK_BYTES = 8 << 20  # pass-through copies hold one chunk
MEMORY_SHARE = 0.25  # of available memory, what the default number of workers may fill
MAXIMUM_DEFAULT_WORKERS = 32
PROBED = "language_model.model.layers.0.feed_forward.shared_expert.down_proj"  # a name that every format has a place for


@dataclass(frozen=True)
class CostEstimate:
    """Cost of one run.

    peak_memory_bytes: above the bare import.  seconds is None when nothing could be measured.  calibration_tokens: that go through
    the model, 0 without calibration.  hidden_state_bytes: disk that they take meanwhile, beside ``disk_bytes``.
    """

    workers: int
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int
    disk_bytes: int
    source_bytes: int
    seconds: float | None
    rates: dict[str, float]
    calibration_tokens: int = 0
    hidden_state_bytes: int = 0


@dataclass(frozen=True)
class GpuFit:
    """Whether an artifact fits on ``count`` GPUs of ``gigabytes`` each with tensor parallelism, and the room left.

    context_tokens: how many tokens of KV cache (BF16) the room holds, all sequences together.  fits: that is at least the
    context asked.
    """

    gigabytes: int
    count: int
    fits: bool
    context_tokens: int


def unit_memory(unit: Unit, artifacts: Sequence[ArtifactPlan], config: Llama4Config) -> int:
    """Bytes one worker holds for this unit: its source slice, one byte per code, and the encoded tensors of one artifact at a
    time.  The slice is taken to have the dtype that the config states; weights stored in F32 under a BF16 config take twice that.
    """
    if unit.copies:
        return COPY_CHUNK_BYTES
    elements = sum(math.prod(matrix.shape) for matrix in unit.matrices)
    encoded = max(sum(tensor.nbytes for tensor in artifact.outputs[unit.key]) for artifact in artifacts)
    return elements * DTYPE_BYTES[config.dtype] + elements + encoded


def default_workers(plan: Plan) -> int:
    """One worker per core, fewer when their buffers would not fit in a quarter of the memory that is free now."""
    largest = max(unit_memory(unit, plan.artifacts, plan.config) for unit in plan.units)
    return max(1, min(available_cores(), int(MEMORY_SHARE * available_memory()) // largest, MAXIMUM_DEFAULT_WORKERS))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that are free now: of the machine, or of the container (control group v2) where that is less."""
    limits = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):  # not Linux
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    try:
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max": no limit
        pass
    return max(0, min(limits))


def estimate_cost(
    plan: Plan,
    output: Path,
    *,
    workers: int | None = None,
    sample: Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
) -> CostEstimate:
    """Estimate the run of ``plan`` into ``output``.

    sample: a source shard to measure reading with; without it reading is taken to be as fast as writing.  The probe writes 64 MB
    beside the output and removes it.  What cannot be measured is left out of ``rates``; without a rate of writing there is no
    estimate of the time.  The source is taken to have the dtype that the config states.  calibration_tokens: for recipes that need
    them, samples times their length; more is taken for a pass than statistics at hand would take.
    """
    count = workers or default_workers(plan)
    largest = sorted((unit_memory(unit, plan.artifacts, plan.config) for unit in plan.units), reverse=True)[:count]
    source = sum(math.prod(item.shape) * DTYPE_BYTES[plan.config.dtype] for unit in plan.units for item in unit.items)
    disk = sum(artifact.total_bytes for artifact in plan.artifacts)
    rates = _probe(plan, output, sample)
    seconds: float | None = None
    if "write" in rates:
        transfer = source / rates.get("read", rates["write"]) + disk / rates["write"]
        compute = sum(
            _elements(plan, artifact, name) / rate
            for artifact in plan.artifacts
            for name, rate in rates.items()
            if name in _schemes(artifact)
        )
        seconds = max(transfer, compute / count) + disk / (rates["hash"] * count)
    memory, hidden, tokens = sum(largest), 0, 0
    if any(artifact.recipe.needs_calibration for artifact in plan.artifacts):
        learned, tokens = sum(artifact.recipe.needs_hessians for artifact in plan.artifacts), calibration_tokens
        memory = max(memory, calibration_memory(plan.config, tokens, learned > 0))
        hidden = hidden_state_bytes(plan.config, tokens, learned)
        rates["calibration"] = _product_rate()
        if seconds is not None:
            threads = workers or available_cores()
            seconds += calibration_operations(plan.config, tokens, learned) / (rates["calibration"] * threads)
    return CostEstimate(count, memory, 0, disk, source, seconds, rates, tokens, hidden)


def _schemes(artifact: ArtifactPlan) -> dict[str, tuple[Scheme, str, bool]]:
    """What is quantized without Hessians, by name of the scheme; the others are part of the calibration."""
    return {
        given.scheme.name: (given.scheme, given.method, given.clip_search)
        for given in artifact.assignments.values()
        if given.scheme is not None and given.method not in METHODS_WITH_HESSIANS
    }


def _elements(plan: Plan, artifact: ArtifactPlan, scheme: str) -> int:
    return sum(
        math.prod(matrix.shape)
        for unit in plan.units
        for matrix in unit.matrices
        if (given := artifact.assignments[matrix.name]).scheme is not None
        and given.scheme.name == scheme
        and given.method not in METHODS_WITH_HESSIANS
    )


def _probe(plan: Plan, output: Path, sample: Path | None) -> dict[str, float]:
    """Measured rates: ``read``, ``write``, ``hash`` in bytes per second, and weights per second and core for each scheme."""
    rates: dict[str, float] = {}
    block = os.urandom(1 << 20) * 16
    started = time.perf_counter()
    hashlib.sha256(block).digest()
    rates["hash"] = len(block) / (time.perf_counter() - started)
    parent = output
    while not os.path.isdir(parent) and parent != parent.parent:
        parent = parent.parent
    # Whatever is wrong with a disk is no reason to withhold the rest of the plan.
    with contextlib.suppress(OSError):
        rates["write"] = _write_rate(parent, block)
    if sample is not None:
        with contextlib.suppress(OSError):
            rates["read"] = _read_rate(sample)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 1024, generator=generator, dtype=torch.float32).to(torch.bfloat16).T
    evidence = Evidence(1, torch.ones(1024), torch.ones(1024), torch.eye(1024))  # for those that ask; rates do not depend on it
    with Team(1) as team:
        for artifact in plan.artifacts:
            form = FORMATS[artifact.recipe.format]
            for name, (scheme, method, search) in _schemes(artifact).items():
                workspace, quantize = Workspace(), METHODS[method]
                for _ in range(4):  # the first call may compile, others may be disturbed: the best counts
                    started = time.perf_counter()
                    [(quantized, _)] = quantize(
                        [weight], scheme, clip_search=search, workspace=workspace, evidence=evidence, team=team
                    )
                    form.encode(PROBED, quantized, workspace)
                    rates[name] = max(rates.get(name, 0.0), weight.numel() / (time.perf_counter() - started))
    return rates


def _product_rate() -> float:
    """Floating-point operations per second and core of a product of float32 matrices."""
    left = torch.ones(1024, 1024)
    best = 0.0
    with Team(1):
        for _ in range(3):
            started = time.perf_counter()
            torch.mm(left, left)
            best = max(best, 2 * 1024**3 / (time.perf_counter() - started))
    return best


def _write_rate(directory: Path, block: bytes) -> float:
    """Bytes per second onto the disk of ``directory``.  Raises OSError."""
    with tempfile.TemporaryFile(dir=directory) as file:
        started = time.perf_counter()
        for _ in range(4):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return 4 * len(block) / (time.perf_counter() - started)


def _read_rate(sample: Path) -> float:
    """Bytes per second from a file.  Raises OSError."""
    with sample.open("rb", buffering=0) as shard:
        started, size = time.perf_counter(), 0
        while size < 256 << 20 and (got := shard.read(16 << 20)):
            size += len(got)
        return max(size, 1) / (time.perf_counter() - started)


def kv_cache_bytes_per_token(config: Llama4Config) -> int:
    """BF16 keys and values of one token over all layers.  Engines that trim chunked layers need less for long contexts."""
    return 2 * 2 * config.num_layers * config.num_key_value_heads * config.head_dim


def gpu_fits(artifact_bytes: int, config: Llama4Config, context: int) -> list[GpuFit]:
    """For each GPU size and count: whether weights and ``context`` tokens of KV cache fit, and how many tokens there is room
    for.
    """
    rows = []
    for gigabytes in GPU_GIGABYTES:
        for count in GPU_COUNTS:
            usable = count * (gigabytes * 1_000_000_000 * USABLE_SHARE - OVERHEAD_BYTES) - artifact_bytes
            copies = max(1, count / config.num_key_value_heads)  # more GPUs than KV heads: heads are replicated
            tokens = max(0, int(usable / (kv_cache_bytes_per_token(config) * copies)))
            rows.append(GpuFit(gigabytes, count, tokens >= context, tokens))
    return rows
