"""Formats: how the bytes are laid out in files.  One module, one line here; recipes name a format by its key."""

from __future__ import annotations

from quantkit.formats import compressed_tensors, gguf, packed

FORMATS = {"compressed-tensors": compressed_tensors, "gguf": gguf, "packed": packed}
