"""The options of ``eval`` and ``compare``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import MAXIMUM_WORKERS, AsJson, check_size, expand
from .text import parse_size

MEASUREMENT = "Measurement"
OUTPUT = "Output and gates"


@dataclass(frozen=True)
class Measurement:
    """What is measured, and how; named as the library's ``evaluate`` names it."""

    reference: Annotated[
        str,
        typer.Option(
            "--reference", metavar="MODEL", callback=expand, help="The BF16 checkpoint that the artifacts were made from."
        ),
    ]
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            callback=expand,
            help="Text or JSONL file, a directory of them, or a hub dataset. Default: the bundled held-out text.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a hub dataset.", rich_help_panel=MEASUREMENT),
    ] = None
    window: Annotated[int, typer.Option(metavar="N", min=3, help="Tokens of a window.", rich_help_panel=MEASUREMENT)] = 512
    windows: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="Windows. Default: all.", rich_help_panel=MEASUREMENT)
    ] = None
    convention: Annotated[
        Literal["full", "llama.cpp"],
        typer.Option(
            metavar="full|llama.cpp",
            help="full: every token of a window counts but its first; llama.cpp: the second half, as llama-perplexity has it.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = "full"
    golden: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            callback=expand,
            help="Questions with their answers, as JSONL; they are put too.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where it is computed.", rich_help_panel=MEASUREMENT)] = "cpu"
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=MAXIMUM_WORKERS, help="Cores to compute on. Default: all.", rich_help_panel=MEASUREMENT),
    ] = None
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            callback=expand,
            help="Where unfinished work and the reference's results are kept. Default: ~/.cache/quantkit/evaluation.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None
    cache_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            callback=check_size,
            help="Bytes that may lie there; what was not used for longest is removed. Default: 20GB.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens held in memory at once. Default: by the model's width.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Chooses windows, and draws intervals.", rich_help_panel=MEASUREMENT)
    ] = 0
    resamples: Annotated[
        int, typer.Option(metavar="N", min=0, help="Draws for the intervals; 0: no intervals.", rich_help_panel=MEASUREMENT)
    ] = 1000
    float_activations: Annotated[
        bool,
        typer.Option(
            "--float-activations",
            help="Do not round activations, even where the artifact's scheme has serving engines do so.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``evaluate``, by name."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "float_activations"}
        places = {name: None if given[name] is None else Path(given[name]) for name in ("golden", "cache")}
        limit = None if self.cache_limit is None else parse_size(self.cache_limit)
        return {**given, **places, "cache_limit": limit, "round_activations": not self.float_activations}


@dataclass(frozen=True)
class Ending:
    """What becomes of the figures."""

    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="GATE",
            help="Exit with code 10 when this holds of an artifact: 'kld > 0.02', 'kld.high > 0.02' for the end of the interval, "
            "'size > 70GB', 'NAME: agreement < 0.95' for one of them. Repeatable.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    save: Annotated[
        str | None,
        typer.Option(metavar="FILE.json", callback=expand, help="Also keep everything measured as JSON.", rich_help_panel=OUTPUT),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace files of an earlier run.", rich_help_panel=OUTPUT)] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress; of a report, print the files only.", rich_help_panel=OUTPUT)
    ] = False
    as_json: AsJson = False
