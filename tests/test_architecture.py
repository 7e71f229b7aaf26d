"""The shape of the code base: import direction, file lengths, public names, no hidden behaviour."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantkit

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "quantkit").rglob("*.py"))
COMMAND_LINE = sorted((ROOT / "cli").rglob("*.py"))
LONGEST = 500

PUBLIC = {
    "__version__",
    # what one calls
    "calibrate",
    "convert",
    "evaluate",
    "plan",
    "repack",
    "estimate_cost",
    "gpu_fits",
    "summarize_roles",
    "inspect",
    "verify",
    # evaluations
    "failed_gates",
    "parse_gate",
    "write_report",
    # recipes
    "GGUF_PRESETS",
    "PACKED_PRESETS",
    "PRESETS",
    "Recipe",
    "Rule",
    "load_recipe",
    "parse_recipe",
    "resolve_targets",
    # what comes back
    "ArtifactEvaluation",
    "ArtifactPlan",
    "ArtifactResult",
    "CalibrateResult",
    "CalibrationOptions",
    "ConvertResult",
    "CostEstimate",
    "Difference",
    "Estimate",
    "Evaluation",
    "EvaluationProgress",
    "Gate",
    "GoldenAnswers",
    "GpuFit",
    "Inspection",
    "Plan",
    "Progress",
    "RepackResult",
    "RoleSummary",
    "Scores",
    "VerifyResult",
    # what is raised
    "QuantkitError",
    "CheckpointError",
    "CorpusError",
    "UnsupportedModelError",
    "AlreadyQuantizedError",
    "WeightError",
    "RecipeError",
    "OutputError",
    "ResumeError",
    "LedgerError",
    "ArtifactError",
    "CalibrationError",
    "GateError",
    "Interrupted",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in LIBRARY}


def imports(path: Path) -> Iterator[str]:
    """The modules of quantkit that a file imports, anywhere in it, for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from quantkit import x": the module x, unless the package has a public function of that name, which is then meant
            hidden = PUBLIC if node.module == "quantkit" else set()
            inner = [(alias.name, f"{node.module}.{alias.name}") for alias in node.names]
            names = [full if full in MODULES and name not in hidden else node.module or "" for name, full in inner]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "quantkit")


def documented_order() -> list[str]:
    """The modules as ARCHITECTURE.md lists them, lowest first."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"## Modules.*?```\n(.*?)```", text, re.DOTALL)
    assert block, "ARCHITECTURE.md has no block under '## Modules'"
    return [line.split()[0].removesuffix("/") for line in block[1].splitlines() if line and not line.startswith(" ")]


def test_modules_import_only_lower_ones() -> None:
    order = documented_order()
    rank = {name: number for number, name in enumerate(order)}
    present = {module_name(path).split(".")[1] for path in LIBRARY if module_name(path) != "quantkit"}
    assert set(order) == present, "ARCHITECTURE.md must list every module and nothing else"
    wrong = []
    for path in LIBRARY:
        name = module_name(path)
        if name == "quantkit":
            continue  # the public names: may import anything
        own = name.split(".")[1]
        for target in imports(path):
            assert target != "quantkit", f"{name} imports from the package itself: name the module"
            imported = target.split(".")[1]
            if imported != own and rank[imported] >= rank[own]:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_imports_have_no_cycle() -> None:
    graph = {module_name(path): set(imports(path)) - {module_name(path)} for path in LIBRARY}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_library_does_not_know_the_command_line() -> None:
    for path in LIBRARY:
        text = path.read_text(encoding="utf-8")
        assert "quantkit_cli" not in text, path
        assert not re.search(r"^\s*(import|from) (typer|rich)\b", text, re.MULTILINE), path


def test_no_file_is_too_long() -> None:
    folders = ("quantkit", "cli", "tests", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert lengths, "no file found"
    assert {str(path): length for path, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize("path", [*LIBRARY, *COMMAND_LINE], ids=lambda path: str(path.relative_to(ROOT)))
def test_house_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    if tree.body:
        assert ast.get_docstring(tree), "a module begins with a note on its design"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            kept = node.name is not None or any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert kept or not broad, f"line {node.lineno} swallows every error"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = f"{node.value.id}.{node.attr}"
            assert used not in ("os.environ", "os.getenv"), f"line {node.lineno}: behaviour by environment variable"


def test_public_names() -> None:
    assert set(quantkit.__all__) == PUBLIC
    assert len(quantkit.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(quantkit, name) is not None
    for name in ("convert", "evaluate", "plan", "inspect", "repack", "verify"):
        assert callable(getattr(quantkit, name)), f"quantkit.{name} must be the function, not the module of that name"


def test_every_error_is_public_and_documented() -> None:
    tree = quantkit.QuantkitError
    family = [tree]
    for error in family:
        family.extend(error.__subclasses__())
    ours = {error for error in family if error.__module__ == "quantkit.errors"}
    assert {error.__name__ for error in ours} <= PUBLIC
    document = sys.modules["quantkit.errors"].__doc__ or ""
    assert all(error.__name__ in document for error in ours)
    assert all(error.exit_code not in (0, 2) for error in ours), "0 is success and 2 is wrong usage"


@pytest.mark.parametrize("module", ["quantkit_cli.app", "quantkit_cli.__main__"])
def test_the_command_line_starts_without_the_library(module: str) -> None:
    code = f"import {module}, sys; print([name for name in ('quantkit', 'torch', 'numba', 'numpy') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
