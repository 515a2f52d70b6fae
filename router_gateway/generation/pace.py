"""How long requests take to their first text at this gateway, and what is under way. Knows no text and no limit.

Prompts are computed in the order of their arrival, so a request waits for those before it, whatever their routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from router_gateway.routing.ttft import TtftLine


class Pace:
    """Predicts for requests that come, and learns from those under way. `lanes`: first shards that share the work."""

    def __init__(self, routes: Iterable[str], lanes: Callable[[], int], clock: Callable[[], float]) -> None:
        self._lines = {route: TtftLine() for route in routes}
        self._lanes = lanes
        self._clock = clock
        # Tokens of prompts whose first token has not come.
        self._ahead = 0

    def seconds(self, route: str, prompt_tokens: int) -> float | None:
        """From now to the first text, which nearly all requests keep to; None where too little is known."""
        return self._lines[route].bound(self._tokens(prompt_tokens), self._clock())

    def begin(self, route: str, prompt_tokens: int) -> Run:
        """A request takes a route now."""
        run = Run(self, route, prompt_tokens, self._tokens(prompt_tokens), self._clock())
        self._ahead += prompt_tokens
        return run

    def computed(self, prompt_tokens: int) -> None:
        """A prompt stands before nobody any more."""
        self._ahead -= prompt_tokens

    def arrived(self, route: str, tokens: float, began: float) -> None:
        """The first text of a request that began then, with so much to compute."""
        now = self._clock()
        # A clock may be too coarse for a fake shard.
        self._lines[route].observe(tokens, max(now - began, 1e-6), now)

    def _tokens(self, prompt_tokens: int) -> float:
        """To be computed before the first token of such a prompt, its own among them."""
        return prompt_tokens + self._ahead / max(self._lanes(), 1)


@dataclass(slots=True)
class Run:
    """One request on its route. Each of its moments counts once, however often it is told."""

    pace: Pace
    route: str
    prompt_tokens: int
    # To be computed before its first token.
    tokens: float
    began: float
    _computed: bool = False
    _arrived: bool = False

    def token(self) -> None:
        """A token came, so the prompt is computed; or none will come."""
        if not self._computed:
            self._computed = True
            self.pace.computed(self.prompt_tokens)

    def text(self) -> None:
        """Text leaves for the client."""
        if not self._arrived:
            self._arrived = True
            self.pace.arrived(self.route, self.tokens, self.began)
