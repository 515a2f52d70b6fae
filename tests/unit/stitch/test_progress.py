"""What a progress line prints on a terminal and in a log."""

from __future__ import annotations

import io

from stitch.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(stream: io.StringIO) -> str:
    with ProgressLine(stream) as progress:
        for done in range(1, 21):
            progress("data", done, 20)
        progress("distil", 1, 1)
    return stream.getvalue()


def test_progress_line_prints_every_tenth_to_a_log() -> None:
    lines = printed(io.StringIO()).splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == ["data: 1 of 20", "data: 2 of 20", "data: 4 of 20"]
    assert len(lines) == 12
    assert lines[-1] == "distil: 1 of 1"


def test_progress_line_rewrites_one_line_on_a_terminal() -> None:
    text = printed(Terminal())
    assert text.count("\n") == 1
    assert text.count("\r") == 21
    assert text.endswith("distil: 1 of 1\n")


def test_progress_line_prints_nothing_without_a_task() -> None:
    terminal = Terminal()
    with ProgressLine(terminal):
        pass
    assert terminal.getvalue() == ""
