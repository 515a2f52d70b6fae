"""Decodes token ids to text incrementally: one id in, the text that is final now out, never half a character.

A byte-level token may end inside a character, and a decoder may treat the first token of a sequence differently. So
the tokens of the last complete piece stay before the new ones as context, and their text is not repeated. Every push
decodes one such window of bounded length, so a token costs O(1), amortized. A byte-fallback decoder turns a whole run
of bytes into replacements because of one invalid byte, so the text of a run is final with the token after it. All
pieces joined equal the decoding of all ids at once, for any ids and wherever the answer ends.

`tokenizers.decoders.DecodeStream` is not used: on such a run it raises, it has no end of stream that would return an
incomplete character, and its window grows with a run of invalid bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A decoder puts it in place of bytes that are not, or not yet, a character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# An incomplete character has at most 3 of its 4 bytes; byte-fallback decoders show each of them as a replacement.
MAX_OPEN_BYTES = 3
# Without it, invalid bytes would let the window grow with the answer.
MAX_WINDOW_TOKENS = 32

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Decodes one answer.

    `decode` decodes a list of ids at once; ids in `silent` (special tokens) have no text, and those in `byte_tokens`
    are bytes of a byte-fallback decoder. The pieces that `push` and `finish` return are, joined, `decode` of all ids.
    """

    def __init__(
        self, decode: Decode, silent: frozenset[int] = frozenset(), byte_tokens: frozenset[int] = frozenset()
    ) -> None:
        self._decode = decode
        self._silent = silent
        self._byte_tokens = byte_tokens
        # The window, without the run of bytes that follows it.
        self._window: list[int] = []
        self._run: list[int] = []
        # Tokens at the window's start that are context, and characters of the window's text that were returned.
        self._context_tokens = 0
        self._returned = 0

    def push(self, token_id: int) -> str:
        """The text that is final now; empty within a character or a run of bytes."""
        if token_id in self._silent:
            return ""
        self._run.append(token_id)
        if token_id in self._byte_tokens:
            return ""
        self._window += self._run
        self._run = []
        text = self._decode(self._window)
        piece = self._advance(text, len(text) - _open_characters(text))
        if not text.endswith(REPLACEMENT):
            self._keep_as_context()
        elif len(self._window) > MAX_WINDOW_TOKENS:
            self._drop_invalid(text)
        return piece

    def finish(self) -> str:
        """The text that was held back, incomplete characters as replacements; ends the answer."""
        text = self._decode([*self._window, *self._run])
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        piece = text[self._returned : end]
        self._returned = max(self._returned, end)
        return piece

    def _keep_as_context(self) -> None:
        """Drops the old context; the other tokens, whose text was returned, become the context of the next ones."""
        tokens = self._window[self._context_tokens :]
        if text := self._decode(tokens):
            self._window, self._context_tokens, self._returned = tokens, len(tokens), len(text)
        elif len(tokens) > MAX_WINDOW_TOKENS:
            # Without text they are no context: a decoder may strip the start of what follows.
            self._window = self._window[: self._context_tokens]
            self._returned = len(self._decode(self._window))

    def _drop_invalid(self, text: str) -> None:
        """Drops a prefix of a window full of invalid bytes, up to where no character spans the end of the prefix."""
        for end in range(len(self._window) - MAX_OPEN_BYTES - 1, 0, -1):
            dropped, kept = self._decode(self._window[:end]), self._decode(self._window[end:])
            if dropped + kept == text and len(dropped) <= self._returned:
                self._window = self._window[end:]
                self._context_tokens = 0
                self._returned -= len(dropped)
                return


def _open_characters(text: str) -> int:
    """How many replacements at the end may still become a character with the next tokens."""
    trailing = len(text) - len(text.rstrip(REPLACEMENT))
    return min(trailing, MAX_OPEN_BYTES)
