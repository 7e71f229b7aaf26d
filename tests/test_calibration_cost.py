"""What a calibration is said to cost, against what torch counts and what the pass really allocates."""

from __future__ import annotations

from pathlib import Path

import pytest
from speaking_models import options, write_random_texts, write_speaking_model
from torch.utils.flop_counter import FlopCounterMode

from quantkit import calibrate, convert, estimate_cost, plan
from quantkit.calibration_cost import calibration_memory, calibration_operations, hidden_state_bytes
from quantkit.checkpoint import Checkpoint


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_operations_of_the_forward_pass_are_those_that_torch_counts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_speaking_model(tmp_path / "model", kind)
    texts = write_random_texts(tmp_path / "texts.jsonl", documents=8)
    for module in ("quantkit.calibration", "quantkit.calibration_cost"):
        monkeypatch.setattr(f"{module}.ENOUGH_ROWS", 0.0)  # nothing is lent: it depends on the routes
    counter = FlopCounterMode(display=False)
    with counter:
        result = calibrate(source, tmp_path / "statistics", calibration=options(texts), workers=1)
    products = sum(count for operation, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation))
    tokens = result.statistics.description["corpus"]["tokens"]
    with Checkpoint.open(source) as checkpoint:
        router = 2 * tokens * checkpoint.config.hidden_size * checkpoint.config.num_experts * sum(checkpoint.config.moe_layers)
        counted = calibration_operations(checkpoint.config, tokens, 0) + router
    assert products == pytest.approx(counted, rel=0.01)


def test_a_plan_says_what_calibration_adds(tmp_path: Path) -> None:
    source = write_speaking_model(tmp_path / "model")
    free, learned = (estimate_cost(plan(source, name), tmp_path, workers=2) for name in ("w4a16-rtn", "w4a16-gptq"))
    assert (free.calibration_tokens, free.hidden_state_bytes) == (0, 0)
    more = estimate_cost(plan(source, "w4a16-gptq"), tmp_path, workers=2, calibration_tokens=10 * learned.calibration_tokens)
    assert more.hidden_state_bytes == 10 * learned.hidden_state_bytes > 0
    assert learned.peak_memory_bytes <= more.peak_memory_bytes
    with Checkpoint.open(source) as checkpoint:
        config = checkpoint.config
    operations = [calibration_operations(config, tokens, 1) for tokens in (10**6, 2 * 10**6)]
    assert 1.5 < operations[1] / operations[0] < 2
    assert calibration_memory(config, 10_000, True) > calibration_memory(config, 10_000, False)


def test_hidden_states_take_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_speaking_model(tmp_path / "model")
    texts = write_random_texts(tmp_path / "texts.jsonl")
    sizes: list[int] = []

    def look(event: object) -> None:
        found = [path.stat().st_size for path in tmp_path.rglob("*.bin")]
        sizes.append(sum(found))

    convert(source, "w4a16-gptq", tmp_path / "out", calibration=options(texts), progress=look)
    rows = 6 * 40  # samples, and the length that they are padded to
    with Checkpoint.open(source) as checkpoint:
        said = hidden_state_bytes(checkpoint.config, rows, 1)
    assert max(sizes) == said
