"""Which route a conversation is on. Knows no turn of it, and forgets: one that is not known is judged anew."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

MOST = 10_000
KEPT_SECONDS = 3600.0


class Conversations:
    """The last `most` conversations by their ids, each for `kept_seconds` after its last request."""

    def __init__(self, clock: Callable[[], float], most: int = MOST, kept_seconds: float = KEPT_SECONDS) -> None:
        self._clock = clock
        self._most = most
        self._kept_seconds = kept_seconds
        # Route and the moment of the last request, those seen last behind.
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def route_of(self, conversation_id: str) -> str | None:
        """The route to go on with, or None."""
        route, seen = self._known.get(conversation_id, (None, 0.0))
        return route if seen + self._kept_seconds > self._clock() else None

    def keep(self, conversation_id: str, route: str) -> None:
        """From now on the conversation is on that route."""
        self._known[conversation_id] = route, self._clock()
        self._known.move_to_end(conversation_id)
        if len(self._known) > self._most:
            self._known.popitem(last=False)
