"""Labelling prompts through a cluster: measures of quality, failures, interruptions, and the verb `label`."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections.abc import Iterator
from math import exp
from pathlib import Path
from typing import Any

import pytest

from stitch.errors import Exhausted, InvalidRequest, Unavailable
from stitch_training.cli import main
from stitch_training.labelling import (
    chosen_routes,
    label_rows,
    matches_gold,
    measure_quality,
    read_rows,
    remaining_rows,
)
from stitch_training.labels import read_labels
from stitch_training.prompt_runs import RunProgress, open_for_append
from tests.support.fake_gateway import FakeGateway, serving
from tests.support.labelled_prompts import write

ROUTES = ("weak", "strong")


class SumRoutes:
    """Routes of which strong answers sums, weak answers 0, and both fail on some prompts."""

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.failing = failing
        self.requests: list[tuple[str, str]] = []
        self.most_in_flight = 0
        self._in_flight = 0

    async def likelihood(self, prompt: str, route: str, answer: str) -> float:
        raise NotImplementedError

    async def answer(self, prompt: str, route: str) -> str:
        self.requests.append((prompt, route))
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        await asyncio.sleep(0)
        self._in_flight -= 1
        if prompt in self.failing:
            raise Unavailable("no shard")
        return f"it is {sum(map(int, prompt.split('+')))}" if route == "strong" else "it is 0"


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{number}+1", "answer": str(number + 1), "task": "sum"} for number in range(count)]


async def test_label_rows_measures_every_route_on_every_prompt() -> None:
    out, routes = io.StringIO(), SumRoutes()
    progress = await label_rows(sums(3), ROUTES, routes, out, concurrency=2)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert sorted(line["prompt"] for line in lines) == ["0+1", "1+1", "2+1"]
    for line in lines:
        assert (line["routes"], line["measure"], line["task"]) == ({"weak": 0.0, "strong": 1.0}, "gold", "sum")
        assert line["answers"] == {"weak": "it is 0", "strong": f"it is {sum(map(int, line['prompt'].split('+')))}"}
    assert (progress.done, progress.failed) == (3, 0)
    assert len(routes.requests) == 6


async def test_label_rows_keeps_to_its_concurrency() -> None:
    routes = SumRoutes()
    await label_rows(sums(20), ROUTES, routes, io.StringIO(), concurrency=4)
    assert routes.most_in_flight == 4


async def test_failed_prompt_is_counted_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    progress = await label_rows(sums(4), ROUTES, SumRoutes(failing=("2+1",)), out, concurrency=2)
    assert (progress.done, progress.failed) == (3, 1)
    assert "2+1" not in out.getvalue()
    assert "no shard" in capsys.readouterr().err


async def test_next_run_labels_only_the_remaining_prompts(tmp_path: Path) -> None:
    path = tmp_path / "made" / "labels.jsonl"
    again = SumRoutes()
    for routes in (SumRoutes(failing=("1+1", "3+1")), again):
        with open_for_append(path) as out:
            await label_rows(remaining_rows(sums(4), path, ROUTES), ROUTES, routes, out, concurrency=1)
    assert {prompt for prompt, _ in again.requests} == {"1+1", "3+1"}
    assert sorted(read_labels(path).prompts) == ["0+1", "1+1", "2+1", "3+1"]


def test_incomplete_last_line_is_dropped_and_labelled_again(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", [{"prompt": "0+1", "routes": {"weak": 0, "strong": 1}}])
    with path.open("a") as file:
        file.write('{"prompt": "1+1", "rou')
    assert [row["prompt"] for row in remaining_rows(sums(3), path, ROUTES)] == ["1+1", "2+1"]
    assert path.read_text().count("\n") == 1


def test_repeated_prompt_is_labelled_once(tmp_path: Path) -> None:
    assert len(remaining_rows([*sums(2), *sums(2)], tmp_path / "absent.jsonl", ROUTES)) == 2


async def test_progress_is_reported_after_every_prompt() -> None:
    reported: list[int] = []
    await label_rows(sums(3), ROUTES, SumRoutes(), io.StringIO(), 1, lambda progress: reported.append(progress.done))
    assert reported == [1, 2, 3]
    assert RunProgress(2_000, 1_500, 3).line(100.0) == "1,500 of 2,000 done, 3 failed, 15.0/s"


@pytest.mark.parametrize(("routes", "concurrency", "field"), [(("only",), 1, "routes"), (ROUTES, 0, "concurrency")])
async def test_one_route_or_no_concurrency_is_refused(routes: tuple[str, ...], concurrency: int, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await label_rows(sums(1), routes, SumRoutes(), io.StringIO(), concurrency)
    assert refused.value.field == field


async def test_no_prompts_label_nothing() -> None:
    assert (await label_rows([], ROUTES, SumRoutes(), io.StringIO(), 8)).done == 0


def test_questions_are_read_as_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"question": "1+1", "answer": "#### 2"}])
    assert read_rows(path) == [{"question": "1+1", "answer": "#### 2", "prompt": "1+1"}]


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("She has 3 + 4 = 7 apples.", "3 + 4 = 7\n#### 7", True),
        ("First 7, then 9.", "#### 7", False),
        ("It is $1,250.00", "#### 1250", True),
        ("It is -3", "-3", True),
        ("No number at all", "#### 7", False),
        ("", "#### 7", False),
        ("B. Paris", "B", True),
        ("The answer is B", "b", True),
        ("Because B is wrong, C", "B", False),
        ("It is the Eiffel Tower.", "Eiffel Tower", True),
        ("anything", "", False),
        ("", "B", False),
    ],
)
def test_answer_matches_gold_by_last_number_or_edge_words(answer: str, gold: str, right: bool) -> None:
    assert matches_gold(answer, gold) is right


class FixedRoutes:
    """Routes of which strong answers 5 with a high likelihood, weak 4 with a low one."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ...]] = []

    async def answer(self, prompt: str, route: str) -> str:
        self.requests.append(("answer", prompt, route))
        return {"weak": "it is 4", "strong": "it is 5"}[route]

    async def likelihood(self, prompt: str, route: str, answer: str) -> float:
        self.requests.append(("likelihood", prompt, route, answer))
        return {"weak": 0.25, "strong": 0.75}[route]


