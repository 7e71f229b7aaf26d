"""CPU kernels, compiled by numba: from weights in memory to codes, scales and statistics in one pass.

``simd`` gives numba explicit vectors and ``memory`` moves them; ``numbers`` knows the number families, ``tiles`` the way through a
matrix; ``groups``, ``rows`` and ``blocks`` are the entry points, one for each granularity of scales (a scale for the whole tensor
is one given to ``rows``); ``packing`` packs codes and ``jit`` compiles.  What the kernels compute is stated in plain torch in
``quantkit.grid``, which they must equal bit for bit.
"""
