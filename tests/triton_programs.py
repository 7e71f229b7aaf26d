"""Triton kernels without a GPU, for tests: interpreted, or compiled for an H200 and looked at.

Triton decides at its import whether it interprets, so both happen in processes of their own: a test file that is run as a program.
There it ends with ``main``, which is given functions by name; JSON can tell their results.
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_program(file: str, name: str, **environment: str) -> Any:
    """Run one of the programs of a test file in a process of its own; what it printed."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, file, name], env={**kept, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def interpreted_by(file: str) -> Any:
    """What its program ``interpret`` finds in Triton's interpreter."""
    return run_program(file, "interpret", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


def main(programs: Mapping[str, Callable[[], Any]]) -> None:
    """Run the program that the command line names."""
    print(json.dumps(programs[sys.argv[1]]()))


@dataclass(frozen=True)
class MachineCode:
    """Of a kernel for an H200.  operations: how often each stands there, by name without what follows its first dot."""

    registers: int
    stack: int
    shared: int
    operations: Mapping[str, int]
    listing: str
    ptx: str

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit."""
        return self.operations.get("LDL", 0) + self.operations.get("STL", 0)


def machine_codes() -> Any:
    """The benchmark that compiles the kernels of the mixture of experts."""
    folder = str(Path(__file__).resolve().parent.parent / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("moe_machine_code")


def machine_code_of(compiled: Any) -> MachineCode:
    """What Triton compiled, disassembled."""
    tools = machine_codes()
    registers, stack, listing = tools.disassembled(compiled)
    names = collections.Counter(name.split(".")[0] for name, _, _ in tools.parsed(listing))
    return MachineCode(registers, stack, compiled.metadata.shared, names, listing, compiled.asm["ptx"])


def machine_code(kernel: Any, types: Mapping[str, str], constants: Mapping[str, object], options: Mapping[str, Any]) -> MachineCode:
    """A kernel compiled for an H200.  types: Triton's names for those of its arguments; all but fractions are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if types.get(name, "fp32") != "fp32"},
    )
    return machine_code_of(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options)))
