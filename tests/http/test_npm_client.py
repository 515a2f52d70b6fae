"""OpenAI's client for Node: chats, completions, responses, models, streams, parameters, and each class of errors.

Runs where `node` and `npm` are installed; npm installs the version of `npm/package-lock.json` into the user's cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from router_gateway.admission.tenants import hash_key
from stitch.errors import Exhausted, Expired
from tests.http.conftest import USER, Serve
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard, raises
from tests.support.processes import Cluster

HERE = Path(__file__).with_name("npm")
FILES = ("package.json", "package-lock.json")
INSTALL_SECONDS = 120
UNREACHABLE = re.compile("code (ECONN|ENOTFOUND|EAI_AGAIN|ETIMEDOUT)")
TEXT = "hello world"
GENERATED = len(tokens(TEXT)) + 1


def shards() -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom", tokens(TEXT)), FakeShard("top-0", "top")


@pytest.fixture(scope="module")
def installed() -> Path:
    """The folder with the client's package."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node or npm is not installed, so that OpenAI's client for Node can't run")
    lock = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in FILES)).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "stitch-tests")
    folder = cache / f"npm-{lock[:16]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        for file in FILES:
            shutil.copy(HERE / file, name)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        if UNREACHABLE.search(done.stderr):
            pytest.skip("npm reaches no registry, so that OpenAI's client for Node can't be installed")
        assert done.returncode == 0, done.stderr
        # Another test run may have been faster.
        if not folder.exists():
            shutil.copytree(name, folder)
    return folder


