"""Loops that Numba compiles for a processor: products, attention, whole layers. Run no PyTorch.

A product of a few rows is bound by reading the matrix, and panels (`panels.py`) are read at the memory's full speed,
which the kernels that are made for many rows don't reach. One of many rows is bound by arithmetic, of which tiles
(`tiled.py`, `bytewise.py`) do most a second where a processor has them. Between its products a layer does so little
that calling anything for each step of it, or even for each layer, costs more than the step. And attention of a library
wants each past in one piece, where a loop reads it in its blocks.
"""
