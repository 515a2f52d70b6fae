"""Paged attention: where a batch's tokens are in the KV cache, its division into tasks, and decode.

A single token of a sequence (decode) attends here, several consecutive ones (prefill) in `prefill.py`, or in AMX tiles
in `tiled_prefill.py` where there are enough of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.cpu.attention.prefill import MAX_QUERIES, attend_prefill
from stitch_server.cpu.attention.register_tiles import LANES, STRIP, TILE_SIDE, dots, weighted_sums
from stitch_server.cpu.attention.softmax import exponentiate, largest
from stitch_server.cpu.attention.tiled_prefill import MAX_AMX_QUERIES, MIN_AMX_QUERIES, attend_prefill_amx
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.matmul.bf16x3 import BF16_TILE_INPUTS
from stitch_server.cpu.scalars import Floats, Indices, Numbers, load_as_float32, narrowed
from stitch_server.cpu.simd import configure_tiles, release_tiles
from stitch_server.cpu.tasks import first_task, next_task, wait_for


class PagedKV(NamedTuple):
    """The KV cache, and the slots in it of a batch's sequences, their new tokens included."""

    # The index of its first layer in the whole model.
    first: int
    # [layers, slots, 2 * kv_heads, head_dim]: a token's keys, then its values.
    kv: Numbers
    # The slots of all sequences, one after the other, oldest token first.
    slots: Indices
    # Token t attends to slots[begins[t] : ends[t]], of which the last is its own. Neighbours with the same begin are
    # consecutive tokens of one sequence.
    begins: Indices
    ends: Indices