@dataclass
class Node:
    """A process with the client."""

    process: asyncio.subprocess.Process

    async def call(self, method: str, *given: Any) -> dict[str, Any]:
        """The outcome: `reply`, `parts` of a stream or a page, or `error`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"method": method, "given": given}).encode() + b"\n")
        line = await self.process.stdout.readline()
        assert line, "the process has ended"
        outcome: dict[str, Any] = json.loads(line)
        return outcome

    async def reply(self, method: str, *given: Any) -> Any:
        outcome = await self.call(method, *given)
        return outcome.get("reply", outcome)

    async def parts(self, method: str, *given: Any) -> list[Any]:
        outcome = await self.call(method, *given)
        assert "parts" in outcome, outcome
        found: list[Any] = outcome["parts"]
        return found


@asynccontextmanager
async def node(folder: Path, url: str, key: str = "none") -> AsyncIterator[Node]:
    script = ["--input-type=module", "--eval", (HERE / "client.mjs").read_text()]
    process = await asyncio.create_subprocess_exec(
        "node", *script, "--", f"{url}/v1", key, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield Node(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        assert await process.wait() == 0


async def test_chats_are_answered_and_streamed(serve: Serve, installed: Path) -> None:
    asked = {"model": "weak", "messages": USER}
    async with serve(*shards()) as served, node(installed, served.url) as client:
        reply = await client.reply("chat.completions.create", asked)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = await client.parts("chat.completions.create", {**asked, **options})
    assert (reply["model"], reply["choices"][0]["message"]["content"]) == ("weak", TEXT)
    assert reply["usage"]["completion_tokens"] == GENERATED
    assert reply["stitch"]["route"] == "weak"
    *parts, last = chunks
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == TEXT
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["usage"] == reply["usage"]


async def test_parameters_of_a_chat_are_taken_over(serve: Serve, installed: Path) -> None:
    bottom, top = shards()
    bottom.logprob = -0.5
    asked = {"model": "weak", "messages": USER}
    async with serve(bottom, top) as served, node(installed, served.url) as client:
        stopped = await client.reply("chat.completions.create", {**asked, "stop": ["lo w"]})
        several = await client.reply("chat.completions.create", {**asked, "n": 3})
        scored = await client.reply("chat.completions.create", {**asked, "logprobs": True, "top_logprobs": 2})
        await client.reply("chat.completions.create", {**asked, "seed": 7, "logit_bias": {"5": -100}})
    assert (stopped["choices"][0]["message"]["content"], stopped["choices"][0]["finish_reason"]) == ("hel", "stop")
    assert [choice["message"]["content"] for choice in several["choices"]] == [TEXT] * 3
    assert several["usage"]["completion_tokens"] == 3 * GENERATED
    assert [entry["logprob"] for entry in scored["choices"][0]["logprobs"]["content"]] == [-0.5] * GENERATED
    sampling = bottom.requests[-1].sampling
    assert (sampling.seed, dict(sampling.logit_bias)) == (7, {5: -100})


async def test_prompts_are_completed_and_streamed(serve: Serve, installed: Path) -> None:
    bottom, top = shards()
    bottom.logprob = -0.5
    asked = {"model": "weak", "prompt": ["the", "fox"], "echo": True, "logprobs": 1}
    async with serve(bottom, top) as served, node(installed, served.url) as client:
        reply = await client.reply("completions.create", asked)
        chunks = await client.parts("completions.create", {**asked, "stream": True})
    assert [choice["text"] for choice in reply["choices"]] == [f"the{TEXT}", f"fox{TEXT}"]
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == len(tokens("the")) + GENERATED
    choices = [chunk["choices"][0] for chunk in chunks]
    streamed = ["".join(one["text"] for one in choices if one["index"] == index) for index in range(2)]
    assert streamed == [f"the{TEXT}", f"fox{TEXT}"]


async def test_responses_are_created_and_streamed(serve: Serve, installed: Path) -> None:
    asked = {"model": "weak", "input": [{"role": "user", "content": "hello"}]}
    async with serve(*shards()) as served, node(installed, served.url) as client:
        reply = await client.reply("responses.create", asked)
        events = await client.parts("responses.create", {**asked, "stream": True})
        followed = await client.reply("responses.stream", asked)
    assert (reply["output_text"], reply["status"]) == (TEXT, "completed")
    assert reply["usage"]["output_tokens"] == GENERATED
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == TEXT
    assert events[-1]["response"]["usage"] == reply["usage"]
    assert (followed["output_text"], followed["status"]) == (TEXT, "completed")


async def test_models_are_listed(serve: Serve, installed: Path) -> None:
    async with serve(*shards()) as served, node(installed, served.url) as client:
        listed = await client.parts("models.list")
        found = await client.reply("models.retrieve", "weak")
    assert [one["id"] for one in listed] == ["auto", "weak", "strong"]
    assert found == next(one for one in listed if one["id"] == "weak")


async def test_each_class_of_errors_is_raised(serve: Serve, installed: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(f'[tenants.t]\nkeys = ["{hash_key("mine")}"]\nroutes = ["weak"]\n')
    bottom, top = shards()
    keys = str(tmp_path / "keys.toml")
    async with serve(bottom, top, key="mine", keys=keys) as served, node(installed, served.url, "mine") as client:

        async def error(*options: Any, **fields: Any) -> dict[str, Any]:
            asked = {"model": "weak", "messages": USER, **fields}
            outcome = await client.call("chat.completions.create", asked, *options)
            found: dict[str, Any] = outcome["error"]
            return found

        found = {
            "BadRequestError": await error(temperature=-1),
            "AuthenticationError": await error({"headers": {"authorization": "Bearer other"}}),
            "PermissionDeniedError": await error(model="strong"),
            "NotFoundError": await error(model="none"),
            "UnprocessableEntityError": await error(objectives={"max_cost": 1e-9}),
        }
        bottom.faults[0] = raises(Exhausted("no room"))
        found["RateLimitError"] = await error()
        bottom.faults[1] = raises(Expired("too late"))
        found["APIError"] = await error(stream=True)
        served.gateway.in_flight.close()
        found["InternalServerError"] = await error()
    assert {name: one["name"] for name, one in found.items()} == {name: name for name in found}
    assert (found["BadRequestError"]["param"], found["BadRequestError"]["code"]) == ("temperature", "invalid_value")
    assert found["NotFoundError"]["code"] == "model_not_found"
    assert found["APIError"]["code"] == "deadline_exceeded"
    assert found["InternalServerError"]["status"] == 503


@pytest.mark.slow
async def test_seeded_text_is_that_of_grpc(tiny_cluster: Cluster, installed: Path) -> None:
    given: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 16}
    expected = await asyncio.to_thread(tiny_cluster.client.generate, messages=USER, route="weak", **given)
    async with node(installed, f"http://{tiny_cluster.http}") as client:
        asked = {"model": "weak", "messages": USER, **given}
        replies = [await client.reply("chat.completions.create", asked) for _ in range(2)]
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == [expected.text] * 2
