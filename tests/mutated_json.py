"""JSON with any values in any places, for tests that it is read or refused and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from quantkit.errors import ArtifactError
from quantkit.verify import verify


def any_json(*likely: Any) -> st.SearchStrategy[Any]:
    """Any JSON value.  likely: values that the reader under test may take for its own."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(likely),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value that can be assigned to: (container, key)."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def check_verification(whole: Path, spare: Path, name: str, content: Any, source: Path) -> None:
    """With ``content`` in a file of the artifact ``spare``, a copy of ``whole``, verification fails as documented; only what the
    manifest itself says may also make no difference."""
    (spare / name).write_text(json.dumps(content))
    try:
        if name == "manifest.json":
            try:
                assert all(check.ok for check in verify(spare, source, sample=1).checks)
            except ArtifactError as error:
                assert str(error)
        else:
            with pytest.raises(ArtifactError, match=f"{name} has "):
                verify(spare, source, sample=1)
    finally:
        shutil.copy(whole / name, spare / name)
