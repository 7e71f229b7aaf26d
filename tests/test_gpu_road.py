"""The road through a GPU, on simulated devices: products, and mixtures of experts.

Triton decides at its import whether it interprets, so all this runs in a process of its own: this file, run as a program.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from triton_programs import interpreted_by, main, needs_triton

from quantkit.errors import RecipeError
from quantkit.grid import QuantizedTensor
from quantkit.kernels.weights import Mlp, Weight

KINDS = {  # schemes, and hidden and width of a mixture
    "int4-g128": (256, 128),
    "int4-g32-asym": (160, 96),
    "int3-g64-asym": (128, 64),
    "int8-channel": (144, 72),
    "int8-channel-dynamic": (144, 72),
    "fp8-channel-dynamic": (144, 72),
    "fp8-block-dynamic": (256, 128),
    "fp8-tensor-static": (144, 72),
    "BF16": (144, 72),
    "Q8_0": (160, 96),
    "Q4_K": (256, 256),
    "Q6_K": (256, 256),
    "Q5_K": (256, 256),  # has no kernel: it is brought to the device as BF16
}
ALSO_LAZY = ("int4-g32-asym", "fp8-channel-dynamic")  # experts also brought to the device when they are asked for
EXACT, ROUNDED = 0.01, 0.06  # of the largest result: BF16 has 8 bits, and an input that rounds to the other side moves by a step
TOKENS, EXPERTS = 5, 2


def matrix(kind: str, rows: int, columns: int) -> Weight:
    import test_moe_triton

    weight: Weight = test_moe_triton.matrix(None if kind == "BF16" else kind, rows, columns)
    if kind == "fp8-tensor-static":
        assert isinstance(weight, QuantizedTensor)
        weight = replace(weight, input_scale=torch.tensor([0.01]))
    return weight


def deviation(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Beside the largest result."""
    return float((found.cpu().to(torch.float32) - wanted).abs().max() / wanted.abs().max())


# ------------------------------------------------------------------------------------------------- in the other process


def products() -> dict[str, Any]:
    """By kind: deviation from the CPU; whether a weight that is on the device gives the same and waits for nothing."""
    from simulated_kernels import simulate_with_kernels

    from quantkit.kernels import device_weights, dispatch

    found = {}
    for kind, (columns, rows) in KINDS.items():
        torch.manual_seed(1)
        weight, x = matrix(kind, rows, columns), torch.randn(TOKENS, columns).to(torch.bfloat16)
        wanted = dispatch.dequant_matmul(x.to(torch.float32), weight, backend="reference")
        with simulate_with_kernels(2) as simulation:
            result = dispatch.dequant_matmul(x.to("cuda"), weight)
            there = x.to("cuda:1")
            ready = device_weights.build(weight, there.device)
            simulation.waits.clear()
            again = dispatch.dequant_matmul(there, ready)
            waits = list(simulation.waits)
            found[kind] = {
                "deviation": deviation(result, wanted),
                "waits": waits,
                "devices": [str(result.device), str(again.device)],
                "same": torch.equal(result.cpu(), again.cpu()),
            }
    return found


def mixtures() -> dict[str, Any]:
    """By kind and whether inputs are rounded: the same of whole mixtures, and whether tokens go where they go on the CPU."""
    from simulated_kernels import simulate_with_kernels

    from quantkit.kernels import device_mixture, dispatch

    found = {}
    for kind, (hidden, width) in KINDS.items():
        torch.manual_seed(2)
        sizes = ((width, hidden), (width, hidden), (hidden, width))
        *experts, shared = (Mlp(*(matrix(kind, *size) for size in sizes)) for _ in range(EXPERTS + 1))
        x, router = torch.randn(TOKENS, hidden).to(torch.bfloat16), torch.randn(EXPERTS, hidden)
        for rounds in (True, False) if kind.endswith(("dynamic", "static")) else (True,):
            settings: dict[str, Any] = {"round_activations": rounds}
            wanted, routing = dispatch.moe_forward(x.to(torch.float32), router, experts, shared, backend="reference", **settings)
            with simulate_with_kernels(2) as simulation:
                given = x.to("cuda:1")
                ready, there = device_mixture.prepare(experts, shared, given.device), router.to(given.device)
                simulation.waits.clear()
                result, routed = dispatch.moe_forward(given, there, ready, None, **settings)
                waits, again = list(simulation.waits), result
                if kind in ALSO_LAZY:
                    again, _ = dispatch.moe_forward(given, router, experts, shared, **settings)
                found[f"{kind} {rounds}"] = {
                    "deviation": deviation(result, wanted),
                    "waits": waits,
                    "devices": [str(result.device), str(routed.experts.device)],
                    "same": torch.equal(result.cpu(), again.cpu()),
                    "routed": torch.equal(routed.experts.cpu(), routing.experts),
                }
    return found


