"""Labels prompts through a running cluster: how good each route's answer is, appended to a file of JSON lines.

The quality of a route on a prompt is measured by the best measure that the row allows, none of which a route made:

    gold        1 where the route's answer matches the row's `answer`, else 0
    doctests    1 where the code in the answer passes the row's `doctests` in the sandbox, else 0
    reference   how likely the route finds the row's `reference`: the geometric mean of its tokens' probabilities

A row without any of them is refused. Lines are appended as prompts finish, so an interrupted run resumes
(`prompt_runs`). Lines of gold and doctests have the routes' `answers`, so that a person can check the labels.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol, TextIO, TypeAlias

from stitch.client import Answer, AsyncClient
from stitch.client.until_room import until_room
from stitch.errors import InvalidRequest
from stitch_training.functions import is_correct
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
from stitch_training.sandbox import DoctestedFunction, check_platform

Row: TypeAlias = Mapping[str, Any]
Measure: TypeAlias = Literal["gold", "doctests", "reference"]

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
        return (await self._ask(fields)).text

    async def likelihood(self, prompt: str, route: str, answer: str) -> float:
        """See `Routes`; over the answer's first `max_tokens` tokens."""
        fields = self._fields(prompt, route) | {"forced_answer": answer, "logprobs": 0, "ignore_eos": True}
        reply = await self._ask(fields)
        return math.exp(fmean(token.logprob for token in reply.logprobs))

    async def _ask(self, fields: dict[str, Any]) -> Answer:
        return await until_room(lambda: self.client.generate(**fields, timeout=ANSWER_TIMEOUT_SECONDS))

    def _fields(self, prompt: str, route: str) -> dict[str, Any]:
        content = {"prompt": prompt} if self.is_plain else {"messages": [{"role": "user", "content": prompt}]}
        return {**content, "route": route, "max_tokens": self.max_tokens}


@dataclass(frozen=True)
class QualityLabel:
    """The quality of every route on one prompt, 0 to 1, its measure, and the answers that were generated for it."""

    qualities: dict[str, float]
    measure: Measure
    answers: dict[str, str] = field(default_factory=dict)


def measure_of(row: Row, location: str) -> Measure:
    """Returns the measure that a row allows. Raises InvalidRequest, which names the location, where there is none."""
    if isinstance(row.get("answer"), str):
        return "gold"
    if "doctests" in row:
        doctested_function(row, location)
        return "doctests"
    if isinstance(row.get("reference"), str):
        return "reference"
    raise InvalidRequest(location, sorted(row), "a row needs an `answer`, `doctests` or a `reference`")


def doctested_function(row: Row, location: str = "row") -> DoctestedFunction:
    """Returns the function of a row's `doctests`. Raises InvalidRequest where a field is missing or no text."""
    given, names = row["doctests"], ("name", "header", "doc")
    if not isinstance(given, dict) or not all(isinstance(given.get(name), str) for name in names):
        raise InvalidRequest(f"{location}.doctests", given, f"it needs the texts {', '.join(names)}")
    module = given.get("module")
    if module is not None and str(module).partition(".")[0] not in sys.stdlib_module_names:
        raise InvalidRequest(f"{location}.doctests.module", module, "it must be one of the standard library, or absent")
    return DoctestedFunction(module, *(given[name] for name in names))


async def measure_quality(row: Row, names: Sequence[str], routes: Routes) -> QualityLabel:
    """Measures the named routes on one row. Raises what `routes` raises, and InvalidRequest as `measure_of` does."""
    prompt, measure = row["prompt"], measure_of(row, "row")
    if measure == "reference":
        return QualityLabel(await _likelihoods(prompt, names, routes, row["reference"]), measure)
    answers = {name: await routes.answer(prompt, name) for name in names}
    if measure == "gold":
        correct = {name: matches_gold(answer, row["answer"]) for name, answer in answers.items()}
    else:
        function = doctested_function(row)
        correct = {name: await asyncio.to_thread(is_correct, answer, function) for name, answer in answers.items()}
    return QualityLabel({name: float(one) for name, one in correct.items()}, measure, answers)


async def _likelihoods(prompt: str, names: Sequence[str], routes: Routes, answer: str) -> dict[str, float]:
    return {name: await routes.likelihood(prompt, name, answer) for name in names}


@dataclass(frozen=True)
class LabellingSettings:
    """The gateway and the prompts of a labelling run."""

    connection: GatewayConnection
    data: Path
    out: Path
    # Empty: the cheapest and the costliest of the cluster.
    routes: tuple[str, ...]
    max_tokens: int
    concurrency: int
    is_plain: bool


async def label_file(settings: LabellingSettings) -> RunProgress:
    """Labels the prompts of a file that the output doesn't have yet."""
    rows = read_rows(settings.data)
    async with settings.connection.open() as client:
        names = chosen_routes(settings.routes, [route.name for route in (await client.describe()).routes])
        remaining = remaining_rows(rows, settings.out, names)
        routes = ClusterRoutes(client, settings.max_tokens, settings.is_plain)
        with open_for_append(settings.out) as out:
            return await label_rows(remaining, names, routes, out, settings.concurrency, reporter())


def chosen_routes(given: Sequence[str], served: Sequence[str]) -> tuple[str, ...]:
    """Returns the given routes, or else the ends of those that the cluster serves, which are cheapest first.

    Raises InvalidRequest for a route that is not served.
    """
    for name in given:
        if name not in served:
            raise InvalidRequest("routes", name, f"the cluster serves {', '.join(served)}")
    return tuple(given) or tuple(dict.fromkeys([served[0], served[-1]]))


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
    """Reads the rows of a file. Raises InvalidRequest, which names the line, where one is invalid or has no measure."""
    rows: list[Row] = []
    for number, row in read_json_lines(path):
        if measure_of(row, f"{path.name}:{number}") == "doctests":
            check_platform()
        rows.append(row)
    return rows


def remaining_rows(rows: Sequence[Row], out: Path, names: Sequence[str]) -> list[Row]:
    """Returns the rows whose prompts the output doesn't have yet, each prompt once.

    Raises InvalidRequest where the output has labels of other routes than the named ones.
    """
    labelled = set()
    if out.exists():
        drop_incomplete_line(out)
        for number, row in read_json_lines(out):
            if set(row.get("routes", ())) != set(names):
                limit = f"this run labels {', '.join(names)}"
                raise InvalidRequest(f"{out.name}:{number}.routes", sorted(row.get("routes", ())), limit)
            labelled.add(row["prompt"])
    remaining = {row["prompt"]: row for row in rows if row["prompt"] not in labelled}
    return list(remaining.values())


def _line(row: Row, label: QualityLabel) -> str:
    fields = {"prompt": row["prompt"], "routes": label.qualities, "measure": label.measure}
    if "task" in row:
        fields["task"] = row["task"]
    if label.answers:
        fields["answers"] = label.answers
    return json.dumps(fields, ensure_ascii=False) + "\n"
