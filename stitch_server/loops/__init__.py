"""Loops over a few tokens, compiled by Numba for a processor: products, attention, whole layers. Run no PyTorch.

A product of a few rows is bound by reading the matrix, and the plainest loop, one row of weights behind the other,
reads it at the memory's full speed on one thread, which the kernels that are made for many rows do not. From four rows
on it is bound by arithmetic as well, and tiles do that in vector registers (`tiles.py`). Between its products a layer
does so little arithmetic that calling anything for each step of it, or even for each layer, costs more than the step.
And attention of a library wants each past in one piece, where a loop reads it in its blocks.
"""
