"""The gateway's log of requests: a line for each, but one line for a client's refusals within a while.

A refused request costs its client nothing, so the number of such lines must not be the client's to choose. No line has
text of a request.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial

_log = logging.getLogger(__name__)

REFUSALS = frozenset(("invalid", "unmet", "exhausted"))
SUMMARY_SECONDS = 10.0
# Clients with refusals that are counted at the same time.
MAX_CLIENTS = 1_000

# Takes the outcome of a request and its line.
Write = Callable[[str, str], None]


def write_line(outcome: str, line: str) -> None:
    """Logs every request."""
    _log.info("%s", line)


class RequestLog:
    """Sums up refusals by client; `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # By client the time of the first refusal and the outcomes of the next ones, oldest first.
        self._refused: OrderedDict[str, tuple[float, Counter[str]]] = OrderedDict()

    def of(self, client: str) -> Write:
        """Logs the requests of one client."""
        return partial(self._write, client)

    def _write(self, client: str, outcome: str, line: str) -> None:
        now = self._clock()
        self._end_summaries(now)
        if outcome not in REFUSALS:
            write_line(outcome, line)
        elif client in self._refused:
            self._refused[client][1][outcome] += 1
        else:
            self._refused[client] = now, Counter()
            write_line(outcome, line)

    def _end_summaries(self, now: float) -> None:
        """Logs the summaries that are old enough, or too many."""
        while self._refused:
            client, (since, outcomes) = next(iter(self._refused.items()))
            if now - since < SUMMARY_SECONDS and len(self._refused) <= MAX_CLIENTS:
                return
            del self._refused[client]
            if outcomes:
                _log.info("client %s: %s more in %.0f s", client, counted(outcomes), now - since)


def counted(outcomes: Counter[str]) -> str:
    """The outcomes as text, most frequent first."""
    return ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())


def client_of(peer: str) -> str:
    """The client of gRPC's `peer`, such as `ipv4:192.0.2.1:50000`, without its port."""
    return peer.rpartition(":")[0] or peer
