"""What the README states is what the code does: presets, schemes, recipe example, sizes, exit codes, bounds."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import quantkit
from quantkit.assignment import MAXIMUM_ERROR
from quantkit.llama4 import ROLES, parse_config
from quantkit.mixtures import FILE_TYPES, data_bytes
from quantkit.scheme import GGML, scheme_names
from quantkit_cli.app import app
from quantkit_cli.presets import GGUF_ROWS, packed_rows, preset_rows
from quantkit_cli.text import size
from tests.releases import release as true_config

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
RELEASES: dict[str, dict[str, Any]] = {
    "Scout": {"num_local_experts": 16, "interleave_moe_layer_step": 1},
    "Maverick": {"num_local_experts": 128, "interleave_moe_layer_step": 2},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def cells(header: str) -> list[list[str]]:
    """Rows of the table whose heading begins so, code marks removed."""
    lines = README.split(f"\n| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines]


def release_config(directory: Path, release: str) -> Path:
    config = true_config(**RELEASES[release])
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_it_begins_with_the_two_commands() -> None:
    assert README.startswith("# quantkit\n\n```\nmake demo\nmake test\n```\n")


def test_presets_and_schemes() -> None:
    stated = {row[0]: (row[1], row[2]) for row in cells("preset | scheme")}
    assert stated == {row.name: (row.scheme, f"{row.bits_per_weight:.3f}") for row in preset_rows()}
    packed = {row[0]: (row[1], row[2]) for row in cells("packed preset")}
    assert packed == {row.name: (row.scheme, f"{row.bits_per_weight:.3f}") for row in packed_rows()}
    schemes = README.split("Schemes: ")[1].split("`keep`.")[0]
    missing = [name for name in scheme_names() if f"`{name.removesuffix('-asym')}`" not in schemes and name != "keep"]
    assert missing == []
    types = README.split("In GGUF the schemes are llama.cpp's types: ")[1].split(";")[0]
    assert sorted(re.findall(r"`(\w+)`", types)) == sorted(GGML)


def test_gguf_file_types() -> None:
    stated = {row[0]: row[1:] for row in cells("file type")}
    models = [parse_config(true_config(**fields)) for fields in RELEASES.values()]
    presets = set()
    for row in GGUF_ROWS:
        bits, scout, maverick, calibrated, what = stated.pop(row.name)
        assert (bits, what) == (f"{row.bits_per_weight:.2f}", row.what)
        sizes = [size(data_bytes(FILE_TYPES[row.name], model, row.calibrated)) for model in models]
        assert [scout, maverick] == sizes, row.name
        suffixes = ["importance"] if "always" in calibrated else []
        presets |= {row.name, *(f"{row.name}-{suffix}" for suffix in suffixes + re.findall(r"-(\w+)", calibrated))}
        assert quantkit.GGUF_PRESETS[row.name].needs_calibration == ("always" in calibrated)
    assert not stated and presets == set(quantkit.GGUF_PRESETS)


def test_commands_parse() -> None:
    commands = re.findall(r"^quantkit (?:convert|calibrate|plan|inspect|verify|presets) .*$", README, re.MULTILINE)
    assert len(commands) > 10
    parser = typer.main.get_command(app)
    for command in commands:
        _, name, *arguments = shlex.split(command)
        parser.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_which_clients_load_what(tmp_path: Path) -> None:
    stated = {row[0]: row[1:] for row in cells("preset | vLLM 0.33")}
    for artifact in quantkit.plan(release_config(tmp_path, "Scout"), list(quantkit.PRESETS)).artifacts:
        found = [("yes, mind the note" if note.why else "yes") if note.loads else "no" for note in artifact.notes]
        assert stated.pop(artifact.name) == found
    assert not stated


def test_the_recipe_examples_fit_scout(tmp_path: Path) -> None:
    recipes = [quantkit.parse_recipe(example, "README") for example in blocks("toml")]
    used = [
        {assignment.scheme.name for assignment in artifact.assignments.values() if assignment.scheme}
        for artifact in quantkit.plan(release_config(tmp_path, "Scout"), recipes).artifacts
    ]
    assert used == [{"int8-g128", "int4-g128"}, {"Q4_K", "Q6_K", "BF16", "F32"}, {"int8-g128", "int3-g64"}]
    asked = README.split("quantkit.resolve_targets(")[1].split(")` gives")[0]
    assert 'method="gptq"' in asked and quantkit.resolve_targets(
        ["Q4_K_M"], method="gptq", tensor_types=["attn_v=Q8_0"], vision="BF16"
    )
    assert all(f"`{role}`" in README for role in ROLES)


@pytest.mark.parametrize("release", list(RELEASES))
def test_sizes_of_the_releases(tmp_path: Path, release: str) -> None:
    stated = {row[0]: row[1 + list(RELEASES).index(release)] for row in cells("model")}
    presets = [name for name in stated if name in quantkit.PRESETS]
    assert len(presets) == 5
    plan = quantkit.plan(release_config(tmp_path, release), presets)
    assert {artifact.name: size(artifact.total_bytes) for artifact in plan.artifacts} == {name: stated[name] for name in presets}
    packed = {row[0]: row[3 + list(RELEASES).index(release)] for row in cells("packed preset")}
    planned = quantkit.plan(release_config(tmp_path, release), list(packed)).artifacts
    assert {artifact.name: size(artifact.total_bytes) for artifact in planned} == packed
    parameters = sum(row.parameters for row in quantkit.summarize_roles(plan, plan.artifacts[0]))
    assert stated["parameters, BF16 source"] == f"{parameters / 1e9:.1f} B, {size(2 * parameters)}"
    rows = 0
    for artifact in plan.artifacts:
        fits = {(fit.count, fit.gigabytes) for fit in quantkit.gpu_fits(artifact.tensor_bytes, plan.config, 131_072) if fit.fits}
        for row in (row for row in stated if row.startswith(f"GPUs for `{artifact.name}` with ")):
            rows += 1
            for count, gigabytes in re.findall(r"(\d+) x (\d+)", stated[row]):
                assert int(count) == min(other for other, memory in fits if memory == int(gigabytes)), row
    assert rows == 2


def test_exit_codes_and_bounds() -> None:
    codes = {int(row[0]) for row in cells("exit code")}
    raised = {getattr(quantkit, name).exit_code for name in quantkit.__all__ if name.endswith("Error") or name == "Interrupted"}
    assert codes - {0, 2} == raised - {quantkit.QuantkitError.exit_code}
    sentence = README.split("passes a bound: ")[1].split("`maximum_error`")[0].replace("\n", " ")
    assert {name.lower(): float(bound) for bound, name in re.findall(r"([\d.]+) for (\w+)", sentence)} == MAXIMUM_ERROR


def test_the_python_example_compiles_and_names_what_exists() -> None:
    [example] = blocks("python")
    compile(example, "README", "exec")
    assert all(name in quantkit.__all__ for name in re.findall(r"quantkit\.(\w+)\(", example))
