"""`stitch batch`: every line of a file has one outcome, in order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stitch.cli import batch
from stitch.cli.batch import MAX_ATTEMPTS, Outcomes, answered_lines, outcome_lines, read_lines
from stitch.client import AsyncClient
from stitch.errors import Exhausted, StitchError
from stitch.v1 import inference_pb2
from tests.support.fake_gateway import FakeGateway


async def outcomes(
    gateway: FakeGateway, *lines: object, kept: Mapping[int, str] | None = None, **defaults: Any
) -> list[dict[str, Any]]:
    written = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    async with AsyncClient(gateway.address) as client:
        found = outcome_lines(client, written, kept or {}, defaults, concurrency=4)
        return [json.loads(line) async for line in found]


async def test_outcomes_are_in_order_with_line_and_id(gateway: FakeGateway) -> None:
    found = await outcomes(gateway, {"prompt": "a", "id": "first"}, {"prompt": "b c", "id": [2]}, {"prompt": "d"})
    assert [(one["line"], one.get("id"), one["text"]) for one in found] == [
        (1, "first", "echo: a"),
        (2, [2], "echo: b c"),
        (3, None, "echo: d"),
    ]
    assert "id" not in found[2]
    assert found[0]["token_ids"] == [5, 1]


async def test_fields_of_line_override_defaults(gateway: FakeGateway) -> None:
    lines = {"prompt": "a b c"}, {"prompt": "a b c", "max_tokens": 3, "route": "weak"}
    found = await outcomes(gateway, *lines, max_tokens=2, route="strong")
    assert [(one["generated_tokens"], one["route"]) for one in found] == [(2, "strong"), (3, "weak")]


async def test_line_with_messages_is_answered(gateway: FakeGateway) -> None:
    (found,) = await outcomes(gateway, {"messages": [{"role": "user", "content": "hi there"}]})
    assert found["text"] == "echo: hi there"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "it is no JSON"),
        (b"", "it is no JSON"),
        (b'{"prompt": "\xff"}', "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[1]", "it must be an object"),
        (b'"prompt"', "it must be an object"),
        (b"{}", "needs either a prompt or messages"),
        (b'{"prompt": 3}', "prompt is 3, but it must be text in valid Unicode"),
        (b'{"prompt": "\\ud800"}', "prompt is '\\ud800', but it must be text in valid Unicode"),
        (b'{"prompt": ""}', "prompt is '', but it must not be empty"),
        (b'{"prompt": "a", "route": "medium"}', "route is 'medium', but this cluster has"),
        (b'{"prompt": "a", "temperature": NaN}', "sampling.temperature is nan"),
        (b'{"prompt": "a", "timeout": 3}', "timeout is 3, but a request has"),
        (b'{"prompt": "a", "self": 3}', "self is 3, but a request has"),
    ],
)
async def test_invalid_line_is_error_and_others_are_answered(gateway: FakeGateway, line: bytes, message: str) -> None:
    before, bad, after = await outcomes(gateway, {"prompt": "a"}, line, {"prompt": "b"})
    assert (before["text"], after["text"]) == ("echo: a", "echo: b")
    assert list(bad) == ["line", "error"]
    assert bad["error"]["code"] == "INVALID_ARGUMENT"
    assert message in bad["error"]["message"]


async def test_error_has_id_of_line(gateway: FakeGateway) -> None:
    (found,) = await outcomes(gateway, {"prompt": "", "id": 7})
    assert (found["id"], found["line"]) == (7, 1)


async def test_missing_gateway_is_error_of_every_line() -> None:
    found = await outcomes(FakeGateway(address="127.0.0.1:1"), {"prompt": "a"}, {"prompt": "b"})
    assert [one["error"]["code"] for one in found] == ["UNAVAILABLE", "UNAVAILABLE"]


async def test_unknown_rpc_error_is_error_of_line(gateway: FakeGateway) -> None:
    gateway.failure = lambda request: 1 / 0  # type: ignore[return-value, assignment]
    (found,) = await outcomes(gateway, {"prompt": "a"})
    assert found["error"]["code"] == "UNKNOWN"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every wait for a full gateway; no wait takes time."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(batch.asyncio, "sleep", sleep)
    return found


async def test_request_is_repeated_after_retry_delay(gateway: FakeGateway, waits: list[float]) -> None:
    refusals = iter([Exhausted("full", 2.5), Exhausted("full", 0.5)])
    gateway.failure = lambda request: next(refusals, None)
    (found,) = await outcomes(gateway, {"prompt": "a"})
    assert found["text"] == "echo: a"
    assert waits == [2.5, 0.5]


async def test_full_gateway_is_error_after_max_attempts(gateway: FakeGateway, waits: list[float]) -> None:
    gateway.failure = lambda request: Exhausted("full")
    (found,) = await outcomes(gateway, {"prompt": "a"})
    assert found["error"] == {"code": "RESOURCE_EXHAUSTED", "message": "full"}
    assert len(waits) == MAX_ATTEMPTS - 1


async def test_requests_in_flight_stay_within_concurrency(gateway: FakeGateway) -> None:
    asked = running = most = 0

    class Client(AsyncClient):
        async def generate(self, *args: Any, **fields: Any) -> Any:
            nonlocal asked, running, most
            asked, running = asked + 1, running + 1
            most = max(most, running)
            try:
                return await super().generate(*args, **fields)
            finally:
                running -= 1

    async with Client(gateway.address) as client:
        lines = [b'{"prompt": "a"}'] * 10
        assert len([line async for line in outcome_lines(client, lines, {}, {}, concurrency=3)]) == 10
    assert (asked, most) == (10, 3)


async def test_kept_answers_are_not_requested(gateway: FakeGateway) -> None:
    found = await outcomes(gateway, {"prompt": "a"}, {"prompt": "b"}, kept={1: '{"line": 1, "text": "kept"}'})
    assert [one["text"] for one in found] == ["kept", "echo: b"]
    assert [request.prompt for request in gateway.requests] == ["b"]


async def test_closing_outcome_lines_cancels_requests(gateway: FakeGateway) -> None:
    def first_is_free(request: inference_pb2.GenerateRequest) -> StitchError | None:
        gateway.stall_before_word = 0
        return None

    async with AsyncClient(gateway.address) as client:
        found = outcome_lines(client, [b"{", b'{"prompt": "a"}'], {}, {}, concurrency=2)
        gateway.failure = first_is_free
        async for _ in found:
            break
        await found.aclose()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        assert all(task.cancelled() for task in others)


def test_read_lines_returns_raw_bytes(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\r\n\n\xff\nlast')
    assert read_lines(tmp_path / "in.jsonl") == [b'{"prompt": "a"}', b"", b"\xff", b"last"]


def write(out: Path, kept: Mapping[int, str], *lines: str) -> None:
    with Outcomes(out, kept) as outcomes:
        for line in lines:
            outcomes.write(line)


def test_outcomes_replace_output_at_end(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    with Outcomes(out, {}) as outcomes:
        outcomes.write("1")
        assert out.read_text() == "old"
    assert out.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [out]


def test_interrupted_outcomes_keep_written_and_kept_lines(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with suppress(KeyboardInterrupt), Outcomes(out, {1: "kept 1", 3: "kept 3"}) as outcomes:
        outcomes.write("kept 1")
        outcomes.write("new 2")
        raise KeyboardInterrupt
    assert out.read_text() == "kept 1\nnew 2\nkept 3\n"


def test_outcomes_escape_lone_surrogate(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    write(out, {}, json.dumps({"id": "ü\ud800"}, ensure_ascii=False))
    assert json.loads(out.read_text()) == {"id": "ü\ud800"}


def test_answered_lines_omits_errors_and_incomplete_lines(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"line": 1, "text": "a"}\n{"line": 2, "error": {}}\n[3]\n{"line": 4, "te')
    assert answered_lines(out) == {1: '{"line": 1, "text": "a"}'}


def test_answered_lines_reads_draft_of_killed_run(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.part").write_text('{"line": 2, "text": "b"}\n')
    assert list(answered_lines(tmp_path / "out.jsonl")) == [2]


def test_answered_lines_is_empty_without_files(tmp_path: Path) -> None:
    assert answered_lines(tmp_path / "out.jsonl") == {}
