"""Attention of a few tokens over their pasts, which are read in their blocks. Knows arrays alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.amx import close_tiles, open_tiles
from stitch_server.loops.compiling import compiled
from stitch_server.loops.dots import LANES, SIDE, STRIP, blend, dots
from stitch_server.loops.numbers import Floats, Numbers, Places, like, widened
from stitch_server.loops.parts import DEPTH
from stitch_server.loops.past import Past
from stitch_server.loops.softmax import largest, shares
from stitch_server.loops.tasks import first_task, next_task, wait_for
from stitch_server.loops.tiled_attention import FEWEST_QUERIES, MOST_QUERIES_IN_TILES, attend_in_tiles
from stitch_server.loops.together import MOST_QUERIES, attend_together


class Division(NamedTuple):
    """How attention is divided into tasks."""

    # The first of the tokens that attend together, and one behind the last.
    starts: Places
    # Of how many parts of its heads each of these has a task.
    parts: int
    # Whether many queries for the same keys are multiplied in tiles.
    in_tiles: bool


class Scratch(NamedTuple):
    """Room for one thread's attention."""

    weights: Floats
    answered: Floats


@compiled()
def keep(new: Floats, token: int, head: int, pairs: Numbers, past: Past) -> None:
    """One token's key or value of one head, `[head_dim]`, to the last of its slots."""
    slot = past.slots[past.ends[token] - 1]
    for dimension in range(pairs.shape[2]):
        pairs[slot, head, dimension] = like(pairs[slot, head, dimension], new[dimension])


@compiled()
def keep_all(new: Floats, pairs: Numbers, past: Past) -> None:
    """All tokens' keys and values of all heads, `new` `[tokens, 2 * kv_heads, head_dim]`."""
    for token in range(len(new)):
        for head in range(new.shape[1]):
            keep(new[token, head], token, head, pairs, past)


