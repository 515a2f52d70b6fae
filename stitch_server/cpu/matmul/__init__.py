"""Matrix products by weights in float32, bfloat16, int8 and int4.

| weights | few rows | many rows, with AMX |
|---|---|---|
| float32, bfloat16 | `floating.py` by `panels.py`, in vectors | `floating.py` by `strips.py` and `amx_bf16.py` |
| int8 | `int8.py` by `amx_int8.py` | the same |
| int4 | `int4.py` by `vnni_int4.py` | dequantized by `int4_groups.py`, then as float32 |

Before they are multiplied, numbers are split into several that the processor multiplies faster, without loss: float32
into three bfloat16 (`bf16x3.py`), or rows into three int8 digits (`digits.py`).
"""
