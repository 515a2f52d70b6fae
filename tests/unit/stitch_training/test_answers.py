"""Training text of a route's answers: its prompts, what is sent, the file, and a run that resumes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stitch.errors import Exhausted, Unavailable
from stitch_training.answer_quality import kept_back_prompts
from stitch_training.answers import AnswersSettings, seed_of, training_prompts
from stitch_training.cli import main
from stitch_training.data import Turn, is_held_out, read_documents
from tests.support.fake_gateway import FakeGateway, serving


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serving(FakeGateway()) as gateway:
        yield gateway


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    """Prompts of two files, some of them with answers, one of them twice, and a plain text."""
    chats = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"chat {number}"}]}
        for number in range(20)
    ]
    questions = [{"question": f"question {number}", "answer": "yes"} for number in range(20)]
    return [
        write(tmp_path / "chats.jsonl", [*chats, chats[0], {"text": "plain"}]),
        write(tmp_path / "questions.jsonl", questions),
    ]


def run(gateway: FakeGateway, data: list[Path], out: Path, *flags: str) -> int:
    files = [str(path) for path in data]
    return main(
        ["answers", "--gateway", gateway.address, "--data", *files, "--out", str(out), "--route", "strong", *flags]
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=str)


def prompts_in(path: Path) -> set[tuple[Turn, ...]]:
    return {document.prompt() for document in read_documents(path)}


def test_answers_are_conversations_that_training_reads(gateway: FakeGateway, data: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "made" / "answers.jsonl"
    assert run(gateway, data, out) == 0
    documents = list(read_documents(out))
    assert all(document.turns[-1].role == "assistant" for document in documents)
    answer = {document.prompt()[-1].content: document.turns[-1] for document in documents}
    assert answer["question 4"] == Turn("assistant", "echo: question 4")
    row = next(row for row in lines(out) if row["messages"][-2]["content"] == "question 4")
    assert (row["route"], row["temperature"], row["seed"]) == ("strong", 0.7, 0)


def test_answers_to_held_out_prompts_are_what_a_fit_measures_itself_on(
    gateway: FakeGateway, data: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    run(gateway, data, out)
    assert prompts_in(out) == {
        document.prompt() for path in data for document in read_documents(path) if document.turns
    }
    held_out = {document.prompt() for document in read_documents(out) if is_held_out(document, 10)}
    # An evaluation asks them too.
    assert held_out == {prompt for path in data for prompt in kept_back_prompts([path], 10, 100)}


def test_requests_have_the_route_the_sampling_and_a_seed_of_their_own(
    gateway: FakeGateway, data: list[Path], tmp_path: Path
) -> None:
    flags = ("--max-tokens", "2", "--temperature", "0.5", "--seed", "3", "--prompts", "6")
    assert run(gateway, data, tmp_path / "answers.jsonl", *flags) == 0
    assert len(gateway.requests) == 6
    for request in gateway.requests:
        assert (request.route, request.sampling.max_tokens, request.sampling.temperature) == ("strong", 2, 0.5)
        prompt = [Turn(message.role, message.content) for message in request.chat.messages]
        assert request.sampling.seed == seed_of(prompt, 3)
    assert len({request.sampling.seed for request in gateway.requests}) == 6
    # Both files in turn; answers of two tokens are cut off.
    kinds = [row["messages"][-2]["content"].split()[0] for row in lines(tmp_path / "answers.jsonl")]
    assert sorted(kinds) == ["chat"] * 3 + ["question"] * 3
    assert all(document.turns[-1].is_cut for document in read_documents(tmp_path / "answers.jsonl"))


def test_interrupted_run_resumes_to_the_same_file(gateway: FakeGateway, data: list[Path], tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    run(gateway, data, whole)
    gateway.failure = lambda request: Unavailable("no shard") if "chat" in request.chat.messages[-1].content else None
    assert run(gateway, data, resumed) == 1
    with resumed.open("a") as file:
        file.write('{"messages": [{"role": "us')
    gateway.failure = lambda request: None
    before = len(gateway.requests)
    assert run(gateway, data, resumed) == 0
    asked = [request.chat.messages[-1].content for request in gateway.requests[before:]]
    assert asked
    assert all(text.startswith("chat") for text in asked)
    assert lines(resumed) == lines(whole)


def test_full_cluster_is_waited_for(gateway: FakeGateway, data: list[Path], tmp_path: Path) -> None:
    run(gateway, data, tmp_path / "at-once.jsonl")
    refusals = iter([Exhausted("full", 0.01), Exhausted("full", 0.01)])
    gateway.failure = lambda request: next(refusals, None)
    assert run(gateway, data, tmp_path / "later.jsonl") == 0
    assert next(refusals, None) is None
    assert lines(tmp_path / "later.jsonl") == lines(tmp_path / "at-once.jsonl")


@pytest.mark.parametrize("flags", [("--temperature", "0"), ("--seed", "1"), ("--route", "weak")])
def test_file_of_another_run_is_refused(
    gateway: FakeGateway, data: list[Path], tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    run(gateway, data, out, "--prompts", "2")
    left = out.read_bytes()
    assert run(gateway, data, out, *flags) == 2
    assert f"out is 'answers.jsonl:1', but its {flags[0][2:]} is" in capsys.readouterr().err
    assert out.read_bytes() == left


@pytest.mark.parametrize(
    ("flags", "reason"), [(("--concurrency", "0"), "concurrency is 0"), (("--prompts", "0"), "data is 'chats.jsonl")]
)
def test_nothing_to_do_is_refused(
    gateway: FakeGateway, data: list[Path], tmp_path: Path, flags: tuple[str, str], reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(gateway, data, tmp_path / "answers.jsonl", *flags) == 2
    assert reason in capsys.readouterr().err


def test_prompts_are_in_an_order_of_their_seed(data: list[Path], tmp_path: Path) -> None:
    def order(seed: int) -> list[tuple[Turn, ...]]:
        return list(training_prompts(AnswersSettings(tuple(data), tmp_path / "x", "strong", seed=seed)))

    assert order(0) == order(0) != order(1)
    assert set(order(0)) == set(order(1))
