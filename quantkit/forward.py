"""Llama 4, text side: the arithmetic of one layer in float32, on any device, free of where weights come from.

Follows transformers' ``modeling_llama4`` operation by operation.  What is easily got wrong:

* RMSNorm divides in float32.  QK normalization has no weight and comes *after* the rotation, on rotary layers only.
* The rotation is complex: elements 2i and 2i+1 are one number.  With ``low_freq_factor == high_freq_factor`` the llama3 scaling has
  no smooth band: it is a step.
* Rotary layers attend inside chunks of ``attention_chunk_size`` positions; the others to all earlier positions, with queries that
  grow with the logarithm of their position (temperature tuning).
* The router's sigmoid score multiplies the *input* of an expert.

Tensors of one sample are ``[length, features]``; samples never see each other, so a caller may take them in any portions, and those
of equal length together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from quantkit.config import Llama4Config


@dataclass(frozen=True)
class Routing:
    """Where tokens go: experts int64 ``[tokens, k]``, scores float32 ``[tokens, k]``, logits float32 ``[tokens, experts]``."""

    experts: torch.Tensor
    scores: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class NextTokens:
    """What the layers share while each text gets one more token; see :func:`next_tokens`.

    turn: of the rotation, complex64 ``[texts, 1, head_dim / 2]``.  growth: of queries where layers do not rotate, float32
    ``[texts, 1, 1]``; None where they do not grow.  hidden: by whether a layer rotates, the positions that a text does not look at,
    bool ``[texts, 1, 1, longest]``.
    """

    turn: torch.Tensor
    growth: torch.Tensor | None
    hidden: dict[bool, torch.Tensor]


def rms_norm(values: torch.Tensor, epsilon: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """``values`` divided by the root of the mean of their squares (plus epsilon) along the last dimension, times ``weight``."""
    if values.is_cuda:  # one launch instead of six
        return functional.rms_norm(values, values.shape[-1:], weight, epsilon)
    normal = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    return normal if weight is None else normal * weight


def rotary_frequencies(config: Llama4Config) -> torch.Tensor:
    """Radians per position of each complex pair, float32 ``[head_dim / 2]``, llama3 scaling applied."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    scaled = torch.where(wavelength > longest, frequencies / scaling.factor, frequencies)
    width = scaling.high_freq_factor - scaling.low_freq_factor
    if not width:
        return scaled
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / width
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return torch.where((wavelength <= longest) & (wavelength >= shortest), between, scaled)


