"""A piece of PTX as Triton's kernels contain it, run on arrays: every register is an array of 32-bit words, one for each lane.

Only instructions that occur are known.  Pairs of FP16 or BF16 numbers are computed in float64 and rounded once.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint32]


def halves(words: Words, kind: torch.dtype) -> torch.Tensor:
    """The two numbers of each word, float64 ``[lanes, 2]``, the lower one first."""
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int16).reshape(-1, 2).copy()).view(kind).to(torch.float64)


def words_of(pairs: torch.Tensor, kind: torch.dtype) -> Words:
    """The reverse, rounded to the nearest number."""
    return pairs.to(kind).view(torch.int16).contiguous().numpy().view(np.uint32).reshape(-1)


def run(text: str, outputs: int, inputs: list[Words]) -> list[Words]:
    """What stands in registers ``$0`` to ``$outputs - 1`` when ``inputs`` are those that follow."""
    registers: dict[str, Words] = {f"${outputs + place}": words.astype(np.uint32) for place, words in enumerate(inputs)}

    def value(name: str) -> Words:
        return registers[name] if name in registers else np.full(len(inputs[0]), int(name, 0), np.uint32)

    for line in (line.strip().rstrip(";") for line in text.splitlines()):
        if not line or line[0] in "{}.":
            continue
        operation, rest = line.split(" ", 1)
        target, *names = [name.strip() for name in rest.split(",")]
        given = [value(name) for name in names]
        number = re.search(r"(b?f16)x2$", operation)
        if number:
            kind = torch.float16 if number[1] == "f16" else torch.bfloat16
            one, *others = [halves(words, kind) for words in given]
            name = operation.split(".")[0]
            result = {
                "add": lambda: one + others[0],  # noqa: B023
                "sub": lambda: one - others[0],  # noqa: B023
                "mul": lambda: one * others[0],  # noqa: B023
                "fma": lambda: one * others[0] + others[1],  # noqa: B023
                "neg": lambda: -one,  # noqa: B023
            }[name]()
            registers[target] = words_of(result, kind)
        elif operation == "mov.b32":
            registers[target] = given[0]
        elif operation == "and.b32":
            registers[target] = given[0] & given[1]
        elif operation == "xor.b32":
            registers[target] = given[0] ^ given[1]
        elif operation == "shr.u32":
            registers[target] = given[0] >> given[1]
        elif operation == "shl.b32":
            registers[target] = given[0] << given[1]
        elif operation == "prmt.b32":
            both = given[1].astype(np.uint64) << np.uint64(32) | given[0]
            result_bits = np.zeros_like(given[0])
            for place in range(4):
                byte = both >> np.uint64(8 * (int(given[2][0]) >> 4 * place & 7)) & np.uint64(0xFF)
                result_bits |= byte.astype(np.uint32) << np.uint32(8 * place)
            registers[target] = result_bits
        elif operation == "lop3.b32":
            one_bits, two_bits, three_bits, table = given
            result_bits = np.zeros_like(one_bits)
            for case in range(8):
                if int(table[0]) >> case & 1:
                    chosen = [
                        words if case >> shift & 1 else ~words
                        for words, shift in zip((one_bits, two_bits, three_bits), (2, 1, 0), strict=True)
                    ]
                    result_bits |= chosen[0] & chosen[1] & chosen[2]
            registers[target] = result_bits
        else:
            raise AssertionError(f"unknown instruction: {line}")
    return [registers[f"${place}"] for place in range(outputs)]
