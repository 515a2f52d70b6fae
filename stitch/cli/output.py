"""Judgements and answers as lines of text. Knows no terminal."""

from __future__ import annotations

from stitch.cli.ttft_samples import Line
from stitch.client import Answer, RouteDecision


def decision_line(judged: RouteDecision | Answer) -> str:
    """Route, score and reason."""
    return f"route {judged.route} · score {judged.score:.2f} · {judged.reason}"


def timing_line(answer: Answer) -> str:
    """Tokens and durations."""
    parts = [
        f"{answer.prompt_tokens} prompt tokens",
        f"{answer.generated_tokens} generated ({answer.finish_reason})",
        f"first token {seconds(answer.ttft_seconds)}",
        f"total {seconds(answer.total_seconds)}",
    ]
    speed = tokens_per_second(answer)
    return " · ".join(parts if speed is None else [*parts, f"{speed:.1f} tokens/s"])


def stages_line(answer: Answer) -> str:
    """Where the time to the first token went."""
    return " · ".join(f"{stage.replace('_', ' ')} {seconds(spent)}" for stage, spent in answer.stages.items())


def tokens_per_second(answer: Answer) -> float | None:
    """The pace behind the first token; None where there is nothing behind it."""
    if answer.ttft_seconds is None or answer.generated_tokens < 2 or answer.total_seconds <= answer.ttft_seconds:
        return None
    return (answer.generated_tokens - 1) / (answer.total_seconds - answer.ttft_seconds)


def seconds(duration: float | None) -> str:
    """A duration in the unit in which it reads best."""
    if duration is None:
        return "–"
    if abs(duration) >= 1:
        return f"{duration:.2f} s"
    # A microsecond is noise.
    return f"{round(duration * 1000, 2) + 0.0:.3g} ms"


def line_text(line: Line) -> str:
    """A regression line's slope, intercept and fit."""
    sign = "−" if line.intercept_seconds < 0 else "+"
    formula = f"{line.slope_seconds * 1000:.2f} ms a token {sign} {seconds(abs(line.intercept_seconds))}"
    return f"{formula}, R² {line.r_squared:.3f}"


def millions(count: int) -> str:
    """A number of parameters."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
