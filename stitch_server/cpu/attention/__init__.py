"""Attention over a paged KV cache.

`dispatch.py` divides a batch into tasks and computes those of single tokens (decode). Several consecutive tokens
(prefill) attend in `prefill.py`, in vectors (`register_tiles.py`, `softmax.py`), or in AMX tiles in `tiled_prefill.py`.
"""
