"""Attention on a device, where each operation costs some microseconds however small it is: many samples at a time.

Samples of equal length attend together.  A step of generation gives one token to every text, whose keys and values lie padded, of
all texts together; so a step takes as many operations for a hundred texts as for one.  Small tensors go to the device without
waiting for what it does, which is safe from memory that is not pinned: it is copied before the call returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch

from quantkit import forward
from quantkit.config import Llama4Config
from quantkit.forward import NextTokens

GROWTH = 256  # positions by which room for keys and values grows, at least

Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value: tokens of some samples one behind the other


@dataclass(frozen=True)
class Step:
    """One token of each of some samples.  numbers, places: which samples, and positions of the tokens, int64 ``[samples]``."""

    numbers: torch.Tensor
    places: torch.Tensor
    tokens: NextTokens


@dataclass
class Padded:
    """Keys and values of all samples.

    most: positions that no sample goes beyond, None where that is not known.  layers: by layer, keys and values ``[samples, room,
    key_value_heads, head_dim]``.  steps: by the first of their samples, what is the same for all layers that see these tokens next;
    whoever moves on to the next tokens clears them.
    """

    most: int | None = None
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    steps: dict[int, Step] = field(default_factory=dict)


def attend(
    config: Llama4Config, layer: int, projected: Projected, lengths: Sequence[int], frequencies: torch.Tensor
) -> torch.Tensor:
    """What attention gathers for whole samples of these lengths: float32 ``[tokens, heads * head_dim]``."""
    parts, begin = [], 0
    for length, group in groupby(lengths):
        count = len(list(group))
        end = begin + count * length
        query, key, value = (rows[begin:end].view(count, length, -1) for rows in projected)
        parts.append(forward.attend(config, layer, query, key, value, frequencies=frequencies).flatten(0, 1))
        begin = end
    return torch.cat(parts)


def attend_further(
    config: Llama4Config,
    layer: int,
    projected: Projected,
    samples: Sequence[int],
    lengths: Sequence[int],
    past: Sequence[int],
    padded: Padded,
    frequencies: torch.Tensor,
) -> torch.Tensor:
    """The same for samples that go on; their keys and values join those in ``padded``.

    samples: which they are.  lengths: new tokens of each.  past: tokens in ``padded`` of every sample, of these and others.
    """
    query, key, value = projected
    device, room = query.device, max(past[one] + more for one, more in zip(samples, lengths, strict=True))
    keys, values = _with_room(config, layer, padded, past, room, device)
    if max(lengths) == 1:
        step = padded.steps.get(samples[0])
        if step is None:
            numbers, places = torch.tensor([samples, [past[one] for one in samples]]).to(device, non_blocking=True)
            step = padded.steps[samples[0]] = Step(numbers, places, forward.next_tokens(config, places, room, frequencies))
        keys[step.numbers, step.places] = forward.next_keys(config, layer, key, step.tokens)
        values[step.numbers, step.places] = value.view(len(samples), -1, config.head_dim)
        keys, values = keys[:, :room], values[:, :room]
        if len(samples) < len(past):
            keys, values = keys[step.numbers], values[step.numbers]
        return forward.attend_next(config, layer, query, keys, values, step.tokens)
    parts = []
    for sample, length, end in zip(samples, lengths, accumulate(lengths), strict=True):
        rows, before = slice(end - length, end), past[sample]
        new = forward.cached_keys(config, layer, key[rows], frequencies=frequencies, first=before)
        keys[sample, before : before + length] = new
        values[sample, before : before + length] = value[rows].view(length, -1, config.head_dim)
        earlier = (keys[sample, :before], values[sample, :before]) if before else None
        parts.append(forward.attend(config, layer, query[rows], key[rows], value[rows], frequencies=frequencies, past=earlier))
    return torch.cat(parts)


def _with_room(
    config: Llama4Config, layer: int, padded: Padded, past: Sequence[int], room: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer, with so many positions at least."""
    held = padded.layers.get(layer)
    if held is None or held[0].shape[1] < room:
        longest = max(past)
        if longest:  # a first step has all that prompts have
            growing = longest + max(GROWTH, longest // 4)
            room = max(room, growing if padded.most is None else min(growing, padded.most))
        shape = (len(past), room, config.num_key_value_heads, config.head_dim)
        larger = (torch.zeros(shape, device=device), torch.zeros(shape, device=device))  # what is masked must be finite
        if held is not None:
            for new, old in zip(larger, held, strict=True):
                new[:, : old.shape[1]] = old
        padded.layers[layer] = held = larger
    return held
