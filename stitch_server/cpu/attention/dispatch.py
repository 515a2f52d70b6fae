"""Paged attention: divides a batch into tasks, and chooses a kernel for each. Knows arrays alone.

A single token of a sequence (decode) attends here, several consecutive ones (prefill) in `prefill.py`, or in AMX tiles
in `tiled_prefill.py` where there are enough of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.cpu.amx import close_tiles, open_tiles
from stitch_server.cpu.attention.paged_kv import PagedKV
from stitch_server.cpu.attention.prefill import MOST_QUERIES, attend_prefill
from stitch_server.cpu.attention.register_tiles import LANES, SIDE, STRIP, dots, weighted_sums
from stitch_server.cpu.attention.softmax import exponentiate, largest
from stitch_server.cpu.attention.tiled_prefill import FEWEST_QUERIES, MOST_QUERIES_IN_TILES, attend_in_tiles
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.matmul.bf16x3 import DEPTH
from stitch_server.cpu.scalars import Floats, Indices, Numbers, narrowed, widened
from stitch_server.cpu.tasks import first_task, next_task, wait_for


class Division(NamedTuple):
    """How a batch's attention is divided into tasks."""

    # Where each group of tokens that attend together begins, and one behind the last.
    starts: Indices
    # Into how many tasks each group is cut, by KV heads.
    parts: int
    # Whether groups with many queries use AMX tiles.
    in_tiles: bool


class Scratch(NamedTuple):
    """One thread's buffers for decode."""

    weights: Floats
    answered: Floats


@compiled()
def store(new: Floats, token: int, head: int, kv: Numbers, paged: PagedKV) -> None:
    """Writes one token's key or value of one head, `[head_dim]`, to the cache."""
    slot = paged.slots[paged.ends[token] - 1]
    for dimension in range(kv.shape[2]):
        kv[slot, head, dimension] = narrowed(kv[slot, head, dimension], new[dimension])


@compiled()
def store_all(new: Floats, kv: Numbers, paged: PagedKV) -> None:
    """Writes all tokens' keys and values, `new` `[tokens, 2 * kv_heads, head_dim]`, to the cache."""
    for token in range(len(new)):
        for head in range(new.shape[1]):
            store(new[token, head], token, head, kv, paged)


