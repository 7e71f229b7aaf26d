"""What a calibration costs, from the config alone: memory, disk for hidden states, floating-point operations.

Memory follows from the largest MLP and hardly from the number of tokens; disk and operations grow with the tokens.  Operations are
counted as multiplications and additions of float32 and cover what takes all but a few per cent of the time: the products of the
forward pass, the Hessians (upper triangles), and of each GPTQ unit the factorization and the feeding forward of errors.
"""

from __future__ import annotations

from quantkit.calibration import ENOUGH_ROWS, LEAST_ROWS
from quantkit.config import Llama4Config
from quantkit.layer_pass import PORTION
from quantkit.methods.gptq import PANEL

HIDDEN_ARRAYS = 3  # what entered the layer before, what enters this one, what leaves it
TRIANGLE = 0.6  # of a full product, in tiles


def hidden_state_bytes(config: Llama4Config, tokens: int, artifacts: int) -> int:
    """Disk that hidden states take while a calibration runs.  artifacts: those whose routed experts make up for the shared one."""
    width = max(config.hidden_size, config.num_heads * config.head_dim)
    return 4 * tokens * ((HIDDEN_ARRAYS + artifacts) * config.hidden_size + width)


def calibration_operations(config: Llama4Config, tokens: int, learned: int) -> float:
    """Floating-point operations of one pass.  learned: artifacts whose feed-forward weights a method with Hessians quantizes."""
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    attention = 2 * tokens * hidden * (2 * queries + 2 * config.num_key_value_heads * config.head_dim)
    total = 0.0
    for moe in config.moe_layers:
        width = config.expert_width if moe else config.dense_width
        total += attention + _mlp(hidden, width, tokens, learned)
        if moe:
            own = tokens * config.experts_per_token / config.num_experts
            lent = max(0.0, min(ENOUGH_ROWS * width - own, max(own, LEAST_ROWS * width)))
            total += config.num_experts * _mlp(hidden, width, own + min(lent, tokens - own), learned)
            if learned:
                deviations = 2 * 3 * hidden * width + 2 * config.experts_per_token * hidden * width
                total += learned * (tokens * deviations + config.num_experts * hidden * width**2)
    return total


def _mlp(hidden: int, width: int, rows: float, learned: int) -> float:
    """One gated MLP: forward, both Hessians, and GPTQ for each artifact."""
    forward = 2 * rows * 3 * hidden * width
    if not learned:
        return forward
    hessians = TRIANGLE * 2 * rows * (hidden**2 + width**2)
    factors = (hidden**3 + width**3) / 3
    feeding = 2 * width * hidden**2 + hidden * width**2
    return forward + hessians + learned * (factors + feeding)


def calibration_memory(config: Llama4Config, tokens: int, hessians: bool) -> int:
    """Bytes that a calibration holds at most, without the hidden states, which are mapped files."""
    kinds = set(config.moe_layers)
    logits = 2 * 4 * tokens * config.num_experts if True in kinds else 0  # twice while portions are joined
    return logits + max(_layer_memory(config, min(PORTION, tokens), hessians, routed) for routed in kinds)


def _layer_memory(config: Llama4Config, rows: int, hessians: bool, routed: bool) -> int:
    """Bytes for one gated MLP: an expert, or that of a dense layer."""
    hidden, width = config.hidden_size, config.expert_width if routed else config.dense_width
    matrix, stored = hidden * width, 2 * 3 * hidden * width
    shown = 4 * 3 * matrix + 4 * rows * 3 * (hidden + width)  # weights in float32, and a portion on its way
    if not hessians:
        return stored + shown
    sums = 4 * (hidden**2 + width**2)  # of both projections
    method = 4 * max(hidden, width) ** 2  # a factor
    method += 2 * matrix * (4 + 1 + 1 + 1) + 4 * PANEL * 2 * width  # errors, codes, packed codes, corrections
    if not routed:  # one after the other; a sequential pass also holds what gate and up became
        return stored + sums + max(shown, method + 2 * 4 * matrix)
    return stored + sums + shown + method + 2 * 4 * matrix  # and what is missing, with what makes up for it
