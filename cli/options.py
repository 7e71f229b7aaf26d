"""The options that several commands share, and how their values are read.

Options that always come together are the fields of a dataclass, declared once with their defaults.  A command takes them as one
parameter, and :func:`spread` makes a parameter of each field, because typer makes its options of parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from . import text
from .presets import complete_target

if TYPE_CHECKING:
    from quantkit import CalibrationOptions, Recipe

DEFAULT_CONTEXT = 131_072
CALIBRATION_TOKENS = 400_000  # about what the bundled corpus has
MAXIMUM_WORKERS = 4096


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its options in place of each parameter that is a dataclass.

    It then takes all by name, in the order in which help lists them.
    """
    hints = get_type_hints(command, include_extras=True)
    del hints["return"]
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[Parameter] = []
    for name, hint in hints.items():
        if name in groups:
            inner = get_type_hints(hint, include_extras=True)
            options = [(field.name, inner[field.name], field.default) for field in fields(groups[name])]
        else:
            options = [(name, hint, (command.__kwdefaults__ or {}).get(name, MISSING))]
        for option, annotation, default in options:
            given = Parameter.empty if default is MISSING else default
            parameters.append(Parameter(option, Parameter.KEYWORD_ONLY, default=given, annotation=annotation))

    @wraps(command)
    def spreading(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    spreading.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    spreading.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spreading


# ------------------------------------------------------------------------------------------------------------ single ones


def check_size(value: str | None) -> str | None:
    """The value of an option that says a size, as it was written; refuses others."""
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
        callback=check_size,
        help="Largest tensor file: 5GB, 500MB, 4GiB. Default: 5GB for safetensors and packed; a GGUF file stays whole.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, max=MAXIMUM_WORKERS, help="Units worked on at once. Default: by cores and free memory.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Discard an unfinished run instead of resuming it.")]
QuietDirectory = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; print the directory only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for errors too.")]


# ----------------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class ConversionWishes:
    """What ``convert`` and ``plan`` are told of the artifacts besides their targets."""

    revision: Revision = None
    workers: Workers = None
    max_shard_size: ShardSize = None
    method: Annotated[
        Literal["rtn", "importance", "gptq"] | None,
        typer.Option(
            metavar="rtn|importance|gptq",
            case_sensitive=False,
            help="How file types without a suffix get their numbers; gptq is the same as [bold]--to TYPE-gptq[/].",
            rich_help_panel="GGUF",
        ),
    ] = None
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="PATTERN=TYPE",
            help="Tensors whose name in the file the regular expression is found in get this type: ffn_down_exps=Q6_K. Repeatable.",
            rich_help_panel="GGUF",
        ),
    ] = None
    mmproj: Annotated[
        Literal["F16", "BF16", "F32", "Q8_0"] | None,
        typer.Option(
            "--mmproj",
            metavar="F16|BF16|F32|Q8_0",
            case_sensitive=False,
            help="Type of the vision tower's file. Default: F16.",
            rich_help_panel="GGUF",
        ),
    ] = None

    def targets(self, to: list[str]) -> list[Recipe]:
        """The recipes that ``to`` names."""
        from quantkit import resolve_targets

        return resolve_targets(to, method=self.method, tensor_types=self.tensor_type or (), vision=self.mmproj)


@dataclass(frozen=True)
class CalibrationChoice:
    """How ``convert`` and ``calibrate`` are to calibrate."""

    corpus: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            callback=expand,
            help="Text or JSONL file, a directory of them, or a hub dataset. Default: the bundled corpus.",
            rich_help_panel="Calibration",
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Samples to calibrate on. Default: all.", rich_help_panel="Calibration"),
    ] = None
    sequence_length: Annotated[
        int,
        typer.Option(metavar="N", min=2, help="Tokens of a sample.", rich_help_panel="Calibration"),
    ] = 2048
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where a calibration computes.", rich_help_panel="Calibration")
    ] = "cpu"
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses the samples.", rich_help_panel="Calibration")] = 0
    packing: Annotated[
        Literal["packed", "documents"],
        typer.Option(metavar="HOW", help="packed: documents joined; documents: one a sample.", rich_help_panel="Calibration"),
    ] = "packed"
    minimum_tokens: Annotated[
        int,
        typer.Option(
            "--min-expert-tokens", metavar="N", min=0, help="Fail when an expert gets fewer.", rich_help_panel="Calibration"
        ),
    ] = 0

    @property
    def chooses_text(self) -> bool:
        """Whether anything was said of the text to calibrate on."""
        return replace(self, device="cpu", minimum_tokens=0) != CalibrationChoice()

    def options(self, *, sequential: bool = False, statistics: Path | None = None) -> CalibrationOptions:
        """The same as the library takes it."""
        from quantkit import CalibrationOptions

        return CalibrationOptions(
            self.corpus,
            self.samples,
            self.sequence_length,
            self.seed,
            self.packing,
            self.minimum_tokens,
            sequential,
            statistics,
            self.device,
        )
