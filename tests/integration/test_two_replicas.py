"""Sessions over two replicas of each stage: they are spread evenly, and a stopped replica costs a pause."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from stitch.client import Answer, Client, Delta
from stitch.v1 import inference_pb2, inference_pb2_grpc
from tests.support.processes import GATEWAY, Cluster, running_cluster
from tests.support.stitched_reference import reference
from tests.support.tiny_cluster import BOTTOM, CUTS, TOP, write_tiny_cluster
from tests.support.tiny_model import TOKENS
from tests.support.waiting import becomes_true

BOTTOMS, TOPS = ("bottom-0", "bottom-1"), ("top-0", "top-1")
SESSIONS = 40
# One replica has room for thirty sessions, and twenty may wait at once: both together have room for all.
KV_TOKENS, MAX_WAITING = 8_192, 20
FIELDS: dict[str, Any] = {"route": "weak", "max_tokens": 240, "ignore_eos": True, "temperature": 1.0, "seed": 3}
# The end token of the tiny models, and the tokens of a KV block.
END_TOKEN, BLOCK_TOKENS = 2, 16
# With these the end token comes as soon as it may, at once, and never.
BIASED: list[dict[str, Any]] = [
    {"max_tokens": 120, "temperature": 1.0, "seed": 3, "logit_bias": {END_TOKEN: 100.0}, "min_tokens": 100},
    {"max_tokens": 120, "logit_bias": {END_TOKEN: 100.0}},
    {"max_tokens": 120, "temperature": 1.0, "top_p": 0.9, "seed": 3, "logit_bias": {END_TOKEN: -100.0}},
]
START_SECONDS = 30.0
# From the signal to the next token: the bound on silence, and a prefill on a machine that has other work.
PAUSE_SECONDS = 4.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    file = write_tiny_cluster(
        tmp_path_factory.mktemp("pair"),
        name="two-replicas",
        bottoms=[BOTTOM, BOTTOM],
        tops=[TOP, TOP],
        kv_tokens=KV_TOKENS,
        max_waiting_sessions=MAX_WAITING,
    )
    with running_cluster(file, tmp_path_factory.mktemp("run")) as running:
        yield running


def sessions(cluster: Cluster, shard: str) -> int:
    """Sessions that run or wait on the shard."""
    return sum(int(cluster.metric(shard, f"stitch_sessions_{state}")) for state in ("running", "waiting"))


def computed_tokens(cluster: Cluster, shard: str) -> float:
    """Tokens of all passes of the shard."""
    return cluster.metric(shard, "stitch_batch_tokens_sum")


@contextmanager
def paused(cluster: Cluster, shard: str) -> Iterator[None]:
    cluster.pause(shard)
    try:
        yield
    finally:
        cluster.resume(shard)


def test_sessions_at_once_are_spread_evenly_and_none_is_refused(cluster: Cluster) -> None:
    # The gateway serves as soon as it reaches one chain.
    assert becomes_true(cluster.all_serving, START_SECONDS)
    before = {name: computed_tokens(cluster, name) for name in (*BOTTOMS, *TOPS)}
    with ThreadPoolExecutor(SESSIONS) as threads, Client(cluster.gateway) as client:
        answers = [threads.submit(client.generate, "stitch", **FIELDS) for _ in range(SESSIONS)]
        # One request refused would raise Exhausted.
        assert len({tuple(answer.result().token_ids) for answer in answers}) == 1
    for stage in BOTTOMS, TOPS:
        fewest, most = sorted(computed_tokens(cluster, name) - before[name] for name in stage)
        assert most <= 1.5 * fewest


def test_answers_with_bias_and_least_tokens_are_the_same_alone_in_a_batch_and_over_replay(cluster: Cluster) -> None:
    alone = [cluster.generate("stitch", **one) for one in BIASED]
    assert [answer.finish_reason for answer in alone] == ["stop", "stop", "length"]
    # The end token is forced by its bias as soon as it may come, and by another one it never comes.
    assert [answer.generated_tokens for answer in alone] == [101, 1, 120]
    client = cluster.client
    together = client.batch([{"prompt": "stitch", **one} for one in (*BIASED, FIELDS, *BIASED)])
    batched = [one.token_ids for one in together if isinstance(one, Answer)]
    assert [*batched[:3], *batched[4:]] == [answer.token_ids for answer in alone] * 2
    assert batched[3] == cluster.generate("stitch", **FIELDS).token_ids
    assert over_replay(cluster, TOPS, BIASED[0]).token_ids == alone[0].token_ids


def test_several_answers_compute_the_prompt_once(cluster: Cluster) -> None:
    prompt, fields = "one prompt for many answers " * 8, {**FIELDS, "max_tokens": 48}
    reused = "stitch_prefix_tokens_reused_total"
    before = {name: cluster.metric(name, reused) for name in (*BOTTOMS, *TOPS)}
    first = cluster.generate(prompt, n=4, **fields)
    answers = (first, *first.others)
    assert len({answer.token_ids for answer in answers}) == len(answers) == 4
    whole_blocks = (first.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert whole_blocks > 100
    assert [answer.cached_tokens for answer in answers] == [0, *[whole_blocks] * 3]
    for role in BOTTOMS, TOPS:
        assert sorted(cluster.metric(name, reused) - before[name] for name in role) == [0, 3 * whole_blocks]
    alone = cluster.generate(prompt, **fields)
    assert alone.token_ids == first.token_ids
    # Each of the answers goes on with other shards by itself.
    replayed = over_replay(cluster, BOTTOMS, {**fields, "n": 4}, prompt)
    assert [one.token_ids for one in (replayed, *replayed.others)] == [answer.token_ids for answer in answers]
    assert replayed.replays + sum(one.replays for one in replayed.others) >= 1


def resumed_tokens(cluster: Cluster) -> int:
    """Tokens of which no bottom shard has computed the lower layers again."""
    return sum(int(cluster.metric(name, "stitch_prefix_tokens_resumed_total")) for name in BOTTOMS)


def test_conversation_that_moves_keeps_what_is_computed_also_over_replay(cluster: Cluster, tmp_path: Path) -> None:
    prompt = random.Random(1).choices(range(3, TOKENS), k=200)
    asked: dict[str, Any] = {"conversation_id": "moves", "ignore_eos": True}
    first = cluster.generate(token_ids=prompt, route="weak", max_tokens=25, **asked)
    # Whole blocks of prompt and answer, whose last token no layer has seen.
    kept = (200 + 24) // BLOCK_TOKENS * BLOCK_TOKENS
    token_ids = [*prompt, *first.token_ids, *prompt[:7]]
    write_tiny_cluster(tmp_path)
    files = [tmp_path / name for name in ("bottom", "top", "strong.safetensors")]
    expected = reference(*files, *CUTS["strong"]).generate(token_ids, 120)
    before = resumed_tokens(cluster)
    fields = {"token_ids": token_ids, "route": "strong", "max_tokens": 120, **asked}
    assert list(cluster.generate(**fields).token_ids) == expected
    assert resumed_tokens(cluster) - before == kept
    for role, least in (TOPS, kept), (BOTTOMS, 0):
        before = resumed_tokens(cluster)
        answer = over_replay(cluster, role, fields, None)
        assert (list(answer.token_ids), answer.replays) == (expected, 1)
        assert resumed_tokens(cluster) - before >= least


def over_replay(
    cluster: Cluster, role: tuple[str, str], fields: dict[str, Any], prompt: str | None = "stitch"
) -> Answer:
    """The answers of a request whose shard of that role stops after the first token."""
    with Client(cluster.gateway) as client:
        stream = client.stream(prompt, **fields)
        events = iter(stream)
        while not isinstance(next(events), Delta):
            pass
        [used] = [name for name in role if sessions(cluster, name)]
        with paused(cluster, used):
            for _ in events:
                pass
        return stream.answer


@pytest.mark.parametrize("role", [BOTTOMS, TOPS], ids=["first", "last"])
def test_stopped_replica_costs_a_pause(cluster: Cluster, role: tuple[str, str]) -> None:
    expected = cluster.generate("stitch", **FIELDS)
    before = cluster.metric(GATEWAY, "stitch_replays_total")
    with Client(cluster.gateway) as client:
        stream = client.stream("stitch", **FIELDS)
        events = iter(stream)
        while not isinstance(next(events), Delta):
            pass
        [used] = [name for name in role if sessions(cluster, name)]
        with paused(cluster, used):
            stopped, longest = time.monotonic(), 0.0
            last = stopped
            for _ in events:
                now = time.monotonic()
                longest, last = max(longest, now - last), now
        answer: Answer = stream.answer
    assert answer.token_ids == expected.token_ids
    assert cluster.metric(GATEWAY, "stitch_replays_total") == before + 1
    assert longest < PAUSE_SECONDS


def test_object_goes_on_after_its_last_shard_is_killed(cluster: Cluster) -> None:
    word = {"type": "string", "minLength": 4, "maxLength": 8}
    names = [f"field {index}" for index in range(12)]
    schema = {"type": "object", "properties": dict.fromkeys(names, word), "required": names}
    request = inference_pb2.GenerateRequest(
        prompt="stitch",
        route="weak",
        sampling={"temperature": 1.0, "seed": 3, "max_tokens": 400},
        response_format={"json_schema": json.dumps(schema | {"additionalProperties": False})},
    )
    with grpc.insecure_channel(cluster.gateway) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        expected = "".join(event.delta.text for event in stub.Generate(request))
        before, text, killed = cluster.metric(GATEWAY, "stitch_replays_total"), "", list[str]()
        for event in stub.Generate(request):
            text += event.delta.text
            if len(text) > 60 and not killed:
                killed = [name for name in TOPS if sessions(cluster, name)]
                cluster.kill(*killed)
    cluster.start(*killed)
    cluster.wait_until_serving(*killed)
    assert text == expected
    assert list(json.loads(text)) == names
    assert cluster.metric(GATEWAY, "stitch_replays_total") == before + 1
