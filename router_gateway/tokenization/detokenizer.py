"""Token ids to text, piece by piece, never half a character. Knows nothing of stop strings.

A byte-level token may end inside of a character, and a decoder may treat the first token of a sequence differently.
So the tokens of the last whole piece stay in front of the new ones as context, and what they decode to is not
repeated. Every push decodes one such window, whose length has a bound: O(1) a token, amortised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a decoder puts in place of bytes that are no character, or none yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character begun has at most 3 of its 4 bytes; decoders with byte tokens show each of these as a replacement.
MAX_OPEN_BYTES = 3
# Bytes that never become characters would let the window grow with the answer.
MAX_WINDOW_TOKENS = 32

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """The text of one answer.

    `decode` turns ids into text as a whole; ids in `silent` (special tokens) have no text and are left out.
    The pieces that `push` and `finish` return are, put together, `decode` of all ids.
    """

    def __init__(self, decode: Decode, silent: frozenset[int] = frozenset()) -> None:
        self._decode = decode
        self._silent = silent
        self._window: list[int] = []
        # Tokens of the window whose text is out, and characters of the window's text that are out.
        self._context_tokens = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty in the middle of a character."""
        if token_id in self._silent:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        piece = self._show(text, len(text) - _open_characters(text))
        if not text.endswith(REPLACEMENT):
            self._forget(self._context_tokens)
        elif len(self._window) > MAX_WINDOW_TOKENS:
            self._forget_junk(text)
        return piece

    def finish(self) -> str:
        """What was held back, as it is: the answer is over."""
        text = self._decode(self._window)
        return self._show(text, len(text))

    def _show(self, text: str, end: int) -> str:
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _forget(self, tokens: int) -> None:
        """Drops the window's first tokens and keeps the rest, all of it shown, as context."""
        self._window = self._window[tokens:]
        self._context_tokens = len(self._window)
        self._shown = len(self._decode(self._window))

    def _forget_junk(self, text: str) -> None:
        """Cuts the window where no character spans the cut, so that the text stays the same."""
        for cut in range(len(self._window) - MAX_OPEN_BYTES - 1, 0, -1):
            before, after = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if before + after == text and len(before) <= self._shown:
                self._window = self._window[cut:]
                self._context_tokens = 0
                self._shown -= len(before)
                return


def _open_characters(text: str) -> int:
    """Replacements at the end that the next token may still turn into a character."""
    trailing = len(text) - len(text.rstrip(REPLACEMENT))
    return min(trailing, MAX_OPEN_BYTES)