@compiled()
def divided(paged: PagedKV, heads: int, threads: int, in_tiles: bool) -> Division:
    """Groups consecutive tokens of a sequence, so that its past is read as few times as possible.

    `in_tiles` holds only where `head_dim` fills whole tiles.
    """
    kv_heads = paged.kv.shape[2] // 2
    in_tiles = in_tiles and paged.kv.shape[3] % DEPTH == 0
    most = max(1, (MOST_QUERIES_IN_TILES // threads if in_tiles else MOST_QUERIES) * kv_heads // heads)
    starts = np.empty(len(paged.begins) + 1, np.int64)
    groups = 0
    for token in range(len(paged.begins)):
        goes_on = groups > 0 and paged.begins[token] == paged.begins[starts[groups - 1]]
        if not goes_on or token - starts[groups - 1] >= most:
            starts[groups] = token
            groups += 1
    starts[groups] = len(paged.begins)
    return Division(starts[: groups + 1], 1 if groups >= 2 * threads or threads == 1 else kv_heads, in_tiles)


@compiled()
def tasks_of(division: Division) -> int:
    """How many tasks there are."""
    return (len(division.starts) - 1) * division.parts


@compiled()
def scratch_for(paged: PagedKV, heads: int, head_dim: int) -> Scratch:
    """Buffers for so many query heads and the batch's longest past."""
    longest = 0
    for token in range(len(paged.begins)):
        longest = max(longest, paged.ends[token] - paged.begins[token])
    # Register tiles may have more rows than a group has heads.
    return Scratch(np.empty((heads + SIDE, longest), np.float32), np.empty((heads + SIDE, head_dim), np.float32))


@compiled()
def attend(
    task: int,
    division: Division,
    query: Floats,
    kv: Numbers,
    paged: PagedKV,
    window: int,
    scale: float,
    scratch: Scratch,
    attended: Floats,
) -> None:
    """Computes one task's part of `attended` `[tokens, heads, head_dim]`; `query` may have more heads behind these."""
    group, part = task // division.parts, task % division.parts
    first, after = division.starts[group], division.starts[group + 1]
    kv_heads = kv.shape[1] // 2
    low, high = part * kv_heads // division.parts, (part + 1) * kv_heads // division.parts
    begin = paged.begins[first]
    if window > 0:
        begin = max(begin, paged.ends[first] - window)
    visible = paged.slots[begin : paged.ends[after - 1]]
    if after == first + 1:
        _attend_alone(query[first], kv, visible, low, high, scale, scratch, attended[first])
        return
    lengths = paged.ends[first:after] - begin
    if division.in_tiles and (after - first) * attended.shape[1] >= FEWEST_QUERIES * kv_heads:
        attend_in_tiles(query[first:after], kv, visible, lengths, low, high, window, scale, attended[first:after])
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
    in_tiles: bool,
    threads: int,
    counts: Indices,
) -> None:
    """Attention of a whole batch, by all threads that call it with the same `counts`."""
    division = divided(paged, attended.shape[1], threads, in_tiles)
    scratch = scratch_for(paged, attended.shape[1], attended.shape[2])
    task = first_task(counts)
    if in_tiles and task < tasks_of(division):
        open_tiles()
    while task < tasks_of(division):
        attend(task, division, query, kv, paged, window, scale, scratch, attended)
        task = next_task(counts)
    if in_tiles:
        close_tiles()
    wait_for(counts, tasks_of(division))


@compiled()
def _attend_alone(
    query: Floats, kv: Numbers, visible: Indices, low: int, high: int, scale: float, scratch: Scratch, attended: Floats
) -> None:
    """Decode: one token, `[heads, head_dim]`, and its KV heads [low, high).

    Transposing keys would not pay for a single query: behind 140 tokens, 11 µs instead of 21.
    """
    kv_heads = kv.shape[1] // 2
    group = len(attended) // kv_heads
    weights, answered = scratch
    for kv_head in range(low, high):
        first, last = kv_head * group, (kv_head + 1) * group
        _score(query, first, last, kv[:, kv_head], visible, scale, weights)
        for head in range(first, last):
            _softmax(weights[head, : visible.size])
        _weigh_values(weights, first, last, kv[:, kv_heads + kv_head], visible, answered)
        for head in range(first, last):
            for dimension in range(attended.shape[1]):
                attended[head, dimension] = answered[head, dimension]


@compiled()
def _score(query: Floats, first: int, end: int, keys: Numbers, visible: Indices, scale: float, scores: Floats) -> None:
    """`scores[head, token]` = query · key · scale, for query heads [first, end)."""
    tiled = len(query) >= SIDE and query.shape[1] % LANES == 0
    for begin in range(0, visible.size, SIDE):
        after = min(begin + SIDE, visible.size)
        # Within a block tokens are neighbours, and are taken a register tile at a time.
        if tiled and after - begin == SIDE and visible[after - 1] - visible[begin] == SIDE - 1:
            for head in range(first, end, SIDE):
                row = min(head, len(query) - SIDE)
                sums = dots(keys, visible[begin], query, row)
                for place in range(begin, after):
                    for member in range(head, min(head + SIDE, end)):
                        at = SIDE * (place - begin) + member - row
                        scores[member, place] = sums[at] * np.float32(scale)
        else:
            for place in range(begin, after):
                for head in range(first, end):
                    product = np.float32(0)
                    for dimension in range(query.shape[1]):
                        product += query[head, dimension] * widened(keys[visible[place], dimension])
                    scores[head, place] = product * np.float32(scale)


@compiled()
def _weigh_values(weights: Floats, first: int, end: int, values: Numbers, visible: Indices, attended: Floats) -> None:
    """attended[head] = Σ weight · value, for query heads [first, end); overwrites some rows behind these."""
    tiled = attended.shape[1] - attended.shape[1] % STRIP
    for at in range(0, tiled, STRIP):
        for head in range(first, end, SIDE):
            weighted_sums(values, visible, at, weights, head, attended[head : head + SIDE, at : at + STRIP])
    for head in range(first, end):
        for dimension in range(tiled, attended.shape[1]):
            attended[head, dimension] = 0
        for place in range(visible.size):
            weight = weights[head, place]
            for dimension in range(tiled, attended.shape[1]):
                attended[head, dimension] += weight * widened(values[visible[place], dimension])


@compiled()
def _softmax(scores: Floats) -> None:
    """Softmax, in place."""
    total = exponentiate(scores, largest(scores, scores[0]))
    for place in range(scores.size):
        scores[place] /= total