def same_bits() -> dict[str, Any]:
    """Whether a mixture of which all experts are on the device, or those with tokens, gives the same; into how many parts sums are
    cut in the one and in the other."""
    from simulated_kernels import simulate_with_kernels

    from quantkit.kernels import device_mixture, dispatch, moe_triton_rows

    parts: list[int] = []
    combine = moe_triton_rows.combine

    def combined(given: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
        parts.append(len(given))
        combine(given, places, out)

    torch.manual_seed(3)
    sizes = ((4096, 32), (4096, 32), (32, 4096))
    *experts, shared = (Mlp(*(matrix("BF16", *size) for size in sizes)) for _ in range(17))
    x, router = torch.rand(12, 32).to(torch.bfloat16), torch.zeros(16, 32)
    router[3], router[5, :16] = 1.0, 2.1  # these two have all tokens
    with simulate_with_kernels(), mock.patch.object(moe_triton_rows, "combine", combined):
        given, there = x.to("cuda"), router.to("cuda")
        ready = device_mixture.prepare(experts, shared, given.device)
        result, routing = dispatch.moe_forward(given, there, ready, None)
        again, _ = dispatch.moe_forward(given, there, experts, shared)
        assert routing.experts.cpu().unique().tolist() == [3, 5]
        return {"same": torch.equal(result.cpu(), again.cpu()), "parts": parts}


def refused() -> dict[str, str]:
    """What programs with a tensor on the wrong device raise."""
    from simulated_kernels import simulate_with_kernels

    from quantkit.kernels import device_weights, dispatch, moe_triton_rows

    def raised(work: Any) -> str:
        try:
            work()
        except (RuntimeError, RecipeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with simulate_with_kernels(2):
        parts, out = torch.zeros(1, 4, 32, device="cuda"), torch.zeros(4, 32, device="cuda")
        places = torch.arange(4)[None]
        elsewhere = device_weights.build(torch.zeros(16, 128, dtype=torch.bfloat16), torch.device("cuda:1"))
        x = torch.zeros(2, 128, dtype=torch.bfloat16, device="cuda")

        def on_the_other() -> None:
            moe_triton_rows.combine(parts.to("cuda:1"), places.to("cuda:1"), out.to("cuda:1"))

        return {
            "of the CPU": raised(lambda: moe_triton_rows.combine(parts, places, out)),
            "not current": raised(on_the_other),
            "weights elsewhere": raised(lambda: dispatch.dequant_matmul(x, elsewhere)),
            "right": raised(lambda: moe_triton_rows.combine(parts, places.to("cuda"), out)),
        }


def interpret() -> dict[str, Any]:
    """Everything, in one process."""
    import triton_arithmetic

    torch.set_num_threads(1)
    triton_arithmetic.make_exact()
    return {"products": products(), "mixtures": mixtures(), "refused": refused(), "same": same_bits()}


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpreted_by(__file__)  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_products_on_a_device(found: dict[str, Any], kind: str) -> None:
    result = found["products"][kind]
    assert result["deviation"] < (ROUNDED if kind.endswith(("dynamic", "static")) else EXACT)
    assert result["same"] and result["devices"] == ["cuda:0", "cuda:1"] and result["waits"] == []


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_on_a_device(found: dict[str, Any], kind: str) -> None:
    results = {name: result for name, result in found["mixtures"].items() if name.split()[0] == kind}
    assert results
    for name, result in results.items():
        rounds = kind.endswith(("dynamic", "static")) and name.endswith("True")
        assert result["deviation"] < (ROUNDED if rounds else EXACT), name
        assert result["same"] and result["routed"] and result["devices"] == ["cuda:1"] * 2, name
        assert result["waits"] == [], "once experts are prepared nothing waits for the device"


@needs_triton
def test_what_stays_on_the_device_never_shows_in_results(found: dict[str, Any]) -> None:
    one, other = found["same"]["parts"]
    assert found["same"]["same"] and one == other > 1, "sums of as many parts: BF16 hides most of what else would differ"


@needs_triton
def test_kernels_refuse_tensors_that_are_elsewhere(found: dict[str, Any]) -> None:
    errors = found["refused"]
    assert "DeviceError: kernel combine_rows: pointer argument places cannot be accessed" in errors["of the CPU"]
    assert "is on cuda:1, but the current device is cuda:0" in errors["not current"]
    assert "RecipeError: inputs are on cuda:0 and prepared weights on cuda:1" in errors["weights elsewhere"]
    assert errors["right"] == ""


if __name__ == "__main__":
    main({"interpret": interpret})
