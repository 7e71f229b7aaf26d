"""The experts' kernels as machine code for an H200, which nobody here has: resources, and whether tensor cores do the work.

``benchmarks/moe_machine_code.py`` compiles what launchers would launch for Scout and reads the result; here is a part of its table.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "moe_machine_code.py"
CHOSEN = (  # scheme, gate_up or down, rows of a tile
    "int4-g128:gate_up:16",
    "int4-g128:gate_up:32",
    "int4-g128:gate_up:64",
    "int4-g128:gate_up:128",
    "int4-g128:down:16",
    "int4-g32-asym:gate_up:128",
    "int8-channel-dynamic:gate_up:128",
    "fp8-channel-dynamic:gate_up:16",
    "fp8-block-dynamic:gate_up:128",
    "bf16:down:128",
    "Q4_K:gate_up:16",
    "Q6_K:down:128",
)
MOST_SHARED = 227 * 1024  # bytes of a multiprocessor that programs may have
REGISTERS = 65536  # of a multiprocessor
MOST_PER_WEIGHT = 4.0  # instructions, of INT4 in the smallest tile: more would take longer than reading the weights
MOST_WAITS = 4  # for the tensor core, in a step of 128 or 256 inputs that is eight products or more

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment = kept | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, SCRIPT, "--json", "--variants", ",".join(CHOSEN)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def name_of(code: dict[str, Any]) -> str:
    return " ".join(str(value) for value in code["variant"].values())


@needs_triton
def test_nothing_is_spilled(codes: list[dict[str, Any]]) -> None:
    assert {name_of(code) for code in codes if code["spills"] or code["stack"]} == set()


@needs_triton
def test_programs_fit_as_the_table_of_tiles_says(codes: list[dict[str, Any]]) -> None:
    for code in codes:
        assert code["shared"] * code["residents"] <= MOST_SHARED, name_of(code)
        assert code["registers"] * 32 * code["warps"] * code["residents"] <= REGISTERS, name_of(code)


@needs_triton
def test_tensor_cores_multiply_what_is_stored(codes: list[dict[str, Any]]) -> None:
    for code in codes:
        variant = code["variant"]
        eight_bits = variant["scheme"].startswith("fp8") and variant["rounded"]
        assert set(code["tensor_core"]) == {"QGMMA" if eight_bits else "HGMMA"}, name_of(code)
        assert code["waits"] <= MOST_WAITS, name_of(code)


@needs_triton
def test_four_bits_are_unpacked_as_fast_as_they_are_read(codes: list[dict[str, Any]]) -> None:
    smallest = [code for code in codes if code["variant"]["scheme"] == "int4-g128" and code["variant"]["tokens"] == 16]
    assert len(smallest) == 2
    assert all(0 < code["per_weight"] <= MOST_PER_WEIGHT for code in smallest)
