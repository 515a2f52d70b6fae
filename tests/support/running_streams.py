"""Answers that a test reads in threads while it disturbs the cluster, with the arrival of every token."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc

from stitch.client import Client, Delta
from stitch.errors import StitchError


@dataclass(eq=False)
class RunningStream:
    """One answer from its request to its end."""

    fields: Mapping[str, Any]
    # Seconds of `time.monotonic`.
    started: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    # What the client raised; a broken connection may have a status of gRPC's own.
    error: StitchError | grpc.RpcError | None = None
    thread: threading.Thread | None = None

    @property
    def longest_pause(self) -> float:
        """Seconds between two arrivals of tokens, or between the request and the first one."""
        times = [self.started, *self.arrivals]
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)

    @property
    def is_running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def read(self, client: Client) -> None:
        """Reads the answer to its end, or to its error."""
        stream = client.stream(**self.fields)
        try:
            for event in stream:
                if isinstance(event, Delta):
                    self.arrivals += [time.monotonic()] * len(event.token_ids)
                    self.token_ids += event.token_ids
            self.finished = stream.answer.token_ids == tuple(self.token_ids)
        except (StitchError, grpc.RpcError) as error:
            self.error = error


class RunningStreams:
    """Several answers at the same time over one client."""

    def __init__(self, client: Client, requests: Sequence[Mapping[str, Any]]) -> None:
        self.streams = [RunningStream(fields) for fields in requests]
        for stream in self.streams:
            stream.started = time.monotonic()
            stream.thread = threading.Thread(target=stream.read, args=(client,), daemon=True)
            stream.thread.start()

    @property
    def tokens(self) -> list[int]:
        """The number of tokens of each stream so far."""
        return [len(stream.token_ids) for stream in self.streams]

    @property
    def running(self) -> int:
        """The number of streams that have not ended."""
        return sum(stream.is_running for stream in self.streams)

    def have_more_than(self, tokens: Sequence[int]) -> bool:
        """Whether every stream has more tokens than that, or has ended."""
        return all(
            len(stream.token_ids) > earlier or not stream.is_running
            for stream, earlier in zip(self.streams, tokens, strict=True)
        )

    def ended(self, timeout_seconds: float) -> bool:
        """Waits until all streams have ended; returns whether they did within that time."""
        give_up = time.monotonic() + timeout_seconds
        for stream in self.streams:
            assert stream.thread is not None
            stream.thread.join(max(0.0, give_up - time.monotonic()))
        return self.running == 0
