"""Inspection of sources, artifacts and single files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantkit.convert import convert
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.inspection import inspect, role_of
from quantkit.llama4 import inventory, parse_config

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"


def test_roles_by_name_agree_with_the_inventory() -> None:
    for tensor in inventory(parse_config(json.loads((DEMO / "config.json").read_text()))):
        assert role_of(tensor.name) == tensor.role, tensor.name
    assert role_of("language_model.model.layers.3.feed_forward.experts.7.up_proj.weight_scale") == "routed_expert"
    assert role_of("something.else") is None


def test_source() -> None:
    result = inspect(DEMO)
    assert (result.kind, result.format, result.parameters) == ("source", "safetensors", 15_443_968)
    rows = {row.role: row for row in result.roles}
    assert rows["routed_expert"].schemes == ("BF16",)
    assert rows["routed_expert"].bits_per_weight == 16
    assert len(result.files) == 3


def test_artifact(tmp_path: Path) -> None:
    [made] = convert(DEMO, ["w4a16-rtn"], tmp_path).artifacts
    result = inspect(made.directory)
    rows = {row.role: row for row in result.roles}
    assert (result.kind, result.format, result.parameters) == ("artifact", "pack-quantized", 15_443_968)
    assert rows["routed_expert"].schemes == ("int4-g128",)
    assert rows["attention"].schemes == ("BF16",)
    assert 4.125 <= rows["routed_expert"].bits_per_weight < 4.13
    assert result.notes == ()
    [file] = made.directory.glob("*.safetensors")
    alone = inspect(file)
    assert alone.files == ((file.name, file.stat().st_size),)
    (made.directory / "manifest.json").unlink()
    assert any("no manifest" in note for note in inspect(made.directory).notes)


def test_what_cannot_be_read_is_a_documented_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(DEMO, broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(QuantkitError, match=r"config.json"):
        inspect(broken)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"x.safetensors"):
        inspect(tmp_path / "x.safetensors")
