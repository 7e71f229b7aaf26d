"""The CPU's products against the plain ones in float64, and their promises: order, laziness, memory, threads."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from typing import Literal

import pytest
import torch

from quantkit import forward
from quantkit.grid import QuantizedTensor, dequantize, fit, fit_global_scale, snap
from quantkit.kernels import moe_cpu
from quantkit.kernels.activations import rounded_inputs
from quantkit.kernels.dispatch import dequant_matmul, moe_forward
from quantkit.kernels.weights import Mlp, Weight
from quantkit.scheme import GGML, parse_scheme, scheme_names
from quantkit.team import Team
from quantkit.workspace import Workspace
from tests.test_dequantize import random_weight

HIDDEN, WIDTH = 256, 512
FLOATING = ("bfloat16", "float16", "float32", "input-major bfloat16", "input-major float32")
NAMES = [name for name in scheme_names() if name != "keep"]


def weight_of(name: str, rows: int = WIDTH, columns: int = HIDDEN, seed: int = 0) -> Weight:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5
    if name in FLOATING:
        dtype: torch.dtype = getattr(torch, name.split()[-1])
        values = values.to(dtype)
        turned: torch.Tensor = values.t().contiguous().t()
        return turned if name.startswith("input-major") else values
    scheme = parse_scheme(name)
    assert scheme is not None
    if scheme.number == "ggml":
        quantized = random_weight(name, rows, columns, seed)
        if scheme.block_type.floating:
            return dataclasses.replace(quantized, codes=values.to(quantized.codes.dtype))
        small = torch.tensor(0.002).half() if scheme.scale_number != "e8m0" else torch.tensor(118, dtype=torch.uint8)
        minimum = None if quantized.minimum is None else torch.full_like(quantized.minimum, 0.001)
        return dataclasses.replace(quantized, scale=small.expand(quantized.scale.shape).contiguous(), minimum=minimum)
    divisor = fit_global_scale(float(values.abs().max())) if scheme.global_scale else None
    scale, zero_point = fit(values, scheme, divisor)
    quantized = snap(values, scheme, scale, zero_point, divisor)
    if scheme.static_activations:
        quantized = dataclasses.replace(quantized, input_scale=torch.tensor([0.011]).bfloat16())
    return quantized


def mlp_of(*names: str, seed: int = 0) -> Mlp:
    gate, up, down = names * 3 if len(names) == 1 else names
    return Mlp(
        weight_of(gate, WIDTH, HIDDEN, 3 * seed),
        weight_of(up, WIDTH, HIDDEN, 3 * seed + 1),
        weight_of(down, HIDDEN, WIDTH, 3 * seed + 2),
    )


def values(weight: Weight) -> torch.Tensor:
    return (dequantize(weight) if isinstance(weight, QuantizedTensor) else weight).double()


def product(x: torch.Tensor, weight: Weight, rounding: bool) -> torch.Tensor:
    x = rounded_inputs(x.float(), weight) if rounding else x
    return x.double() @ values(weight).t()


def oracle(x: torch.Tensor, routing: forward.Routing, experts: Sequence[Mlp], shared: Mlp, rounding: bool) -> torch.Tensor:
    """Token by token, in float64."""

    def mlp(row: torch.Tensor, weights: Mlp) -> torch.Tensor:
        gate, up = product(row, weights.gate, rounding), product(row, weights.up, rounding)
        return product(gate * torch.sigmoid(gate) * up, weights.down, rounding)

    rows = []
    for row, chosen, scores in zip(x, routing.experts, routing.scores, strict=True):
        total = mlp(row[None], shared)
        for expert, score in zip(chosen.tolist(), scores, strict=True):
            total = total + mlp((row * score)[None], experts[expert])
        rows.append(total)
    return torch.cat(rows) if rows else torch.zeros(0, x.shape[1], dtype=torch.float64)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    if wanted.numel():
        assert float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm()) + 1e-30


def inputs(tokens: int, columns: int = HIDDEN, seed: int = 7) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    with Team(2) as team:
        yield team


@pytest.mark.parametrize("name", [*FLOATING, *NAMES, *GGML])
def test_products(name: str, team: Team) -> None:
    weight = weight_of(name)
    for tokens in (0, 1, 3, 5, 70):
        x = inputs(tokens)
        for rounding in (True, False):
            found = dequant_matmul(x, weight, backend="cpu", round_activations=rounding, team=team)
            assert_close(found, product(x, weight, rounding))
            assert_close(found, dequant_matmul(x, weight, backend="reference", round_activations=rounding).double())


@pytest.mark.parametrize(
    "name", ["int4-channel", "fp8-channel-dynamic", "int8-channel-dynamic", "bfloat16", "input-major bfloat16"]
)
def test_sizes_that_fill_no_vector_or_tile(name: str) -> None:
    for rows, columns in ((8, 8), (264, 40), (72, 24), (300, 16)):
        for tokens in (3, 30):
            weight, x = weight_of(name, rows, columns), inputs(tokens, columns)
            assert_close(dequant_matmul(x, weight), product(x, weight, True))
            assert torch.equal(x, inputs(tokens, columns))


MIXED = {
    "int4": [mlp_of("int4-g128", seed=seed) for seed in range(5)],
    "rounded": [mlp_of("fp8-channel-dynamic", seed=seed) for seed in range(5)],
    "mixed": [
        mlp_of("int4-g32-asym", "int8-g128", "fp8-block-dynamic", seed=1),
        mlp_of("Q4_K", "Q6_K", "Q8_0", seed=2),
        mlp_of("fp8-tensor-static", "fp8-channel-dynamic", "int8-channel-dynamic", seed=3),
        mlp_of("input-major bfloat16", "float32", "IQ4_XS", seed=4),
        mlp_of("nvfp4", "mxfp4", "float16", seed=5),
    ],
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize(("tokens", "each"), [(0, 1), (1, 1), (40, 1), (40, 2), (3, 5)])
def test_mixtures_of_experts(kind: str, tokens: int, each: int, team: Team) -> None:
    experts, shared, router = MIXED[kind], mlp_of("int8-g128", seed=9), inputs(5, seed=3) / 4
    x = inputs(tokens)
    for rounding in (True, False):
        found, routing = moe_forward(
            x, router, experts, shared, experts_per_token=each, backend="cpu", round_activations=rounding, team=team
        )
        wanted, again = moe_forward(
            x, router, experts, shared, experts_per_token=each, backend="reference", round_activations=rounding
        )
        assert torch.equal(routing.experts, again.experts) and torch.equal(routing.logits, again.logits)
        # A rounding that two orders of summation take to different sides is a whole step of FP8.
        loose = 2e-3 if rounding and kind != "int4" else 1e-5
        assert_close(found, wanted.double(), loose)
        assert_close(found, oracle(x, routing, experts, shared, rounding), loose)
    assert torch.equal(x, inputs(tokens))


def test_all_tokens_on_one_expert(team: Team) -> None:
    router = torch.zeros(5, HIDDEN)
    router[3, 0] = 1
    x = inputs(30)
    x[:, 0] = 2
    found, routing = moe_forward(x, router, MIXED["int4"], mlp_of("float32"), team=team)
    assert (routing.experts == 3).all()
    assert_close(found, oracle(x, routing, MIXED["int4"], mlp_of("float32"), True))


class Lazy(Sequence[Mlp]):
    """Experts that are read when they are asked for; the one before must be gone by then."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.last: weakref.ref[Mlp] | None = None

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.asked.append(index)
        assert self.last is None or self.last() is None
        mlp = dataclasses.replace(MIXED["int4"][index])
        self.last = weakref.ref(mlp)
        return mlp


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_experts_are_asked_for_once_in_order(backend: Literal["cpu", "reference"], team: Team) -> None:
    router = inputs(5, seed=3)
    router[2] = 0
    x, experts = inputs(60), Lazy()
    routing = moe_forward(x, router, experts, mlp_of("float32"), backend=backend, team=team)[1]
    assert experts.asked == sorted(set(routing.experts.flatten().tolist()))
    experts.asked.clear()
    moe_forward(x[:0], router, experts, mlp_of("float32"), backend=backend, team=team)
    assert experts.asked == []


