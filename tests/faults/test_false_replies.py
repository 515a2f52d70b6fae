"""A next shard that answers with invented, damaged and foreign replies ends its own sessions alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stitch.channels import open_sync_channel
from stitch.v1 import inference_pb2, shard_pb2, shard_pb2_grpc
from tests.support.false_shard import FalseShard, Reply, false_shard
from tests.support.processes import Cluster, running_cluster
from tests.support.random_messages import changed, garbled
from tests.support.tiny_cluster import TOP, write_tiny_cluster
from tests.support.tiny_model import TOKENS
from tests.support.waiting import becomes_true

RELEASE_SECONDS = 20.0
# A session that its next shard leaves unanswered.
ANSWER_SECONDS = 0.2
QUESTION: dict[str, Any] = {"prompt": "the quick brown fox", "route": "weak", "max_tokens": 12, "ignore_eos": True}
DEFECTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)

pytestmark = pytest.mark.slow

numbers = st.sampled_from([0, 1, 2, 7, 2**31, 2**32 - 1])
seconds = st.sampled_from([0.0, 0.5, -1.0, math.nan, math.inf, 1e300])
# Of a session: that of the step, or any number, so also those of everybody else's.
sessions = st.one_of(st.none(), st.integers(0, 40))


@st.composite
def replies(draw: Callable[[Any], Any]) -> Reply:
    """A reply to a step: with the step's number or another one, tokens, failures, and damages."""
    number, damages, seed = draw(st.one_of(st.none(), numbers)), draw(st.integers(0, 3)), draw(st.integers(0, 1 << 30))
    tokens = draw(st.lists(st.tuples(sessions, numbers, st.integers(0, TOKENS + 20), st.integers(-2, 2)), max_size=3))
    failures = draw(st.lists(st.tuples(sessions, numbers, st.integers(0, 9)), max_size=2))
    stages = draw(st.lists(st.tuples(st.sampled_from(["wire", "stitch", "x", ""]), seconds), max_size=2))
    is_garbled = draw(st.booleans())

    def reply(step: shard_pb2.Step) -> bytes:
        own, last = step.segments[0].session, step.segments[0].position + step.segments[0].length
        message = shard_pb2.StepReply(step=step.step if number is None else number)
        for session, epoch, token_id, offset in tokens:
            position = max(0, last + offset)
            token = shard_pb2.GeneratedToken(id=token_id, position=position)
            message.tokens.add(session=own if session is None else session, epoch=epoch % 3, token=token)
        for session, epoch, cause in failures:
            message.failures.add(session=own if session is None else session, epoch=epoch % 3, cause=cause, message="x")  # type: ignore[arg-type]
        message.stages.extend(inference_pb2.Stage(name=name, seconds=value) for name, value in stages)
        random = Random(seed)
        frame = shard_pb2.LinkResponse(reply=message)
        for _ in range(damages):
            changed(frame, random)
        data = frame.SerializeToString()
        return garbled(data, random) if is_garbled and damages else data

    return reply


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    file = write_tiny_cluster(tmp_path_factory.mktemp("pair"), tops=[TOP, TOP])
    with running_cluster(file, tmp_path_factory.mktemp("run"), absent=["top-1"]) as running:
        yield running


@pytest.fixture
def false(cluster: Cluster) -> Iterator[FalseShard]:
    """The second top shard. It answers no Describe, so the gateway places nothing there."""
    with false_shard(cluster.address("top-1")) as shard, open_sync_channel(cluster.address("top-0")) as channel:
        described = shard_pb2_grpc.ShardStub(channel).Describe(shard_pb2.ShardDescribeRequest())
        shard.identity = described.identity
        shard.identity.shard = "top-1"
        yield shard


class Bystander:
    """A client that repeats one request over the honest top shard."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.alone = cluster.generate(**QUESTION).token_ids
        self.others: list[tuple[int, ...]] = []
        self.answers = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._over.is_set():
            answer = self._cluster.generate(**QUESTION).token_ids
            self.answers += 1
            if answer != self.alone:
                self.others.append(answer)

    def __enter__(self) -> Bystander:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def session_over(chain: str, channel: grpc.Channel) -> grpc.StatusCode:
    """Asks the first shard for an answer over that chain; returns the status of its end."""
    request = shard_pb2.ShardGenerateRequest(
        token_ids=[5, 6, 7], prompt_tokens=3, route="weak", chain=[chain], sampling=inference_pb2.Sampling(max_tokens=4)
    )
    call = shard_pb2_grpc.ShardStub(channel).Generate(request, timeout=ANSWER_SECONDS)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("examples", [40, pytest.param(5_000, marks=pytest.mark.full)])
@pytest.mark.timeout(1_200)
def test_false_replies_disturb_nobody_else(cluster: Cluster, false: FalseShard, examples: int) -> None:
    ends: set[grpc.StatusCode] = set()
    with open_sync_channel(cluster.address("bottom-0")) as channel, Bystander(cluster) as bystander:

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(script=st.lists(replies(), max_size=4))
        def check(script: list[Reply]) -> None:
            false.tell(script)
            code = session_over("top-1", channel)
            ends.add(code)
            assert code not in DEFECTS

        check()
    assert bystander.answers > 0
    assert bystander.others == []
    assert false.steps > examples // 4
    assert len(ends) > 1
    for name in cluster.names:
        assert cluster.running(name)
        assert "Traceback" not in cluster.log(name)
        if name != "gateway":
            free = lambda: cluster.metric(name, "stitch_kv_cache_usage_ratio") == 0  # noqa: B023, E731
            assert becomes_true(free, RELEASE_SECONDS)
