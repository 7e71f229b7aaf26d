"""Reports of an evaluation: one HTML page for people, Markdown for pull requests, JSON for programs.

All three are made in memory, written beside their places and renamed, so that no reader ever sees half a report.  JSON has ``null``
where a figure is not known, since NaN is no JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint import CONFIG_NAME
from quantkit.errors import OutputError
from quantkit.evaluation import Evaluation
from quantkit.evaluation_checks import checked_path
from quantkit.journal import output_errors, replace_file
from quantkit.report.html import html_report
from quantkit.report.markdown import markdown_report
from quantkit.report.words import title as usual_title
from quantkit.writer import MANIFEST

HTML_NAME, MARKDOWN_NAME, JSON_NAME = "report.html", "report.md", "report.json"
NAMES = (HTML_NAME, MARKDOWN_NAME, JSON_NAME)


def write_report(
    evaluation: Evaluation,
    directory: str | os.PathLike[str],
    *,
    title: str | None = None,
    command: Sequence[str] | None = None,
    force: bool = False,
) -> list[Path]:
    """Write ``report.html``, ``report.md`` and ``report.json`` and return their paths.

    title: of the page.  command: the words of the command that measured this; None: one is made from what the evaluation says.
    force: replace an existing report.  Raises OutputError, RecipeError for a directory that is no path.
    """
    target = Path(checked_path("directory", directory))
    check_report(target, force=force)
    content = evaluation_content(evaluation)
    title = title or usual_title(evaluation)
    texts = {
        HTML_NAME: html_report(evaluation, title, command, content),
        MARKDOWN_NAME: markdown_report(evaluation, title, command),
        JSON_NAME: json_text(content),
    }
    with output_errors(f"make {target}"):
        target.mkdir(parents=True, exist_ok=True)
    return [write_text(target / name, text, force=force) for name, text in texts.items()]


def check_report(directory: str | Path, *, force: bool) -> None:
    """Refuse a directory that holds a report, that cannot be one, or that holds a model.  Raises OutputError."""
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file: name a directory for the report")
    model = next((name for name in (CONFIG_NAME, MANIFEST) if os.path.lexists(target / name)), None)
    if model is not None:
        raise OutputError(f"{target} holds a model ({model}): name another for the report, or it would be shipped along")
    for name in NAMES:
        check_file(target / name, force=force)


def is_report(directory: Path) -> bool:
    """Whether a report is what this directory is for."""
    return all((directory / name).is_file() for name in NAMES) and not os.path.lexists(directory / CONFIG_NAME)


def check_file(path: Path, *, force: bool) -> None:
    """Refuse a path that is taken.  Raises OutputError."""
    if path.is_dir():
        raise OutputError(f"{path} is a directory: choose another output")
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path} exists already: choose another output, or replace it with --force")


def write_text(path: Path, text: str, *, force: bool) -> Path:
    """Write a file at once: whoever reads it sees all of it.  Raises OutputError."""
    check_file(path, force=force)
    with output_errors(f"write {path}"):
        replace_file(path, text.encode("utf-8", "backslashreplace"))
    return path


def evaluation_content(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as data that strict JSON can hold: None for NaN and infinity."""
    return dict(_finite(evaluation.to_dict()))


def json_text(content: dict[str, Any]) -> str:
    """As a file's content."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
