"""From tokens to the pieces of text that a client sees. Knows no clock and no shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from router_gateway.requests.types import Delta, Token
from router_gateway.tokenization.detokenizer import Detokenizer
from router_gateway.tokenization.stop_strings import StopStrings


class Answer:
    """The text so far. Tokens wait for the next piece of text, so that none is lost and none comes twice."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop)
        self._waiting: list[Token] = []
        self.generated_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: the answer is over."""
        return self._stop.found

    def push(self, tokens: Iterable[Token]) -> Delta | None:
        """The next piece, or None where nothing is certain yet. Tokens behind a stop string are dropped."""
        text = ""
        for token in tokens:
            if self.stopped:
                break
            self.generated_tokens += 1
            self._waiting.append(token)
            text += self._stop.push(self._detokenizer.push(token.id))
        return self._delta(text) if text else None

    def finish(self) -> Delta | None:
        """What was held back, with the tokens that had no text; None where there is neither."""
        text = "" if self.stopped else self._stop.push(self._detokenizer.finish()) + self._stop.finish()
        return self._delta(text) if text or self._waiting else None

    def _delta(self, text: str) -> Delta:
        tokens, self._waiting = tuple(self._waiting), []
        return Delta(text, tokens)
