"""Finds the messages of a conversation in the text that a chat template renders of it.

A template is a program: it may trim messages, escape them, repeat them, or leave out a part of one. So the conversation
is rendered again with a mark at both ends of every message, each one a character that no text has. Without its marks
that rendering must equal the first. It differs where a template trims messages, so they are marked within the spaces
around them then; and where a template looks at how a message begins or ends, they are searched in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# The first of the characters for private use, which templates pass on as they are; two for each message.
_FIRST_MARK, _LAST_MARK = 0xF0000, 0x10FFFD


class ContentSpan(NamedTuple):
    """The characters [start, end) of a rendering that are a message's."""

    message: int
    start: int
    end: int


def content_spans(render: Callable[[Sequence[str]], str], contents: Sequence[str]) -> tuple[str, list[ContentSpan]]:
    """Returns the rendering of a conversation and where its messages are in it.

    `render` renders the conversation with the given contents in place of its own. A message may be there several times,
    and not at all where the template leaves it out. Raises ValueError where a message can't be found.
    """
    text = render(contents)
    first = _unused_marks(contents, text)
    if first is None:
        return text, list(_searched(text, contents))
    for cores in (contents, [content.strip() for content in contents]):
        pairs = zip(contents, cores, strict=True)
        marked = render([_marked(*pair, first + 2 * index) for index, pair in enumerate(pairs)])
        plain = "".join(character for character in marked if not _is_mark(character, first, contents))
        if plain == text:
            return text, sorted(_between_marks(marked, text, cores, first), key=lambda span: span.start)
    return text, list(_searched(text, contents))


def _unused_marks(contents: Sequence[str], text: str) -> int | None:
    """Returns the first of two private characters for each message that no text has; None where there are none."""
    used = {ord(one) for one in "".join((text, *contents)) if ord(one) >= _FIRST_MARK}
    first = max(used, default=_FIRST_MARK - 1) + 1
    return first if first + 2 * len(contents) <= _LAST_MARK else None


def _is_mark(character: str, first: int, contents: Sequence[str]) -> bool:
    return first <= ord(character) < first + 2 * len(contents)


def _marked(content: str, core: str, mark: int) -> str:
    """Puts marks around the core of the content."""
    if not core:
        return content
    start = content.index(core)
    return content[:start] + chr(mark) + core + chr(mark + 1) + content[start + len(core) :]


def _between_marks(marked: str, text: str, cores: Sequence[str], first: int) -> Iterator[ContentSpan]:
    """Yields the spans between marks; where one of two is missing, that of the part of the message beside the other."""
    opened: dict[int, int] = {}
    position = 0
    for character in marked:
        if not _is_mark(character, first, cores):
            position += 1
            continue
        message, is_end = divmod(ord(character) - first, 2)
        if not is_end:
            opened[message] = position
            continue
        start = opened.pop(message, None)
        if start is None:
            start = position - _common_length(cores[message][::-1], text[:position][::-1])
        yield ContentSpan(message, start, position)
    for message, start in opened.items():
        yield ContentSpan(message, start, start + _common_length(cores[message], text[start:]))


def _common_length(one: str, other: str) -> int:
    """Returns the length of the longest common prefix."""
    return next(
        (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


def _searched(text: str, contents: Sequence[str]) -> Iterator[ContentSpan]:
    """Yields the first place of every message after the one before it."""
    position = 0
    for message, content in enumerate(contents):
        if core := content.strip():
            start = text.find(core, position)
            if start < 0:
                raise ValueError(f"the chat template does not render message {message} as it is: {core[:80]!r}")
            position = start + len(core)
            yield ContentSpan(message, start, position)
