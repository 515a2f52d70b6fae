"""How a streamed answer and its figures look on a terminal, or in a log. Knows no command."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from stitch.cli.output import decision_line, stages_line, timing_line
from stitch.client import Answer, RouteDecision, Stream


def show_stream(console: Console, stream: Stream) -> Answer:
    """Prints the judgement, the answer as it comes, and where the time went."""
    for event in stream:
        if isinstance(event, RouteDecision):
            console.print(Text(decision_line(event), style="cyan"), soft_wrap=True)
        else:
            console.out(event.text, end="", highlight=False)
            console.file.flush()
    console.out()
    show_figures(console, stream.answer)
    return stream.answer


def show_figures(console: Console, answer: Answer) -> None:
    """Prints tokens, durations and stages."""
    console.print(Text(timing_line(answer), style="dim"), soft_wrap=True)
    if answer.stages:
        console.print(Text(f"first token: {stages_line(answer)}", style="dim"), soft_wrap=True)
