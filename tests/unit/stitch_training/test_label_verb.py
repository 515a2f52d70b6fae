"""`label` from its command line, against a gateway that echoes."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator
from math import exp
from pathlib import Path

import pytest

from stitch.errors import Unavailable
from stitch_training import label
from tests.support.fake_gateway import FakeGateway, serving
from tests.support.labelled_prompts import write


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serving(FakeGateway()) as gateway:
        yield gateway


def ran(gateway: FakeGateway, folder: Path, *flags: str) -> int:
    parser = ArgumentParser()
    label.add_arguments(parser)
    given = ["--gateway", gateway.address, "--data", str(folder / "data.jsonl"), "--out", str(folder / "labels.jsonl")]
    return label.run(parser.parse_args([*given, *flags]))


def labels(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]


def test_all_routes_of_the_cluster_are_labelled(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "2 3", "answer": "3"}, {"prompt": "2 3 4", "answer": "3"}])
    assert ran(gateway, tmp_path) == 0
    found = {str(row["prompt"]): row["routes"] for row in labels(tmp_path)}
    # The echo ends with the query's last number, on every route.
    assert found == {"2 3": {"weak": 1.0, "strong": 1.0}, "2 3 4": {"weak": 0.0, "strong": 0.0}}
    assert "2 of 2 labelled, 0 failed" in capsys.readouterr().err


def test_requests_are_greedy_chats_of_the_length_asked_for(gateway: FakeGateway, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "one two", "answer": "two"}])
    assert ran(gateway, tmp_path, "--max-tokens", "2", "--routes", "weak,strong") == 0
    assert sorted(request.route for request in gateway.requests) == ["strong", "weak"]
    for request in gateway.requests:
        assert [message.content for message in request.chat.messages] == ["one two"]
        assert (request.sampling.temperature, request.sampling.max_tokens) == (0.0, 2)


def test_a_reference_is_scored_instead_of_an_answer(gateway: FakeGateway, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "one two", "reference": "three"}])
    assert ran(gateway, tmp_path) == 0
    assert [(request.forced_answer, request.sampling.logprobs) for request in gateway.requests] == [("three", 0)] * 2
    # Every token of the fake gateway has the log-probability -0.5.
    (row,) = labels(tmp_path)
    assert (row["routes"], row["measure"]) == ({"weak": exp(-0.5), "strong": exp(-0.5)}, "reference")


def test_a_plain_prompt_is_sent_as_it_is(gateway: FakeGateway, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "one two"}])
    assert ran(gateway, tmp_path, "--plain") == 0
    assert {request.prompt for request in gateway.requests} == {"one two"}


def test_a_run_with_failures_says_so_and_the_next_one_mends_it(gateway: FakeGateway, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "good"}, {"prompt": "bad"}])
    gateway.failure = lambda request: Unavailable("gone") if request.prompt == "bad" else None
    assert ran(gateway, tmp_path, "--plain") == 1
    assert [row["prompt"] for row in labels(tmp_path)] == ["good"]
    gateway.failure = lambda request: None
    assert ran(gateway, tmp_path, "--plain") == 0
    assert [row["prompt"] for row in labels(tmp_path)] == ["good", "bad"]


def test_one_route_alone_is_refused(gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data.jsonl", [{"prompt": "x"}])
    assert ran(gateway, tmp_path, "--routes", "weak") == 2
    assert "at least two routes" in capsys.readouterr().err
