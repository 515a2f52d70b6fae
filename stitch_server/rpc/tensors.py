"""Hidden states to bytes and back.

In: rows `[tokens, hidden]` on any device. Out: little-endian bytes of float32, bfloat16 or float16; or for int8 one
signed byte per value and one float32 scale per token, where value = byte * scale and scale = max |row| / 127.
Invariant: what passes `Packed.check` can be unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stitch.errors import InvalidRequest
from stitch.v1 import shard_pb2
from stitch_server.devices import as_bits

DTYPES: dict[str, tuple[shard_pb2.Dtype, torch.dtype]] = {
    "float32": (shard_pb2.DTYPE_FLOAT32, torch.float32),
    "bfloat16": (shard_pb2.DTYPE_BFLOAT16, torch.bfloat16),
    "float16": (shard_pb2.DTYPE_FLOAT16, torch.float16),
    "int8": (shard_pb2.DTYPE_INT8, torch.int8),
}
_TORCH = dict(DTYPES.values())
# The names of DTYPES by their number on a link.
WIRE_NAMES = {number: name for name, (number, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Packed:
    """Hidden states as bytes, with their shape."""

    dtype: shard_pb2.Dtype
    tokens: int
    width: int
    data: bytes
    scales: bytes = b""

    def check(self, width: int, dtype: shard_pb2.Dtype) -> None:
        """Raises InvalidRequest where the bytes do not fit the shape, or the shape does not fit the receiver."""
        if self.dtype != dtype:
            name = shard_pb2.Dtype.Name(self.dtype) if self.dtype in shard_pb2.Dtype.values() else str(self.dtype)
            raise InvalidRequest("hidden.dtype", name, f"this link carries {shard_pb2.Dtype.Name(dtype)}")
        if self.width != width:
            raise InvalidRequest("hidden.hidden_size", self.width, f"the receiver expects {width}")
        expected = self.tokens * width * _TORCH[dtype].itemsize
        if len(self.data) != expected:
            shape = f"[{self.tokens}, {width}]"
            raise InvalidRequest("hidden.data", f"{len(self.data)} bytes", f"the shape {shape} takes {expected}")
        scales = self.tokens * 4 if dtype == shard_pb2.DTYPE_INT8 else 0
        if len(self.scales) != scales:
            raise InvalidRequest("hidden.scales", f"{len(self.scales)} bytes", f"{self.tokens} tokens take {scales}")


def bytes_per_token(width: int, dtype: str) -> int:
    """The bytes of one token's hidden states on a link."""
    return width * DTYPES[dtype][1].itemsize + (4 if dtype == "int8" else 0)


def pack(rows: Tensor, dtype: shard_pb2.Dtype) -> Packed:
    """Rounds `rows` `[tokens, hidden]` to `dtype` and copies them to the host."""
    torch_dtype = _TORCH[dtype]
    tokens, width = rows.shape
    if torch_dtype is torch.int8:
        # A row of zeros has scale 0, and is divided by 1.
        scales = rows.float().abs().amax(dim=1, keepdim=True) / 127
        rows = torch.round(rows.float() / scales.masked_fill(scales == 0, 1.0))
        return Packed(dtype, tokens, width, _bytes(rows.to(torch.int8)), _bytes(scales))
    return Packed(dtype, tokens, width, _bytes(rows.to(torch_dtype)))


def unpack(packed: Packed, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rows `[tokens, hidden]` in the receiver's dtype; `packed` has passed `check`."""
    # A bytearray, since torch warns of read-only buffers.
    rows = torch.frombuffer(bytearray(packed.data), dtype=_TORCH[packed.dtype]).view(packed.tokens, packed.width)
    if packed.scales:
        rows = rows * torch.frombuffer(bytearray(packed.scales), dtype=torch.float32)[:, None]
    return rows.to(device=device, dtype=dtype)


def _bytes(rows: Tensor) -> bytes:
    return as_bits(rows.cpu()).tobytes()
