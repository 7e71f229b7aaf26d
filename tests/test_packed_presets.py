"""Presets of the packed format: what the command line says of them is what a plan says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from quantkit.convert import plan
from quantkit.plan import summarize_roles
from quantkit.recipe import PACKED_PRESETS, PRESETS, resolve_recipe
from quantkit_cli.data import presets_data
from quantkit_cli.presets import PACKED_LINES, complete_target, packed_rows, preset_rows
from quantkit_cli.tables import print_packed_presets
from tests.tiny_models import tiny_config


def test_lines_are_the_library_s() -> None:
    assert list(PACKED_LINES) == list(PACKED_PRESETS) == [row.name for row in packed_rows()]
    assert not PACKED_PRESETS.keys() & PRESETS.keys()
    assert complete_target("packed-int4") == ["packed-int4", "packed-int4-gptq"]
    assert resolve_recipe("Packed-INT4") is PACKED_PRESETS["packed-int4"]


@pytest.mark.parametrize("name", list(PACKED_PRESETS))
def test_stated_bits_are_those_of_a_plan(name: str, tmp_path: Path) -> None:
    widths = {"hidden_size": 8192, "intermediate_size": 8192, "num_hidden_layers": 1, "head_dim": 2048}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("text", **widths)))
    made = plan(tmp_path / "config.json", name)
    [row] = [row for row in summarize_roles(made, made.artifacts[0]) if row.role == "routed_expert"]
    [stated] = [stated for stated in packed_rows() if stated.name == name]
    assert row.bits_per_weight == pytest.approx(stated.bits_per_weight, abs=1e-9)
    assert row.schemes == (stated.scheme,)


def test_they_are_listed() -> None:
    listed = presets_data(preset_rows(), (), packed_rows())
    assert list(listed) == [*PRESETS, *PACKED_PRESETS]
    assert {listed[name]["format"] for name in PACKED_PRESETS} == {"packed"}
    console = Console(record=True, width=140)
    print_packed_presets(console, packed_rows())
    printed = console.export_text()
    assert all(f" {name} " in printed for name in PACKED_PRESETS)
