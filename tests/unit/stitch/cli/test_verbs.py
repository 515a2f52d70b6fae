"""Verbs against a fake gateway, from their arguments to their output."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from stitch.cli.batch import digest
from stitch.cli.chat import Conversation
from stitch.cli.main import main
from stitch.client import Client
from stitch.errors import Unavailable
from tests.support.fake_gateway import STAGES, WAIT_SECONDS, FakeGateway
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[4]
PROGRAM = (sys.executable, "-m", "stitch.cli.main")


def ask(gateway: FakeGateway, *arguments: str) -> int:
    return main(["ask", *arguments, "--gateway", gateway.address])


def test_ask_prints_decision_answer_and_durations(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(gateway, "to be [bold]or[/] not") == 0
    assert capsys.readouterr().out.splitlines() == [
        "route weak · score 0.25 · 4 words",
        "echo: to be [bold]or[/] not",
        "4 prompt tokens · 5 generated (stop) · first token 250 ms · total 500 ms · 16.0 tokens/s",
        "first token: route 1 ms · queue 2 ms · bottom prefill 100 ms · wire 3 ms · top prefill 50 ms · sample 4 ms",
    ]


def test_ask_json_prints_documented_fields(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(gateway, "to be", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "text": "echo: to be",
        "token_ids": [5, 2, 2],
        "route": "weak",
        "score": 0.125,
        "reason": "2 words",
        "prompt_tokens": 2,
        "generated_tokens": 3,
        "cached_tokens": 0,
        "replays": 0,
        "finish_reason": "stop",
        "ttft_seconds": 0.25,
        "total_seconds": 0.5,
        "stages": STAGES,
    }


def test_ask_sends_system_message_and_question(gateway: FakeGateway) -> None:
    assert ask(gateway, "hi", "--system", "Be brief.") == 0
    turns = gateway.requests[0].chat.messages
    assert [(turn.role, turn.content) for turn in turns] == [("system", "Be brief."), ("user", "hi")]


def test_ask_plain_sends_prompt_unchanged(gateway: FakeGateway) -> None:
    assert ask(gateway, "hi", "--plain") == 0
    assert gateway.requests[0].prompt == "hi"


def test_ask_plain_refuses_system_message(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(gateway, "hi", "--plain", "--system", "x") == 1
    assert capsys.readouterr().err == "stitch: --system is 'x', but --plain sends no conversation\n"


def test_ask_reads_question_from_standard_input(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nthere"))
    assert ask(gateway, "-") == 0
    assert gateway.requests[0].chat.messages[0].content == "hi\nthere"


def test_ask_uses_proxy_only_when_asked(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert ask(gateway, "hi") == 0
    assert ask(gateway, "hi", "--proxy") == 1
    assert "ipv4:127.0.0.1:1:" in capsys.readouterr().err


@pytest.mark.parametrize("question", ["", " \n", "-"])
def test_ask_refuses_blank_question(
    gateway: FakeGateway, question: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert ask(gateway, question, "--system", "Be brief.") == 1
    assert "but it must not be empty" in capsys.readouterr().err
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("content", "question"),
    [(b"\xef\xbb\xbfhi \xe2\x86\x92\r\n", "hi →\r\n"), (b"caf\xe9", None)],
    ids=["byte-order-mark", "latin-1"],
)
def test_ask_reads_utf_8_from_pipe_in_any_locale(gateway: FakeGateway, content: bytes, question: str | None) -> None:
    done = in_ascii("ask", "-", "--gateway", gateway.address, stdin=content)
    assert b"Traceback" not in done.stderr
    asked = [request.chat.messages[0].content for request in gateway.requests]
    if question is None:
        assert b"but it must be text in valid Unicode" in done.stderr
        assert (done.returncode, asked) == (1, [])
    else:
        assert (done.returncode, asked) == (0, [question])
        assert rb"echo: hi \u2192" in done.stdout


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"], ["ask", "naïve 👋", "--json"], ["chat"]])
def test_verbs_print_in_ascii_without_traceback(gateway: FakeGateway, arguments: list[str]) -> None:
    done = in_ascii(*arguments, "--gateway", gateway.address, stdin="→ 👋\n".encode())
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    if "--json" in arguments:
        assert isinstance(json.loads(done.stdout), dict)


@pytest.mark.parametrize(
    ("arguments", "closed", "error"),
    [
        ("ask -", "<&-", "stitch: prompt is '', but it must not be empty\n"),
        ("chat", "<&-", ""),
        ("ask hi", ">&-", ""),
        ("ask hi --json", ">&-", ""),
        ("ask hi", ">/dev/full", "stitch: [Errno 28] No space left on device\n"),
    ],
)
def test_closed_streams_give_no_traceback(gateway: FakeGateway, arguments: str, closed: str, error: str) -> None:
    script = f"{' '.join(PROGRAM)} {arguments} --gateway {gateway.address} {closed}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (1 if error else 0, error)


def in_ascii(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs the command where locale and terminals know ASCII alone."""
    ascii_alone = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **ascii_alone}
    return subprocess.run([*PROGRAM, *arguments], input=stdin, capture_output=True, env=environment, check=False)


