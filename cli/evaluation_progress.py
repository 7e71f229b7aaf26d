"""What the display of an evaluation shows.

An evaluation goes from model to model and back for every batch of text, so rate and time left are those of the model that is being
run: its token-layers, or the bytes that are being checked.  Without a terminal lines come by the clock: twelve artifacts in eight
sweeps would begin and end some two hundred jobs.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from . import text
from .display import View

if TYPE_CHECKING:
    from quantkit.evaluate import EvaluationProgress

STOPPING = "Stopping ..."
LABELS = {
    "check": "Checking",
    "reference": "Reference",
    "artifact": "Artifact",
    "scores": "Scoring",
    "golden": "Golden set",
    "intervals": "Intervals",
}
UNITS = {"scores": "positions", "golden": "questions", "intervals": "groups of text"}


def evaluation_view(progress: EvaluationProgress) -> View:
    """The model, and the layer where there are layers to go through."""
    from quantkit.report.words import one_line

    place = one_line(progress.model)
    if progress.layers:
        place += f", layer {min(progress.layer + 1, progress.layers)} of {progress.layers}"
    return View(
        label=LABELS[progress.phase],
        job=(progress.phase, progress.model),
        done=progress.tokens,
        total=progress.tokens_total,
        seconds=progress.seconds,
        amount="",
        place=place,
        per_second=text.size if progress.phase == "check" else partial(_counted, UNITS.get(progress.phase, "token-layers")),
        steady=True,
    )


def _counted(unit: str, rate: float) -> str:
    return f"{text.count(rate)} {unit}"
