"""Methods choose the numbers: weights and a scheme in, codes and scales out.  One method, one file, one line in METHODS.

All take the same arguments; ``team`` are threads that a method may use.
"""

from __future__ import annotations

from quantkit.methods import awq, blocks, gptq, rtn

METHODS = {"rtn": rtn.quantize, "importance": blocks.quantize_weighted, "gptq": gptq.quantize, "awq": awq.quantize}
