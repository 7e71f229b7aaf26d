"""Plans: exact sizes from the config alone, per role and in total."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.convert import plan
from quantkit.errors import RecipeError
from quantkit.estimate import default_workers, estimate_cost, gpu_fits, kv_cache_bytes_per_token, unit_memory
from quantkit.llama4 import parse_config
from quantkit.plan import make_plan, summarize_roles
from quantkit.recipe import PRESETS, parse_recipe
from tests.releases import release

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"


def release_config(experts: int, step: int, **text: Any) -> dict[str, Any]:
    """The shapes of the Scout (16 experts, step 1) and Maverick (128, step 2) releases."""
    return release(num_local_experts=experts, interleave_moe_layer_step=step, **text)


def plan_config(config: dict[str, Any], *names: str) -> Any:
    text = json.dumps(config, indent=2)
    return make_plan(text, parse_config(config), [PRESETS[name] for name in names])


# Gigabytes of the tensor files, by hand.  Scout has 102.68e9 feed-forward parameters (routed and shared) and 5.96e9 others,
# Maverick 395.61e9 (routed, shared, dense) and 5.97e9; feed-forward weights take 4.125 bits (or 8, and 2 bytes an output
# row), others 16.
@pytest.mark.parametrize(
    ("experts", "step", "name", "gigabytes"),
    [
        (16, 1, "w4a16-rtn", 64.87),
        (16, 1, "fp8-dynamic", 114.64),
        (128, 2, "w4a16-rtn", 215.94),
        (128, 2, "fp8-dynamic", 407.67),
    ],
)
def test_release_sizes(experts: int, step: int, name: str, gigabytes: float) -> None:
    [artifact] = plan_config(release_config(experts, step), name).artifacts
    assert artifact.tensor_bytes / 1e9 == pytest.approx(gigabytes, abs=0.04)
    assert all(file.size <= 5_000_000_000 for file in artifact.files)
    assert artifact.files[0].name == f"model-00001-of-{len(artifact.files):05d}.safetensors"


def test_scout_bits_per_weight() -> None:
    result = plan_config(release_config(16, 1), "w4a16-rtn")
    rows = {row.role: row for row in summarize_roles(result, result.artifacts[0])}
    assert rows["routed_expert"].parameters == 48 * 16 * 3 * 5120 * 8192
    assert rows["routed_expert"].bits_per_weight == pytest.approx(4.125, abs=1e-3)
    assert rows["attention"].bits_per_weight == 16
    assert sum(row.parameters for row in rows.values()) == 108_641_793_536
    assert sum(row.bytes for row in rows.values()) < result.artifacts[0].tensor_bytes


def test_two_trillion_parameters_plan() -> None:
    config = release_config(16, 1, hidden_size=16384, intermediate_size=32768, num_hidden_layers=80, num_attention_heads=128)
    result = plan_config(config, "w4a16-rtn", "fp8-dynamic")
    assert sum(row.parameters for row in summarize_roles(result, result.artifacts[0])) > 2e12
    assert result.artifacts[1].total_bytes > 2e12


def test_config_alone_gives_the_same_tensor_files_as_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    with_weights = plan(DEMO, ["w4a16-rtn"]).artifacts[0]
    for source in (tmp_path, tmp_path / "config.json"):
        alone = plan(source, ["w4a16-rtn"]).artifacts[0]
        assert alone.files == with_weights.files
        assert alone.sidecars == with_weights.sidecars
        assert alone.file_sizes.items() <= with_weights.file_sizes.items()


def test_shard_size_is_honoured() -> None:
    [artifact] = plan(DEMO, ["fp8-dynamic"], max_shard_bytes=2_000_000).artifacts
    assert len(artifact.files) > 8
    assert all(file.size <= 2_000_000 or len(file.tensors) == 1 for file in artifact.files)
    names = [tensor.name for file in artifact.files for tensor in file.tensors]
    assert len(names) == len(set(names)) == sum(len(tensors) for tensors in artifact.outputs.values())


def test_recipes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="quantizes nothing"):
        plan(DEMO, [parse_recipe('[[rules]]\nscheme = "keep"', "test")])
    with pytest.raises(RecipeError, match="same name"):
        plan(DEMO, ["w8a8", "w8a8"])
    with pytest.raises(RecipeError, match="at least one target"):
        plan(DEMO, [])
    with pytest.raises(RecipeError, match="unknown format 'gguf2'"):
        plan(DEMO, [parse_recipe('format = "gguf2"\n[[rules]]\nscheme = "keep"', "test")])
    with pytest.raises(RecipeError, match="shard size"):
        plan(DEMO, ["w8a8"], max_shard_bytes=0)


def test_group_size_that_does_not_divide_is_refused() -> None:
    config = release_config(16, 1, intermediate_size=8160)
    with pytest.raises(RecipeError, match="multiple of the group size 128"):
        plan_config(config, "w4a16-rtn")


def test_scout_int4_fits_one_80_gigabyte_gpu_and_fp8_does_not() -> None:
    config = release_config(16, 1)
    result = plan_config(config, "w4a16-rtn", "fp8-dynamic")
    assert kv_cache_bytes_per_token(result.config) == 2 * 48 * 8 * 128 * 2
    fits = {
        artifact.name: {(row.gigabytes, row.count): row for row in gpu_fits(artifact.tensor_bytes, result.config, 8192)}
        for artifact in result.artifacts
    }
    assert fits["w4a16-rtn"][80, 1].fits
    assert not fits["fp8-dynamic"][80, 1].fits
    assert fits["fp8-dynamic"][80, 2].fits
    assert not fits["w4a16-rtn"][24, 1].fits
    assert fits["w4a16-rtn"][24, 1].context_tokens == 0


def test_cost_bounds_memory_by_the_largest_units(tmp_path: Path) -> None:
    result = plan_config(release_config(128, 2), "w4a16-rtn", "fp8-dynamic")
    cost = estimate_cost(result, tmp_path, workers=2)
    dense_gate_up = 2 * 16384 * 5120  # the largest unit of Maverick: BF16, codes and FP8
    assert cost.peak_memory_bytes == pytest.approx(2 * dense_gate_up * (2 + 1 + 1), rel=0.01)
    assert cost.source_bytes == 2 * 401_583_781_376
    assert cost.disk_bytes == sum(artifact.total_bytes for artifact in result.artifacts)
    assert cost.seconds is not None
    assert cost.seconds > 0
    assert {"write", "hash", "int4-g128", "fp8-channel-dynamic"} <= cost.rates.keys()
    assert list(tmp_path.iterdir()) == []
    assert default_workers(result) >= 1
    unknown = estimate_cost(result, tmp_path, workers=2, sample=tmp_path / "gone")
    assert "read" not in unknown.rates
    assert unit_memory(result.units[0], result.artifacts, result.config) < 100_000_000  # the embedding is copied in chunks