def test_ask_sends_flags(gateway: FakeGateway) -> None:
    assert ask(gateway, "hi", "--route", "strong", "--max-tokens", "1", "--temperature", "0.5", "--stop", "x") == 0
    (request,) = gateway.requests
    assert (request.route, request.sampling.max_tokens, request.sampling.temperature) == ("strong", 1, 0.5)
    assert list(request.stop) == ["x"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["hi", "--temperature", "-1"], "sampling.temperature is -1.0, but it must be at least 0 and at most 100"),
        (["hi", "--max-tokens", "99999999999"], "max_tokens is 99999999999, but it must be a whole number of 32 bits"),
        (["hi", "--route", "medium"], "route is 'medium', but this cluster has: weak, strong, auto"),
        (["", "--plain"], "prompt is '', but it must not be empty"),
    ],
)
def test_ask_prints_refusal_in_one_sentence(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    assert ask(gateway, *arguments) == 1
    assert capsys.readouterr() == ("", f"stitch: {error}\n")


def test_ask_prints_deadline(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.stall_before_word = 0
    assert ask(gateway, "hi", "--timeout", "0.2") == 1
    assert "Deadline Exceeded" in capsys.readouterr().err


def test_ask_prints_unknown_rpc_error(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.failure = lambda request: 1 / 0  # type: ignore[return-value, assignment]
    assert ask(gateway, "hi") == 1
    assert capsys.readouterr().err.startswith("stitch: the gateway failed: Exception iterating responses")


class TestChat:
    """`stitch chat` with typed lines."""

    @pytest.fixture
    def talk(self, gateway: FakeGateway) -> Iterator[Conversation]:
        with Client(gateway.address) as client:
            yield Conversation(client, Console(file=io.StringIO()), {}, system="Be brief.")

    @staticmethod
    def hold(talk: Conversation, *lines: str) -> None:
        typed = iter(lines)

        def read_line(prompt: str) -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        talk.run(read_line)

    @staticmethod
    def asked(gateway: FakeGateway) -> list[list[str]]:
        return [[turn.content for turn in request.chat.messages] for request in gateway.requests]

    def test_chat_sends_previous_turns(self, talk: Conversation, gateway: FakeGateway) -> None:
        self.hold(talk, "a", "", "b")
        assert self.asked(gateway) == [["Be brief.", "a"], ["Be brief.", "a", "echo: Be brief. a", "b"]]
        assert [turn.role for turn in gateway.requests[1].chat.messages] == ["system", "user", "assistant", "user"]

    def test_new_clears_turns(self, talk: Conversation, gateway: FakeGateway) -> None:
        self.hold(talk, "a", "/new", "b")
        assert self.asked(gateway)[1] == ["Be brief.", "b"]

    def test_route_holds_until_changed(self, talk: Conversation, gateway: FakeGateway) -> None:
        self.hold(talk, "a", "/route strong", "b", "c", "/route", "d")
        assert [request.route for request in gateway.requests] == ["", "strong", "strong", "auto"]

    def test_conversation_keeps_name_until_new_or_route(self, talk: Conversation, gateway: FakeGateway) -> None:
        self.hold(talk, "a", "b", "/new", "c", "/route strong", "d", "e")
        names = [request.conversation_id for request in gateway.requests]
        assert "" not in names
        assert [names.index(name) for name in names] == [0, 0, 2, 3, 3]

    def test_failure_drops_turn(self, talk: Conversation, gateway: FakeGateway) -> None:
        failures = iter([Unavailable("top-0 is gone")])
        gateway.failure = lambda request: next(failures, None)
        self.hold(talk, "a", "b")
        assert self.asked(gateway) == [["Be brief.", "a"], ["Be brief.", "b"]]
        assert "top-0 is gone" in talk.console.file.getvalue()  # type: ignore[attr-defined]

    def test_ctrl_c_drops_turn(self, talk: Conversation, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(console: object, stream: object) -> None:
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr("stitch.cli.chat.show_stream", interrupt)
        self.hold(talk, "a", "b")
        assert self.asked(gateway) == [["Be brief.", "b"]]

    def test_quit_and_help_send_nothing(self, talk: Conversation, gateway: FakeGateway) -> None:
        self.hold(talk, "/help", "/quit", "a")
        assert gateway.requests == []
        assert "/route" in talk.console.file.getvalue()  # type: ignore[attr-defined]

    def test_chat_reads_standard_input(
        self, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
        assert main(["chat", "--gateway", gateway.address, "--max-tokens", "1"]) == 0
        assert "1 generated (length)" in capsys.readouterr().out


class TestBatch:
    """`stitch batch` from file to file."""

    @staticmethod
    def batch(gateway: FakeGateway, folder: Path, *arguments: str) -> int:
        files = [str(folder / "in.jsonl"), "--out", str(folder / "out.jsonl")]
        return main(["batch", *files, "--gateway", gateway.address, *arguments])

    @staticmethod
    def written(folder: Path) -> list[dict[str, object]]:
        return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]

    def test_batch_answers_every_line(
        self, gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "max_tokens": 1}\n')
        assert self.batch(gateway, tmp_path, "--route", "strong") == 0
        assert [(line["text"], line["route"]) for line in self.written(tmp_path)] == [
            ("echo: a", "strong"),
            ("echo:", "strong"),
        ]
        assert capsys.readouterr() == ("", f"2 answered, 0 failed: {tmp_path / 'out.jsonl'}\n")

    def test_batch_with_invalid_line_exits_with_1(
        self, gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\nnonsense\n')
        assert self.batch(gateway, tmp_path) == 1
        assert ["error" in line for line in self.written(tmp_path)] == [False, True]
        assert capsys.readouterr().err.startswith("1 answered, 1 failed: ")

    def test_batch_resume_requests_missing_lines(self, gateway: FakeGateway, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
        kept = {"line": 1, "text": "kept", "request": digest({"prompt": "a"})}
        (tmp_path / "out.jsonl").write_text(json.dumps(kept) + '\n{"line": 2, "error": {}}\n')
        assert self.batch(gateway, tmp_path, "--resume") == 0
        assert [line["text"] for line in self.written(tmp_path)] == ["kept", "echo: b", "echo: c"]

    def test_batch_resume_with_line_in_front_keeps_answers_of_their_requests(
        self, gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "id": 7}\n{"prompt": "gone"}\n')
        assert self.batch(gateway, tmp_path, "--max-tokens", "1") == 0
        gateway.requests.clear()
        (tmp_path / "in.jsonl").write_text('{"prompt": "new"}\n\n{"prompt": "a"}\n{"id": 7, "prompt": "b"}\n')
        assert self.batch(gateway, tmp_path, "--resume", "--max-tokens", "2") == 0
        assert [request.prompt for request in gateway.requests] == ["new"]
        assert [(line["line"], line["text"]) for line in self.written(tmp_path)] == [
            (1, "echo: new"),
            (3, "echo:"),
            (4, "echo:"),
        ]
        old = json.loads((tmp_path / "out.jsonl.old").read_text())
        assert (old["request"], old["text"]) == (digest({"prompt": "gone"}), "echo:")
        told = capsys.readouterr().err
        assert f"1 of 3 answers belong to no line and go to {tmp_path / 'out.jsonl.old'}\n" in told
        assert "2 kept answers were made with max_tokens 1, not 2\n" in told

    async def test_killed_runs_lose_no_answer(self, gateway: FakeGateway, tmp_path: Path) -> None:
        prompts = [f"{number}" if number % 4 else f"{number} and more words" for number in range(40)]
        (tmp_path / "in.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
        out, draft = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
        files = [str(tmp_path / "in.jsonl"), "--out", str(out), "--gateway", gateway.address, "--concurrency", "12"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        gateway.stall_before_word = 2
        for _ in range(2):
            command = [*PROGRAM, "batch", *files, "--resume"]
            process = await asyncio.create_subprocess_exec(*command, env=environment)
            await eventually(lambda: draft.exists() and draft.read_text().count("echo") > 0, WAIT_SECONDS)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            with draft.open("a") as file:
                file.write('{"line": 1, "te')
            written = draft.read_text().count("echo")
        gateway.stall_before_word = None
        gateway.requests.clear()
        assert await asyncio.to_thread(self.batch, gateway, tmp_path, "--resume") == 0
        assert len(gateway.requests) == len(prompts) - written
        assert [line["text"] for line in self.written(tmp_path)] == [f"echo: {prompt}" for prompt in prompts]
        assert not draft.exists()

    def test_batch_in_other_locale_is_utf_8(self, gateway: FakeGateway, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text('\ufeff{"prompt": "é\u2028→"}\n', encoding="utf-8")
        files = [str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--gateway", gateway.address]
        for _ in range(2):
            done = in_ascii("batch", *files, "--resume")
            assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
        (line,) = (tmp_path / "out.jsonl").read_bytes().decode().splitlines()
        assert json.loads(line)["text"] == "echo: é →"
        assert len(gateway.requests) == 1

    def test_batch_on_full_disk_leaves_output_and_resumes(self, gateway: FakeGateway, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(20)))
        (tmp_path / "out.jsonl").write_text("old\n")
        files = [str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--gateway", gateway.address]
        limited = ["bash", "-c", 'ulimit -f 2; exec "$@"', "-", *PROGRAM, "batch", *files]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(limited, capture_output=True, env=environment, check=False)
        assert done.returncode == 1
        assert done.stderr.decode() == f"stitch: [Errno 27] File too large: '{tmp_path / 'out.jsonl.part'}'\n"
        assert (tmp_path / "out.jsonl").read_text() == "old\n"
        gateway.requests.clear()
        assert self.batch(gateway, tmp_path, "--resume") == 0
        assert [line["text"] for line in self.written(tmp_path)] == [f"echo: {number}" for number in range(20)]
        assert 10 < len(gateway.requests) < 20

    def test_batch_to_pipe_streams(self, gateway: FakeGateway, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
        os.mkfifo(tmp_path / "out.jsonl")
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit((tmp_path / "out.jsonl").read_text)
            assert self.batch(gateway, tmp_path) == 0
            assert [json.loads(line)["line"] for line in read.result(WAIT_SECONDS).splitlines()] == [1, 2]
        assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]

    def test_batch_to_standard_output_appends_to_redirection(self, gateway: FakeGateway, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
        command = [*PROGRAM, "batch", str(tmp_path / "in.jsonl"), "--out", "/dev/stdout", "--gateway", gateway.address]
        with (tmp_path / "redirected").open("w") as redirected:
            redirected.write("before\n")
            redirected.flush()
            subprocess.run(command, stdout=redirected, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
            redirected.write("after\n")
        first, answer, last = (tmp_path / "redirected").read_text().splitlines()
        assert (first, json.loads(answer)["line"], last) == ("before", 1, "after")

    def test_batch_of_standard_streams(self, gateway: FakeGateway, tmp_path: Path) -> None:
        done = in_ascii(
            "batch", "-", "--out", "-", "--gateway", gateway.address, stdin=b'\xef\xbb\xbf{"prompt": "a"}\n\n'
        )
        assert (done.returncode, done.stderr) == (0, b"1 answered, 0 failed: -\n")
        assert json.loads(done.stdout)["text"] == "echo: a"

    def test_batch_onto_its_input_asks_nothing(
        self, gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
        (tmp_path / "out.jsonl").symlink_to("in.jsonl")
        assert self.batch(gateway, tmp_path) == 1
        assert "would be overwritten" in capsys.readouterr().err
        assert gateway.requests == []
        assert (tmp_path / "in.jsonl").read_text() == '{"prompt": "a"}\n'

    async def test_ctrl_c_keeps_finished_answers(self, gateway: FakeGateway, tmp_path: Path) -> None:
        gateway.stall_before_word = 2
        # The third is answered before the second.
        out, draft = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
        (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b c d"}\n{"prompt": "e"}\n{"prompt": "f"}\n')
        out.write_text(json.dumps({"line": 3, "text": "kept", "request": digest({"prompt": "e"})}) + "\n")
        arguments = [str(tmp_path / "in.jsonl"), "--out", str(out), "--resume", "--gateway", gateway.address]
        command = [*PROGRAM, "batch", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = await asyncio.create_subprocess_exec(*command, env=environment)
        await eventually(lambda: draft.exists() and draft.read_text().count("\n") == 2, WAIT_SECONDS)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        assert [line["text"] for line in self.written(tmp_path)] == ["echo: a", "kept", "echo: f"]
        assert await asyncio.to_thread(gateway.cancelled.wait, WAIT_SECONDS)

    def test_batch_prints_missing_file(
        self, gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.batch(gateway, tmp_path) == 1
        assert "No such file or directory" in capsys.readouterr().err
        assert not (tmp_path / "out.jsonl").exists()

    def test_batch_of_empty_file_is_empty(self, gateway: FakeGateway, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text("")
        assert self.batch(gateway, tmp_path) == 0
        assert (tmp_path / "out.jsonl").read_text() == ""


def test_status_shows_models_routes_and_shards(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--gateway", gateway.address]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"fake at {gateway.address}" in shown
    assert "bottom org/large qwen2 28 1,536 32,768" in shown
    assert "weak 0–14 1536 → 896 abcdef012345 13–23 900.0 M" in shown
    assert "bottom-0 bottom 0–19 127.0.0.1:7001 cpu float32 4,096 ready" in shown
    assert "top-1 top 13–23 127.0.0.1:7003 cpu float32 – gone" in shown
    assert "shards from file fake.toml: added top-1, 0:01:15 ago" in shown
    assert "refused: DNS top.test: it has no address" in shown


def test_status_json_includes_false_values(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "--gateway", gateway.address]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gateway"] == gateway.address
    assert found["bottom"]["hidden_size"] == 1536
    assert [shard["serving"] for shard in found["shards"]] == [True, True, False]


class TestTtft:
    """`stitch ttft` as tables and files."""

    @pytest.fixture(autouse=True)
    def slopes(self, gateway: FakeGateway) -> None:
        gateway.ttft_seconds = lambda route, tokens: 0.1 + tokens * (0.002 if route == "strong" else 0.001)

    def test_ttft_prints_medians_and_lines(self, gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["ttft", "--lengths", "4,8", "--repeat", "1", "--gateway", gateway.address]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "prompt tokens weak strong" in shown
        assert "4 104 ms 108 ms 8 108 ms 116 ms" in shown
        assert "weak 1.000 100 ms 1.0000 strong 2.000 100 ms 1.0000" in shown

    def test_ttft_writes_files(self, gateway: FakeGateway, tmp_path: Path) -> None:
        plot, data = tmp_path / "new" / "ttft.png", tmp_path / "ttft.json"
        arguments = ["--lengths", "4,8", "--repeat", "2", "--out", str(plot), "--json", str(data)]
        assert main(["ttft", *arguments, "--gateway", gateway.address]) == 0
        assert plot.read_bytes().startswith(b"\x89PNG")
        written = json.loads(data.read_text())
        assert (written["cluster"], len(written["samples"])) == ("fake", 8)
        assert written["lines"]["strong"]["slope_seconds"] == pytest.approx(0.002)

    def test_ttft_without_matplotlib_prints_tables(
        self, gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        plot = tmp_path / "ttft.png"
        arguments = ["--lengths", "4,8", "--repeat", "1", "--out", str(plot), "--gateway", gateway.address]
        assert main(["ttft", *arguments]) == 0
        shown = capsys.readouterr().out
        assert "no plot: " in shown
        assert "ms per token" in shown
        assert not plot.exists()

    def test_ttft_refuses_lengths_beyond_context(
        self, gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["ttft", "--lengths", "40000,50000", "--gateway", gateway.address]) == 1
        assert "two must be below the context of 32768 tokens" in capsys.readouterr().err
