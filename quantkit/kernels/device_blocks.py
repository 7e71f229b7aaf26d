"""Blocks of llama.cpp's types on a device, arranged for :mod:`quantkit.kernels.moe_triton_blocks`.

A block of ggml's is a run of 34, 144 or 210 bytes with scales among the codes.  Nothing in it is aligned to more than two bytes,
its rows have no stride that the tensor memory accelerator takes, and neighbouring inputs stand in halves of one byte, so a kernel
that read it would spend its time on shuffling: memory brings 7e12 weights of 4.6 bits a second, and a GPU has four or five
instructions for each.  So blocks are taken apart when they are brought to the device.  All stored numbers stay what they are, to
the bit; only their places change, and sizes from 144 to 148 bytes (Q4_K), from 210 to 212 (Q6_K), or not at all (Q8_0).

    Q8_0   codes: planes of 8 bits (:mod:`quantkit.kernels.planes`).  scales: FP16, one for each 32 inputs
    Q4_K   codes: planes of 4 bits.  numbers: five words for each 256 inputs, as below
    Q6_K   codes: for each 256 inputs the planes of the lower 4 bits of both halves, 32 words, and then the upper 2 bits: field f of
           word b of 16 belongs to input 16 f + b.  So a field of any word belongs to 16 neighbouring inputs and to one scale

The five words of a row's 256 inputs: scale, and above it minimum, as FP16; eight group scales and eight group minimums, one byte
each (Q4_K), or sixteen group scales (Q6_K).  The first byte is the lowest.
"""

from __future__ import annotations

import torch

from quantkit.grid import QuantizedTensor
from quantkit.kernels.device_weights import Parts, pack
from quantkit.kernels.weights import Weight

NUMBERS = 5  # words with the scales of 256 inputs
CODE_WORDS = {"Q4_K": 32, "Q6_K": 48}  # words with their codes


def parts(weight: Weight, device: torch.device) -> Parts:
    """A matrix taken apart; see above."""
    assert isinstance(weight, QuantizedTensor)
    name, codes, scale = weight.scheme.name, weight.codes.to(device), weight.scale.to(device)
    if name == "Q8_0":
        words = pack(codes, 8)
        scales = scale.new_zeros((len(scale), words.shape[1] // 8))  # padding has scales too
        scales[:, : scale.shape[1]] = scale
        return Parts(words, {"scales": scales})
    assert weight.group_scale is not None
    numbers = torch.empty((*scale.shape, NUMBERS), dtype=torch.int32, device=device)
    first = torch.zeros((*scale.shape, 2), dtype=torch.float16, device=device)
    first[..., 0] = scale
    if name == "Q4_K":
        assert weight.minimum is not None and weight.group_minimum is not None
        first[..., 1] = weight.minimum.to(device)
        numbers[..., 1:3] = _words(weight.group_scale.to(device), 2)
        numbers[..., 3:5] = _words(weight.group_minimum.to(device), 2)
        words = pack(codes - 8, 4)  # which adds 8 again
    else:
        numbers[..., 1:5] = _words(weight.group_scale.to(device), 4)
        low = pack((codes & 15) - 8, 4).view(len(codes), -1, 32)  # [out, blocks, words]
        fields = (codes >> 4).to(torch.int32).view(len(codes), -1, 16, 16)  # [out, blocks, fields, words]
        top = fields[:, :, 0].clone()
        for number in range(1, 16):
            top |= fields[:, :, number] << (2 * number)
        words = torch.cat([low, top], -1).flatten(1)
    numbers[..., 0] = first.view(torch.int32)[..., 0]
    return Parts(words, {"numbers": numbers.flatten(1)})


def _words(values: torch.Tensor, count: int) -> torch.Tensor:
    """int8 ``[out, blocks * 4 * count]`` as words ``[out, blocks, count]``, the first byte lowest."""
    return values.contiguous().view(torch.int32).view(len(values), -1, count)
