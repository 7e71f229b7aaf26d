"""Statistics: files that others can read, exact round trips, damage noticed, models told apart."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CalibrationError, OutputError
from quantkit.evidence import Evidence
from quantkit.llama4 import parse_config
from quantkit.statistics import (
    Statistics,
    check_statistics,
    is_statistics,
    load_statistics,
    merge,
    save_statistics,
    statistics_digest,
)
from tests.sample_statistics import KINDS, PROVENANCE, sample_counts, sample_statistics
from tests.tiny_models import tiny_config, write_tiny_model

MAVERICK = parse_config(tiny_config("maverick"))
TENSORS, DESCRIPTION = "statistics.safetensors", "statistics.json"
PARTS = ("tokens", "score_mass", "margin", "kinds", "borrowed")


def same(left: Statistics, right: Statistics) -> bool:
    """Equality spelled out: of dataclasses that hold tensors, == is none."""
    if (left.cache_peaks, left.kinds, left.description) != (right.cache_peaks, right.kinds, right.description):
        return False
    if left.inputs.keys() != right.inputs.keys() or left.experts.keys() != right.experts.keys():
        return False
    pairs = [(left.inputs[key], right.inputs[key], ("mean_square", "peak")) for key in left.inputs]
    counts = [(left.experts[layer], right.experts[layer], PARTS) for layer in left.experts]
    return all(
        getattr(a, name).dtype == getattr(b, name).dtype and torch.equal(getattr(a, name), getattr(b, name))
        for a, b, names in [*pairs, *counts]
        for name in names
    ) and all(a.tokens == b.tokens for a, b, _ in pairs)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "saved"
    directory.mkdir()
    save_statistics(directory, sample_statistics(MAVERICK))
    return directory


# ------------------------------------------------------------------------------------------------------------ save, load


@pytest.mark.parametrize("kind", ["scout", "maverick", "text"])
def test_what_is_saved_comes_back(kind: str, tmp_path: Path) -> None:
    config = parse_config(tiny_config(kind))
    statistics = sample_statistics(config)
    save_statistics(tmp_path, statistics)
    back = load_statistics(tmp_path)
    assert same(back, statistics)
    assert all(evidence.hessian is None for evidence in back.inputs.values())
    assert statistics_digest(back) == statistics_digest(statistics) == json.loads((tmp_path / DESCRIPTION).read_text())["digest"]
    check_statistics(back, config, PROVENANCE)


def test_the_library_reads_the_tensors_and_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    statistics = sample_statistics(MAVERICK)
    tensors = load_file(saved / TENSORS)
    expected = {f"inputs.{key}.mean_square": evidence.mean_square for key, evidence in statistics.inputs.items()}
    expected |= {f"inputs.{key}.peak": evidence.peak for key, evidence in statistics.inputs.items()}
    expected |= {f"experts.{at.layer}.{part}": getattr(at, part) for at in statistics.experts.values() for part in PARTS}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in expected.items())
    save_file(expected, tmp_path / "by_library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "by_library.safetensors").read_bytes() == (saved / TENSORS).read_bytes()
    with safe_open(saved / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_same_statistics_give_the_same_bytes_in_any_order(saved: Path, tmp_path: Path) -> None:
    other = sample_statistics(MAVERICK)
    shuffled = dataclasses.replace(
        other,
        inputs=dict(reversed(other.inputs.items())),
        experts=dict(reversed(other.experts.items())),
        cache_peaks=dict(reversed(other.cache_peaks.items())),
        description=dict(reversed(other.description.items())),
    )
    save_statistics(tmp_path, shuffled)
    save_statistics(tmp_path, shuffled)  # over the files that are there
    for name in (TENSORS, DESCRIPTION):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()
    again = tmp_path / "again"
    again.mkdir()
    save_statistics(again, load_statistics(saved))
    assert (again / DESCRIPTION).read_bytes() == (saved / DESCRIPTION).read_bytes()


def test_hessians_and_views_are_saved_as_plain_statistics(tmp_path: Path) -> None:
    statistics = sample_statistics(MAVERICK)
    key, evidence = next(iter(statistics.inputs.items()))
    spread = torch.stack([evidence.mean_square, evidence.peak], 1)
    statistics.inputs[key] = Evidence(evidence.tokens, spread[:, 0], spread[:, 1], torch.eye(4))
    save_statistics(tmp_path, statistics)
    assert same(load_statistics(tmp_path), sample_statistics(MAVERICK))


def test_a_model_without_experts(tmp_path: Path) -> None:
    statistics = Statistics({}, {}, {0: (0.0, 3.0)}, (), {"source": PROVENANCE})
    save_statistics(tmp_path, statistics)
    assert same(load_statistics(tmp_path), statistics)


def test_values_that_cannot_be_are_not_saved(tmp_path: Path) -> None:
    statistics = sample_statistics(MAVERICK)
    key = next(iter(statistics.inputs))
    for value in (float("nan"), float("inf"), -1.0):
        peak = statistics.inputs[key].peak.clone()
        peak[3] = value
        broken = dataclasses.replace(statistics, inputs={key: Evidence(1, statistics.inputs[key].mean_square, peak)})
        with pytest.raises(CalibrationError, match="negative or not finite"):
            save_statistics(tmp_path, broken)
    with pytest.raises(CalibrationError, match="peaks"):
        save_statistics(tmp_path, dataclasses.replace(statistics, cache_peaks={0: (float("nan"), 1.0)}))
    counts = sample_counts(1, torch.ones(8, 3, dtype=torch.int64))
    for wrong in (
        dataclasses.replace(counts, tokens=counts.tokens + 1),
        dataclasses.replace(counts, margin=counts.margin.float()),
        dataclasses.replace(counts, kinds=counts.kinds[:, :2]),
    ):
        with pytest.raises(CalibrationError, match="layer 1"):
            save_statistics(tmp_path, dataclasses.replace(statistics, experts={1: wrong}))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_or_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save_statistics(tmp_path / "nowhere", sample_statistics(MAVERICK))


# ---------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION])
def test_missing_files(saved: Path, name: str) -> None:
    assert is_statistics(saved)
    (saved / name).unlink()
    assert is_statistics(saved)
    with pytest.raises(CalibrationError, match=f"has no {name}"):
        load_statistics(saved)
    (saved / name).mkdir()
    with pytest.raises(CalibrationError, match=f"has no {name}"):
        load_statistics(saved)
    assert not is_statistics(saved.parent)


def test_files_of_two_calibrations_do_not_pair(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_statistics(other, sample_statistics(MAVERICK, seed=1))
    shutil.copy(other / TENSORS, saved / TENSORS)
    with pytest.raises(CalibrationError, match="do not belong together"):
        load_statistics(saved)


ORIGINAL: dict[str, bytes] = {}


def originals(directory: Path) -> dict[str, bytes]:
    """Both files of small statistics, made once."""
    if not ORIGINAL:
        save_statistics(directory, small_statistics())
        ORIGINAL.update({name: (directory / name).read_bytes() for name in (TENSORS, DESCRIPTION)})
    return ORIGINAL


def small_statistics() -> Statistics:
    counts = sample_counts(2, torch.tensor([[3, 0], [5, 9]]))
    evidence = Evidence(8, torch.tensor([0.25, 1.0]), torch.tensor([1.0, 2.0]))
    return Statistics({"a": evidence}, {2: counts}, {2: (0.5, 4.0)}, ("x", "y"), {"source": PROVENANCE, "version": "1"})


def load_or_fail(directory: Path, files: dict[str, bytes]) -> Statistics | None:
    for name, data in files.items():
        (directory / name).write_bytes(data)
    try:
        return load_statistics(directory)
    except CalibrationError as error:
        assert str(error).endswith(".") and len(str(error)) < 2000
        return None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_is_noticed_or_changes_nothing(tmp_path: Path, data: st.DataObject) -> None:
    files = dict(originals(tmp_path))
    name = data.draw(st.sampled_from([TENSORS, DESCRIPTION]))
    position = data.draw(st.integers(0, len(files[name]) - 1))
    changed = bytearray(files[name])
    changed[position] ^= data.draw(st.integers(1, 255))
    found = load_or_fail(tmp_path, files | {name: bytes(changed)})
    assert found is None or same(found, small_statistics())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_cut_and_grown_files(tmp_path: Path, data: st.DataObject) -> None:
    files = dict(originals(tmp_path))
    name = data.draw(st.sampled_from([TENSORS, DESCRIPTION]))
    cut = data.draw(st.integers(0, len(files[name])))
    tail = data.draw(st.binary(max_size=40))
    found = load_or_fail(tmp_path, files | {name: files[name][:cut] + tail})
    assert found is None or same(found, small_statistics())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(member=st.sampled_from(["format", "digest", "description", "kinds", "inputs", "experts", "cache_peaks", "more"]), value=JSON)
def test_any_value_in_any_member(tmp_path: Path, member: str, value: Any) -> None:
    """With the digest made right again, as somebody would who means harm."""
    files = dict(originals(tmp_path))
    content = json.loads(files[DESCRIPTION])
    del content["digest"]
    content[member] = value
    found = load_or_fail(tmp_path, files | {DESCRIPTION: signed(content, tmp_path, files)})
    if found is not None:
        assert member in ("description", "digest", "kinds", "cache_peaks")
        assert all(isinstance(kind, str) for kind in found.kinds) and len(found.kinds) == 2
        assert all(peak >= 0 for pair in found.cache_peaks.values() for peak in pair)


def signed(content: dict[str, Any], directory: Path, files: dict[str, bytes]) -> bytes:
    """JSON with the digest that the format defines, computed here once more."""
    (directory / "signed.safetensors").write_bytes(files[TENSORS])
    digest = xxhash.xxh3_128(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(load_file(directory / "signed.safetensors").items()):
        dtype = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}[tensor.dtype]
        digest.update(f"\n{name} {dtype} {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return json.dumps({"digest": digest.hexdigest(), **content}).encode()


def test_the_digest_is_the_one_defined_here(tmp_path: Path) -> None:
    files = originals(tmp_path)
    content = json.loads(files[DESCRIPTION])
    stated = content.pop("digest")
    assert json.loads(signed(content, tmp_path, files))["digest"] == stated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, tensors: content.update(format="quantkit statistics 2"), "this version reads"),
        (lambda content, tensors: content.update(experts=[2, 2]), "'experts'"),
        (lambda content, tensors: content.update(experts=[True]), "'experts'"),
        (lambda content, tensors: content["inputs"].update(a=-1), "'inputs'"),
        (lambda content, tensors: content["inputs"].update(b=1), "does not hold the tensors"),
        (lambda content, tensors: content.update(cache_peaks={"02": [1.0, 1.0]}), "'cache_peaks'"),
        (lambda content, tensors: content.update(cache_peaks={"2": [float("nan"), 1.0]}), "peaks"),
        (lambda content, tensors: content.update(kinds=["x", "x"]), "'kinds'"),
        (lambda content, tensors: content.update(kinds=["x"]), "expected"),
        (lambda content, tensors: tensors.update({"inputs.a.peak": torch.ones(3)}), "expected"),
        (lambda content, tensors: tensors.update({"inputs.a.peak": torch.ones(2, dtype=torch.float64)}), "is F64"),
        (lambda content, tensors: tensors.update({"inputs.a.peak": torch.tensor([1.0, float("inf")])}), "not finite"),
        (lambda content, tensors: tensors.update({"experts.2.tokens": torch.tensor([3, 15])}), "tokens of all kinds"),
        (lambda content, tensors: tensors.pop("experts.2.margin"), "does not hold the tensors"),
    ],
)
def test_hostile_files_with_a_right_digest(tmp_path: Path, change: Callable[[Any, Any], Any], message: str) -> None:
    files = dict(originals(tmp_path))
    content = json.loads(files[DESCRIPTION])
    del content["digest"]
    (tmp_path / TENSORS).write_bytes(files[TENSORS])
    tensors = load_file(tmp_path / TENSORS)
    change(content, tensors)
    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / DESCRIPTION).write_bytes(signed(content, tmp_path, {TENSORS: (tmp_path / TENSORS).read_bytes()}))
    with pytest.raises(CalibrationError, match=message):
        load_statistics(tmp_path)


def test_deep_json(tmp_path: Path) -> None:
    files = dict(originals(tmp_path))
    for depth in (300, 900, 100_000):
        text = b'{"description": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
        assert load_or_fail(tmp_path, files | {DESCRIPTION: text}) is None


# ----------------------------------------------------------------------------------------------------------- merge, check


def test_merged_layers_are_the_whole() -> None:
    parts = [sample_statistics(MAVERICK, layers=(layer,)) for layer in range(4)]
    merged = merge(list(reversed(parts)))
    assert list(merged.experts) == [1, 3] and list(merged.cache_peaks) == [0, 1, 2, 3]
    assert merged.inputs.keys() == sample_statistics(MAVERICK).inputs.keys()
    for part in parts:
        for key, evidence in part.inputs.items():
            assert torch.equal(merged.inputs[key].peak, evidence.peak)
    check_statistics(merged, MAVERICK, PROVENANCE)


def test_what_cannot_be_merged() -> None:
    part = sample_statistics(MAVERICK, layers=(0,))
    with pytest.raises(CalibrationError, match="same layer"):
        merge([part, part])
    with pytest.raises(CalibrationError, match="different runs"):
        merge([part, dataclasses.replace(sample_statistics(MAVERICK, layers=(1,)), kinds=("other",))])
    with pytest.raises(CalibrationError, match="no statistics"):
        merge([])


def without(values: dict[Any, Any]) -> dict[Any, Any]:
    return dict(list(values.items())[1:])


def test_statistics_of_another_model_are_refused() -> None:
    statistics = sample_statistics(MAVERICK)
    narrow = {key: Evidence(1, torch.ones(3), torch.ones(3)) for key in list(statistics.inputs)[:1]}
    few = {1: sample_counts(1, torch.ones(2, len(KINDS), dtype=torch.int64))}
    cases: list[tuple[Statistics, str]] = [
        (dataclasses.replace(statistics, inputs=without(statistics.inputs)), "no statistics of language_model"),
        (dataclasses.replace(statistics, inputs=statistics.inputs | {"x.y": next(iter(statistics.inputs.values()))}), "'x.y'"),
        (dataclasses.replace(statistics, inputs=statistics.inputs | narrow), "has 3 inputs instead of 128"),
        (dataclasses.replace(statistics, experts=without(statistics.experts)), "no counts of the experts of layer 1"),
        (dataclasses.replace(statistics, experts=statistics.experts | {0: statistics.experts[1]}), "layer 0, which has none"),
        (dataclasses.replace(statistics, experts=statistics.experts | few), "2 experts instead of 8"),
        (dataclasses.replace(statistics, cache_peaks=without(statistics.cache_peaks)), "cache of layer 0"),
        (dataclasses.replace(statistics, description={}), "do not say what they were measured on"),
        (dataclasses.replace(statistics, description={"source": {"config": "00aa11bb"}}), "which shards"),
    ]
    for wrong, message in cases:
        with pytest.raises(CalibrationError, match=message):
            check_statistics(wrong, MAVERICK, PROVENANCE)
    with pytest.raises(CalibrationError, match=r"and [\d,]+ more"):
        check_statistics(sample_statistics(parse_config(tiny_config("text"))), MAVERICK, PROVENANCE)


def test_the_source_decides_and_its_place_does_not(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "one", "maverick")
    shutil.copytree(tmp_path / "one", tmp_path / "copied")
    write_tiny_model(tmp_path / "two", "maverick", rms_norm_eps=1e-6)
    write_tiny_model(tmp_path / "resharded", "maverick", shard_bytes=1 << 40)
    provenances = {}
    for name in ("one", "copied", "two", "resharded"):
        with Checkpoint.open(tmp_path / name) as checkpoint:
            provenances[name] = checkpoint.provenance()
    statistics = dataclasses.replace(sample_statistics(MAVERICK), description={"source": provenances["one"]})
    check_statistics(statistics, MAVERICK, provenances["one"])
    check_statistics(statistics, MAVERICK, provenances["copied"] | {"repository": "owner/name", "commit": "abc"})
    with pytest.raises(CalibrationError, match=r"config\.json is another one"):
        check_statistics(statistics, MAVERICK, provenances["two"])
    with pytest.raises(CalibrationError, match="shards differ"):
        check_statistics(statistics, MAVERICK, provenances["resharded"])
