"""Labels prompts through a running cluster: how good each route's answer is, appended to a file of JSON lines.

The quality of a route on a prompt is measured by the best measure that the row allows:

    gold        1 where the route's answer matches the row's `answer`, else 0
    reference   how likely the route finds the row's `reference`: the geometric mean of its tokens' probabilities
    agreement   the same of the strongest route's answer, where a row has neither

Lines are appended as prompts finish, so an interrupted run resumes (`prompt_runs`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol, TextIO, TypeAlias

from stitch.client import AsyncClient
from stitch.errors import InvalidRequest
from stitch_training.labels import read_json_lines
from stitch_training.prompt_runs import (
    ANSWER_TIMEOUT_SECONDS,
    GatewayConnection,
    RunProgress,
    append_lines,
    drop_incomplete_line,
    open_for_append,
    reporter,
)

Row: TypeAlias = Mapping[str, Any]
Measure: TypeAlias = Literal["gold", "reference", "agreement"]

_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# GSM8K's gold answers are a derivation, this mark, and the number.
GOLD_MARK = "####"


def matches_gold(answer: str, gold: str) -> bool:
    """Whether an answer's last number is the gold number, or its first or last words are the gold words."""
    expected = gold.rpartition(GOLD_MARK)[2].strip()
    if _NUMBER.fullmatch(expected):
        numbers = _NUMBER.findall(answer)
        return bool(numbers) and _number(numbers[-1]) == _number(expected)
    words, given = _words(expected), _words(answer)
    return bool(words) and words in (given[: len(words)], given[-len(words) :])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _number(text: str) -> float:
    return float(text.replace(",", ""))


class Routes(Protocol):
    """The routes of a cluster. Both methods raise StitchError where a route gives no answer."""

    async def answer(self, prompt: str, route: str) -> str:
        """Generates a route's answer to a prompt."""
        ...

    async def likelihood(self, prompt: str, route: str, answer: str) -> float:
        """Returns the geometric mean of the probabilities, 0 to 1, that a route gives to the tokens of an answer."""
        ...


@dataclass(frozen=True)
class ClusterRoutes:
    """The routes of a gateway's cluster, which generate greedily."""

    client: AsyncClient
    max_tokens: int
    # Whether prompts are sent as plain text instead of a chat.
    is_plain: bool

    async def answer(self, prompt: str, route: str) -> str:
        """See `Routes`."""
        fields = self._fields(prompt, route) | {"temperature": 0.0}
        return (await self.client.generate(**fields, timeout=ANSWER_TIMEOUT_SECONDS)).text

    async def likelihood(self, prompt: str, route: str, answer: str) -> float:
        """See `Routes`; over the answer's first `max_tokens` tokens."""
        fields = self._fields(prompt, route) | {"forced_answer": answer, "logprobs": 0, "ignore_eos": True}
        reply = await self.client.generate(**fields, timeout=ANSWER_TIMEOUT_SECONDS)
        return math.exp(fmean(token.logprob for token in reply.logprobs))

    def _fields(self, prompt: str, route: str) -> dict[str, Any]:
        content = {"prompt": prompt} if self.is_plain else {"messages": [{"role": "user", "content": prompt}]}
        return {**content, "route": route, "max_tokens": self.max_tokens}


@dataclass(frozen=True)
class QualityLabel:
    """The quality of every route on one prompt, 0 to 1, and its measure."""

    qualities: dict[str, float]
    measure: Measure


async def measure_quality(row: Row, names: Sequence[str], routes: Routes) -> QualityLabel:
    """Measures the named routes, which are cheapest first, on one row. Raises what `routes` raises."""
    prompt, gold, reference = row["prompt"], row.get("answer"), row.get("reference")
    if isinstance(gold, str):
        qualities = {name: float(matches_gold(await routes.answer(prompt, name), gold)) for name in names}
        return QualityLabel(qualities, "gold")
    if isinstance(reference, str):
        return QualityLabel(await _likelihoods(prompt, names, routes, reference), "reference")
    strongest = await routes.answer(prompt, names[-1])
    return QualityLabel(await _likelihoods(prompt, names, routes, strongest), "agreement")


async def _likelihoods(prompt: str, names: Sequence[str], routes: Routes, answer: str) -> dict[str, float]:
    return {name: await routes.likelihood(prompt, name, answer) for name in names}


@dataclass(frozen=True)
class LabellingSettings:
    """The gateway and the prompts of a labelling run."""

    connection: GatewayConnection
    data: Path
    out: Path
    # Cheapest first; empty: all routes of the cluster.
    routes: tuple[str, ...]
    max_tokens: int
    concurrency: int
    is_plain: bool


async def label_file(settings: LabellingSettings) -> RunProgress:
    """Labels the prompts of a file that the output doesn't have yet."""
    rows = remaining_rows(read_rows(settings.data), settings.out)
    async with settings.connection.open() as client:
        names = settings.routes or [route.name for route in (await client.describe()).routes]
        routes = ClusterRoutes(client, settings.max_tokens, settings.is_plain)
        with open_for_append(settings.out) as out:
            return await label_rows(rows, names, routes, out, settings.concurrency, reporter())


async def label_rows(
    rows: Sequence[Row],
    names: Sequence[str],
    routes: Routes,
    out: TextIO,
    concurrency: int,
    report: Callable[[RunProgress], None] = lambda progress: None,
) -> RunProgress:
    """Writes one line for each row that every named route answered, with `concurrency` rows in flight.

    Raises InvalidRequest for fewer than two routes: one alone can't be compared.
    """
    if len(names) < 2:
        raise InvalidRequest("routes", list(names), "there must be at least two routes")

    async def line_of(row: Row) -> str:
        return _line(row, await measure_quality(row, names, routes))

    return await append_lines(rows, line_of, out, concurrency, report)


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a file. Raises InvalidRequest where a line is invalid."""
    return [row for _, row in read_json_lines(path)]


def remaining_rows(rows: Sequence[Row], out: Path) -> list[Row]:
    """Returns the rows whose prompts the output doesn't have yet, each prompt once."""
    labelled = set()
    if out.exists():
        drop_incomplete_line(out)
        labelled = {row["prompt"] for _, row in read_json_lines(out)}
    remaining = {row["prompt"]: row for row in rows if row["prompt"] not in labelled}
    return list(remaining.values())


def _line(row: Row, label: QualityLabel) -> str:
    fields = {"prompt": row["prompt"], "routes": label.qualities, "measure": label.measure}
    if "task" in row:
        fields["task"] = row["task"]
    return json.dumps(fields, ensure_ascii=False) + "\n"
