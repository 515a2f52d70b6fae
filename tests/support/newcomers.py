"""Clients that come at random moments, each with a short question, and what they wait for their answers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from stitch.client import Client
from tests.support.running_streams import RunningStreams

MEAN_INTERVAL_SECONDS = 0.2
PROMPT_CHARACTERS, ANSWER_TOKENS = 12, 4
END_SECONDS = 30.0


@dataclass(eq=False)
class Newcomers:
    """The newcomers of one time, in the order in which they came."""

    client: Client
    draw: Random
    streams: list[RunningStreams] = field(default_factory=list)

    @property
    def waits(self) -> list[float]:
        """How long each one waited from its question to its last token. Raises AssertionError for one without any."""
        waits = []
        for one in self.streams:
            assert one.ended(END_SECONDS)
            (stream,) = one.streams
            assert stream.finished, stream
            waits.append(stream.arrivals[-1] - stream.started)
        return waits

    def come_until(self, left: threading.Event) -> None:
        while not left.wait(self.draw.expovariate(1 / MEAN_INTERVAL_SECONDS)):
            prompt = "".join(self.draw.choices("abcdefgh", k=PROMPT_CHARACTERS))
            route = self.draw.choice(("weak", "strong"))
            request = {"prompt": prompt, "route": route, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
            self.streams.append(RunningStreams(self.client, [request]))


def percentile(waits: Sequence[float], share: float = 0.95) -> float:
    """The wait that this share of them does not exceed."""
    return sorted(waits)[math.ceil(share * len(waits)) - 1]


@contextmanager
def newcomers(client: Client, seed: str) -> Iterator[Newcomers]:
    """Newcomers come within the block, at random moments that `seed` fixes."""
    come, left = Newcomers(client, Random(seed)), threading.Event()
    thread = threading.Thread(target=come.come_until, args=(left,), daemon=True)
    thread.start()
    try:
        yield come
    finally:
        left.set()
        thread.join()


def newcomers_of(client: Client, seed: str, seconds: float) -> Newcomers:
    """Those that come within this time."""
    with newcomers(client, seed) as come:
        time.sleep(seconds)
    return come
