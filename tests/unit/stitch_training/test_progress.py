"""What a long run tells, on a terminal and in a log."""

from __future__ import annotations

import io

from stitch_training.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(stream: io.StringIO) -> str:
    with ProgressLine(stream) as progress:
        for done in range(1, 21):
            progress("data", done, 20)
        progress("distil", 1, 1)
    return stream.getvalue()


def test_a_log_gets_a_line_for_every_tenth() -> None:
    lines = told(io.StringIO()).splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == ["data: 1 of 20", "data: 2 of 20", "data: 4 of 20"]
    assert len(lines) == 12
    assert lines[-1] == "distil: 1 of 1"


def test_a_terminal_keeps_one_line() -> None:
    text = told(Terminal())
    assert text.count("\n") == 1
    assert text.count("\r") == 21
    assert text.endswith("distil: 1 of 1\n")


def test_nothing_done_prints_nothing() -> None:
    terminal = Terminal()
    with ProgressLine(terminal):
        pass
    assert terminal.getvalue() == ""
