"""Results as rich tables that fit 80 columns.

What goes to a file, a pipe or a log has no edge: there no line is broken and nothing is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
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
    from quantkit.statistics import Statistics

    from .presets import GgufRow, PresetRow


UNBOUNDED = 10_000  # columns of output that is no terminal
SHORTEST_NAME = 8  # columns that a name keeps, however many lines it then takes


def without_edge(console: Console) -> Console:
    """A console as it is, or without an edge where it is no terminal."""
    return console if console.is_terminal else Console(file=console.file, width=UNBOUNDED)


def print_table(console: Console, table: Table) -> None:
    """Print a table with every figure in full: names break their lines, or where that is not enough rows go on beyond the edge."""
    wide = console.options.update(max_width=UNBOUNDED)
    natural = console.measure(table, options=wide).maximum
    for column in table.columns:
        longest = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
        column.min_width = column.width = longest if column.no_wrap else min(longest, SHORTEST_NAME)
    narrowest = console.measure(table, options=wide).minimum
    for column in table.columns:
        column.width = None
    if narrowest > console.width:
        table.width = natural  # left to itself it would leave out columns
    console.print(table, crop=False)


def print_note(console: Console, note: str, style: str = "") -> None:
    """Print sentences: in lines that end between words on a terminal, else whole."""
    console.print(Text(note, style=style), soft_wrap=not console.is_terminal)


def make_table(left: Sequence[str], right: Sequence[str] = (), wrap: str | Sequence[str] = ()) -> Table:
    """A table with text columns on the left and number columns on the right; only the columns ``wrap`` may break their lines."""
    breaking = (wrap,) if isinstance(wrap, str) else wrap
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in left:
        table.add_column(name, no_wrap=name not in breaking, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _role_name(role: str) -> str:
    return role.replace("_", " ")


def many(count: int, noun: str) -> str:
    """``1 file``, ``2,304 files``."""
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}s"


def print_heading(console: Console, heading: str) -> None:
    """A bold line after an empty one."""
    console.print()
    console.print(Text(heading, style="bold"))


# --------------------------------------------------------------------------------------------------------------- convert


def print_conversion(console: Console, result: ConvertResult) -> None:
    """Per artifact the table of sizes and errors and the clients that refuse it, then the totals of the run."""
    for artifact in result.artifacts:
        print_heading(console, artifact.name)
        print_table(console, _artifact_table(artifact))
        resumed = f", {artifact.units_resumed} units resumed from an earlier run" if artifact.units_resumed else ""
        line = f"{artifact.directory}: {text.size(artifact.bytes)}, {artifact.tensors} weights{resumed}"
        console.print(Text(line), soft_wrap=True)
        for note in artifact.notes:
            if not note.loads:
                print_note(console, f"not loaded by {note.client}: {note.why}", "yellow")
    count = len(result.artifacts)
    rate = ""
    if result.seconds > 0 and not any(artifact.units_resumed for artifact in result.artifacts):
        rate = f", {text.size(result.source_bytes / result.seconds)}/s of source"
    console.print()
    made = f"{many(count, 'artifact')} from {text.size(result.source_bytes)} of source"
    console.print(f"{made} in {text.duration(result.seconds)}{rate}", highlight=False)


def _artifact_table(artifact: ArtifactResult) -> Table:
    rows = artifact.roles
    table = make_table(("role", "scheme"), ("size", "bits/weight", "mean error", "worst"))
    kept = [row for row in rows if row.role not in artifact.relative_errors]
    for row in rows:
        if row.role in artifact.relative_errors:
            mean, worst = artifact.relative_errors[row.role]
            table.add_row(
                _role_name(row.role), ", ".join(row.schemes), text.size(row.bytes), _bits([row]), f"{mean:.4f}", f"{worst:.4f}"
            )
    if kept:
        size = text.size(sum(row.bytes for row in kept))
        table.add_row("all else", "keep", size, _bits(kept), "exact", "exact", style="dim")
    table.add_row("total", "", text.size(sum(row.bytes for row in rows)), _bits(rows), "", "", style="bold")
    return table


def _bits(rows: Iterable[RoleSummary]) -> str:
    rows = list(rows)
    return f"{8 * sum(row.bytes for row in rows) / max(1, sum(row.parameters for row in rows)):.2f}"


def role_table(rows: Iterable[RoleSummary]) -> Table:
    """Tensors, parameters, bits per weight and size by role and in total."""
    rows = list(rows)
    table = make_table(("role", "scheme"), ("tensors", "parameters", "bits/weight", "size"), wrap="scheme")
    for row in rows:
        cells = (f"{row.tensors:,}", text.count(row.parameters), _bits([row]), text.size(row.bytes))
        table.add_row(_role_name(row.role), ", ".join(row.schemes), *cells, style="dim" if row.schemes == ("keep",) else "")
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
        print_heading(console, artifact.name)
        print_table(console, role_table(roles[artifact.name]))
        _print_files(console, artifact, complete=plan.provenance is not None)
        if artifact.notes:
            print_heading(console, f"Clients that load {artifact.name}")
            print_table(console, _client_table(artifact))
        print_heading(console, f"GPUs that hold {artifact.name} and {context:,} tokens of context")
        console.print(Text("In each cell: the tokens of KV cache there is room for.", style="dim"))
        if artifact.recipe.format == "gguf":
            console.print(Text("llama.cpp also runs with less: what does not fit stays in the machine's memory.", style="dim"))
        print_table(console, _gpu_table(fits[artifact.name]))
    print_heading(console, "The run")
    _print_cost(console, cost)


def _print_files(console: Console, artifact: ArtifactPlan, complete: bool) -> None:
    sizes = artifact.file_sizes
    print_heading(console, f"Files: {len(sizes)}, {sum(sizes.values()):,} bytes")
    console.print(_file_columns(list(sizes.items())))
    if not complete:
        note = "Planned without the source's files: manifest.json, tokenizer and licence files come on top."
        print_note(console, note, "dim")


def _file_columns(sizes: Sequence[tuple[str, int]]) -> Columns:
    width = max((len(name) for name, _ in sizes), default=0)
    return Columns([Text(f"{name:<{width}} {size:>15,}") for name, size in sizes], padding=(0, 4))


def _client_table(artifact: ArtifactPlan) -> Table:
    table = make_table(("loads", "client"), wrap="client")
    for note in artifact.notes:
        loads = Text("yes", style="green") if note.loads else Text("no", style="bold red")
        table.add_row(loads, Text(f"{note.client}: {note.why}" if note.why else note.client))
    return table


def _gpu_table(fits: list[GpuFit]) -> Table:
    counts = sorted({fit.count for fit in fits})
    table = make_table(("memory each",), [many(count, "GPU") for count in counts])
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
    table.add_row("writes", f"{text.size(cost.disk_bytes)}, the disk space needed")
    table.add_row("memory", f"at most {text.size(cost.peak_memory_bytes)} for {cost.workers} workers; {gpu}")
    if cost.calibration_tokens:
        states = f"{text.size(cost.hidden_state_bytes)} more on disk while it runs"
        table.add_row("calibration", f"{cost.calibration_tokens:,} tokens through the model; hidden states take {states}")
    if cost.seconds is not None:
        measured = ", ".join(f"{name} {_rate(name, rate)}" for name, rate in cost.rates.items())
        table.add_row("time", f"about {text.duration(cost.seconds)} on this machine")
        table.add_row("", Text(f"measured: {measured}", style="dim"))
    else:
        table.add_row("time", "unknown: the output cannot be written to, so nothing was measured")
    console.print(table)


def _rate(name: str, rate: float) -> str:
    if name == "calibration":
        return f"{rate / 1e9:.0f} GFLOP/s per core"
    return f"{text.size(rate)}/s" if name in ("read", "write", "hash") else f"{text.count(rate)} weights/s per core"


# -------------------------------------------------------------------------------------------------------- inspect, verify


def print_inspection(console: Console, inspection: Inspection) -> None:
    """What stands at a path: kind, model, roles, files, notes."""
    console.print(Text(str(inspection.path), style="bold"), soft_wrap=True)
    kind = {"artifact": "quantized", "importance": "statistics"}.get(inspection.kind, "not quantized")
    console.print(Text(inspection.model))
    sizes = f"{text.count(inspection.parameters)} parameters, {text.size(inspection.bytes)}"
    files = many(len(inspection.files), "file")
    console.print(Text(f"{sizes} in {files}, {kind}, format {inspection.format}"))
    console.print()
    print_table(console, role_table(inspection.roles))
    console.print(_file_columns(inspection.files))
    if inspection.facts:
        facts = Table.grid(padding=(0, 2))
        for label, value in inspection.facts:
            facts.add_row(Text(label), Text(value))
        console.print()
        console.print(facts)
    for note in inspection.notes:
        print_note(console, f"Note: {note}", "yellow")


def print_verification(console: Console, result: VerifyResult) -> None:
    """Each check with what it found."""
    console.print()
    console.print(Text(str(result.directory), style="bold"), soft_wrap=True)  # a path stays in one piece
    table = make_table(("check", "", "found"), wrap="found")
    for check in result.checks:
        table.add_row(check.name, Text("ok", style="green") if check.ok else Text("failed", style="bold red"), check.detail)
    print_table(console, table)
    console.print(f"Verified: {result.tensors} tensors, {text.size(result.bytes)}", highlight=False)


def print_statistics(console: Console, directory: Path, statistics: Statistics) -> None:
    """Where statistics lie, what was calibrated on, and what every expert received."""
    from .coverage import print_coverage

    console.print(Text(str(directory), style="bold"), soft_wrap=True)
    corpus = statistics.description.get("corpus")
    if isinstance(corpus, dict):
        parts = [f"{name} {corpus[name]}" for name in ("source", "samples", "tokens", "packing", "seed") if name in corpus]
        print_note(console, f"Calibrated on: {', '.join(parts)}")
    print_coverage(console, statistics)


def print_presets(console: Console, rows: Iterable[PresetRow]) -> None:
    """Name, scheme, bits and one line for each preset."""
    print_table(console, _preset_table(rows))
    console.print("Quantized: routed experts, shared expert, dense MLP. All else is as in the source.", highlight=False)


def print_packed_presets(console: Console, rows: Iterable[PresetRow]) -> None:
    """The same for the presets of quantkit's own format."""
    print_heading(console, "Packed, for quantkit's own kernels")
    print_table(console, _preset_table(rows))
    console.print("Scheme and bits are those of routed experts.", highlight=False)


def _preset_table(rows: Iterable[PresetRow]) -> Table:
    table = make_table(("preset", "scheme", "bits", "what it is"), wrap="what it is")
    for row in rows:
        table.add_row(row.name, row.scheme, f"{row.bits_per_weight:.3f}", row.what)
    return table


def print_gguf_presets(console: Console, rows: Iterable[GgufRow]) -> None:
    """Name, bits, methods and one line for each file type."""
    print_heading(console, "GGUF, for llama.cpp and Ollama")
    table = make_table(("preset", "bits", "calibrated", "what it is"), wrap="what it is")
    for row in rows:
        always = ["always"] if row.calibrated else []
        suffixes = [f"-{method}" for method in row.methods if not (always and method == "importance")]
        table.add_row(row.name, f"{row.bits_per_weight:5.2f}", ", ".join(always + suffixes) or "never", row.what)
    print_table(console, table)
    for line in (
        "Bits are those of all weights of Scout's text model; vision goes to a file of its own.",
        "Q4_K_M-importance or Q4_K_M-gptq calibrates; 'always': such a type is of no use otherwise.",
    ):
        print_note(console, line)
