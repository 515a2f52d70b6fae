"""`stitch demo`: a cluster, one question, several at once, and the time to first token, in two minutes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from stitch.cli.output import decision_line, for_terminal, seconds, show_stream
from stitch.cli.status import show_description
from stitch.cli.ttft import measure_with_progress, show_times, write_plot
from stitch.cli.up import bring_up, take_down
from stitch.client import Answer, Client
from stitch.cluster import load_cluster
from stitch.local.run_folder import run_folder

QUESTION = "Explain step by step how rain forms, and compare it with snow."
QUESTION_TOKENS = 64
# Easy questions, and some that need reasoning or code, so that routes differ.
QUESTIONS = (
    "What is the capital of France?",
    "Compare cats and dogs as pets and explain which suits a small flat better.",
    "Who wrote Hamlet?",
    "A train leaves at 9:40 and needs 2 hours and 35 minutes. When does it arrive, and why? Show every step.",
    "Name three fruits.",
    "def f(x):\n    return x+1\n\nRefactor this function, add type hints and explain each change.",
    "What is the largest planet?",
    "Explain why ice floats on water and compare it with how iron behaves.",
)
ANSWER_TOKENS = 32
LENGTHS = (32, 64, 128, 256, 512)
REPEAT = 3


def run(parsed: argparse.Namespace) -> int:
    """Runs the whole demonstration; uses a cluster that runs already, and leaves it running."""
    console = Console()
    with _serving(console, parsed.cluster) as endpoint, Client(*endpoint) as client:
        found = client.describe()
        routes = [route.name for route in found.routes]
        console.rule("1 · two models, one forward pass")
        show_description(console, found)
        console.rule("2 · one question")
        ask(console, client)
        console.rule(f"3 · {len(QUESTIONS)} questions at once")
        ask_many(console, client)
        console.rule("4 · time to first token against prompt length")
        samples = measure_with_progress(console, client, routes, LENGTHS, REPEAT)
        show_times(console, samples, routes)
        write_plot(console, samples, routes, found.cluster, Path(parsed.out))
    return 0


@contextmanager
def _serving(console: Console, name_or_path: str) -> Iterator[tuple[str, Path | None]]:
    """The endpoint of that cluster's gateway, which is started for the block if it doesn't run."""
    folder = run_folder(load_cluster(name_or_path).name)
    if folder.processes():
        yield folder.cluster().gateway_endpoint
        return
    console.rule("0 · a cluster on this machine")
    cluster = bring_up(console, name_or_path)
    if cluster.cluster.openai_url is not None:
        console.print(f"OpenAI's API is at {cluster.cluster.openai_url}", highlight=False)
    try:
        yield cluster.cluster.gateway_endpoint
    finally:
        take_down(console, cluster)


def ask(console: Console, client: Client) -> None:
    """Asks one question and prints its route decision and the answer while it is generated."""
    _show_question(console, QUESTION)
    show_stream(console, client.stream(messages=_chat(QUESTION), max_tokens=QUESTION_TOKENS))


def ask_many(console: Console, client: Client) -> None:
    """Asks several questions in one call and prints each with its route decision and its answer."""
    requests = [{"messages": _chat(question), "max_tokens": ANSWER_TOKENS} for question in QUESTIONS]
    with console.status("answering all of them together"):
        outcomes = client.batch(requests)
    for question, outcome in zip(QUESTIONS, outcomes, strict=True):
        console.print()
        _show_question(console, question)
        if not isinstance(outcome, Answer):
            raise outcome
        line = f"{decision_line(outcome)} · first token {seconds(outcome.ttft_seconds)}"
        console.print(Text(line, style="cyan"), soft_wrap=True)
        console.print(Text(for_terminal(outcome.text.strip())), soft_wrap=True)


def _show_question(console: Console, question: str) -> None:
    console.print(Text.assemble(("? ", "green"), (question, "bold")), soft_wrap=True)


def _chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]