@compiled()
def slot_mapping(spans: Indices, blocks: Indices, block_tokens: int) -> tuple[Indices, Indices, Indices]:
    """Returns the slots, begins and ends of a `PagedKV`.

    `spans` `[sequences, 2]`: the tokens of each sequence, and how many of these are new. `blocks`: the blocks of all
    sequences, one sequence after the other.
    """
    slots = np.empty(np.sum(spans[:, 0]), np.int64)
    begins, ends = np.empty(np.sum(spans[:, 1]), np.int64), np.empty(np.sum(spans[:, 1]), np.int64)
    begin = token = block = 0
    for sequence in range(len(spans)):
        length, new = spans[sequence, 0], spans[sequence, 1]
        for index in range(length):
            slots[begin + index] = blocks[block + index // block_tokens] * block_tokens + index % block_tokens
        for index in range(length - new, length):
            begins[token], ends[token] = begin, begin + index + 1
            token += 1
        begin += length
        block += -(-length // block_tokens)
    return slots, begins, ends


class TaskPlan(NamedTuple):
    """The division of a batch's attention into tasks."""

    # The first token of each group that attends together, and the end of the last group.
    starts: Indices
    # The number of tasks of each group, which have some of the KV heads each.
    head_splits: int
    # Whether groups with many queries use AMX tiles.
    use_amx: bool


class Scratch(NamedTuple):
    """One thread's buffers for decode."""

    weights: Floats
    outputs: Floats


@compiled()
def store_kv(new: Floats, token: int, head: int, kv: Numbers, paged: PagedKV) -> None:
    """Writes one token's key or value of one head, `[head_dim]`, to the cache."""
    slot = paged.slots[paged.ends[token] - 1]
    for dimension in range(kv.shape[2]):
        kv[slot, head, dimension] = narrowed(kv[slot, head, dimension], new[dimension])


@compiled()
def store_all_kv(new: Floats, kv: Numbers, paged: PagedKV) -> None:
    """Writes all tokens' keys and values, `new` `[tokens, 2 * kv_heads, head_dim]`, to the cache."""
    for token in range(len(new)):
        for head in range(new.shape[1]):
            store_kv(new[token, head], token, head, kv, paged)


@compiled()
def divide(paged: PagedKV, heads: int, threads: int, use_amx: bool) -> TaskPlan:
    """Groups consecutive tokens of a sequence, so that its context is read as few times as possible.

    `use_amx` holds only where `head_dim` fills whole tiles.
    """
    kv_heads = paged.kv.shape[2] // 2
    use_amx = use_amx and paged.kv.shape[3] % BF16_TILE_INPUTS == 0
    limit = max(1, (MAX_AMX_QUERIES // threads if use_amx else MAX_QUERIES) * kv_heads // heads)
    starts = np.empty(len(paged.begins) + 1, np.int64)
    groups = 0
    for token in range(len(paged.begins)):
        is_same_sequence = groups > 0 and paged.begins[token] == paged.begins[starts[groups - 1]]
        if not is_same_sequence or token - starts[groups - 1] >= limit:
            starts[groups] = token
            groups += 1
    starts[groups] = len(paged.begins)
    return TaskPlan(starts[: groups + 1], 1 if groups >= 2 * threads or threads == 1 else kv_heads, use_amx)


@compiled()
def task_count(plan: TaskPlan) -> int:
    """Returns the number of tasks."""
    return (len(plan.starts) - 1) * plan.head_splits


@compiled()
def new_scratch(paged: PagedKV, heads: int, head_dim: int) -> Scratch:
    """Allocates buffers for `heads` query heads and the batch's longest context."""
    longest = 0
    for token in range(len(paged.begins)):
        longest = max(longest, paged.ends[token] - paged.begins[token])
    # Register tiles may have more rows than a group has heads.
    return Scratch(
        np.empty((heads + TILE_SIDE, longest), np.float32), np.empty((heads + TILE_SIDE, head_dim), np.float32)
    )


@compiled()
def attend(
    task: int,
    plan: TaskPlan,
    query: Floats,
    kv: Numbers,
    paged: PagedKV,
    window: int,
    scale: float,
    scratch: Scratch,
    attended: Floats,
) -> None:
    """Computes one task's share of `attended` `[tokens, heads, head_dim]`; `query` may have more heads after these."""
    group, split = task // plan.head_splits, task % plan.head_splits
    first, after = plan.starts[group], plan.starts[group + 1]
    kv_heads = kv.shape[1] // 2
    low, high = split * kv_heads // plan.head_splits, (split + 1) * kv_heads // plan.head_splits
    begin = paged.begins[first]
    if window > 0:
        begin = max(begin, paged.ends[first] - window)
    visible = paged.slots[begin : paged.ends[after - 1]]
    if after == first + 1:
        _attend_decode(query[first], kv, visible, low, high, scale, scratch, attended[first])
        return
    lengths = paged.ends[first:after] - begin
    if plan.use_amx and (after - first) * attended.shape[1] >= MIN_AMX_QUERIES * kv_heads:
        attend_prefill_amx(query[first:after], kv, visible, lengths, low, high, window, scale, attended[first:after])
    else:
        attend_prefill(query[first:after], kv, visible, lengths, low, high, window, scale, attended[first:after])


@compiled()
def attend_shared(
    query: Floats,
    paged: PagedKV,
    kv: Numbers,
    window: int,
    scale: float,
    attended: Floats,
    use_amx: bool,
    threads: int,
    counts: Indices,
) -> None:
    """Computes the attention of a whole batch, on all threads that call it with the same `counts`."""
    plan = divide(paged, attended.shape[1], threads, use_amx)
    scratch = new_scratch(paged, attended.shape[1], attended.shape[2])
    task = first_task(counts)
    if use_amx and task < task_count(plan):
        configure_tiles()
    while task < task_count(plan):
        attend(task, plan, query, kv, paged, window, scale, scratch, attended)
        task = next_task(counts)
    if use_amx:
        release_tiles()
    wait_for(counts, task_count(plan))


@compiled()
def _attend_decode(
    query: Floats, kv: Numbers, visible: Indices, low: int, high: int, scale: float, scratch: Scratch, attended: Floats
) -> None:
    """Decode: one token, `[heads, head_dim]`, and its KV heads [low, high).

    Transposing keys would not pay for a single query: at 140 tokens of context, 11 µs instead of 21.
    """
    kv_heads = kv.shape[1] // 2
    group = len(attended) // kv_heads
    weights, outputs = scratch
    for kv_head in range(low, high):
        first, last = kv_head * group, (kv_head + 1) * group
        _score(query, first, last, kv[:, kv_head], visible, scale, weights)
        for head in range(first, last):
            _softmax(weights[head, : visible.size])
        _weigh_values(weights, first, last, kv[:, kv_heads + kv_head], visible, outputs)
        for head in range(first, last):
            for dimension in range(attended.shape[1]):
                attended[head, dimension] = outputs[head, dimension]


@compiled()
def _score(query: Floats, first: int, end: int, keys: Numbers, visible: Indices, scale: float, scores: Floats) -> None:
    """`scores[head, token]` = query · key · scale, for query heads [first, end)."""
    tiled = len(query) >= TILE_SIDE and query.shape[1] % LANES == 0
    for begin in range(0, visible.size, TILE_SIDE):
        after = min(begin + TILE_SIDE, visible.size)
        # The tokens of a block are neighbours, and are multiplied a register tile at a time.
        if tiled and after - begin == TILE_SIDE and visible[after - 1] - visible[begin] == TILE_SIDE - 1:
            for head in range(first, end, TILE_SIDE):
                row = min(head, len(query) - TILE_SIDE)
                sums = dots(keys, visible[begin], query, row)
                for index in range(begin, after):
                    for member in range(head, min(head + TILE_SIDE, end)):
                        at = TILE_SIDE * (index - begin) + member - row
                        scores[member, index] = sums[at] * np.float32(scale)
        else:
            for index in range(begin, after):
                for head in range(first, end):
                    product = np.float32(0)
                    for dimension in range(query.shape[1]):
                        product += query[head, dimension] * load_as_float32(keys[visible[index], dimension])
                    scores[head, index] = product * np.float32(scale)


@compiled()
def _weigh_values(weights: Floats, first: int, end: int, values: Numbers, visible: Indices, attended: Floats) -> None:
    """attended[head] = Σ weight · value, for query heads [first, end); overwrites some rows after these."""
    tiled = attended.shape[1] - attended.shape[1] % STRIP
    for at in range(0, tiled, STRIP):
        for head in range(first, end, TILE_SIDE):
            weighted_sums(
                values,
                visible,
                at,
                weights,
                head,
                attended[head : head + TILE_SIDE, at : at + STRIP],
            )
    for head in range(first, end):
        for dimension in range(tiled, attended.shape[1]):
            attended[head, dimension] = 0
        for index in range(visible.size):
            weight = weights[head, index]
            for dimension in range(tiled, attended.shape[1]):
                attended[head, dimension] += weight * load_as_float32(values[visible[index], dimension])


@compiled()
def _softmax(scores: Floats) -> None:
    """Softmax, in place."""
    total = exponentiate(scores, largest(scores, scores[0]))
    for index in range(scores.size):
        scores[index] /= total
