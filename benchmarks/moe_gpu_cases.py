"""What ``moe_gpu.py`` multiplies: random weights of every scheme on a device, rows of a routed layer, launches with any tile.

Needs torch, Triton and NumPy; quantkit's kernels for a GPU are imported without what the rest of quantkit depends on where that is
not installed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

QUANTKIT = Path(__file__).resolve().parent.parent / "quantkit"
BF16 = "bf16"  # the name of plain weights here
REACH = {"int4": (-8, 7), "int8": (-128, 127)}


def import_kernels() -> None:
    """Make ``quantkit.kernels`` importable also where numba, llvmlite and gguf are missing, which it needs on a CPU only."""
    try:
        importlib.import_module("quantkit.kernels.device_weights")
    except ModuleNotFoundError:
        for name in [name for name in sys.modules if name.split(".")[0] in ("quantkit", *_CPU_ONLY)]:
            del sys.modules[name]
        package = types.ModuleType("quantkit")  # without what its own __init__ imports
        package.__path__ = [str(QUANTKIT)]
        sys.modules["quantkit"] = package
        sys.meta_path.insert(0, _Absent())
        importlib.import_module("quantkit.kernels.device_weights")


_CPU_ONLY = ("numba", "llvmlite", "gguf")


class _Nothing:
    """Stands for whatever is imported from a package that is missing: decorates without effect, gives itself, is inherited from."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return arguments[0] if len(arguments) == 1 and not options and isinstance(arguments[0], types.FunctionType) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _NoCache:
    """Where numba would keep machine code."""

    def __init__(self, function: object) -> None:
        raise RuntimeError(f"there is no numba to compile {function}")  # as numba does where there is no directory to write to


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of packages that are missing, with nothing in them."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """A module of nothing for every part of those packages."""
        if name.split(".")[0] in _CPU_ONLY:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        """Everything that is asked of it is nothing."""
        nothing = _Nothing()
        module.__dict__["__getattr__"] = lambda name: _NoCache if name == "FunctionCache" else getattr(nothing, name)


# ----------------------------------------------------------------------------------------------------------------- weights


def matrix(name: str, rows: int, columns: int, device: torch.device) -> Any:
    """A random weight of a scheme as it is stored, its values around 1 / sqrt(columns)."""
    from quantkit.grid import QuantizedTensor
    from quantkit.scheme import parse_scheme

    size = columns**-0.5
    if name == BF16:
        return (torch.randn(rows, columns, device=device) * size).to(torch.bfloat16)
    scheme = parse_scheme(name)
    assert scheme is not None

    def whole(low: int, high: int, height: int, width: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (height, width), device=device, dtype=torch.int8)

    def around(height: int, width: int, middle: float) -> torch.Tensor:
        return (torch.rand(height, width, device=device) + 0.5) * middle

    if scheme.number == "ggml":
        kind = scheme.block_type
        blocks, groups = columns // kind.block, columns // kind.group if kind.group else 0
        most = max(abs(kind.codes[0] - kind.offset), abs(kind.codes[1] - kind.offset)) / 2
        largest = max(map(abs, kind.group_scales)) / 2 or 1
        return QuantizedTensor(
            scheme,
            whole(*kind.codes, rows, columns),
            around(rows, blocks, size / most / largest).to(torch.float16),
            group_scale=whole(*kind.group_scales, rows, groups) if groups else None,
            minimum=around(rows, blocks, size / largest).to(torch.float16) if kind.minimum else None,
            group_minimum=whole(*kind.group_scales, rows, groups) if kind.minimum else None,
        )
    shape = scheme.scale_shape(rows, columns)
    if scheme.number == "fp8":
        codes = (torch.randn(rows, columns, device=device) * 64).clamp_(-448, 448).to(torch.float8_e4m3fn)
        return QuantizedTensor(scheme, codes, around(*shape, size / 64).to(torch.bfloat16))
    low, high = REACH[scheme.number]
    zero_point = None if scheme.symmetric else whole(low, high, *shape)
    return QuantizedTensor(
        scheme, whole(low, high, rows, columns), around(*shape, size / high * 2).to(torch.bfloat16), zero_point=zero_point
    )


def values_of(weight: Any) -> torch.Tensor:
    """What is stored, float32 ``[out, in]``."""
    from quantkit import grid

    return weight.to(torch.float32) if isinstance(weight, torch.Tensor) else grid.dequantize(weight)


@dataclass(frozen=True)
class Layer:
    """Experts of one scheme, the shared one last, ready to be multiplied; ``experts`` routed ones.

    matrices: gate, up and down of every expert as they are stored; of the first one only where all others repeat it.
    """

    name: str
    experts: int
    hidden: int
    width: int
    mixture: Any
    matrices: tuple[Any, ...]

    @property
    def bytes_of_expert(self) -> float:
        """Bytes of one expert on the device."""
        [stack] = self.mixture.stacks
        return float(stack.gate.nbytes + stack.down.nbytes) / (self.experts + 1)

    @property
    def weights_of_expert(self) -> int:
        return 3 * self.hidden * self.width


def layer(name: str, experts: int, hidden: int, width: int, device: torch.device, *, distinct: bool = False) -> Layer:
    """A random layer.  Experts are copies of one in memory of their own, or all different where ``distinct``."""
    from quantkit.kernels import device_mixture, device_weights
    from quantkit.kernels.weights import Mlp

    gates, downs, matrices = [], [], []
    for _ in range(experts + 1 if distinct else 1):
        gate, up = matrix(name, width, hidden, device), matrix(name, width, hidden, device)
        down = matrix(name, hidden, width, device)
        gates.append(device_weights.build(gate, device, up))
        downs.append(device_weights.build(down, device))
        matrices.append(Mlp(gate, up, down))
    if not distinct:
        gates, downs = gates * (experts + 1), downs * (experts + 1)
    stack = device_mixture.Stack(
        torch.arange(experts + 1, device=device), experts, device_weights.stack(gates), None, device_weights.stack(downs)
    )
    return Layer(name, experts, hidden, width, device_mixture.Mixture(experts, (stack,)), tuple(matrices))


# ---------------------------------------------------------------------------------------------------------------- launches


def rows_per_expert(tokens: int, experts: int, device: torch.device) -> torch.Tensor:
    """How many rows each expert gets from random top-1 routing, and the shared one all: int64 ``[experts + 1]``."""
    counts = torch.bincount(torch.randint(0, experts, (tokens,)), minlength=experts)
    return torch.cat([counts, torch.tensor([tokens])]).to(device)


def tiles_of(counts: torch.Tensor, tokens: int, size: int) -> Any:
    """Tiles of ``size`` rows for all of these."""
    from quantkit.kernels import moe_tiles

    ends = counts.cumsum(0)
    most = min(len(counts) - 1, tokens) + tokens // size + -(-tokens // size)
    return moe_tiles.cut(ends - counts, ends, size, most)


def chosen_tiles(layer: Layer, counts: torch.Tensor, tokens: int) -> Any:
    """Tiles that quantkit would choose, those of a launch each."""
    from quantkit.kernels import moe_triton

    [stack] = layer.mixture.stacks
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return moe_triton.tiles_of(stack, bounds, tokens, 1, layer.experts)


def rounded(values: torch.Tensor, weight: Any, counts: torch.Tensor, wanted: bool) -> Any:
    """Rows as the kernel takes them, rounded where the scheme asks for it and it is ``wanted``."""
    from quantkit.kernels import moe_tiles, moe_triton

    scheme = weight.scheme
    if not wanted or scheme is None or not (scheme.dynamic_activations or scheme.static_activations):
        return moe_tiles.Rows(values)
    place = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts, output_size=len(values))
    return moe_triton.kernels_of(weight.kind).round_rows(values, weight, place)


def launch(rows: Any, weight: Any, tiles: Any, out: torch.Tensor, *, shape: Any = None, assembly: bool | None = None) -> None:
    """A launch as quantkit does it, with a tile of one's own, or without instructions.  out: ``[splits, rows, width]``."""
    from quantkit.kernels import moe_triton_blocks, moe_triton_float, moe_triton_integer

    assembly = out.is_cuda if assembly is None else assembly
    if weight.kind == "blocks" and weight.scheme.name == "Q8_0":
        weight = moe_triton_blocks.as_integer(weight)
    module: Any = {"integer": moe_triton_integer, "blocks": moe_triton_blocks}.get(weight.kind, moe_triton_float)
    if weight.kind == "blocks":
        rows = moe_triton_blocks.prepared(rows.values)
    module.launch_of(rows, weight, tiles, out, assembly=assembly, shape=shape).run()


def dequantized(words: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """INT4 in groups of 128: words int32 ``[rows, inputs / 8]`` and scales ``[inputs / 128, rows]`` to BF16 ``[rows, inputs]``."""
    from moe_gpu_dequantize import ROWS, dequantize

    rows, inputs = out.shape
    dequantize[(-(-rows // ROWS), inputs // 128)](words, scales, out, rows, inputs, num_warps=4)
