"""Which tiles ``moe_gpu.py`` tries beside those of ``quantkit/kernels/moe_tiles.py``, and what becomes of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import moe_gpu_cases as cases
import torch

TUNED = (
    ("int4-g128", 128),
    ("int4-g128", 16),
    ("fp8-block-dynamic", 128),
    ("fp8-channel-dynamic", 16),
    (cases.BF16, 16),
    (cases.BF16, 128),
    ("Q4_K", 16),
    ("int4-g128", 32),
    ("int4-g128", 64),
    ("fp8-block-dynamic", 32),
    ("fp8-block-dynamic", 64),
    ("int4-g32", 16),
    ("int4-g32", 128),
    ("Q4_K", 128),
    ("Q6_K", 16),
)
KEYS = {  # scheme -> its part of the table of tiles
    "int4-g128": "integer",
    "int4-g32": "integer-parts",
    "int8-channel": "integer-wide",
    "fp8-channel-dynamic": "fp8",
    "fp8-block-dynamic": "fp8",
    cases.BF16: "floating",
    "Q4_K": "Q4_K",
    "Q6_K": "Q6_K",
}
FIRST_TUNED = 6  # of them, before other schemes are measured
TOKENS_TUNED = {16: 8, 32: 512, 64: 1024, 128: 4096}  # rows of a tile -> tokens of a layer that would use it
CANDIDATES = {  # rows of a tile -> outputs, warps, stages, programs on a multiprocessor
    16: ((64, 4, 4, 4), (64, 4, 6, 3), (64, 4, 8, 2), (128, 4, 4, 2), (128, 8, 4, 2), (128, 8, 6, 1)),
    32: ((64, 4, 4, 3), (64, 4, 6, 2), (128, 4, 4, 2), (128, 8, 4, 1)),
    64: ((64, 4, 4, 2), (128, 4, 4, 2), (128, 4, 5, 1), (128, 8, 4, 1), (256, 8, 3, 1)),
    128: ((128, 8, 3, 1), (128, 8, 4, 1), (256, 8, 3, 1), (256, 8, 4, 1), (64, 4, 4, 2), (128, 4, 3, 1), (128, 8, 2, 1)),
}


def candidates(run: Any, layer: cases.Layer, tile: int) -> Iterator[Any]:
    """The tile of the table, then others."""
    from quantkit.kernels import moe_tiles, moe_triton

    [stack] = layer.mixture.stacks
    first = moe_triton.kernels_of(stack.gate.kind).shape_of_tile(stack.gate, tile)
    yield first
    others = [moe_tiles.Shape(*numbers) for numbers in CANDIDATES[tile]]
    yield from [shape for shape in others if shape != first][: None if run.measures else 1]


def tune(run: Any, layer: cases.Layer, tile: int) -> None:
    """Every candidate's time for gate_up and down."""
    from quantkit.kernels import moe_triton

    tokens = TOKENS_TUNED[tile] if run.measures else 3
    [stack] = layer.mixture.stacks
    counts = cases.rows_per_expert(tokens, layer.experts, run.device)
    tiles = cases.tiles_of(counts, tokens, tile)
    values = torch.randn(2 * tokens, layer.hidden, device=run.device).to(torch.bfloat16)
    inner = torch.randn(2 * tokens, layer.width, device=run.device).to(torch.bfloat16)
    parts = torch.empty(moe_triton.splits_of(stack.down, [tiles], run.device), 2 * tokens, layer.hidden, device=run.device)
    given, between = (cases.rounded(rows, weight, counts, True) for rows, weight in ((values, stack.gate), (inner, stack.down)))
    out = torch.empty_like(inner)[None]
    tuned: dict[str, Any] = {"scheme": layer.name, "tile": tile, "tokens": tokens, "tried": []}
    run.found["tiles"].append(tuned)
    for shape in candidates(run, layer, tile):
        if run.late():
            break

        def work() -> None:
            cases.launch(given, stack.gate, tiles, out, shape=shape)  # noqa: B023
            cases.launch(between, stack.down, tiles, parts, shape=shape)  # noqa: B023

        try:
            taken, note = run.seconds(work, 0.2), ""
        except Exception as error:  # a tile that does not fit is an answer
            taken, note = None, f"{type(error).__name__}: {str(error)[:100]}".replace("\n", " ").replace("|", "/")
        tuned["tried"].append([dataclasses.astuple(shape), taken, note])
        run.write()


def table_source(tuned: Sequence[dict[str, Any]]) -> str:
    """The table of ``quantkit/kernels/moe_tiles.py`` with the best of what was tried, to be put there."""
    from quantkit.kernels import moe_tiles

    best: dict[tuple[str, int], Any] = {}
    for entry in tuned:
        timed = [(taken, shape) for shape, taken, _ in entry["tried"] if taken is not None]
        if timed:
            best[KEYS[entry["scheme"]], entry["tile"]] = moe_tiles.Shape(*min(timed)[1])
    lines = ["TABLE: dict[str, dict[int, Shape]] = {"]
    for key, shapes in moe_tiles.TABLE.items():
        lines.append(f'    "{key}": {{')
        for tile, shape in shapes.items():
            chosen = best.get((key, tile), shape)
            numbers = dataclasses.astuple(chosen)
            lines.append(f"        {tile}: Shape({', '.join(map(str, numbers[: 4 if numbers[4] == 8 else 5]))}),")
        lines.append("    },")
    return "\nThe table with these, for quantkit/kernels/moe_tiles.py:\n\n```python\n" + "\n".join([*lines, "}"]) + "\n```\n"
