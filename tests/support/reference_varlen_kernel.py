"""A reference for PyTorch's `varlen_attn` on a CPU: the textbook formula, and the argument checks of the GPU kernel.

It is one custom operator, so a recorder of operators sees one call, as on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stitch_server.attention.flash import HEAD_DIM_STEP, MAX_HEAD_DIM, PAGE_TOKENS


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attends over paged KV; takes the arguments of `torch.nn.attention.varlen.varlen_attn`."""
    assert scale is not None
    assert seqused_k is not None
    assert block_table is not None
    assert cu_seq_k is not None
    assert num_splits == 1, "more than one gives wrong rows in PyTorch 2.13"
    assert enable_gqa or query.shape[1] == key.shape[2]
    window = list(window_size)
    attended: Tensor = _varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window, seqused_k, block_table
    )
    return attended


@torch.library.custom_op("stitch_tests::varlen", mutates_args=())
def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window_size: list[int],
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, block_table)
    attended = torch.empty(query.shape, dtype=query.dtype)
    for index, length in enumerate(seqused_k.tolist()):
        rows = slice(*cu_seq_q[index : index + 2].tolist())
        pages = block_table[index, : -(-length // PAGE_TOKENS)].long()
        keys, values = (pool[pages].flatten(0, 1)[:length] for pool in (key, value))
        attended[rows] = _attended(query[rows], keys, values, scale, window_size)
    return attended


def _attended(query: Tensor, keys: Tensor, values: Tensor, scale: float, window_size: list[int]) -> Tensor:
    """Attention of one sequence; the queries belong to its last tokens."""
    group = query.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, keys.repeat_interleave(group, 1)) * scale
    positions = torch.arange(len(keys))
    ages = positions[len(keys) - len(query) :, None] - positions
    left, right = (len(keys) if reach < 0 else reach for reach in window_size)
    scores = scores.masked_fill((ages > left) | (ages < -right), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(group, 1))


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    seqused_k: Tensor,
    block_table: Tensor,
) -> None:
    """Repeats the checks of `mha_varlen_fwd` in PyTorch 2.13, and checks that redundant arguments agree."""
    sequences, head_dim = len(seqused_k), query.shape[2]
    for ints in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert ints.dtype is torch.int32
        assert ints.stride(-1) == 1
    assert cu_seq_q.shape == cu_seq_k.shape == (sequences + 1,)
    assert block_table.shape[0] == sequences
    assert query.dtype is key.dtype is value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert head_dim % HEAD_DIM_STEP == 0
    assert head_dim <= MAX_HEAD_DIM
    assert key.shape == value.shape
    assert key.shape[1] % PAGE_TOKENS == 0
    assert key.shape[3] == head_dim
    assert query.shape[1] % key.shape[2] == 0
    assert cu_seq_q[0] == 0
    assert cu_seq_q[-1] == len(query)
    assert int(cu_seq_q.diff().max()) <= max_q
    assert torch.equal(cu_seq_k.diff(), seqused_k)
    assert int(seqused_k.max()) <= max_k
    assert max_k <= block_table.shape[1] * key.shape[1], "pages that the table lacks"
