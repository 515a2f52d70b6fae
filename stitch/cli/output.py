"""What the command prints: lines, streamed answers, tables, and the sentence of a failure.

Rich is imported where something is drawn, so that failures and JSON need the client alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import grpc

from stitch.client import Answer, RouteDecision, Stream
from stitch.errors import StitchError

if TYPE_CHECKING:
    from rich.console import Console, Group


# Ends of lines for some readers, and control characters that JSON lets pass.
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}
# A terminal would obey control characters; each shows as a symbol, and the carriage return of a line's end as nothing.
_CONTROL = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t\r"}
_SHOWN = (
    _CONTROL
    | {ord("\r"): "", 0x7F: "\N{SYMBOL FOR DELETE}"}
    | dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}")
)


def for_terminal(text: str) -> str:
    """A text of somebody else's without the control characters that would move the cursor or change the terminal."""
    return text.translate(_SHOWN)


def decision_line(decision: RouteDecision | Answer) -> str:
    """Route, score and reason in one line."""
    return f"route {decision.route} · score {decision.score:.2f} · {decision.reason}"


def timing_line(answer: Answer) -> str:
    """Tokens and durations in one line."""
    columns = [
        f"{answer.prompt_tokens} prompt tokens",
        f"{answer.generated_tokens} generated ({answer.finish_reason})",
        f"first token {seconds(answer.ttft_seconds)}",
        f"total {seconds(answer.total_seconds)}",
    ]
    speed = tokens_per_second(answer)
    return " · ".join(columns if speed is None else [*columns, f"{speed:.1f} tokens/s"])


def stages_line(answer: Answer) -> str:
    """The parts of the time to the first token in one line."""
    return " · ".join(f"{stage.replace('_', ' ')} {seconds(spent)}" for stage, spent in answer.stages.items())


def tokens_per_second(answer: Answer) -> float | None:
    """The decode rate after the first token; None where no token follows it."""
    if answer.ttft_seconds is None or answer.generated_tokens < 2 or answer.total_seconds <= answer.ttft_seconds:
        return None
    return (answer.generated_tokens - 1) / (answer.total_seconds - answer.ttft_seconds)


def seconds(duration: float | None) -> str:
    """A duration in seconds or milliseconds; a dash for None."""
    if duration is None:
        return "–"
    if abs(duration) >= 1:
        return f"{duration:.2f} s"
    # A microsecond is noise.
    return f"{round(duration * 1000, 2) + 0.0:.3g} ms"


def millions(count: int) -> str:
    """A number of parameters in millions or billions."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def show_stream(console: Console, stream: Stream) -> Answer:
    """Prints the route decision, the answer while it is generated, and its durations."""
    from rich.text import Text

    for event in stream:
        if isinstance(event, RouteDecision):
            console.print(Text(for_terminal(decision_line(event)), style="cyan"), soft_wrap=True)
        elif not event.answer:
            console.out(for_terminal(event.text) if console.is_terminal else event.text, end="", highlight=False)
            console.file.flush()
    answer = stream.answer
    for index, other in enumerate(answer.others, 2):
        console.print(Text(f"\nanswer {index}:", style="cyan"))
        console.out(for_terminal(other.text) if console.is_terminal else other.text, end="", highlight=False)
    console.out()
    console.print(Text(for_terminal(timing_line(answer)), style="dim"), soft_wrap=True)
    if answer.stages:
        console.print(Text(for_terminal(f"first token: {stages_line(answer)}"), style="dim"), soft_wrap=True)
    return answer


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Group:
    """A table of plain text under its title; the columns named in `right` hold numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(for_terminal(cell)) for cell in row))
    return Group(Text(title, style="bold"), drawn)


def json_line(value: object) -> str:
    """`value` as one line of JSON, also for readers that end a line at U+0085, U+2028 or U+2029."""
    return json.dumps(value, ensure_ascii=False).translate(_ESCAPED)


def print_json(value: object) -> None:
    """Prints one line of JSON; in ASCII where the terminal isn't UTF-8."""
    unicode = sys.stdout is not None and "utf" in (sys.stdout.encoding or "").lower()
    print(json_line(value) if unicode else json.dumps(value))


def sentence(error: Exception) -> str:
    """The failure in one sentence; raises the error again where it is a defect of this program."""
    if isinstance(error, StitchError | OSError):
        return for_terminal(str(error))
    if isinstance(error, grpc.RpcError):
        return for_terminal(f"the gateway failed: {error.details() or error.code().name}")
    if isinstance(error, ImportError):
        return f"this needs more than the client ({error}): install stitch-serving[all]"
    raise error
