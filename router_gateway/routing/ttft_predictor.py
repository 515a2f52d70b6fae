"""How long requests take to their first text at this gateway, and what is under way. Knows no text and no limit.

Prompts are computed in the order of their arrival, so a request waits for those before it, whatever their routes; of
one that is being computed, only what the pace of its route leaves by now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from router_gateway.routing.ttft_regression import TtftLine


class TtftPredictor:
    """Predicts for requests that come, and learns from those under way. `lanes`: first shards that share the work."""

    def __init__(self, routes: Iterable[str], lanes: Callable[[], int], clock: Callable[[], float]) -> None:
        self._lines = {route: TtftLine() for route in routes}
        self._lanes = lanes
        self._clock = clock
        # Those whose first token has not come, in the order of their arrival, by the identity of their Run.
        self._waiting: dict[int, Run] = {}
        # The tokens of their prompts.
        self._ahead = 0

    def seconds(self, route: str, prompt_tokens: int) -> float | None:
        """From now to the first text, which nearly all requests keep to; None where too little is known."""
        return self._lines[route].bound(self._tokens(prompt_tokens), self._clock())

    def begin(self, prompt_tokens: int, route: str | None = None) -> Run:
        """A prompt stands in line from now on. Without a route, `Run.takes` will say it."""
        run = Run(self, prompt_tokens, self._tokens(prompt_tokens), self._clock(), route)
        self._waiting[id(run)] = run
        self._ahead += prompt_tokens
        self._go_on()
        return run

    def computed(self, run: Run) -> None:
        """A prompt stands before nobody any more."""
        if self._waiting.pop(id(run), None) is not None:
            self._ahead -= run.prompt_tokens
            self._go_on()

    def arrived(self, run: Run) -> None:
        """Its first text is there."""
        now = self._clock()
        if run.route is not None:
            # A clock may be too coarse for a fake shard.
            self._lines[run.route].observe(run.tokens, max(now - run.began, 1e-6), now)

    def _go_on(self) -> None:
        for run in self._computing():
            if run.computing_since is None:
                run.computing_since = self._clock()

    def _computing(self) -> Iterator[Run]:
        """The first in line."""
        return islice(self._waiting.values(), max(self._lanes(), 1))

    def _tokens(self, prompt_tokens: int) -> float:
        """To be computed before the first token of such a prompt, its own among them."""
        ahead = self._ahead - sum(map(self._done, self._computing()))
        return prompt_tokens + ahead / max(self._lanes(), 1)

    def _done(self, run: Run) -> float:
        """Tokens of a prompt that are computed already, as far as its route's pace tells."""
        now = self._clock()
        slope = None if run.route is None else self._lines[run.route].slope(now)
        if run.computing_since is None or not slope:
            return 0.0
        return min((now - run.computing_since) / slope, run.prompt_tokens)


@dataclass(slots=True, eq=False)
class Run:
    """One request. Each of its moments counts once, however often it is told."""

    pace: TtftPredictor
    prompt_tokens: int
    # To be computed before its first token.
    tokens: float
    began: float
    # None: not known yet.
    route: str | None = None
    computing_since: float | None = None
    _arrived: bool = False

    def takes(self, route: str) -> None:
        """It is computed on that route."""
        self.route = route

    def token(self) -> None:
        """A token came, so the prompt is computed; or none will come."""
        self.pace.computed(self)

    def text(self) -> None:
        """Text leaves for the client."""
        if not self._arrived:
            self._arrived = True
            self.pace.arrived(self)
