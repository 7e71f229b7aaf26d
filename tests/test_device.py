"""Calibration with a device: the same code with the CPU as the device, since tests have no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from speaking_models import options, write_random_texts, write_speaking_model

from quantkit import CalibrationError, CalibrationOptions, convert, unit_work, verify
from quantkit.methods import gptq
from quantkit.team import Team, add_gram, add_product, multiply

DEVICE = torch.device("cpu")


def test_products_on_a_device_are_those_of_the_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(70, 40, generator=generator), torch.randn(70, 30, generator=generator)
    found = []
    for device in (None, DEVICE):
        with Team(2, device) as team:
            product, gram, cross = torch.empty(40, 30), torch.ones(40, 40), torch.ones(40, 30)
            multiply(team, left.t(), right, product)
            add_gram(team, left, gram)
            add_product(team, left, right, cross)
            found.append((product, gram.triu(), cross))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_conversion_with_a_device_gives_gptq_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the GPU's own kernels, which tests/test_gptq_gpu.py runs: here the CPU's take their place."""
    source = write_speaking_model(tmp_path / "model")
    given = options(write_random_texts(tmp_path / "texts.jsonl"))
    [plain] = convert(source, "w4a16-gptq", tmp_path / "cpu", calibration=given).artifacts
    calls: list[tuple[int, torch.device]] = []

    def quantize_batch(
        weights: Sequence[Sequence[torch.Tensor]], scheme: Any, evidence: Sequence[Any], device: torch.device, **others: Any
    ) -> Iterator[Any]:
        calls.append((len(weights), device))
        assert others["team"].device == DEVICE
        yield gptq.quantize(weights[0], scheme, evidence=evidence[0], **others)

    monkeypatch.setattr(unit_work.gptq_gpu, "quantize_batch", quantize_batch)
    monkeypatch.setattr(CalibrationOptions, "accelerator", lambda self: DEVICE)
    [there] = convert(source, "w4a16-gptq", tmp_path / "device", calibration=given).artifacts
    assert set(calls) == {(1, DEVICE)} and len(calls) == 1 + 2 * (
        2 + 2 * 4
    )  # a trial; layers of shared and routed experts, two units each
    assert all(check.ok for check in verify(there.directory, source, sample=100).checks)
    for role, (mean, _) in plain.relative_errors.items():
        assert there.relative_errors[role][0] == pytest.approx(mean, rel=1e-2)


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "meta", ""])
def test_a_device_that_is_not_there_is_named(device: str, tmp_path: Path) -> None:
    source = write_speaking_model(tmp_path / "model")
    with pytest.raises(CalibrationError, match="expected cpu"):
        convert(source, "w4a16-gptq", tmp_path / "out", calibration=CalibrationOptions(device=device))
    assert not (tmp_path / "out").exists()
