"""Decodes token ids to text incrementally: one id in, the text that is final now out, never half a character.

A byte-level token may end inside a character, and a decoder may treat the first token of a sequence differently. So
the tokens of the last complete piece stay before the new ones as context, and their text is not repeated. Every push
decodes one such window of bounded length, so a token costs O(1), amortized. All pieces joined equal the decoding of all
ids at once, with one exception: a byte-fallback decoder turns a whole run of bytes into replacements because of one
invalid byte, also characters before it, and text that was returned stays.

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

    `decode` decodes a list of ids at once; ids in `silent` (special tokens) have no text. The pieces that `push` and
    `finish` return are, joined, `decode` of all other ids (see above).
    """

    def __init__(self, decode: Decode, silent: frozenset[int] = frozenset()) -> None:
        self._decode = decode
        self._silent = silent
        self._window: list[int] = []
        # Tokens at the window's start that are context, and the window's text that was returned, theirs included.
        self._context_tokens = 0
        self._returned = ""

    def push(self, token_id: int) -> str:
        """The text that is final now; empty within a character."""
        if token_id in self._silent:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.startswith(self._returned):
            # The new byte may be the start of a character that makes the run of bytes valid again.
            if text.endswith(REPLACEMENT) and len(self._window) <= MAX_WINDOW_TOKENS:
                return ""
            text = self._drop_context()
        piece = self._advance(text, len(text) - _open_characters(text))
        if not text.endswith(REPLACEMENT):
            self._keep_as_context()
        elif len(self._window) > MAX_WINDOW_TOKENS:
            self._drop_invalid(text)
        return piece

    def finish(self) -> str:
        """The text that was held back, incomplete characters as replacements; ends the answer."""
        text = self._decode(self._window)
        if not text.startswith(self._returned):
            text = self._drop_context()
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        piece = text[len(self._returned) : end]
        self._returned += piece
        return piece

    def _keep_as_context(self) -> None:
        """Drops the old context; the other tokens, whose text was returned, become the context of the next ones."""
        self._window = self._window[self._context_tokens :]
        self._context_tokens = len(self._window)
        self._returned = self._decode(self._window)

    def _drop_context(self) -> str:
        """Drops a context that would be invalid together with the tokens after it, and decodes those alone."""
        self._window = self._window[self._context_tokens :]
        self._context_tokens, self._returned = 0, ""
        return self._decode(self._window)

    def _drop_invalid(self, text: str) -> None:
        """Drops a prefix of a window full of invalid bytes, up to where no character spans the end of the prefix."""
        for end in range(len(self._window) - MAX_OPEN_BYTES - 1, 0, -1):
            dropped, kept = self._decode(self._window[:end]), self._decode(self._window[end:])
            if dropped + kept == text and len(dropped) <= len(self._returned):
                self._window = self._window[end:]
                self._context_tokens = 0
                self._returned = self._returned[len(dropped) :]
                return


def _open_characters(text: str) -> int:
    """How many replacements at the end may still become a character with the next tokens."""
    trailing = len(text) - len(text.rstrip(REPLACEMENT))
    return min(trailing, MAX_OPEN_BYTES)
