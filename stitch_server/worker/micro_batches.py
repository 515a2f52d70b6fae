"""Parts of one pass that are computed at the same time, each in a thread of its own. Knows no tensor and no layer.

A pass that is cut into lanes needs no meeting of threads in every product, as more threads for each product would. So
it takes a core whenever one is free, also where a neighbour on this machine has two thirds of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from threading import Condition
from typing import TypeVar

from stitch_server.engine.types import Segment

Result = TypeVar("Result")

# Each lane reads all weights, so fewer rows are not worth one.
LANE_ROWS = 4
# Threads share a loop without lanes; with so many rows each they do better apart, since what one of them writes the
# other one needn't wait for, or fetch from its cache.
KERNEL_LANE_ROWS = 64
# How many times its share a lane of whole sequences may have.
UNEVEN = 1.125


class Turns:
    """What a lane has computed, for the lane behind it, which may hold later tokens of the same sequence."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._reached = 0
        self._over = False

    def reached(self, layer: int) -> None:
        """All layers before `layer` are computed."""
        with self._changed:
            self._reached = layer
            self._changed.notify_all()

    def end(self) -> None:
        """The lane computes no more, whether it came to its end or failed."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait_for(self, layer: int) -> None:
        """Returns when all layers before `layer` are computed, or the lane is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._reached >= layer)


class Lanes:
    """Threads that wait for parts of passes."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None

    def run(self, parts: Sequence[Callable[[], Result]]) -> list[Result]:
        """All parts' results, the first of them computed by the calling thread; raises the first one's error."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(thread_name_prefix="lane")
        others = [self._threads.submit(part) for part in parts[1:]]
        try:
            first = parts[0]()
        finally:
            # None may still write when the next pass begins.
            wait(others)
        return [first, *(other.result() for other in others)]


@dataclass(frozen=True, slots=True)
class Part:
    """What a lane has of a pass."""

    segments: list[Segment]
    # Which rows of the pass these are.
    rows: list[int]


def divided(segments: Sequence[Segment], lanes: int) -> list[Part]:
    """All tokens in so many parts of about as many rows: whole sequences, or else a prompt may go on in the next one.

    Within a part they are in the same order.
    """
    return apart(segments, lanes) or _cut(segments, lanes)


def apart(segments: Sequence[Segment], lanes: int) -> list[Part] | None:
    """Whole sequences in so many parts, none of which depends on another; None where one would be much larger."""
    lengths: dict[int, int] = {}
    for segment in segments:
        lengths[segment.session.id] = lengths.get(segment.session.id, 0) + segment.length
    sizes, places = [0] * lanes, dict[int, int]()
    # Large ones first, so that small ones even them out.
    for sequence in sorted(lengths, key=lambda number: -lengths[number]):
        places[sequence] = lane = sizes.index(min(sizes))
        sizes[lane] += lengths[sequence]
    if max(sizes) * lanes > UNEVEN * sum(sizes):
        return None
    parts = [Part([], []) for _ in range(lanes)]
    row = 0
    for segment in segments:
        part = parts[places[segment.session.id]]
        part.segments.append(segment)
        part.rows.extend(range(row, row + segment.length))
        row += segment.length
    return parts


def _cut(segments: Sequence[Segment], lanes: int) -> list[Part]:
    """The same tokens in the same order in parts of as many rows."""
    whole = sum(segment.length for segment in segments)
    parts = [Part([], []) for _ in range(lanes)]
    row = 0
    for segment in segments:
        done = 0
        while done < segment.length:
            lane = row * lanes // whole
            # Where the next lane begins.
            length = min(segment.length - done, -(-(lane + 1) * whole // lanes) - row)
            parts[lane].segments.append(replace(segment, position=segment.position + done, length=length))
            parts[lane].rows.extend(range(row, row + length))
            done, row = done + length, row + length
    return parts


def depend(parts: Sequence[Part]) -> bool:
    """Whether a part holds later tokens of a sequence of which another one holds earlier ones."""
    sequences = [{segment.session.id for segment in part.segments} for part in parts]
    return sum(map(len, sequences)) > len(set().union(*sequences))