@compiled()
def divided(past: Past, heads: int, threads: int, in_tiles: bool) -> Division:
    """For so many query heads and threads: of several tokens together as few passes over their past as can be.

    In tiles where heads are whole ones.
    """
    kv_heads = past.pairs.shape[2] // 2
    in_tiles = in_tiles and past.pairs.shape[3] % DEPTH == 0
    most = max(1, (MOST_QUERIES_IN_TILES // threads if in_tiles else MOST_QUERIES) * kv_heads // heads)
    starts = np.empty(len(past.begins) + 1, np.int64)
    groups = 0
    for token in range(len(past.begins)):
        goes_on = groups > 0 and past.begins[token] == past.begins[starts[groups - 1]]
        if not goes_on or token - starts[groups - 1] >= most:
            starts[groups] = token
            groups += 1
    starts[groups] = len(past.begins)
    return Division(starts[: groups + 1], 1 if groups >= 2 * threads or threads == 1 else kv_heads, in_tiles)


@compiled()
def tasks_of(division: Division) -> int:
    """How many there are."""
    return (len(division.starts) - 1) * division.parts


@compiled()
def scratch_for(past: Past, heads: int, head_dim: int) -> Scratch:
    """For so many query heads."""
    longest = 0
    for token in range(len(past.begins)):
        longest = max(longest, past.ends[token] - past.begins[token])
    # Tiles may have more rows than a group has heads.
    return Scratch(np.empty((heads + SIDE, longest), np.float32), np.empty((heads + SIDE, head_dim), np.float32))


@compiled()
def attend(
    task: int,
    division: Division,
    query: Floats,
    pairs: Numbers,
    past: Past,
    window: int,
    scale: float,
    scratch: Scratch,
    mixed: Floats,
) -> None:
    """What the rows of a task see, `mixed` `[tokens, heads, head_dim]`; `query` may have more heads behind these."""
    group, part = task // division.parts, task % division.parts
    first, after = division.starts[group], division.starts[group + 1]
    kv_heads = pairs.shape[1] // 2
    low, high = part * kv_heads // division.parts, (part + 1) * kv_heads // division.parts
    begin = past.begins[first]
    if window > 0:
        begin = max(begin, past.ends[first] - window)
    seen = past.slots[begin : past.ends[after - 1]]
    if after == first + 1:
        _attend_alone(query[first], pairs, seen, low, high, scale, scratch, mixed[first])
        return
    lengths = past.ends[first:after] - begin
    if division.in_tiles and (after - first) * mixed.shape[1] >= FEWEST_QUERIES * kv_heads:
        attend_in_tiles(query[first:after], pairs, seen, lengths, low, high, window, scale, mixed[first:after])
    else:
        attend_together(query[first:after], pairs, seen, lengths, low, high, window, scale, mixed[first:after])


@compiled()
def attend_shared(
    query: Floats,
    past: Past,
    pairs: Numbers,
    window: int,
    scale: float,
    mixed: Floats,
    in_tiles: bool,
    threads: int,
    counts: Places,
) -> None:
    """What all rows see, by all threads that call it with the same `counts`; in tiles what gains by it."""
    division = divided(past, mixed.shape[1], threads, in_tiles)
    scratch = scratch_for(past, mixed.shape[1], mixed.shape[2])
    task = first_task(counts)
    if in_tiles and task < tasks_of(division):
        open_tiles()
    while task < tasks_of(division):
        attend(task, division, query, pairs, past, window, scale, scratch, mixed)
        task = next_task(counts)
    if in_tiles:
        close_tiles()
    wait_for(counts, tasks_of(division))


@compiled()
def _attend_alone(
    query: Floats, pairs: Numbers, seen: Places, low: int, high: int, scale: float, scratch: Scratch, mixed: Floats
) -> None:
    """One token, `[heads, head_dim]`, and heads that share keys [low, high).

    For it turning keys would not pay: behind 140, 11 µs instead of 21.
    """
    kv_heads = pairs.shape[1] // 2
    group = len(mixed) // kv_heads
    weights, answered = scratch
    for kv_head in range(low, high):
        first, last = kv_head * group, (kv_head + 1) * group
        _score(query, first, last, pairs[:, kv_head], seen, scale, weights)
        for head in range(first, last):
            _soften(weights[head, : seen.size])
        _mix(weights, first, last, pairs[:, kv_heads + kv_head], seen, answered)
        for head in range(first, last):
            for dimension in range(mixed.shape[1]):
                mixed[head, dimension] = answered[head, dimension]


@compiled()
def _score(query: Floats, first: int, end: int, keys: Numbers, seen: Places, scale: float, scores: Floats) -> None:
    """What `scores` query heads [first, end) have for each token that is seen."""
    tiled = len(query) >= SIDE and query.shape[1] % LANES == 0
    for begin in range(0, seen.size, SIDE):
        after = min(begin + SIDE, seen.size)
        # Most tokens lie next to those before them.
        if tiled and after - begin == SIDE and seen[after - 1] - seen[begin] == SIDE - 1:
            for head in range(first, end, SIDE):
                row = min(head, len(query) - SIDE)
                sums = dots(keys, seen[begin], query, row)
                for place in range(begin, after):
                    for member in range(head, min(head + SIDE, end)):
                        at = SIDE * (place - begin) + member - row
                        scores[member, place] = sums[at] * np.float32(scale)
        else:
            for place in range(begin, after):
                for head in range(first, end):
                    product = np.float32(0)
                    for dimension in range(query.shape[1]):
                        product += query[head, dimension] * widened(keys[seen[place], dimension])
                    scores[head, place] = product * np.float32(scale)


@compiled()
def _mix(weights: Floats, first: int, end: int, values: Numbers, seen: Places, mixed: Floats) -> None:
    """Sums of the values that are seen, for heads [first, end); some rows behind these are spoilt."""
    tiled = mixed.shape[1] - mixed.shape[1] % STRIP
    for at in range(0, tiled, STRIP):
        for head in range(first, end, SIDE):
            blend(values, seen, at, weights, head, mixed[head : head + SIDE, at : at + STRIP])
    for head in range(first, end):
        for dimension in range(tiled, mixed.shape[1]):
            mixed[head, dimension] = 0
        for place in range(seen.size):
            weight = weights[head, place]
            for dimension in range(tiled, mixed.shape[1]):
                mixed[head, dimension] += weight * widened(values[seen[place], dimension])


@compiled()
def _soften(scores: Floats) -> None:
    """Softmax, in place."""
    total = shares(scores, largest(scores, scores[0]))
    for place in range(scores.size):
        scores[place] /= total
