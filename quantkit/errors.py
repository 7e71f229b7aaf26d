"""Every error quantkit raises on purpose.

    QuantkitError
    ├── CheckpointError            the source cannot be read as it stands (missing shard, bad header, wrong tensor)
    │   ├── UnsupportedModelError  the config is not a Llama 4, or uses something quantkit cannot express
    │   ├── AlreadyQuantizedError  the source is already quantized
    │   └── WeightError            a weight is NaN or infinite
    ├── RecipeError                the recipe is malformed, matches nothing, or asks for what a format cannot hold; or an argument
    │                              means nothing
    ├── OutputError                the output cannot be written (exists, disk full, read-only, locked by another run)
    │   └── ResumeError            a partial output belongs to another source, recipe or version
    ├── LedgerError                what was done differs from what was asked, or an error bound was passed
    ├── ArtifactError              a finished artifact fails verification
    ├── CorpusError                the calibration text cannot be read, rendered or tokenized
    ├── CalibrationError           calibration met NaN, too little data, or statistics that do not belong to this model
    ├── GateError                  a gate on an evaluation is malformed, or an artifact crosses it
    └── Interrupted                the run was stopped by the user; it can be resumed

Each message says what happened, where (file, tensor, expert) and what to do about it.  ``exit_code`` is what the command line
returns; 0 is success and 2 is kept for wrong usage.  A message that has many problems to tell shows the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AlreadyQuantizedError",
    "ArtifactError",
    "CalibrationError",
    "CheckpointError",
    "CorpusError",
    "GateError",
    "Interrupted",
    "LedgerError",
    "OutputError",
    "QuantkitError",
    "RecipeError",
    "ResumeError",
    "UnsupportedModelError",
    "WeightError",
    "joined",
    "listed",
]

_LINES, _PHRASES = 12, 8  # problems that a message spells out


class QuantkitError(Exception):
    """Base of all documented errors."""

    exit_code = 1


class CheckpointError(QuantkitError):
    """The source checkpoint is missing, damaged or not what its config says."""

    exit_code = 3


class UnsupportedModelError(CheckpointError):
    """The config does not describe a Llama 4 model that quantkit can handle."""


class AlreadyQuantizedError(CheckpointError):
    """The source is already quantized; quantizing it again would compound the error."""


class WeightError(CheckpointError):
    """A source weight is NaN or infinite."""


class RecipeError(QuantkitError):
    """The recipe is wrong in itself, or does not fit this model or this format; or an argument of a call means nothing."""

    exit_code = 4


class OutputError(QuantkitError):
    """The output cannot be written."""

    exit_code = 5


class ResumeError(OutputError):
    """A partial output exists but was made from another source, recipe or version."""


class LedgerError(QuantkitError):
    """The run did not do what the recipe asked, or passed an error bound."""

    exit_code = 6


class ArtifactError(QuantkitError):
    """A finished artifact fails verification."""

    exit_code = 7


class CorpusError(QuantkitError):
    """Text to calibrate or measure on, a golden set, or the tokenizer to read it with, is missing, damaged or unfit."""

    exit_code = 8


class CalibrationError(QuantkitError):
    """Calibration met values that are not finite, too little data, or statistics that do not belong to this model."""

    exit_code = 9


class GateError(QuantkitError):
    """An artifact crosses a gate that was set on its evaluation; or a gate is malformed, or names what is not evaluated."""

    exit_code = 10


class Interrupted(QuantkitError):
    """The user stopped the run; nothing is lost and the same command resumes it."""

    exit_code = 130


def listed(problems: Sequence[str]) -> str:
    """The first problems, each on a line below what is said before, and how many more there are."""
    more = [f"and {len(problems) - _LINES:,} more"] if len(problems) > _LINES else []
    return "".join(f"\n  {line}" for line in (*problems[:_LINES], *more))


def joined(problems: Sequence[str]) -> str:
    """How many problems there are, and the first ones, on one line."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count}: " + "; ".join(problems[:_PHRASES]) + ("; ..." if len(problems) > _PHRASES else "")
