"""Wheel and sdist: built from a copy of the sources, looked into, and used outside the checkout."""

from __future__ import annotations

import ast
import email
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("quantkit", "cli", "calibration_data", "tests", "demo/tiny-scout/config.json")
BUILD = "import sys, setuptools.build_meta as backend; print(backend.{function}(sys.argv[1]))"


def build(function: str, sources: Path, output: Path) -> Path:
    """Run one hook of the build backend in ``sources``; returns what it made."""
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD.format(function=function), str(output)]
    result = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return output / result.stdout.split()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist)."""
    work = tmp_path_factory.mktemp("packaging")
    sources = work / "sources"
    sources.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, sources)
    ignore = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=ignore)
        else:
            (sources / name).parent.mkdir(parents=True)
            shutil.copy(ROOT / name, sources / name)
    return build("build_wheel", sources, work / "wheel"), build("build_sdist", sources, work / "sdist")


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_packages_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    names = wheel_names(distributions[0])
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"quantkit", "quantkit_calibration_data", "quantkit_cli"}
    code = {name for name in names if name.startswith(("quantkit/", "quantkit_cli/"))}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "quantkit").rglob("*.py")} | {"quantkit/py.typed"}
    expected |= {f"quantkit_cli/{path.relative_to(ROOT / 'cli')}" for path in (ROOT / "cli").rglob("*.py")}
    assert code == expected
    data = {name.removeprefix("quantkit_calibration_data/") for name in names if name.startswith("quantkit_calibration_data/")}
    corpus = {path.relative_to(ROOT / "calibration_data").as_posix() for path in (ROOT / "calibration_data").rglob("*.jsonl")}
    assert corpus, "no calibration data"
    assert data == corpus | {"__init__.py", "README.md"}


def test_wheel_metadata(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as archive:
        [info] = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    namespace: dict[str, str] = {}
    exec((ROOT / "quantkit" / "version.py").read_text(encoding="utf-8"), namespace)
    assert metadata["Version"] == namespace["__version__"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "quantkit = quantkit_cli.__main__:main" in scripts


def test_every_imported_distribution_is_declared() -> None:
    """What the packages import beyond the standard library is what they declare, no more and no less."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    declared = {requirement.split(">=")[0].replace("-", "_") for requirement in requirements}
    imported = set()
    for path in [*(ROOT / "quantkit").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"quantkit"}
    assert third_party == declared


def test_a_wheel_built_from_the_sdist_is_the_same(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    assert not (unpacked / "tests").exists()
    rebuilt = build("build_wheel", unpacked, tmp_path / "wheel")
    assert wheel_names(rebuilt) == wheel_names(wheel)


def test_an_unpacked_wheel_runs_outside_the_checkout(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(distributions[0]) as archive:
        archive.extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import quantkit, quantkit_cli.app; "
        "print(quantkit.__file__); print(quantkit_cli.__file__); print(callable(quantkit.convert)); "
        "from quantkit.documents import read_documents; import quantkit_calibration_data; "
        "print(quantkit_calibration_data.__file__); "
        "print(*(len(read_documents(None, held_out=part).documents) for part in (False, True)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    library, command_line, usable, data, documents = result.stdout.splitlines()
    assert Path(library).is_relative_to(site)
    assert Path(command_line).is_relative_to(site)
    assert usable == "True"
    assert Path(data).is_relative_to(site), "the bundled corpus comes from the wheel, not from a checkout"
    parts = [(ROOT / "calibration_data" / part).glob("*.jsonl") for part in ("calibration", "held_out")]
    lines = [sum(path.read_bytes().count(b"\n") for path in paths) for paths in parts]
    assert documents.split() == [str(number) for number in lines]
