"""Attention over a paged KV cache.

`dispatch.py` divides a batch into tasks and computes those of single tokens; those of several consecutive tokens are
`prefill.py`'s, in vectors (`register_tiles.py`, `softmax.py`), or `tiled_prefill.py`'s, in AMX tiles
(`softmax_columns.py`).
"""
