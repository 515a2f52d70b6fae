"""Text of a peer stays within its line of the log."""

from __future__ import annotations

import logging

import pytest

from stitch.errors import plain
from stitch.logs import FORMAT, LineFormatter

FORGED = "gone\n2026-01-01 00:00:00 INFO stitch: all is well\r\x1b[31m"


def formatted(message: str, *arguments: object, error: BaseException | None = None) -> str:
    info = None if error is None else (type(error), error, None)
    record = logging.LogRecord("stitch_server.rpc", logging.WARNING, __file__, 1, message, arguments, info)
    return LineFormatter(FORMAT).format(record)


def test_line_breaks_and_control_characters_of_an_argument_are_escaped() -> None:
    line = formatted("link to %s: %s", "top-0", FORGED)
    assert line.endswith(r"link to top-0: gone\n2026-01-01 00:00:00 INFO stitch: all is well\r\x1b[31m")
    assert line.isprintable()


def test_lines_of_a_traceback_are_indented_and_escaped() -> None:
    first, *others = formatted("it broke", error=ValueError(FORGED)).splitlines()
    assert first.endswith("stitch_server.rpc: it broke")
    assert len(others) == 3
    assert all(line.startswith("    ") and line.isprintable() for line in others)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("世界", "世界"),
        ("a\tb", r"a\tb"),
        ("a\u2028b", r"a\u2028b"),
        ("a\ud800", r"a\ud800"),
        ("abcdefgh", "abcd…"),
    ],
)
def test_plain_text_is_printable_and_bounded(text: str, expected: str) -> None:
    assert plain(text, 5) == expected
