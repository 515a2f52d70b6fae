"""Matmuls by weights in float32, bfloat16, int8 and int4.

| weights | few tokens | many tokens, with AMX |
|---|---|---|
| float32, bfloat16 | `float32.py` by `panels.py`, in vectors | `float32.py` by `bf16x3.py`, in tiles |
| int8 | `int8.py`, in tiles | the same |
| int4 | `int4.py`, by VNNI | dequantized by `int4.py`, then as float32 |

Operands are split, without loss, into several numbers that the CPU multiplies faster: float32 into three bfloat16
(`bf16x3.py`), or a token's inputs into three int8 digits (`int8.py`).
"""
