"""JSON from files that nobody has checked yet: one function to parse it, one to quote what it held.

Python's parser takes what a file format must not: an object with the same key twice (the last one wins, silently), nesting until
the stack ends, integers of any length.  ``parse_object`` refuses all of it with a CheckpointError that says where, and nothing else
comes out of it.  ``brief`` quotes a value of any size in one short piece, so that a hostile file cannot fill an error message.
"""

from __future__ import annotations

import json
import reprlib
from typing import Any

from quantkit.errors import CheckpointError

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 160
_REPR.maxlong = 40
_REPR.maxlevel = 3


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(f"the key {brief(key)} occurs twice in one object")
            seen.add(key)
    return members


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that ``data`` holds.  ``where`` begins the message of the CheckpointError raised for anything else."""
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is damaged: not UTF-8 text at byte {error.start}. Download it again.") from error
    except RecursionError as error:
        raise CheckpointError(f"{where} is damaged: its JSON is nested too deeply. Download it again.") from error
    except ValueError as error:  # no JSON, a duplicate key, or an integer too long to convert
        raise CheckpointError(f"{where} is damaged: {str(error)[:200]}. Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} is damaged: it holds {brief(content)} instead of a JSON object. Download it again.")
    return content


def brief(value: object) -> str:
    """A short representation of any JSON value."""
    return _REPR.repr(value)
