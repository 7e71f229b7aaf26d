"""The ledger: fixed width, round trip, and failing closed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit import ledger
from quantkit.assignment import Assignment
from quantkit.errors import LedgerError
from quantkit.grid import QuantizationStatistics
from quantkit.llama4 import SourceTensor, WeightMatrix
from quantkit.scheme import parse_scheme
from tests.mutated_json import any_json

MATRIX = WeightMatrix("m.experts.3.gate_proj", (4, 8), "routed_expert", 0, "gate_proj", "m.experts.gate_up_proj", 3, (0, 4))
ASSIGNED = Assignment(parse_scheme("int4-g32"), "rtn", True, 0.45)
STATISTICS = QuantizationStatistics(0.01, 1.0, 2, 0.001, 0.5)
ENTRY = ledger.quantized_entry(MATRIX, ASSIGNED, "int4-g32", STATISTICS, "0123456789abcdef")
KEPT = ledger.kept_entry(SourceTensor("m.norm.weight", (8,), "norm"), "fedcba9876543210")
TABLE = {MATRIX.name: ASSIGNED, "m.norm.weight": Assignment(None)}


def test_entry_states_error_and_clipping() -> None:
    assert ENTRY.relative_error == pytest.approx(0.1)
    assert ENTRY.clipped == 2 / 32
    assert (ENTRY.expert, ENTRY.elements, ENTRY.source_digest) == (3, 32, "0123456789abcdef")


_numbers = st.floats(min_value=0, max_value=1e30, allow_subnormal=False).filter(lambda x: x == 0 or x > 1e-30)


@given(_numbers, _numbers, _numbers)
def test_text_has_the_planned_size_whatever_the_numbers(error: float, low: float, high: float) -> None:
    blank = replace(ENTRY, relative_error=0.0, clipped=0.0, scale_minimum=0.0, scale_maximum=0.0)
    full = replace(ENTRY, relative_error=error, clipped=0.25, scale_minimum=low, scale_maximum=high)
    assert len(ledger.ledger_text("a", [full, KEPT])) == len(ledger.ledger_text("a", [blank, KEPT]))


def test_text_is_json_that_reads_back() -> None:
    data = ledger.ledger_text("w4", [ENTRY, KEPT])
    assert json.loads(data)["artifact"] == "w4"
    first, second = ledger.read_ledger(data)
    assert second == KEPT
    assert replace(first, relative_error=ENTRY.relative_error) == ENTRY
    assert first.relative_error == pytest.approx(ENTRY.relative_error, rel=1e-6)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"quantkit_ledger": 9, "tensors": []}',
        b'{"quantkit_ledger": 1, "tensors": [{}]}',
        b'{"quantkit_ledger": 1, "tensors": 3}',
        b'{"quantkit_ledger": 1, "tensors": [], "tensors": []}',
        b"[" * 100_000,
    ],
)
def test_unreadable_ledgers_are_refused(data: bytes) -> None:
    with pytest.raises(LedgerError):
        ledger.read_ledger(data)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("relative_error", None),
        ("relative_error", "0.1"),
        ("relative_error", True),
        ("relative_error", float("nan")),
        ("relative_error", -0.1),
        ("scale_maximum", float("inf")),
        ("scale_maximum", 10**400),
        ("name", [1]),
        ("name", "\ud800"),
        ("asked", None),
        ("layer", "0"),
        ("layer", 1.5),
        ("expert", -1),
        ("elements", None),
        ("clip_search", 1),
        ("source_digest", 7),
        ("surplus", 1),
    ],
)
def test_a_member_of_the_wrong_kind_is_named(member: str, value: object) -> None:
    parsed = json.loads(ledger.ledger_text("w4", [ENTRY, KEPT]))
    parsed["tensors"][1][member] = value
    with pytest.raises(LedgerError, match=rf"entry 1(: {member} is| does not have the members)"):
        ledger.read_ledger(json.dumps(parsed).encode())


def test_a_name_with_two_entries_is_refused() -> None:
    with pytest.raises(LedgerError, match=r"m.norm.weight has two entries"):
        ledger.read_ledger(ledger.ledger_text("w4", [KEPT, ENTRY, KEPT]))


_json = any_json(10**400, -1, "keep")


@given(st.data())
def test_a_mutated_ledger_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    parsed = json.loads(ledger.ledger_text("w4", [ENTRY, KEPT]))
    entry = data.draw(st.sampled_from(parsed["tensors"]))
    for holder in data.draw(st.lists(st.sampled_from([parsed, entry]), min_size=1, max_size=3)):
        holder[data.draw(st.sampled_from(sorted(holder)))] = data.draw(_json)
    try:
        entries = ledger.read_ledger(json.dumps(parsed).encode())
    except LedgerError:
        return
    for read in entries:
        assert isinstance(read.name, str)
        assert 0 <= read.relative_error < float("inf")


def test_a_true_ledger_passes() -> None:
    entries = iter([KEPT, ENTRY])
    ledger.check(entries, TABLE)
    assert list(entries) == []  # each was looked at


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([ENTRY], "1 planned tensors were not written, m.norm.weight first"),
        ([ENTRY, KEPT, ENTRY], "twice"),
        ([ENTRY, replace(KEPT, name="other"), KEPT], "the plan does not"),
        ([replace(ENTRY, applied="keep"), KEPT], "asks for int4-g32, but keep was applied"),
        ([replace(ENTRY, asked="int8-g32", applied="int8-g32"), KEPT], "asks for int4-g32, but int8-g32"),
        ([replace(ENTRY, relative_error=0.46), KEPT], "0.4600 .* above the bound 0.45"),
        ([replace(ENTRY, relative_error=float("nan")), KEPT], "not finite"),
        ([replace(ENTRY, scale_maximum=float("inf")), KEPT], "not finite"),
    ],
)
def test_every_difference_ends_the_run(entries: list[ledger.LedgerEntry], message: str) -> None:
    with pytest.raises(LedgerError, match=message):
        ledger.check(entries, TABLE)


def test_a_bound_of_nan_lets_nothing_pass() -> None:
    with pytest.raises(LedgerError, match="above the bound nan"):
        ledger.check_entry(ENTRY, replace(ASSIGNED, maximum_error=float("nan")))
