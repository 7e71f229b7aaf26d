"""Results as rich tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import text

if TYPE_CHECKING:
    from quantkit import (
        ArtifactPlan,
        ArtifactResult,
        ConvertResult,
        CostEstimate,
        GpuFit,
        Inspection,
        Plan,
        RoleSummary,
        VerifyResult,
    )

    from .presets import PresetRow


def _table(title: str | None = None) -> Table:
    return Table(title=Text(title, style="bold") if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _columns(table: Table, *right: str, left: tuple[str, ...]) -> None:
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)


def _role_name(role: str) -> str:
    return role.replace("_", " ")


def _heading(console: Console, heading: str) -> None:
    console.print()
    console.print(Text(heading, style="bold"))


# --------------------------------------------------------------------------------------------------------------- convert


def print_conversion(console: Console, result: ConvertResult, roles: Mapping[str, list[RoleSummary]]) -> None:
    """Per artifact the table of sizes and errors, then the totals of the run.  ``roles`` by artifact name."""
    for artifact in result.artifacts:
        console.print()
        console.print(_artifact_table(artifact, roles[artifact.name]))
        resumed = f", {artifact.units_resumed} units resumed from an earlier run" if artifact.units_resumed else ""
        line = f"{artifact.directory}: {text.size(artifact.bytes)}, {artifact.tensors} weights{resumed}"
        console.print(Text(line), soft_wrap=True)
    count = len(result.artifacts)
    rate = ""
    if result.seconds > 0 and not any(artifact.units_resumed for artifact in result.artifacts):
        rate = f", {text.size(result.source_bytes / result.seconds)}/s of source"
    console.print()
    made = f"{count} artifact{'s' if count > 1 else ''} from {text.size(result.source_bytes)} of source"
    console.print(f"{made} in {text.duration(result.seconds)}{rate}", highlight=False)


def _artifact_table(artifact: ArtifactResult, rows: list[RoleSummary]) -> Table:
    table = _table(artifact.name)
    _columns(table, "size", "bits/weight", "mean error", "worst error", left=("role", "scheme"))
    kept = [row for row in rows if row.role not in artifact.relative_errors]
    for row in rows:
        if row.role in artifact.relative_errors:
            mean, worst = artifact.relative_errors[row.role]
            table.add_row(
                _role_name(row.role), ", ".join(row.schemes), text.size(row.bytes), _bits([row]), f"{mean:.4f}", f"{worst:.4f}"
            )
    if kept:
        size = text.size(sum(row.bytes for row in kept))
        table.add_row("everything else", "as in the source", size, _bits(kept), "exact", "exact", style="dim")
    table.add_row("total", "", text.size(sum(row.bytes for row in rows)), _bits(rows), "", "", style="bold")
    return table


def _bits(rows: Iterable[RoleSummary]) -> str:
    rows = list(rows)
    return f"{8 * sum(row.bytes for row in rows) / max(1, sum(row.parameters for row in rows)):.2f}"


def role_table(rows: Iterable[RoleSummary], title: str | None = None) -> Table:
    """Parameters, bits per weight and size by role and in total."""
    rows = list(rows)
    table = _table(title)
    _columns(table, "tensors", "parameters", "bits/weight", "size", left=("role", "scheme"))
    for row in rows:
        style = "dim" if row.schemes == ("keep",) else ""
        scheme = "as in the source" if row.schemes == ("keep",) else ", ".join(row.schemes)
        cells = (f"{row.tensors:,}", text.count(row.parameters), _bits([row]), text.size(row.bytes))
        table.add_row(_role_name(row.role), scheme, *cells, style=style)
    parameters, size = sum(row.parameters for row in rows), sum(row.bytes for row in rows)
    total = (f"{sum(row.tensors for row in rows):,}", text.count(parameters), _bits(rows), text.size(size))
    table.add_row("total", "", *total, style="bold")
    return table


# ------------------------------------------------------------------------------------------------------------------ plan


def print_plan(
    console: Console,
    plan: Plan,
    roles: Mapping[str, list[RoleSummary]],
    cost: CostEstimate,
    context: int,
    fits: Mapping[str, list[GpuFit]],
) -> None:
    """Everything a plan knows: roles, files, clients and GPUs of each artifact, then the cost of the run."""
    for artifact in plan.artifacts:
        console.print()
        console.print(role_table(roles[artifact.name], artifact.name))
        _print_files(console, artifact, complete=plan.provenance is not None)
        if artifact.notes:
            console.print(_client_table(artifact))
        console.print(_gpu_table(fits[artifact.name], context))
    _heading(console, "The run")
    _print_cost(console, cost)


def _print_files(console: Console, artifact: ArtifactPlan, complete: bool) -> None:
    sizes = artifact.file_sizes
    _heading(console, f"Files: {len(sizes)}, {sum(sizes.values()):,} bytes")
    width = max(map(len, sizes))
    console.print(Columns([Text(f"{name:<{width}} {size:>15,}") for name, size in sizes.items()], padding=(0, 4)))
    if not complete:
        note = "Planned without the source's files: manifest.json, tokenizer and licence files come on top."
        console.print(Text(note, style="dim"))


def _client_table(artifact: ArtifactPlan) -> Table:
    table = _table()
    _columns(table, left=("client", "loads it", "what to mind"))
    for note in artifact.notes:
        table.add_row(note.client, Text("yes", style="green") if note.loads else Text("no", style="bold red"), note.why)
    return table


def _gpu_table(fits: list[GpuFit], context: int) -> Table:
    title = f"GPUs: tokens of KV cache beside the weights, where there is room for {text.count(context)} or more"
    table = _table(title)
    counts = sorted({fit.count for fit in fits})
    _columns(table, *(f"{count} GPU{'s' if count > 1 else ''}" for count in counts), left=("memory each",))
    by_place = {(fit.gigabytes, fit.count): fit for fit in fits}
    for gigabytes in sorted({fit.gigabytes for fit in fits}):
        cells = []
        for count in counts:
            fit = by_place[gigabytes, count]
            cells.append(Text(text.count(fit.context_tokens), style="green") if fit.fits else Text("-", style="dim"))
        table.add_row(f"{gigabytes} GB", *cells)
    return table


def _print_cost(console: Console, cost: CostEstimate) -> None:
    table = Table.grid(padding=(0, 2))
    gpu = f"{text.size(cost.peak_gpu_memory_bytes)} of GPU memory" if cost.peak_gpu_memory_bytes else "no GPU is used"
    table.add_row("reads", text.size(cost.source_bytes))
    table.add_row("writes", f"{text.size(cost.disk_bytes)} of disk are needed")
    table.add_row("memory", f"at most {text.size(cost.peak_memory_bytes)} for {cost.workers} workers; {gpu}")
    if cost.seconds is not None:
        measured = ", ".join(f"{name} {_rate(name, rate)}" for name, rate in cost.rates.items())
        table.add_row("time", f"about {text.duration(cost.seconds)} on this machine")
        table.add_row("", Text(f"measured: {measured}", style="dim"))
    else:
        table.add_row("time", "unknown: the output cannot be written to, so nothing was measured")
    console.print(table)


def _rate(name: str, rate: float) -> str:
    return f"{text.size(rate)}/s" if name in ("read", "write", "hash") else f"{text.count(rate)} weights/s per core"


# -------------------------------------------------------------------------------------------------------- inspect, verify


def print_inspection(console: Console, inspection: Inspection) -> None:
    """What stands at a path: kind, model, roles, files, notes."""
    console.print(Text(str(inspection.path), style="bold"), soft_wrap=True)
    kind = "quantized" if inspection.kind == "artifact" else "not quantized"
    console.print(f"{inspection.model}", highlight=False, soft_wrap=True)
    sizes = f"{text.count(inspection.parameters)} parameters, {text.size(inspection.bytes)}"
    console.print(f"{sizes} in {len(inspection.files)} files, {kind}, format {inspection.format}", highlight=False, soft_wrap=True)
    console.print()
    console.print(role_table(inspection.roles))
    width = max((len(name) for name, _ in inspection.files), default=0)
    console.print(Columns([Text(f"{name:<{width}} {size:>15,}") for name, size in inspection.files], padding=(0, 4)))
    for note in inspection.notes:
        console.print(Text(f"Note: {note}", style="yellow"), soft_wrap=True)


def print_verification(console: Console, result: VerifyResult) -> None:
    """Each check with what it found."""
    table = _table(str(result.directory))
    _columns(table, left=("check", "", "found"))
    for check in result.checks:
        table.add_row(check.name, Text("ok", style="green") if check.ok else Text("failed", style="bold red"), check.detail)
    console.print(table)
    console.print(f"Verified: {result.tensors} tensors, {text.size(result.bytes)}", highlight=False)


def print_presets(console: Console, rows: Iterable[PresetRow]) -> None:
    """Name, scheme, bits and one line for each preset."""
    table = _table()
    table.add_column("preset", no_wrap=True)
    table.add_column("scheme", no_wrap=True)
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("what it is")
    for row in rows:
        table.add_row(row.name, row.scheme, f"{row.bits_per_weight:.3f}", row.what)
    console.print(table)
    console.print("Quantized: routed experts, shared expert, dense MLP. All else is as in the source.", highlight=False)
