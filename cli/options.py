"""The options that several commands share, and how their values are read."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from . import text
from .presets import complete_target

DEFAULT_CONTEXT = 131_072
DEFAULT_SEQUENCE_LENGTH = 2048
CALIBRATION_TOKENS = 400_000  # about what the bundled corpus has
MAXIMUM_WORKERS = 4096


def _parse_size(value: str | None) -> str | None:
    try:
        shard_bytes(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return value


def shard_bytes(size: str | None) -> int | None:
    """What ``--max-shard-size`` says; None where it says nothing.  Raises ValueError."""
    return None if size is None else text.parse_size(size)


def expand(value: str | None) -> str | None:
    """``~`` where the shell left it."""
    return value and os.path.expanduser(value)


Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", callback=expand, help="Directory of the BF16 checkpoint, or a hub repository id."),
]
Targets = Annotated[
    list[str],
    typer.Option(
        "--to",
        metavar="PRESET",
        help="A preset, GGUF file types among them (see [bold]quantkit presets[/]), or a recipe file (.toml). "
        "Repeat it: the source is read once for all.",
        autocompletion=complete_target,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, when the source is a hub repository.")]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        "--split-max-size",
        metavar="SIZE",
        callback=_parse_size,
        help="Largest tensor file: 5GB, 500MB, 4GiB. Default: 5GB for safetensors and packed; a GGUF file stays whole.",
    ),
]
Method = Annotated[
    Literal["rtn", "importance", "gptq"] | None,
    typer.Option(
        metavar="rtn|importance|gptq",
        case_sensitive=False,
        help="How file types without a suffix get their numbers; gptq is the same as [bold]--to TYPE-gptq[/].",
        rich_help_panel="GGUF",
    ),
]
TensorTypes = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="Tensors whose name in the file the regular expression is found in get this type: ffn_down_exps=Q6_K. Repeatable.",
        rich_help_panel="GGUF",
    ),
]
VisionType = Annotated[
    Literal["F16", "BF16", "F32", "Q8_0"] | None,
    typer.Option(
        "--mmproj",
        metavar="F16|BF16|F32|Q8_0",
        case_sensitive=False,
        help="Type of the vision tower's file. Default: F16.",
        rich_help_panel="GGUF",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, max=MAXIMUM_WORKERS, help="Units worked on at once. Default: by cores and free memory.")
]
Context = Annotated[int, typer.Option(min=1, help="Tokens of KV cache that the GPUs should have room for.")]
Corpus = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        callback=expand,
        help="Text or JSONL file, a directory of them, or a hub dataset. Default: the bundled corpus.",
        rich_help_panel="Calibration",
    ),
]
Samples = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Samples to calibrate on. Default: all.", rich_help_panel="Calibration")
]
Device = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where a calibration computes.", rich_help_panel="Calibration")]
SequenceLength = Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a sample.", rich_help_panel="Calibration")]
Seed = Annotated[int, typer.Option(metavar="N", help="Chooses the samples.", rich_help_panel="Calibration")]
Packing = Annotated[
    Literal["packed", "documents"],
    typer.Option(metavar="HOW", help="packed: documents joined; documents: one a sample.", rich_help_panel="Calibration"),
]
MinimumTokens = Annotated[
    int,
    typer.Option("--min-expert-tokens", metavar="N", min=0, help="Fail when an expert gets fewer.", rich_help_panel="Calibration"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for errors too.")]
