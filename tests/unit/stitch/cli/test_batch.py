"""`stitch batch`: every line of a file has one outcome, in order."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stitch.cli.batch import (
    Line,
    Outcomes,
    Record,
    Target,
    changed_settings,
    digest,
    kept_answers,
    outcome_records,
    output_target,
    read_lines,
)
from stitch.client import AsyncClient, until_room
from stitch.client.until_room import MAX_ATTEMPTS
from stitch.errors import Exhausted, InvalidRequest, StitchError
from stitch.v1 import inference_pb2
from tests.support.fake_gateway import FakeGateway


async def outcomes(gateway: FakeGateway, *lines: object, **defaults: Any) -> list[Record]:
    async with AsyncClient(gateway.address) as client:
        found = outcome_records(client, numbered(*lines), defaults, concurrency=4)
        return sorted([record async for record in found], key=lambda record: record["line"])


def numbered(*lines: object) -> list[Line]:
    written = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return [Line(number, line) for number, line in enumerate(written, start=1)]


async def test_outcomes_have_line_and_id(gateway: FakeGateway) -> None:
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

    monkeypatch.setattr(until_room.asyncio, "sleep", sleep)
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
        lines = numbered(*[{"prompt": "a"}] * 10)
        assert len([record async for record in outcome_records(client, lines, {}, concurrency=3)]) == 10
    assert (asked, most) == (10, 3)


async def test_closing_outcome_records_cancels_requests(gateway: FakeGateway) -> None:
    def first_is_free(request: inference_pb2.GenerateRequest) -> StitchError | None:
        gateway.stall_before_word = 0
        return None

    async with AsyncClient(gateway.address) as client:
        found = outcome_records(client, numbered(b"{", {"prompt": "a"}), {}, concurrency=2)
        gateway.failure = first_is_free
        async for _ in found:
            break
        await found.aclose()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        # gRPC has tasks of its own.
        assert [task.cancelled() for task in others if "outcome" in repr(task.get_coro())] == [True]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b'{"a": 1}\r\n\n\xff\nlast', [(1, b'{"a": 1}'), (3, b"\xff"), (4, b"last")]),
        (b"\n \t\r\n", []),
        (b"", []),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n\xef\xbb\xbf\n", [(1, b"a"), (2, b"b")]),
        ("é\nb\n".encode("utf-16"), [(1, "é".encode()), (2, b"b")]),
        ("é\nb\n".encode("utf-32"), [(1, "é".encode()), (2, b"b")]),
        ("a\u2028b\x0bc\x85d\re\n".encode(), [(1, "a\u2028b\x0bc\x85d\re".encode())]),
    ],
    ids=["crlf", "blank", "empty", "byte-order-marks", "utf-16", "utf-32", "separators"],
)
def test_read_lines_splits_at_newline_alone(tmp_path: Path, content: bytes, lines: list[tuple[int, bytes]]) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert read_lines(tmp_path / "in.jsonl") == lines


def test_read_lines_refuses_broken_utf_16(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xff\xfea")
    with pytest.raises(InvalidRequest, match=r"but its byte order mark is of utf-16"):
        read_lines(tmp_path / "in.jsonl")


def answer(text: str, **fields: Any) -> Record:
    return {"text": text, "request": digest(fields)}


def test_kept_answers_follow_their_requests() -> None:
    earlier = [answer("A", prompt="a"), answer("B", prompt="b", id=2), answer("gone", prompt="c")]
    lines = numbered({"prompt": "new"}, b'{"id":2,  "prompt":"b"}', b"{", b"[1]", {"prompt": "a"})
    kept, others = kept_answers(lines, earlier)
    assert {number: record["text"] for number, record in kept.items()} == {2: "B", 5: "A"}
    assert [record["text"] for record in others] == ["gone"]


def test_kept_answer_is_of_same_id_and_same_fields() -> None:
    lines = numbered({"prompt": "b", "id": 1}, {"prompt": "a", "id": 2}, {"prompt": "a"})
    kept, others = kept_answers(lines, [answer("A", prompt="a", id=1)])
    assert (kept, len(others)) == ({}, 1)


def test_equal_requests_keep_one_answer_each() -> None:
    lines = numbered({"prompt": "a"}, {"prompt": "a"}, {"prompt": "a"})
    kept, others = kept_answers(lines, [answer("first", prompt="a"), answer("second", prompt="a")])
    assert {number: record["text"] for number, record in kept.items()} == {1: "first", 2: "second"}
    assert others == []


def test_answer_without_digest_is_kept_by_id_alone() -> None:
    lines = numbered({"prompt": "a", "id": "x"}, {"prompt": "b"}, {"prompt": "c", "id": None})
    kept, others = kept_answers(lines, [{"text": "X", "id": "x"}, {"text": "none"}])
    assert list(kept) == [1]
    assert others == [{"text": "none"}]


def test_changed_settings_are_those_that_lines_leave_open() -> None:
    lines = numbered({"prompt": "a"}, {"prompt": "b", "route": "weak"}, {"prompt": "c"})
    kept: dict[int, Record] = {1: {"settings": {"route": "weak", "stop": ["x"]}}, 2: {"settings": {"stop": ["x"]}}}
    assert changed_settings(lines, kept, {"route": "strong", "stop": ["x"], "seed": 0}) == {
        "route 'weak', not 'strong'": 1,
        "seed unset, not 0": 2,
    }


def outcomes_file(out: Path) -> Outcomes:
    return Outcomes(Target(out, is_plain=True))


def test_outcomes_replace_output_at_end_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    out.chmod(0o600)
    with outcomes_file(out) as written:
        written.begin([1, 2, 3], {2: {"line": 2}}, [])
        written.add({"line": 3})
        written.add({"line": 1})
        assert out.read_text() == "old"
        assert (tmp_path / "out.jsonl.part").read_text() == '{"line": 3}\n{"line": 1}\n'
    assert out.read_text() == '{"line": 1}\n{"line": 2}\n{"line": 3}\n'
    assert out.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [out]


def test_outcomes_not_begun_leave_files_as_they_were(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    with outcomes_file(out):
        pass
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("out.jsonl", "old")]


def test_interrupted_outcomes_keep_written_and_kept_lines(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with suppress(KeyboardInterrupt), outcomes_file(out) as written:
        written.begin([1, 2, 3, 4], {1: {"line": 1}, 3: {"line": 3}}, [])
        written.add({"line": 2})
        raise KeyboardInterrupt
    assert out.read_text() == '{"line": 1}\n{"line": 2}\n{"line": 3}\n'


def test_outcomes_escape_separators_and_lone_surrogates(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    record = {"line": 1, "id": "ü\ud800", "text": "a\u2028b\u2029c\x85d\x1ee\x0bf"}
    with outcomes_file(out) as written:
        written.begin([1], {}, [])
        written.add(record)
    text = out.read_bytes().decode()
    assert "ü" in text
    assert [json.loads(line) for line in text.splitlines()] == [record]


def test_pipe_gets_outcomes_in_order_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.touch()
    with Outcomes(Target(out, is_plain=False)) as written:
        written.begin([1, 3, 4], {}, [])
        written.add({"line": 3})
        assert out.read_text() == ""
        written.add({"line": 1})
        assert out.read_text() == '{"line": 1}\n{"line": 3}\n'


def test_earlier_answers_are_of_output_and_draft_without_errors(tmp_path: Path) -> None:
    out, draft = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    both = '{"line": 1, "text": "a\u2028"}\n'
    out.write_text(both + '{"line": 2, "error": {}}\n[3]\n{"line": 5, "text": "b"}\n', encoding="utf-8")
    draft.write_text(both + '{"line": 3, "text": "c"}\n{"line": 4, "te', encoding="utf-8")
    with outcomes_file(out) as written:
        assert [record["text"] for record in written.earlier_answers()] == ["a\u2028", "b", "c"]
    assert draft.exists()


def test_answers_that_belong_to_no_line_go_to_file_of_their_own(tmp_path: Path) -> None:
    out, old = tmp_path / "out.jsonl", tmp_path / "out.jsonl.old"
    old.write_text('{"text": "a"}\n')
    with suppress(KeyboardInterrupt), outcomes_file(out) as written:
        written.begin([7], {7: {"line": 7, "text": "c"}}, [{"text": "b"}])
        assert old.read_text() == '{"text": "a"}\n'
        raise KeyboardInterrupt
    assert out.read_text() == '{"line": 7, "text": "c"}\n'
    assert old.read_text() == '{"text": "a"}\n{"text": "b"}\n'


def test_second_run_on_one_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with outcomes_file(out) as written:
        written.begin([1], {}, [])
        written.add({"line": 1})
        with pytest.raises(InvalidRequest, match="another run is writing it"), outcomes_file(out):
            pass
    assert out.read_text() == '{"line": 1}\n'


def test_output_of_several_names_is_written_in_place(tmp_path: Path) -> None:
    out, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    out.write_text("old")
    other.hardlink_to(out)
    with outcomes_file(out) as written:
        written.begin([1], {}, [])
        written.add({"line": 1})
    assert other.read_text() == '{"line": 1}\n'
    assert other.samefile(out)
    assert len(list(tmp_path.iterdir())) == 2


class TestTarget:
    """What `--out` may name."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        (tmp_path / "in.jsonl").write_text("{}")
        return tmp_path / "in.jsonl"

    @pytest.mark.parametrize("exists", [True, False])
    def test_symbolic_link_is_followed(self, tmp_path: Path, file: Path, exists: bool) -> None:
        real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
        link.symlink_to(real)
        if exists:
            real.touch()
        assert output_target(str(link), file, resume=True) == (real, True)

    def test_pipe_and_device_stream(self, tmp_path: Path, file: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for out in (str(tmp_path / "pipe"), "/dev/null", "/dev/stdout"):
            assert output_target(out, file, resume=False) == (Path(out), False)

    @pytest.mark.parametrize(
        ("out", "reason"),
        [
            ("", "it is a folder"),
            ("folder", "it is a folder"),
            ("link-to-folder", "it is a folder"),
            ("new/", "it is a folder"),
            ("missing/out.jsonl", "the folder .*missing doesn't exist"),
            ("in.jsonl", "the input .*in.jsonl would be overwritten"),
            ("link-to-input", "the input .*in.jsonl would be overwritten"),
            ("name-of-input", "the input .*in.jsonl would be overwritten"),
            ("loop", "it is no file, pipe or terminal"),
            ("socket", "it is no file, pipe or terminal"),
        ],
    )
    def test_other_targets_are_refused(
        self, tmp_path: Path, file: Path, out: str, reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("folder").mkdir()
        Path("link-to-folder").symlink_to("folder")
        Path("link-to-input").symlink_to("in.jsonl")
        Path("name-of-input").hardlink_to(file)
        Path("loop").symlink_to("loop")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
            with pytest.raises(InvalidRequest, match=f"--out is '{out}', but {reason}"):
                output_target(out, file, resume=False)

    def test_draft_that_is_input_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "out.jsonl.part").touch()
        with pytest.raises(InvalidRequest, match="would be overwritten"):
            output_target(str(tmp_path / "out.jsonl"), tmp_path / "out.jsonl.part", resume=False)

    def test_resume_from_pipe_is_refused(self, file: Path) -> None:
        with pytest.raises(InvalidRequest, match="--resume is '/dev/null', but only a plain file"):
            output_target("/dev/null", file, resume=True)
