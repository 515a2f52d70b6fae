"""Labelling prompts through a cluster: a story of answers, failures and interruptions, with a client of our own."""

from __future__ import annotations

import asyncio
import io
import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from stitch.errors import InvalidRequest, Unavailable
from stitch_training.label import (
    Progress,
    add_arguments,
    label,
    open_for_more,
    read_rows,
    remaining,
)
from stitch_training.labels import read_labels
from tests.support.labelled_prompts import write

ROUTES = ("weak", "strong")


class Cluster:
    """Knows the sum on its strong route, says 0 on the weak one, and fails where it is told to."""

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.failing = failing
        self.asked: list[tuple[str, str]] = []
        self.most_at_once = 0
        self._now = 0

    async def likelihood(self, prompt: str, route: str, answer: str) -> float:
        raise NotImplementedError

    async def answer(self, prompt: str, route: str) -> str:
        self.asked.append((prompt, route))
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        await asyncio.sleep(0)
        self._now -= 1
        if prompt in self.failing:
            raise Unavailable("no shard")
        return f"it is {sum(map(int, prompt.split('+')))}" if route == "strong" else "it is 0"


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{number}+1", "answer": str(number + 1), "task": "sum"} for number in range(count)]


async def test_every_route_answers_every_prompt() -> None:
    out, cluster = io.StringIO(), Cluster()
    progress = await label(sums(3), ROUTES, cluster, out, at_once=2)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert sorted(line["prompt"] for line in lines) == ["0+1", "1+1", "2+1"]
    expected = {"routes": {"weak": 0.0, "strong": 1.0}, "measure": "gold", "task": "sum"}
    assert all({**line, "prompt": ""} == {**expected, "prompt": ""} for line in lines)
    assert (progress.done, progress.failed) == (3, 0)
    assert len(cluster.asked) == 6


async def test_prompts_run_at_once_but_not_more_than_allowed() -> None:
    cluster = Cluster()
    await label(sums(20), ROUTES, cluster, io.StringIO(), at_once=4)
    assert cluster.most_at_once == 4


async def test_a_failure_is_counted_and_costs_the_others_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    progress = await label(sums(4), ROUTES, Cluster(failing=("2+1",)), out, at_once=2)
    assert (progress.done, progress.failed) == (3, 1)
    assert "2+1" not in out.getvalue()
    assert "no shard" in capsys.readouterr().err


async def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "made" / "labels.jsonl"
    again = Cluster()
    for cluster in (Cluster(failing=("1+1", "3+1")), again):
        with open_for_more(path) as out:
            await label(remaining(sums(4), path), ROUTES, cluster, out, at_once=1)
    assert {prompt for prompt, _ in again.asked} == {"1+1", "3+1"}
    assert sorted(read_labels(path).prompts) == ["0+1", "1+1", "2+1", "3+1"]


def test_a_line_that_was_torn_is_dropped_and_done_again(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", [{"prompt": "0+1", "routes": {"weak": 0, "strong": 1}}])
    with path.open("a") as file:
        file.write('{"prompt": "1+1", "rou')
    assert [row["prompt"] for row in remaining(sums(3), path)] == ["1+1", "2+1"]
    assert path.read_text().count("\n") == 1


def test_a_prompt_that_comes_twice_is_asked_once(tmp_path: Path) -> None:
    assert len(remaining([*sums(2), *sums(2)], tmp_path / "absent.jsonl")) == 2


async def test_progress_is_reported_after_every_prompt() -> None:
    seen: list[int] = []
    await label(sums(3), ROUTES, Cluster(), io.StringIO(), 1, lambda progress: seen.append(progress.done))
    assert seen == [1, 2, 3]
    assert Progress(2_000, 1_500, 3).line(100.0) == "1,500 of 2,000 labelled, 3 failed, 15.0/s"


@pytest.mark.parametrize(("routes", "at_once", "field"), [(("only",), 1, "routes"), (ROUTES, 0, "at_once")])
async def test_what_labels_nothing_is_refused(routes: tuple[str, ...], at_once: int, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await label(sums(1), routes, Cluster(), io.StringIO(), at_once)
    assert refused.value.field == field


async def test_no_prompts_are_no_work() -> None:
    assert (await label([], ROUTES, Cluster(), io.StringIO(), 8)).done == 0


def test_questions_are_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"question": "1+1", "answer": "#### 2"}])
    assert read_rows(path) == [{"question": "1+1", "answer": "#### 2", "prompt": "1+1"}]


def test_the_flags_have_defaults() -> None:
    parser = ArgumentParser()
    add_arguments(parser)
    parsed = parser.parse_args(["--gateway", "h:1", "--data", "a", "--out", "b"])
    assert (parsed.max_tokens, parsed.at_once, parsed.plain, parsed.routes) == (256, 8, False, None)