async def test_quality_is_measured_by_the_gold_answer_first() -> None:
    label = await measure_quality({"prompt": "2+3", "answer": "#### 5", "reference": "it is 4"}, ROUTES, FixedRoutes())
    assert (label.qualities, label.measure) == ({"weak": 0.0, "strong": 1.0}, "gold")


async def test_quality_is_measured_by_the_reference_without_a_gold_answer() -> None:
    routes = FixedRoutes()
    label = await measure_quality({"prompt": "2+3", "reference": "it is 4"}, ROUTES, routes)
    assert (label.qualities, label.measure) == ({"weak": 0.25, "strong": 0.75}, "reference")
    assert routes.requests == [("likelihood", "2+3", route, "it is 4") for route in ROUTES]


DOCTESTS = {
    "name": "half",
    "header": 'from math import floor\n\ndef half(number):\n    """Returns the half."""',
    "doc": ">>> half(3)\n1\n",
}


class CodingRoutes(FixedRoutes):
    """Routes of which strong writes correct code, and weak code that fails its examples."""

    async def answer(self, prompt: str, route: str) -> str:
        wrong = "def half(number): return number / 2"
        return wrong if route == "weak" else "```python\ndef half(number):\n    return floor(number / 2)\n```"


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="needs the sandbox of this one")
async def test_quality_is_measured_by_doctests() -> None:
    label = await measure_quality({"prompt": "half", "doctests": DOCTESTS}, ROUTES, CodingRoutes())
    assert (label.qualities, label.measure) == ({"weak": 0.0, "strong": 1.0}, "doctests")
    assert label.answers["weak"] == "def half(number): return number / 2"


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "x"}, "data.jsonl:2"),
        ({"prompt": "x", "answer": 3}, "data.jsonl:2"),
        ({"prompt": "x", "doctests": ">>> 1\n1"}, "data.jsonl:2.doctests"),
        ({"prompt": "x", "doctests": {"name": "f", "header": "def f(): 0"}}, "data.jsonl:2.doctests"),
        ({"prompt": "x", "doctests": {**DOCTESTS, "module": "torch.nn"}}, "data.jsonl:2.doctests.module"),
    ],
)
def test_row_without_a_measure_is_refused_by_its_line(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "1+1", "answer": "2"}, row])
    with pytest.raises(InvalidRequest) as refused:
        read_rows(path)
    assert refused.value.field == field


