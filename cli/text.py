"""Numbers as people read and write them: sizes, durations, counts, and the place in the model that a unit's key names.

Sizes are decimal (1 GB = 1,000,000,000 bytes), as disks, downloads and GPU data sheets state them; ``GiB`` is understood on input.
"""

from __future__ import annotations

import re
from decimal import Decimal

LARGEST_SIZE = 10**18
_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_SIZES = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """``5GB``, ``500 MB``, ``4.5GiB`` or plain bytes as a number of bytes.  Raises ValueError."""
    match = _SIZE_PATTERN.fullmatch(text)
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{_short(text)} is not a size; write for example 5GB, 500MB or 4GiB")
    factors = _BINARY_SIZES if match[3] else _SIZES
    exact = Decimal(match[1]) * factors[match[2].lower()]
    if not 1 <= exact <= LARGEST_SIZE:
        raise ValueError(f"{_short(text)} is not a size: it must be at least one byte and at most {LARGEST_SIZE // 10**12:,} TB")
    return int(exact)


def _short(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:37]!r}..."


def size(count: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point: ``64.9 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def size_of(done: float, total: float) -> str:
    """Progress through a size in the unit of the whole: ``13.2/215.5 GB``."""
    whole = size(total)
    number, unit = whole.split(" ")
    factor = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    return f"{done / factor:.{0 if unit == 'bytes' else 1}f}/{number} {unit}"


def count(number: float) -> str:
    """Parameters or tokens: ``107.8 B``, ``14.6 M``, ``512``."""
    if number < 1000:
        return f"{number:.0f}"
    for unit in ("k", "M", "B"):
        number /= 1000
        if number < 999.95:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:.1f} T"


def duration(seconds: float) -> str:
    """``0.8 s``, ``45 s``, ``3 min 20 s``, ``1 h 12 min``, ``2 d 3 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def percent(done: float, total: float) -> str:
    """A share as a whole percentage; 100 % only when all is done."""
    if done >= total:
        return "100 %"
    return f"{min(99, int(100 * done / total))} %"


def place(key: str) -> str:
    """Where a unit of work is, from its key: ``layer 12, expert 7, gate_up_proj``; other keys stay as they are."""
    match = re.fullmatch(r"(.*?)layers\.(\d+)\.(?:feed_forward\.experts\.(\d+)\.)?(.+)", key)
    if not match:
        return key.removesuffix(".weight")
    tower, layer, expert, rest = match.groups()
    parts = [f"{'vision ' if 'vision_model' in tower else ''}layer {layer}"]
    if expert is not None:
        parts.append(f"expert {expert}")
    return ", ".join([*parts, rest.removesuffix(".weight").removeprefix("feed_forward.").removeprefix("self_attn.")])
