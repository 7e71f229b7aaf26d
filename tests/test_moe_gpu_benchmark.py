"""The benchmark of the mixture of experts runs end to end without a GPU, and without the packages that a GPU machine may lack."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.kernels.moe_tiles import TABLE, Shape

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "moe_gpu.py"
WITHOUT = """
import importlib.abc, runpy, sys
missing = {"numba", "llvmlite", "gguf", "huggingface_hub", "jinja2", "rich", "tokenizers", "typer", "xxhash"}
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_it_runs_end_to_end_with_torch_triton_and_numpy_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(SCRIPT), "--interpret", "--output", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr + result.stdout
    found = json.loads((tmp_path / "moe_gpu.json").read_text(encoding="utf-8"))
    assert found["problems"] == [] and found["left out"] == []
    checked = {check["scheme"] for check in found["checks"]}
    assert checked == {
        "int4-g128",
        "fp8-channel-dynamic",
        "fp8-block-dynamic",
        "bf16",
        "Q4_K",
        "fp8-channel-dynamic, rows as they are",
    }
    assert all(0 < check[part] <= 1 for check in found["checks"] for part in ("gate_up", "down"))
    figures = found["figures"]
    assert {figure["model"] for figure in figures} == {"Scout", "Maverick"}
    assert {"BF16, grouped_mm", "int4-g128 written out, grouped_mm"} <= {figure["scheme"] for figure in figures}
    assert all(figure["products"] is None and figure["layer"] is None for figure in figures), "nothing is measured without a GPU"
    assert all(len(tuned["tried"]) == 2 for tuned in found["tiles"]) and len(found["tiles"]) == 2
    text = (tmp_path / "moe_gpu.md").read_text(encoding="utf-8")
    assert "not measured" in text and "PROBLEM" not in text
    assert str(tmp_path) not in text
    printed: dict[str, object] = {"Shape": Shape}
    exec(text.split("```python\n")[1].split("```")[0], printed)  # as it would stand in the module
    assert printed["TABLE"] == TABLE, "without a measurement no tile is better"


@needs_triton
def test_a_lack_of_time_is_told(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--interpret", "--seconds", "0", "--output", str(tmp_path), "--parts", "scout"]
    subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "moe_gpu.json").read_text(encoding="utf-8"))
    assert "copy" in found["left out"] and "Scout, baselines" in found["left out"] and found["figures"] == []


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    result = subprocess.run([sys.executable, str(SCRIPT), "--output", str(tmp_path)], capture_output=True, text=True, check=True)
    assert "not measured" in result.stdout and list(tmp_path.iterdir()) == []