def test_ends_of_the_cluster_are_chosen_unless_routes_are_given() -> None:
    served = ("small", "middle", "whole")
    assert chosen_routes((), served) == ("small", "whole")
    assert chosen_routes(("small", "middle"), served) == ("small", "middle")
    with pytest.raises(InvalidRequest, match="routes is 'other', but the cluster serves small, middle, whole"):
        chosen_routes(("small", "other"), served)


def test_labels_of_other_routes_are_not_continued(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", [{"prompt": "0+1", "routes": {"weak": 0, "strong": 1}}])
    with pytest.raises(InvalidRequest, match=r"labels.jsonl:1.routes .* this run labels small, whole"):
        remaining_rows(sums(3), path, ("small", "whole"))


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serving(FakeGateway()) as gateway:
        yield gateway


def run_label(gateway: FakeGateway, folder: Path, *flags: str) -> int:
    given = ["--gateway", gateway.address, "--data", str(folder / "data.jsonl"), "--out", str(folder / "labels.jsonl")]
    return main(["label", *given, *flags])


def labels(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]


def test_label_measures_both_ends_of_the_cluster(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "2 3", "answer": "3"}, {"prompt": "2 3 4", "answer": "3"}])
    assert run_label(gateway, tmp_path) == 0
    found = {str(row["prompt"]): row["routes"] for row in labels(tmp_path)}
    # The echo ends with the query's last number, on every route.
    assert found == {"2 3": {"weak": 1.0, "strong": 1.0}, "2 3 4": {"weak": 0.0, "strong": 0.0}}
    assert "2 of 2 done, 0 failed" in capsys.readouterr().err


def test_label_sends_greedy_chats_of_the_given_length(gateway: FakeGateway, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "one two", "answer": "two"}])
    assert run_label(gateway, tmp_path, "--max-tokens", "2", "--routes", "weak,strong") == 0
    assert sorted(request.route for request in gateway.requests) == ["strong", "weak"]
    for request in gateway.requests:
        assert [message.content for message in request.chat.messages] == ["one two"]
        assert (request.sampling.temperature, request.sampling.max_tokens) == (0.0, 2)


def test_label_scores_a_reference(gateway: FakeGateway, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "one two", "reference": "three"}])
    assert run_label(gateway, tmp_path) == 0
    assert [(request.forced_answer, request.sampling.logprobs) for request in gateway.requests] == [("three", 0)] * 2
    # Every token of the fake gateway has the log-probability -0.5.
    (row,) = labels(tmp_path)
    assert (row["routes"], row["measure"]) == ({"weak": exp(-0.5), "strong": exp(-0.5)}, "reference")


def test_label_with_plain_sends_prompts_as_text(gateway: FakeGateway, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "one two", "answer": "two"}])
    assert run_label(gateway, tmp_path, "--plain") == 0
    assert {request.prompt for request in gateway.requests} == {"one two"}


def test_label_with_failures_returns_1_and_the_next_run_retries_them(gateway: FakeGateway, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "good", "answer": "good"}, {"prompt": "bad", "answer": "bad"}])
    gateway.failure = lambda request: Unavailable("gone") if request.prompt == "bad" else None
    assert run_label(gateway, tmp_path, "--plain") == 1
    assert [row["prompt"] for row in labels(tmp_path)] == ["good"]
    gateway.failure = lambda request: None
    assert run_label(gateway, tmp_path, "--plain") == 0
    assert [row["prompt"] for row in labels(tmp_path)] == ["good", "bad"]


def test_label_waits_for_room(gateway: FakeGateway, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "one two", "answer": "two"}])
    refusals = iter([Exhausted("full", 0.01), Exhausted("full", 0.01)])
    gateway.failure = lambda request: next(refusals, None)
    assert run_label(gateway, tmp_path) == 0
    assert [row["prompt"] for row in labels(tmp_path)] == ["one two"]


def test_label_of_one_route_returns_2(gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "x", "answer": "x"}])
    assert run_label(gateway, tmp_path, "--routes", "weak") == 2
    assert "at least two routes" in capsys.readouterr().err
