"""What ledger and manifest tell of an artifact, against sums over the JSON itself; and files that have neither."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from quantkit.calibration import CalibrationOptions
from quantkit.convert import convert
from quantkit.errors import ArtifactError
from quantkit.evaluation_checks import read_manifest
from quantkit.evaluation_provenance import Provenance, read_provenance
from quantkit.recipe import Recipe, Rule
from quantkit.stored_model import open_model
from tests.gguf_models import DEMO, text_file, write_source
from tests.speaking_models import random_tokens, write_speaking_model, write_texts
from tests.tiny_models import write_tiny_model


def provenance(path: Path) -> Provenance:
    with open_model(path) as model:
        return read_provenance(model, read_manifest(model))


def ledger(path: Path) -> list[dict[str, Any]]:
    tensors: list[dict[str, Any]] = json.loads((path / "ledger.json").read_text())["tensors"]
    return tensors


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few tokens, so that experts are lent some."""
    directory = tmp_path_factory.mktemp("calibrated")
    source = write_speaking_model(directory / "source")
    texts = write_texts(directory / "texts.jsonl", [("prose.en", random_tokens(60, seed)) for seed in range(4)])
    options = CalibrationOptions(texts, sequence_length=30)
    [made] = convert(source, ["w4a16-gptq"], directory, calibration=options).artifacts
    return made.directory


def test_ledger_cells_are_sums_over_the_ledger(calibrated: Path) -> None:
    found = provenance(calibrated)
    entries = ledger(calibrated)
    assert {(cell.layer, cell.role) for cell in found.ledger} == {
        (entry["layer"], entry["role"]) for entry in entries if entry["applied"] != "keep"
    }
    for cell in found.ledger:
        own = [
            entry for entry in entries if (entry["layer"], entry["role"]) == (cell.layer, cell.role) and entry["applied"] != "keep"
        ]
        squares = [entry["elements"] * entry["relative_error"] ** 2 for entry in own]
        assert cell.matrices == len(own)
        assert cell.relative_error == pytest.approx(math.sqrt(sum(squares) / sum(entry["elements"] for entry in own)))
        assert cell.worst == max(entry["relative_error"] for entry in own) >= cell.relative_error > 0
        assert cell.output_error == pytest.approx(sum(entry["output_error"] for entry in own) / len(own)) and cell.output_error > 0


def test_coverage_is_what_experts_learned_from(calibrated: Path) -> None:
    found = provenance(calibrated)
    tokens: dict[int, dict[int, int]] = defaultdict(dict)
    for entry in ledger(calibrated):
        if entry["role"] == "routed_expert":
            tokens[entry["layer"]][entry["expert"]] = entry["tokens"]
    assert found.coverage == {layer: tuple(counts[expert] for expert in range(4)) for layer, counts in tokens.items()}
    lent = {(entry["layer"], entry["expert"]) for entry in ledger(calibrated) if entry["borrowed"]}
    assert lent and any(f"experts that were lent tokens: {len(lent)} of 8" in line for line in found.fallbacks)


def test_recipe_and_fingerprint_are_the_manifests(calibrated: Path) -> None:
    found = provenance(calibrated)
    manifest = json.loads((calibrated / "manifest.json").read_text())
    assert found.recipe == manifest["recipe"] and found.fingerprint["calibration"] == manifest["calibration"]
    assert found.fingerprint["source"] == manifest["source"] and "files" not in found.fingerprint


def test_roles_account_for_every_byte(calibrated: Path) -> None:
    with open_model(calibrated) as model:
        found = read_provenance(model, read_manifest(model))
        assert sum(role.bytes for role in found.roles) == model.bytes
        assert sum(role.parameters for role in found.roles) == model.parameters
    schemes = {role.role: role.schemes for role in found.roles}
    assert schemes["routed_expert"] == ("int4-g128",) and schemes["attention"] == schemes["router"] == ("keep",)


def test_a_file_by_itself_and_one_in_its_directory(tmp_path: Path) -> None:
    [made] = convert(DEMO, ["Q8_0"], tmp_path).artifacts
    inside, alone = provenance(text_file(made.directory)), tmp_path / "alone.gguf"
    assert inside.ledger and inside == provenance(made.directory)
    assert inside.coverage == {} and inside.fallbacks == ()
    shutil.copy(text_file(made.directory), alone)
    found = provenance(alone)
    assert found.ledger == () and found.recipe is None and found.roles == inside.roles
    assert len(found.fallbacks) == 1 and found.fallbacks[0].startswith("no manifest")
    shutil.copy(made.directory / "ledger.json", tmp_path)  # of something else, as far as anybody knows
    assert provenance(alone).ledger == ()


def test_a_checkpoint_has_little_to_tell(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    found = provenance(tmp_path / "model")
    assert found.ledger == () and found.fallbacks == () and found.recipe is None and found.coverage == {}
    assert {role.schemes for role in found.roles} == {("keep",)} and found.fingerprint


def test_a_damaged_ledger_or_manifest_is_an_error(calibrated: Path, tmp_path: Path) -> None:
    for name in ("ledger.json", "manifest.json"):
        shutil.copytree(calibrated, tmp_path / name)
        path = tmp_path / name / name
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ArtifactError, match=name):
            provenance(tmp_path / name)


def test_what_is_not_as_usual_is_told(calibrated: Path, tmp_path: Path) -> None:
    shutil.copytree(calibrated, tmp_path / "changed")
    path = tmp_path / "changed" / "ledger.json"
    content = json.loads(path.read_text())
    for entry in content["tensors"]:
        if entry["name"].endswith("experts.2.down_proj") and entry["layer"] == 1:
            entry |= {"asked": "int8-g128", "damping": 1e6}
        if entry["role"] == "routed_expert" and entry["expert"] == 3:
            entry |= {"tokens": 0, "borrowed": 0}
    path.write_text(json.dumps(content))
    (tmp_path / "changed" / "manifest.json").unlink()
    (tmp_path / "changed" / "tokenizer.json").unlink()
    lines = "\n".join(provenance(tmp_path / "changed").fallbacks)
    for expected in (
        "no manifest",
        "no tokenizer.json: taken to have the reference's tokenizer",
        "layers.1.feed_forward.experts.2.down_proj: asked int8-g128, applied int4-g128",
        "experts that saw no tokens, so only their weights decided: 2 of 8, first expert 3 of layer 0",
        "most (1e+06) language_model.model.layers.1.feed_forward.experts.2.down_proj",
    ):
        assert expected in lines


def test_rows_that_do_not_fit_llama_cpps_blocks_are_told(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "text", intermediate_size=384, num_hidden_layers=1)
    for name, others in (("mixed", "Q6_K"), ("plain", "Q8_0")):
        rules = (Rule(others, roles=("attention",)), Rule("Q5_0", roles=("shared_expert",), name="down"), Rule("keep"))
        [made] = convert(source, Recipe(name, rules, format="gguf", method="rtn"), tmp_path).artifacts
        told = [line for line in provenance(made.directory).fallbacks if "no multiple of 256" in line]
        assert [line.rpartition(" ")[2] for line in told] == (["1"] if name == "mixed" else [])
        assert all(line.startswith("matrices in Q5_0") for line in told)
