"""Attention of many samples at a time: what forward.attend gives for each sample by itself, with all its tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from simulated_device import simulate

from quantkit import device_attention, forward
from quantkit.checkpoint import Checkpoint
from quantkit.config import Llama4Config
from quantkit.device_attention import Padded, Projected
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Llama4Config:
    """Rotary layers and one without, chunks that samples leave, queries that grow from the fifth position on."""
    directory = tmp_path_factory.mktemp("model")
    write_tiny_model(directory, num_attention_heads=6, attention_chunk_size=8, floor_scale=4, no_rope_layers=[1, 0])
    config = Checkpoint.open(directory).config
    assert list(config.rope_layers) == [True, False] and config.num_heads == 3 * config.num_key_value_heads
    return config


def projected(config: Llama4Config, tokens: int, seed: int) -> Projected:
    generator = torch.Generator().manual_seed(seed)
    widths = (config.num_heads, config.num_key_value_heads, config.num_key_value_heads)
    query, key, value = (torch.randn(tokens, count * config.head_dim, generator=generator) for count in widths)
    return query, key, value


def joined(texts: list[Projected], part: Callable[[int], slice]) -> Projected:
    query, key, value = (torch.cat([text[which][part(number)] for number, text in enumerate(texts)]) for which in range(3))
    return query, key, value


@pytest.mark.parametrize("layer", [0, 1])
def test_whole_samples(config: Llama4Config, layer: int) -> None:
    lengths = [5, 5, 12, 1, 5, 20]
    texts = [projected(config, length, number) for number, length in enumerate(lengths)]
    expected = torch.cat([forward.attend(config, layer, *text) for text in texts])
    together = joined(texts, lambda number: slice(None))
    found = device_attention.attend(config, layer, together, lengths, forward.rotary_frequencies(config))
    torch.testing.assert_close(found, expected)
    with simulate():  # where heads do not share keys
        query, key, value = (rows.to("cuda") for rows in together)
        there = device_attention.attend(config, layer, (query, key, value), lengths, forward.rotary_frequencies(config))
        torch.testing.assert_close(there.cpu(), expected)


@pytest.mark.parametrize("most", [None, 25])
@pytest.mark.parametrize("layer", [0, 1])
def test_samples_that_go_on(config: Llama4Config, layer: int, most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_attention, "GROWTH", 3)
    prompts, ends = [4, 9, 1, 17], [12, 25, 9, 19]  # tokens of a sample at first, and at last
    texts = [projected(config, end, number) for number, end in enumerate(ends)]
    expected = [forward.attend(config, layer, *text) for text in texts]
    padded = Padded(most)
    past, running, first = [0] * 4, [0, 1, 2, 3], True
    while running:
        more = [prompts[number] if first else 1 for number in running]
        if past[1] == 15 and 1 in running:
            more[running.index(1)] = 3  # some tokens at once behind others
        chosen = [texts[number] for number in running]
        steps = dict(zip(running, more, strict=True))
        own = list(running)
        rows = joined(chosen, lambda place, own=own, steps=steps: slice(past[own[place]], past[own[place]] + steps[own[place]]))  # type: ignore[misc]
        found = device_attention.attend_further(
            config, layer, rows, running, more, past, padded, forward.rotary_frequencies(config)
        )
        for number, part in zip(running, torch.split(found, more), strict=True):
            torch.testing.assert_close(part, expected[number][past[number] : past[number] + steps[number]])
            past[number] += steps[number]
        padded.steps.clear()
        running, first = [number for number in running if past[number] < ends[number]], False
    assert past == ends
    keys, values = padded.layers[layer]
    assert keys.shape == values.shape and (keys.shape[1] > 25 if most is None else keys.shape[1] == 25)


def test_rows_behind_a_sample_do_not_matter(config: Llama4Config) -> None:
    query, key, value = projected(config, 6, 1)
    keys = forward.cached_keys(config, 1, key)[None].expand(2, -1, -1, -1)
    values = value.view(1, 6, -1, config.head_dim).expand(2, -1, -1, -1)
    tokens = forward.next_tokens(config, torch.tensor([3, 5]), 6, forward.rotary_frequencies(config))
    found = forward.attend_next(config, 1, query[[3, 5]], keys, values, tokens)
    torch.testing.assert_close(found, forward.attend(config, 1, query, key, value)[[3, 5]])
