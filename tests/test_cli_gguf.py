"""The command line around GGUF: file types in any case, methods, types of tensors, the vision file, importance in and out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from typer.testing import CliRunner

from quantkit import GGUF_PRESETS, PACKED_PRESETS, PRESETS, Recipe, RecipeError, resolve_targets
from quantkit.imatrix import read_imatrix
from quantkit.llama4 import inventory, parse_config
from quantkit.mixtures import FILE_TYPES, data_bytes
from quantkit_cli.app import app
from quantkit_cli.presets import GGUF_ROWS, complete_target
from tests.gguf_models import text_file, vision_file, write_source
from tests.releases import release

TYPES_OF_A_LAYER = {"ffn_down_exps": "Q6_K", "ffn_gate_exps": "Q4_K", "ffn_gate_inp": "F32", "attn_norm": "F32"}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def stored_types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("gguf") / "small")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{number} lazy dogs, and {number * number} foxes."}) + "\n" for number in range(40))
    )
    return path


# --------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("name", ["q4_k_m", "Q4_K_M", "qk4_moe-GPTQ", "iq2_xxs", "W4A16-RTN"])
def test_presets_have_any_case(name: str) -> None:
    [recipe] = resolve_targets(name)
    assert recipe.name.lower() == name.lower() and recipe in (*PRESETS.values(), *GGUF_PRESETS.values())


@pytest.mark.parametrize("name", [*FILE_TYPES])
@pytest.mark.parametrize("method", ["rtn", "importance", "gptq"])
def test_a_method_is_the_suffix_of_a_plain_name(name: str, method: str) -> None:
    preset = GGUF_PRESETS.get(name if method == "rtn" else f"{name}-{method}")
    if preset is not None and preset.method == method:
        assert resolve_targets([name.lower()], method=method) == [preset]
    else:
        with pytest.raises(RecipeError, match=name):
            resolve_targets([name], method=method)


def test_a_method_leaves_other_targets_alone() -> None:
    own = Recipe("own", format="gguf", mixture="Q3_K_M")
    assert resolve_targets(["w4a16-rtn", "Q5_K_M-importance", "Q4_K_S", own], method="gptq") == [
        PRESETS["w4a16-rtn"],
        GGUF_PRESETS["Q5_K_M-importance"],
        GGUF_PRESETS["Q4_K_S-gptq"],
        own,
    ]


def test_wishes_change_gguf_targets_only_and_stand_in_the_recipe() -> None:
    kept, changed = resolve_targets(["fp8-dynamic", "Q4_K_M"], tensor_types=["ffn_(?=down)=q6_K", "attn=Q8_0"], vision="bf16")
    assert kept == PRESETS["fp8-dynamic"]
    assert [(rule["name"], rule["scheme"]) for rule in changed.to_dict()["rules"]] == [("ffn_(?=down)", "Q6_K"), ("attn", "Q8_0")]
    assert changed.vision == "BF16" and changed.mixture == "Q4_K_M" and changed.name == "Q4_K_M"


@pytest.mark.parametrize(
    ("targets", "wishes", "said"),
    [
        ("w4a16-rtn", {"method": "gptq"}, "none of w4a16-rtn is"),
        ("Q4_K_M-gptq", {"method": "rtn"}, "none of Q4_K_M-gptq is"),
        ("w4a16-rtn", {"vision": "F16"}, "for GGUF targets"),
        ("w4a16-rtn", {"tensor_types": ["attn=Q8_0"]}, "for GGUF targets"),
        ("Q4_K_M", {"vision": "Q4_K"}, "the vision file cannot be 'Q4_K'"),
        ("Q4_K_M", {"tensor_types": ["attn"]}, "PATTERN=TYPE"),
        ("Q4_K_M", {"tensor_types": ["=Q6_K"]}, "PATTERN=TYPE"),
        ("Q4_K_M", {"tensor_types": ["attn=Q7"]}, "'Q7' is no type"),
        ("Q4_K_M", {"tensor_types": ["attn(=Q6_K"]}, "not a regular expression"),
        ("q4_km", {}, "did you mean 'Q4_K_M'"),
    ],
)
def test_wishes_that_nothing_can_meet_are_errors(targets: str, wishes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_targets(targets, **wishes)
    assert said in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- convert


def test_options_reach_the_files(source: Path, tmp_path: Path) -> None:
    options = ("--tensor-type", "ffn_down=q6_k", "--mmproj", "bf16", "--split-max-size", "2MB")
    answer = run_json("convert", source, "--to", "q4_k_s", "--to", "w8a16-channel", "-o", tmp_path, *options)
    assert [artifact["name"] for artifact in answer["artifacts"]] == ["Q4_K_S", "w8a16-channel"]
    directory = tmp_path / "Q4_K_S"
    shards = sorted(path for path in directory.glob("small-*.gguf"))
    assert len(shards) > 1 and shards[0].name.endswith(f"-00001-of-{len(shards):05}.gguf")
    types = {name: kind for shard in shards for name, kind in stored_types(shard).items()}
    assert {part: types[f"blk.2.{part}.weight"] for part in TYPES_OF_A_LAYER} == TYPES_OF_A_LAYER
    assert types["blk.0.ffn_down_shexp.weight"] == "Q6_K"
    assert "BF16" in stored_types(vision_file(directory)).values() and "BF16" in vision_file(directory).name
    recipe = json.loads((directory / "manifest.json").read_text())["recipe"]
    assert (recipe["rules"][0]["name"], recipe["rules"][0]["scheme"], recipe["vision"]) == ("ffn_down", "Q6_K", "BF16")
    assert run("verify", directory, "--source", source).exit_code == 0


def test_a_gguf_file_stays_whole_by_default(source: Path, tmp_path: Path) -> None:
    planned = run_json("convert", source, "--to", "Q8_0", "--to", "w8a16", "-o", tmp_path, "--dry-run")
    assert [name for name in planned["artifacts"][0]["files"] if name.endswith(".gguf")] == [
        "small-Q8_0.gguf",
        "mmproj-small-F16.gguf",
    ]
    split = run_json("plan", source, "--to", "Q8_0", "-o", tmp_path, "--max-shard-size", "3MB")
    assert len([name for name in split["artifacts"][0]["files"] if "-of-" in name]) > 1


def test_plan_takes_the_same_options(source: Path, tmp_path: Path) -> None:
    common = ("plan", source, "-o", tmp_path, "--to", "Q3_K_M")
    plain, more = (run_json(*common, *options)["artifacts"][0] for options in ((), ("--tensor-type", "exps=Q8_0")))
    assert more["bytes"] > plain["bytes"]
    [calibrated] = run_json(*common, "--method", "GPTQ", "--mmproj", "Q8_0")["artifacts"]
    assert calibrated["name"] == "Q3_K_M-gptq" and calibrated["recipe"]["vision"] == "Q8_0"
    printed = run(*common)
    assert (
        printed.exit_code == 0 and "llama.cpp also runs with less" in printed.stdout and "mmproj-small-F16.gguf" in printed.stdout
    )
    assert max(map(len, printed.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--method", "awq"], 2),
        (["--mmproj", "Q4_K"], 2),
        (["--tensor-type", "attn"], 4),
        (["--tensor-type", "nothing_is_called_so=Q6_K"], 4),
        (["--split-max-size", "large"], 2),
        (["--statistics", "imatrix.gguf"], 4),  # nothing would be done with it
        (["--calibration", "text.jsonl"], 4),
    ],
)
def test_wrong_options_have_the_documented_codes(options: list[str], code: int, source: Path, tmp_path: Path) -> None:
    result = run("convert", source, "--to", "Q4_K_M", "-o", tmp_path / "out", *options)
    assert result.exit_code == code and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_an_interruption_looks_for_what_the_method_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.convert", interrupt)
    command = ("convert", source, "--to", "Q4_K_M", "--method", "gptq", "-o", tmp_path)
    (tmp_path / "Q4_K_M.partial").mkdir()
    assert "nothing unfinished is left" in run(*command).stderr
    (tmp_path / "Q4_K_M-gptq.partial").mkdir()
    assert "finished work is kept" in run(*command).stderr


# ------------------------------------------------------------------------------------------------------------ importance


def test_importance_goes_out_and_comes_back(source: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate = ("calibrate", source, "--calibration", corpus, "--sequence-length", 64, "-o", tmp_path / "statistics")
    written = tmp_path / "imatrix.gguf"
    answer = run_json(*calibrate, "--imatrix", written)
    assert answer["imatrix"] == str(written)
    names = {tensor.name for tensor in GGUFReader(written).tensors}
    assert {"blk.0.ffn_down_exps.weight.in_sum2", "blk.0.ffn_down_exps.weight.counts"} <= names

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("statistics of this text are there")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["quantkit.calibrate"], "run_layers", refuse)  # the attribute of that name is the function
        taken = run(*calibrate, "--imatrix", written)
        assert taken.exit_code == 5 and f"{written} exists already" in taken.stderr
        assert run_json(*calibrate, "--imatrix", tmp_path / "old.dat", "--imatrix-legacy")["imatrix"].endswith("old.dat")
        assert run(*calibrate).exit_code == 5  # without a file to write they are in the way
        assert run(*calibrate, "--seed", 9, "--samples", 2, "--imatrix", tmp_path / "other").exit_code == 5
        nowhere = run(*calibrate, "--imatrix", tmp_path / "nowhere" / "file")
        assert nowhere.exit_code == 5 and "no such directory" in nowhere.stderr
    old, new = read_imatrix(tmp_path / "old.dat"), read_imatrix(written)
    assert old.entries.keys() == new.entries.keys()
    for number, statistics in enumerate((tmp_path / "statistics", written, tmp_path / "old.dat")):
        output = tmp_path / str(number)
        common = ("convert", source, "--to", "IQ2_XXS", "--to", "Q4_K_M-importance", "-o", output, "--statistics", statistics)
        run_json(*common)
        assert run("verify", output / "IQ2_XXS").exit_code == 0
    kinds = stored_types(text_file(tmp_path / "1" / "IQ2_XXS"))
    assert (
        kinds["blk.1.ffn_up_exps.weight"] == "IQ2_XXS" and "general.file_type" in GGUFReader(text_file(output / "IQ2_XXS")).fields
    )
    hungry = run("convert", source, "--to", "Q4_K_M-gptq", "-o", tmp_path / "x", "--statistics", written)
    assert hungry.exit_code == 9 and "Hessians" in hungry.stderr


def test_inspect_shows_a_file_and_an_importance_file(source: Path, corpus: Path, tmp_path: Path) -> None:
    run_json("convert", source, "--to", "Q6_K", "-o", tmp_path)
    shown = run("inspect", text_file(tmp_path / "Q6_K"))
    assert shown.exit_code == 0 and "Q6_K" in shown.stdout and "routed expert" in shown.stdout
    assert run_json("inspect", tmp_path / "Q6_K")["format"] == "gguf"


# --------------------------------------------------------------------------------------------------------------- presets


def test_file_types_are_listed_with_their_methods_and_bits() -> None:
    assert sorted(name for row in GGUF_ROWS for name in row.presets) == sorted(GGUF_PRESETS)
    config = parse_config(release(num_local_experts=16, interleave_moe_layer_step=1))
    weights = sum(tensor.elements for tensor in inventory(config) if tensor.role not in ("vision", "projector"))
    for row in GGUF_ROWS:
        recipe = GGUF_PRESETS[row.name]
        assert row.calibrated == recipe.needs_calibration
        nbytes = data_bytes(FILE_TYPES[row.name], config, recipe.needs_calibration)
        assert f"{8 * nbytes / weights:.2f}" == f"{row.bits_per_weight:.2f}", row.name
    bits = [row.bits_per_weight for row in GGUF_ROWS]
    assert bits == sorted(bits, reverse=True)


def test_presets_command_lists_both_families() -> None:
    answer = run_json("presets")
    assert list(answer)[: len(PRESETS)] == list(PRESETS) and set(answer) == {*PRESETS, *PACKED_PRESETS, *GGUF_PRESETS}
    for name, recipe in GGUF_PRESETS.items():
        assert (answer[name]["format"], answer[name]["mixture"], answer[name]["method"]) == ("gguf", recipe.mixture, recipe.method)
    printed = run("presets").stdout
    assert all(f" {name} " in printed for name in FILE_TYPES)


def test_completion_offers_methods_once_the_type_is_there() -> None:
    assert complete_target("Q4_K") == ["Q4_K_M", "Q4_K_S"]
    assert complete_target("q4_k") == ["q4_k_m", "q4_k_s"]  # what does not begin as it was typed a shell would drop
    assert complete_target("Q4_K_M") == ["Q4_K_M", "Q4_K_M-importance", "Q4_K_M-gptq"]
    assert complete_target("qk4_moe-g") == ["qk4_moe-gptq"]
    assert resolve_targets(complete_target("iq2_x")) == [GGUF_PRESETS["IQ2_XS"], GGUF_PRESETS["IQ2_XXS"]]
    assert complete_target("w8") == [name for name in PRESETS if name.startswith("w8")]
    assert set(complete_target("")) == {*PRESETS, *PACKED_PRESETS, *FILE_TYPES}
