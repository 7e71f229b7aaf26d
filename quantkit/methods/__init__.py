"""Methods choose the numbers: weights and a scheme in, codes and scales out.  One method, one file, one line in METHODS."""

from __future__ import annotations

from quantkit.methods import rtn

METHODS = {"rtn": rtn.quantize}
