"""Kernels that Numba compiles for a processor: matrix products, attention, whole decoder layers. Run no PyTorch.

`layers.py` takes a batch through all layers of a shard in one call. It calls `matmul/` and `attention/`, each with a
`dispatch.py` that chooses among the kernels beside it. `tasks.py` shares the work among threads. `vectors.py` and
`amx.py` emit the instructions that no compiler would choose from Python.

A product of a few rows (decode) is bound by reading the matrix, and packed panels (`matmul/panels.py`) are read at the
memory's full speed, which libraries' kernels for many rows don't reach. One of many rows (prefill) is bound by
arithmetic, of which AMX tiles (`matmul/strips.py`, `matmul/int8.py`) do most where a processor has them. Between its
products a layer does so little that calling anything for each step of it, or even for each layer, costs more than the
step. And a library's attention wants each sequence's keys and values in one piece; these kernels read them in their
blocks.
"""
