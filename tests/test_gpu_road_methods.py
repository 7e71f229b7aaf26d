"""The road through a GPU, on simulated devices: GPTQ, searches for llama.cpp's types, and a calibration.

Triton decides at its import whether it interprets, so all this runs in a process of its own: this file, run as a program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_device import simulate
from triton_programs import interpreted_by, main, needs_triton

from quantkit import convert, unit_work
from quantkit.calibrate import calibrate
from quantkit.errors import CalibrationError
from quantkit.methods import blocks_gpu, gptq, gptq_gpu
from quantkit.scheme import parse_scheme
from quantkit.team import Team
from quantkit.workspace import Workspace

CPU = torch.device("cpu")
GPTQ = {  # of test_gptq_gpu, and how many inputs
    "int4-g32-asym": 64,
    "int4-channel, little missing": 40,
}
SEARCHED = ("Q6_K", "Q4_K")


# ------------------------------------------------------------------------------------------------- in the other process


def quantized() -> dict[str, Any]:
    """By case: whether GPTQ and searches on a device give the bits of the same code with the CPU as the device."""
    import test_gptq_gpu
    from simulated_kernels import simulate_with_kernels

    test_gptq_gpu.fuse_in_old_interpreters()
    found: dict[str, Any] = {}
    for name, inputs in GPTQ.items():
        scheme_name, _, _, missing = test_gptq_gpu.CASES[name]
        scheme = parse_scheme(scheme_name)
        assert scheme is not None
        weights, evidence = test_gptq_gpu.sample(scheme_name, inputs, (24,), missing, 2)

        def batch(device: torch.device, weights=weights, scheme=scheme, evidence=evidence) -> list[Any]:  # type: ignore[no-untyped-def]
            settings: dict[str, Any] = {"clip_search": True, "workspace": Workspace(), "block": 16}
            return [result for [result] in gptq_gpu.quantize_batch(weights, scheme, evidence, device, **settings)]

        expected = batch(CPU)
        with simulate_with_kernels(2, memory=1 << 24) as simulation:
            results = batch(torch.device("cuda:1"))
            found[name] = {
                "same": [same(one, other) for one, other in zip(results, expected, strict=True)],
                "left": simulation.used,
                "launched": sorted(set(simulation.launches)),
            }
    for name in SEARCHED:
        scheme = parse_scheme(name)
        assert scheme is not None
        torch.manual_seed(3)
        weight, importance = torch.randn(5, 256).to(torch.bfloat16), np.linspace(0.5, 2.0, 256, dtype=np.float32)
        wanted = blocks_gpu.quantize(weight, scheme, importance, CPU)
        with simulate_with_kernels(2) as simulation:
            got = blocks_gpu.quantize(weight, scheme, importance, torch.device("cuda:1"))
            found[name] = {"same": [same(got, wanted)], "left": simulation.used, "launched": sorted(set(simulation.launches))}
    return found


def same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Whether two results have the same statistics, and the same tensors on the CPU."""
    fields = ("codes", "scale", "zero_point", "group_scale", "minimum", "group_minimum")
    pairs = [(getattr(one[0], field), getattr(other[0], field)) for field in fields]
    equal = all(mine is theirs if theirs is None else mine.device == CPU and torch.equal(mine, theirs) for mine, theirs in pairs)
    return equal and one[1] == other[1]


def two_devices() -> dict[str, Any]:
    """Four experts on two devices by threads of their own."""
    import test_gptq_gpu
    from simulated_kernels import simulate_with_kernels

    scheme = parse_scheme("int4-channel")
    assert scheme is not None
    weights, evidence = test_gptq_gpu.sample("devices", 16, (24,), 0.0, 4)
    found: dict[int, torch.Tensor] = {}
    settings: dict[str, Any] = {"clip_search": False, "block": 8}

    def batch(device: torch.device, items: Sequence[int]) -> Iterator[torch.Tensor]:
        chosen = [weights[item] for item in items], scheme, [evidence[item] for item in items], device
        for [(rounded, _)] in gptq_gpu.quantize_batch(*chosen, workspace=Workspace(), **settings):
            yield rounded.codes

    def work(device: torch.device, items: Sequence[int]) -> None:
        found.update(zip(items, batch(device, items), strict=True))

    together = list(batch(CPU, range(4)))
    with simulate_with_kernels(2) as simulation:
        gptq_gpu.run_on_devices([torch.device("cuda:0"), torch.device("cuda:1")], [1.0] * 4, work)
    return {"same": [torch.equal(found[item], together[item]) for item in range(4)], "most": simulation.most}


def interpret() -> dict[str, Any]:
    """Everything, in one process."""
    import triton_arithmetic

    torch.set_num_threads(1)
    triton_arithmetic.make_exact()
    return {"quantized": quantized(), "two_devices": two_devices()}


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpreted_by(__file__)  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.parametrize("name", [*GPTQ, *SEARCHED])
def test_quantizing_on_a_device_gives_the_same_bits(found: dict[str, Any], name: str) -> None:
    result = found["quantized"][name]
    assert all(result["same"]) and result["left"] == [0, 0] and result["launched"]


@needs_triton
def test_two_devices_share_experts(found: dict[str, Any]) -> None:
    assert found["two_devices"]["same"] == [True] * 4 and min(found["two_devices"]["most"]) > 0


def test_a_calibrated_conversion_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but GPTQ's kernels, whose place the CPU's take; they are in ``quantized``."""
    from speaking_models import options, write_random_texts, write_speaking_model  # which the other process does not find

    devices = set()

    def quantize_batch(weights: Any, scheme: Any, evidence: Any, device: torch.device, **others: Any) -> Iterator[Any]:
        devices.add(device)
        with Team(1) as team:
            yield gptq.quantize(weights[0], scheme, evidence=evidence[0], **{**others, "team": team})

    monkeypatch.setattr(unit_work.gptq_gpu, "quantize_batch", quantize_batch)
    source, texts = write_speaking_model(tmp_path / "model"), write_random_texts(tmp_path / "texts.jsonl")
    settings = options(texts, sequential=True)
    [plain] = convert(source, "w4a16-gptq", tmp_path / "plain", calibration=settings, workers=2).artifacts
    with simulate() as simulation:
        settings = replace(settings, device="cuda")
        [there] = convert(source, "w4a16-gptq", tmp_path / "there", calibration=settings, workers=2).artifacts
    assert {device.type for device in devices} == {"cuda"} and simulation.used == [0]
    assert any(name.startswith("aten.mm") for name, _ in simulation.operators)
    for role, (error, _) in plain.relative_errors.items():
        assert there.relative_errors[role][0] == pytest.approx(error, rel=1e-2)


def test_a_calibration_on_a_small_device_says_so(tmp_path: Path) -> None:
    from speaking_models import options, write_random_texts, write_speaking_model

    source, texts = write_speaking_model(tmp_path / "model"), write_random_texts(tmp_path / "texts.jsonl")
    with simulate(memory=1 << 16), pytest.raises(CalibrationError, match="cuda:0 has too little memory"):
        calibrate(source, tmp_path / "out", calibration=options(texts, device="cuda"), workers=2)


if __name__ == "__main__":
    main({"interpret": interpret})
