"""The two entries of the kernels, and which implementation serves them.

    reference   torch, float32, the oracle; any device
    cpu         one matrix at a time dequantized into a reused buffer, float32 products
    triton      products straight from packed weights on a CUDA device

``experts`` may be lazy: an expert is asked for only when tokens reach it, once, and dropped before the next one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, cast

import torch

from quantkit import forward
from quantkit.errors import RecipeError
from quantkit.kernels import moe_cpu, reference
from quantkit.kernels.activations import rounded_inputs
from quantkit.kernels.device_mixture import Mixture
from quantkit.kernels.device_weights import DeviceWeight
from quantkit.kernels.moe_tiles import KnownRows
from quantkit.kernels.weights import Mlp, Weight
from quantkit.team import Team
from quantkit.workspace import Workspace

Backend = Literal["reference", "cpu", "triton"]


def dequant_matmul(
    x: torch.Tensor,
    weight: Weight | DeviceWeight,
    *,
    backend: Backend | None = None,
    round_activations: bool = True,
    team: Team | None = None,
    workspace: Workspace | None = None,
    known_rows: KnownRows | None = None,
) -> torch.Tensor:
    """``x [tokens, in]`` times the transposed weight: ``[tokens, out]``.

    x: float32, for triton BF16.  backend: None goes by the device of ``x``.  round_activations: round ``x`` as clients do where the
    weight's scheme asks for it.  team, workspace: of the CPU; without them one thread and new memory.  known_rows: of a device, for
    who multiplies again and again.
    """
    backend = backend or backend_of(x)
    if backend == "triton":
        result = _triton().dequant_matmul(x, weight, round_activations=round_activations, known_rows=known_rows)
        return cast("torch.Tensor", result)
    assert not isinstance(weight, DeviceWeight), "weights on a device are for triton"
    if backend == "cpu":
        return moe_cpu.dequant_matmul(x, weight, round_activations=round_activations, team=team, workspace=workspace)
    return reference.dequant_matmul(x, weight, rounded_inputs if round_activations else _unrounded)


def moe_forward(
    x: torch.Tensor,
    router: torch.Tensor,
    experts: Sequence[Mlp] | Mixture,
    shared_expert: Mlp | None,
    *,
    experts_per_token: int = 1,
    backend: Backend | None = None,
    round_activations: bool = True,
    team: Team | None = None,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, forward.Routing]:
    """The mixture of experts of one layer for ``x [tokens, hidden]``, and where each token went.

    router: ``[experts, hidden]``.  The sigmoid of the router's logit multiplies what goes into a routed expert; the shared expert
    takes ``x`` itself, and the results are added.  experts: for triton also a mixture that was prepared on the device, the shared
    expert in it; then ``shared_expert`` is None.  Other arguments as of :func:`dequant_matmul`.
    """
    backend = backend or backend_of(x)
    if backend == "triton":
        result, routing = _triton().moe_forward(
            x, router, experts, shared_expert, experts_per_token=experts_per_token, round_activations=round_activations
        )
        return result, routing
    assert not isinstance(experts, Mixture) and shared_expert is not None, "experts on a device are for triton"
    routing = forward.route(x.to(torch.float32), router.to(torch.float32), experts_per_token)
    if backend == "cpu":
        result = moe_cpu.moe(
            x, routing, experts, shared_expert, round_activations=round_activations, team=team, workspace=workspace
        )
        return result, routing
    return reference.moe(x, routing, experts, shared_expert, rounded_inputs if round_activations else _unrounded), routing


def backend_of(x: torch.Tensor) -> Backend:
    """The implementation for inputs on that device."""
    return "triton" if x.is_cuda else "cpu"


def check_device(device: torch.device) -> None:
    """Raises RecipeError where products cannot be computed on a device: without Triton, or on a GPU that lacks what they need."""
    _triton().check_device(device)


def _triton() -> ModuleType:
    """The module with the Triton kernels.  Raises RecipeError without Triton."""
    try:
        from quantkit.kernels import moe_triton
    except ImportError as error:
        raise RecipeError(f"products on a GPU need Triton ({error}); install it with: pip install 'quantkit[cuda]'") from error
    return moe_triton


def _unrounded(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return x
