"""Attention over a paged KV cache.

`dispatch.py` divides a batch into tasks and computes those of single tokens; `prefill.py` has those of several
consecutive tokens in vectors (`register_tiles.py`, `softmax.py`), `tiled_prefill.py` in AMX tiles (`softmax_columns.py`).
"""
