"""Finds the first stop string in a text that arrives in pieces, and holds back what may be the start of one.

Each string has a Knuth-Morris-Pratt automaton, whose state is the number of its characters that the text ends with. So
the largest state is exactly the number of characters to hold back, and a character costs O(1), amortized.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Pieces in, pieces without stop strings out; `found` once one was found."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._automata = [_Automaton(string) for string in strings]
        self._held = ""
        self.found = False

    def push(self, text: str, may_end: bool = True) -> str:
        """The text that surely precedes any stop string; empty after one was found.

        Without `may_end` a string that ends in this text is none.
        """
        if self.found or not self._automata:
            return "" if self.found else text
        joined = self._held + text
        for index in range(len(self._held), len(joined)):
            matched = self._advance(joined[index])
            if matched and may_end:
                self.found, self._held = True, ""
                return joined[: index + 1 - matched]
        keep = max(automaton.state for automaton in self._automata)
        end = len(joined) - keep
        self._held = joined[end:]
        return joined[:end]

    def finish(self) -> str:
        """The text that was held back and did not become a stop string; ends the answer."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """The length of the longest string that ends here, or 0."""
        return max(len(automaton.string) if automaton.advance(character) else 0 for automaton in self._automata)


class _Automaton:
    def __init__(self, string: str) -> None:
        self.string = string
        self.state = 0
        self._fallback = _border_lengths(string)

    def advance(self, character: str) -> bool:
        """Whether the string ends with this character."""
        if self.state == len(self.string):
            self.state = self._fallback[-1]
        while self.state and self.string[self.state] != character:
            self.state = self._fallback[self.state - 1]
        if self.string[self.state] == character:
            self.state += 1
        return self.state == len(self.string)


def _border_lengths(string: str) -> list[int]:
    """For every prefix, the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(string)
    for index in range(1, len(string)):
        border = lengths[index - 1]
        while border and string[index] != string[border]:
            border = lengths[border - 1]
        lengths[index] = border + (string[index] == string[border])
    return lengths
