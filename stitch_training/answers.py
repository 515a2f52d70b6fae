"""Makes training text of a route's own answers: prompts of any files in, a file of conversations out.

Prompts are the turns of a conversation before its first answer. Those that are held out are answered as well: a fit
measures itself on their answers, and never trains on them. A line has the fields `messages`, whose last one is the
answer, `route`, `temperature`, `max_tokens` and `seed`. The tokens of an answer are drawn by the run's seed and the
prompt alone: an interrupted run resumes, and gives the answers that an uninterrupted one gives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from stitch.client import AsyncClient
from stitch.client.until_room import until_room
from stitch.errors import InvalidRequest, shown
from stitch_training.data import Turn, read_documents, shuffle, to_document
from stitch_training.prompt_runs import (
    ANSWER_TIMEOUT_SECONDS,
    GatewayConnection,
    RunProgress,
    append_lines,
    drop_incomplete_line,
    open_for_append,
    reporter,
)

ChatPrompt = tuple[Turn, ...]


@dataclass(frozen=True)
class AnswersSettings:
    """The prompts, and how to answer them."""

    data: tuple[Path, ...]
    out: Path
    route: str
    # The most prompts; None: all.
    prompts: int | None = None
    max_tokens: int = 256
    temperature: float = 0.7
    seed: int = 0
    concurrency: int = 8


async def make_answers(settings: AnswersSettings, connection: GatewayConnection) -> RunProgress:
    """Appends the answers that the output doesn't have yet.

    Raises InvalidRequest where the data can't be read or have no prompt, or the output was made in another way.
    """
    prompts = list(islice(training_prompts(settings), settings.prompts))
    if not prompts:
        names = ", ".join(path.name for path in settings.data)
        raise InvalidRequest("data", names, "it must have a prompt")
    answered = answered_prompts(settings)
    remaining = [prompt for prompt in prompts if prompt not in answered]
    async with connection.open() as client:

        async def line_of(prompt: ChatPrompt) -> str:
            return await _line(client, prompt, settings)

        with open_for_append(settings.out) as out:
            return await append_lines(remaining, line_of, out, settings.concurrency, reporter())


def training_prompts(settings: AnswersSettings) -> Iterator[ChatPrompt]:
    """Yields every prompt once, of the files in turn, each in an order drawn from the seed."""
    streams = [_prompts_of(path, settings.seed) for path in settings.data]
    in_turn = (prompt for prompt in chain.from_iterable(zip_longest(*streams)) if prompt is not None)
    return iter(dict.fromkeys(in_turn))


def _prompts_of(path: Path, seed: int) -> Iterator[ChatPrompt]:
    return (prompt for document in shuffle(read_documents(path), seed) if (prompt := document.prompt()))


def answered_prompts(settings: AnswersSettings) -> set[ChatPrompt]:
    """Returns the prompts that the output has answers to. Raises InvalidRequest where they were made in another way."""
    if not settings.out.exists():
        return set()
    drop_incomplete_line(settings.out)
    answered = set()
    with settings.out.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                answered.add(to_document(row).prompt())
                _check_made_by(row, settings)
            except ValueError as error:
                raise InvalidRequest("out", f"{settings.out.name}:{number}", str(error)) from error
    return answered


def _check_made_by(row: dict[str, Any], settings: AnswersSettings) -> None:
    for name, value in _made_by(settings).items():
        if row.get(name) != value:
            raise ValueError(f"its {name} is {shown(row.get(name))}, not {shown(value)}")


def seed_of(prompt: Sequence[Turn], seed: int) -> int:
    """Returns the seed of a prompt's answer, 64 bits."""
    text = json.dumps([seed, *([turn.role, turn.content] for turn in prompt)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


async def _line(client: AsyncClient, prompt: ChatPrompt, settings: AnswersSettings) -> str:
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in prompt]
    answer = await until_room(
        lambda: client.generate(
            messages=messages,
            route=settings.route,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=seed_of(prompt, settings.seed),
            timeout=ANSWER_TIMEOUT_SECONDS,
        )
    )
    return answer_line(prompt, answer.text, answer.finish_reason, settings)


def answer_line(prompt: ChatPrompt, text: str, finish_reason: str, settings: AnswersSettings) -> str:
    """Returns the line of an answer in the output."""
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in prompt]
    message = {"role": "assistant", "content": text, "finish_reason": finish_reason}
    return json.dumps({"messages": [*messages, message], **_made_by(settings)}, ensure_ascii=False) + "\n"


def _made_by(settings: AnswersSettings) -> dict[str, Any]:
    names = ("route", "temperature", "max_tokens", "seed")
    return {name: getattr(settings, name) for name in names}