@pytest.mark.parametrize("tokens", [1, 3, 30, 200])
def test_the_number_of_threads_changes_no_bit(tokens: int) -> None:
    router, x, shared = inputs(5, seed=3), inputs(tokens), mlp_of("bfloat16", seed=9)
    results = []
    for threads in (1, 2, 3):
        with Team(threads) as team:
            results.append(moe_forward(x, router, MIXED["mixed"], shared, experts_per_token=2, team=team)[0])
    results.append(moe_forward(x, router, MIXED["mixed"], shared, experts_per_token=2)[0])
    assert all(torch.equal(results[0], result) for result in results)


def test_portions_are_the_whole(monkeypatch: pytest.MonkeyPatch, team: Team) -> None:
    router, x, shared = inputs(5, seed=3), inputs(90), mlp_of("fp8-channel-dynamic", seed=9)
    whole = moe_forward(x, router, MIXED["int4"], shared, team=team)[0]
    monkeypatch.setattr(moe_cpu, "PORTION_BYTES", 1)
    assert_close(moe_forward(x, router, MIXED["int4"], shared, team=team)[0], whole.double(), 2e-3)


def test_memory_is_that_of_a_portion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_cpu, "PORTION_BYTES", 2 << 20)
    workspace = Workspace()
    with Team(2) as team:
        moe_forward(inputs(3000), inputs(5), MIXED["int4"], mlp_of("float32"), team=team, workspace=workspace)
        assert workspace.nbytes < (2 << 20) + 2 * 4 * moe_cpu.TILE * WIDTH + 20_000
        held = workspace.nbytes
        moe_forward(inputs(3000), inputs(5), MIXED["int4"], mlp_of("float32"), team=team, workspace=workspace)
        assert workspace.nbytes == held


@pytest.mark.parametrize("name", ["bfloat16", "int4-g128", "float32"])
@pytest.mark.parametrize("tokens", [3, 30])
def test_inputs_of_another_size_are_an_error(name: str, tokens: int, team: Team) -> None:
    with pytest.raises(ValueError, match="inputs of 128 columns for a weight with 256 inputs"):
        dequant_matmul(inputs(tokens, 128), weight_of(name), team=team)
