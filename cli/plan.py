"""``quantkit plan``, and the plan that ``convert --dry-run`` shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import CALIBRATION_TOKENS, DEFAULT_CONTEXT, AsJson, ConversionWishes, Targets, expand, shard_bytes, spread
from .run import print_json, reporting

if TYPE_CHECKING:
    from quantkit import Plan, RoleSummary


@spread
def plan_command(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            callback=expand,
            help="Checkpoint directory, a config.json or its directory, or a hub repository id.",
        ),
    ],
    to: Targets,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Where the run would write; its disk is measured.")
    ] = Path("."),
    wishes: ConversionWishes,
    context: Annotated[int, typer.Option(min=1, help="Tokens of KV cache that the GPUs should have room for.")] = DEFAULT_CONTEXT,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, help="Samples times their length, for recipes that need calibration.")
    ] = CALIBRATION_TOKENS,
    as_json: AsJson = False,
) -> None:
    """Say what a conversion would make and cost, from the config alone.

    Sizes by role and file, bits per weight, which clients load the result, which GPUs hold it with room for the KV cache,
    and the memory, disk and time that the run takes on this machine.
    No weights are needed, and none are downloaded.
    """
    with reporting(as_json):
        from quantkit import plan

        max_shard_bytes = shard_bytes(wishes.max_shard_size)
        planned = plan(source, wishes.targets(to), revision=wishes.revision, max_shard_bytes=max_shard_bytes)
        show_plan(planned, source, output, wishes.workers, context, as_json, calibration_tokens)


def show_plan(
    plan: Plan, source: str, output: Path, workers: int | None, context: int, as_json: bool, calibration_tokens: int
) -> None:
    """Print a plan with what the run costs on this machine."""
    from quantkit import estimate_cost, gpu_fits, summarize_roles

    from .data import plan_data
    from .tables import print_plan

    sample = next(iter(sorted(Path(source).glob("*.safetensors"))), None) if Path(source).is_dir() else None
    cost = estimate_cost(plan, output, workers=workers, sample=sample, calibration_tokens=calibration_tokens)
    roles: dict[str, list[RoleSummary]] = {artifact.name: summarize_roles(plan, artifact) for artifact in plan.artifacts}
    fits = {artifact.name: gpu_fits(artifact.tensor_bytes, plan.config, context) for artifact in plan.artifacts}
    if as_json:
        print_json(plan_data(plan, roles, cost, context, fits))
    else:
        from rich.console import Console

        print_plan(Console(), plan, roles, cost, context, fits)