def rotate(values: torch.Tensor, frequencies: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turn each pair of ``values [..., length, heads, head_dim]`` by its frequency times the position of its row."""
    return _rotated(values, _turn(frequencies, positions))


def _turn(frequencies: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Complex ``[length, 1, head_dim / 2]``."""
    angles = positions.to(torch.float32)[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)[:, None, :]


def _rotated(values: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(values.reshape(*values.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def attend(
    config: Llama4Config,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    frequencies: torch.Tensor | None = None,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
    first: int = 0,
) -> torch.Tensor:
    """What attention gathers, before the output projection: float32 ``[length, heads * head_dim]``, or with samples of equal length
    in front.

    query: ``[length, heads * head_dim]``; key, value: ``[length, key_value_heads * head_dim]``, as projected.  The values that a
    quantized KV cache would hold are those of :func:`cached_keys` and ``value``.  frequencies: of the rotation, if not those of
    the config.  Heads that share keys may be given by themselves.  past: keys as :func:`cached_keys` gives them and values, both
    ``[..., earlier, key_value_heads, head_dim]``, of the positions before these.  first: position of the first token, where those
    before it are not looked at: in a layer that attends in chunks, the beginning of one.
    """
    if query.dim() == 2:  # fused attention wants a dimension for samples
        earlier = None if past is None else (past[0][None], past[1][None])
        return attend(config, layer, query[None], key[None], value[None], frequencies=frequencies, past=earlier, first=first)[0]
    length, leading = query.shape[-2], query.shape[:-2]
    held = first  # position of the first key
    if past is not None:
        first, held = past[0].shape[-3], 0
    query = query.reshape(*leading, length, -1, config.head_dim)
    value = value.reshape(*leading, length, -1, config.head_dim)
    positions = torch.arange(first, first + length, device=query.device)
    query = _turned(config, layer, query, positions, frequencies)
    key = cached_keys(config, layer, key, frequencies=frequencies, first=first)
    if past is not None:
        key, value = torch.cat([past[0], key], -3), torch.cat([past[1], value], -3)
    if not config.rope_layers[layer] and config.temperature_tuning:
        query = query * _growth(config, positions)
    span = config.attention_chunk_size if config.rope_layers[layer] else first + length
    grouped = query.device.type == "cpu"
    if not grouped:  # of CUDA's kernels for float32 only the one that writes all scores down lets heads share keys
        shared = query.shape[-2] // key.shape[-2]
        key, value = key.repeat_interleave(shared, -2), value.repeat_interleave(shared, -2)
    parts = []
    for start in range(first // span * span, first + length, span):
        begin, end = max(start, first), min(start + span, first + length)  # of the queries; keys begin with the chunk
        mask = None
        if begin > start:
            mask = torch.arange(start, end, device=query.device) <= torch.arange(begin, end, device=query.device)[:, None]
        parts.append(
            functional.scaled_dot_product_attention(
                query[..., begin - first : end - first, :, :].transpose(-3, -2),
                key[..., start - held : end - held, :, :].transpose(-3, -2),
                value[..., start - held : end - held, :, :].transpose(-3, -2),
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=grouped,
            ).transpose(-3, -2)
        )
    joined = torch.cat(parts, -3) if len(parts) > 1 else parts[0]
    return joined.reshape(*leading, length, -1)


def next_tokens(config: Llama4Config, positions: torch.Tensor, longest: int, frequencies: torch.Tensor) -> NextTokens:
    """What :func:`attend_next` needs to know of tokens at ``positions``, int64 ``[texts]``, all below ``longest``."""
    place = torch.arange(longest, device=positions.device)
    later = place > positions[:, None]
    earlier = place < (positions // config.attention_chunk_size * config.attention_chunk_size)[:, None]  # than the chunk
    hidden = {False: later[:, None, None], True: (later | earlier)[:, None, None]}
    return NextTokens(_turn(frequencies, positions), _growth(config, positions) if config.temperature_tuning else None, hidden)


def attend_next(
    config: Llama4Config, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tokens: NextTokens
) -> torch.Tensor:
    """What one token of each text gathers, as :func:`attend` gives it: float32 ``[texts, heads * head_dim]``.

    query: as projected.  keys, values: ``[texts, longest, key_value_heads, head_dim]``, keys as :func:`next_keys` gives them, those
    of ``tokens`` among them; those behind a text's token are finite and do not matter.
    """
    texts, shared, rotary = len(query), config.num_heads // config.num_key_value_heads, config.rope_layers[layer]
    query = next_keys(config, layer, query, tokens)
    if not rotary and tokens.growth is not None:
        query = query * tokens.growth
    query = query.reshape(texts, config.num_key_value_heads, shared, config.head_dim)
    scores = torch.einsum("nksd,nlkd->nksl", query, keys) / math.sqrt(config.head_dim)
    likely = torch.softmax(scores.masked_fill_(tokens.hidden[rotary], -math.inf), -1)
    return torch.einsum("nksl,nlkd->nksd", likely, values).reshape(texts, -1)


def next_keys(config: Llama4Config, layer: int, key: torch.Tensor, tokens: NextTokens) -> torch.Tensor:
    """As :func:`cached_keys`, of one token ``[texts, features]`` of each text: ``[texts, heads, head_dim]``."""
    heads = key.view(len(key), -1, config.head_dim)
    return _normal(config, _rotated(heads, tokens.turn)) if config.rope_layers[layer] else heads


def cached_keys(
    config: Llama4Config, layer: int, key: torch.Tensor, *, frequencies: torch.Tensor | None = None, first: int = 0
) -> torch.Tensor:
    """Keys as a cache holds them, rotated and normalized where the layer does so: ``[..., length, key_value_heads, head_dim]``.

    first: position of the first key.
    """
    length = key.shape[-2]
    positions = torch.arange(first, first + length, device=key.device)
    heads = key.reshape(*key.shape[:-2], length, -1, config.head_dim)
    return _turned(config, layer, heads, positions, frequencies)


def _growth(config: Llama4Config, positions: torch.Tensor) -> torch.Tensor:
    """Of queries, ``[positions, 1, 1]``."""
    growth = torch.log(torch.floor((positions.to(torch.float32) + 1.0) / config.floor_scale) + 1.0)
    return (growth * config.attn_scale + 1.0)[:, None, None]


def _turned(
    config: Llama4Config, layer: int, heads: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor | None
) -> torch.Tensor:
    if not config.rope_layers[layer]:
        return heads
    used = rotary_frequencies(config) if frequencies is None else frequencies
    return _normal(config, rotate(heads, used.to(heads.device), positions))


def _normal(config: Llama4Config, heads: torch.Tensor) -> torch.Tensor:
    return rms_norm(heads, config.rms_norm_eps) if config.use_qk_norm else heads


def route(rows: torch.Tensor, router: torch.Tensor, experts_per_token: int) -> Routing:
    """The ``experts_per_token`` experts of largest logits for each row ``[tokens, hidden]``; router: ``[experts, hidden]``."""
    logits = rows @ router.t()
    largest, experts = torch.topk(logits, experts_per_token, dim=-1)
    return Routing(experts, torch.sigmoid(largest), logits)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, the input of a down projection; overwrites ``gate``."""
    return functional.silu(gate, inplace=True).mul_(up)
