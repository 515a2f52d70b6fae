"""Tests of the progress of streams: which are ended for a silent shard, and which replicas are ejected as slow."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from router_gateway.metrics import Metrics
from router_gateway.shards.ejection import EjectionPolicy
from router_gateway.shards.placement import PlacedSession, Placement
from router_gateway.shards.progress import MIN_SAMPLES, ProgressMonitor
from router_gateway.shards.registry import ShardRegistry
from tests.support.fake_shard import FakeShard
from tests.support.registries import QUICK, registry_of
from tests.support.waiting import eventually


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """Sessions on two replicas of each stage, by a clock that a test sets."""

    registry: ShardRegistry
    placement: Placement
    monitor: ProgressMonitor
    metrics: Metrics
    clock: Clock

    def place(self, first: str, *, other_than: str = "") -> PlacedSession:
        """A session on the bottom replica `first`; with `other_than` not on that top replica."""
        other = "bottom-0" if first == "bottom-1" else "bottom-1"
        chain = self.placement.choose("strong", Counter({other: 1, other_than: 1}))
        assert chain is not None
        assert chain.names[0] == first
        return self.placement.place(chain, 10, 100)

    def wait(self, seconds: float) -> None:
        """Lets time pass, with every check."""
        for _ in range(round(seconds / QUICK.check_seconds)):
            self.clock.now += QUICK.check_seconds
            self.monitor.check()

    def ejections(self, cause: str) -> float | None:
        return self.metrics.registry.get_sample_value("stitch_ejections_total", {"cause": cause})


def shards() -> list[FakeShard]:
    return [FakeShard(f"{role}-{index}", role) for role in ("bottom", "top") for index in range(2)]


@asynccontextmanager
async def bench_of(*fakes: FakeShard) -> AsyncIterator[Bench]:
    metrics, clock = Metrics(["weak", "strong"], ["requested"]), Clock()
    async with registry_of(*fakes, metrics=metrics, clock=clock) as (_, registry):
        placement = Placement(registry)
        # On a busy machine a poll may time out.
        while not all(replica.serving for replica in registry.replicas.values()):
            await registry.refresh()
        yield Bench(registry, placement, ProgressMonitor(placement, QUICK, EjectionPolicy()), metrics, clock)
        for fake in fakes:
            fake.answers_describe.set()


async def stops(bench: Bench, fake: FakeShard) -> None:
    """The shard says nothing any more, and its next poll has reached it."""
    fake.answers_describe.clear()
    polls = fake.polls
    bench.registry.replicas[fake.name].start_poll()
    await eventually(lambda: fake.polls > polls)


async def test_stream_that_waits_for_a_silent_shard_is_ended() -> None:
    fakes = shards()
    async with bench_of(*fakes) as bench:
        with bench.place("bottom-0") as session:
            ended: list[bool] = []
            session.cancel = lambda: ended.append(True)
            bench.clock.now = 1.0
            session.record(1)
            await stops(bench, fakes[0])
            bench.wait(0.15)
            assert not ended
            bench.wait(0.1)
            assert ended == [True]
            assert session.silent_shard == "bottom-0"
            assert bench.registry.replicas["bottom-0"].avoided
            assert bench.ejections("unreachable") == 1


async def test_stream_that_gets_tokens_goes_on_whatever_polls_say() -> None:
    fakes = shards()
    async with bench_of(*fakes) as bench:
        with bench.place("bottom-0") as session:
            session.cancel = lambda: ended.append(True)
            ended: list[bool] = []
            await stops(bench, fakes[0])
            for _ in range(20):
                bench.wait(0.05)
                session.record(1)
            assert not ended
            assert not bench.registry.replicas["bottom-0"].silent


async def test_replica_that_sends_tokens_and_answers_no_poll_is_avoided() -> None:
    fakes = shards()
    async with bench_of(*fakes) as bench:
        with bench.place("bottom-0") as session:
            ended: list[bool] = []
            session.cancel = lambda: ended.append(True)
            await stops(bench, fakes[0])
            for _ in range(20):
                session.record(1)
                bench.wait(QUICK.check_seconds)
            assert not ended
            assert bench.registry.replicas["bottom-0"].avoided


async def test_new_session_leaves_replica_that_answers_no_poll_as_soon_as_it_is_avoided() -> None:
    fakes = shards()
    async with bench_of(*fakes) as bench:
        fakes[0].answers_describe.clear()
        with bench.place("bottom-0") as session:
            ended: list[bool] = []
            session.cancel = lambda: ended.append(True)
            polls = fakes[0].polls
            bench.wait(QUICK.check_seconds)
            await eventually(lambda: fakes[0].polls > polls)
            bench.wait(QUICK.doubt_seconds - 2 * QUICK.check_seconds)
            assert not ended
            bench.wait(4 * QUICK.check_seconds)
            assert ended == [True]
            assert session.silent_shard == "bottom-0"


@pytest.mark.parametrize(("tokens", "waited_seconds", "leaves"), [(0, 0.9, True), (0, 1.1, False), (1, 0.9, False)])
async def test_new_session_leaves_next_shard_that_its_first_one_suspects(
    tokens: int, waited_seconds: float, leaves: bool
) -> None:
    fakes = shards()
    async with bench_of(*fakes) as bench:
        with bench.place("bottom-0", other_than="top-1") as session:
            ended: list[bool] = []
            session.cancel = lambda: ended.append(True)
            session.record(tokens)
            bench.clock.now = waited_seconds - QUICK.check_seconds
            # Of no shard of its chain.
            bench.registry.take_suspects("bottom-1", ["top-0"])
            bench.wait(QUICK.check_seconds)
            assert not ended
            bench.registry.take_suspects("bottom-0", ["top-0"])
            bench.monitor.check()
            assert bool(ended) == leaves
            assert session.silent_shard == ("top-0" if leaves else "")


async def test_replica_that_usually_answers_late_is_avoided_later() -> None:
    fakes = shards()
    async with bench_of(*fakes) as bench:
        replica = bench.registry.replicas["bottom-0"]
        for _ in range(20):
            await stops(bench, fakes[0])
            bench.wait(0.04)
            fakes[0].answers_describe.set()
            await eventually(lambda: not replica.unanswered_seconds)
        await stops(bench, fakes[0])
        bench.wait(QUICK.doubt_seconds + 2 * QUICK.check_seconds)
        assert not replica.avoided
        bench.wait(4 * 0.04 - QUICK.doubt_seconds)
        assert replica.avoided


async def test_session_that_has_waited_for_long_leaves_only_where_half_of_it_was_silence() -> None:
    fakes = shards()
    async with bench_of(*fakes) as bench:
        with bench.place("bottom-0") as session:
            ended: list[bool] = []
            session.cancel = lambda: ended.append(True)
            # A long prefill, in which polls are answered.
            bench.wait(3 * QUICK.doubt_seconds)
            await bench.registry.refresh()
            await stops(bench, fakes[0])
            bench.wait(QUICK.doubt_seconds + 2 * QUICK.check_seconds)
            assert not ended
            bench.wait(QUICK.poll_timeout_seconds - QUICK.doubt_seconds)
            assert ended == [True]


async def test_stream_without_tokens_goes_on_while_its_shards_answer_polls() -> None:
    async with bench_of(*shards()) as bench:
        with bench.place("bottom-0") as session:
            ended: list[bool] = []
            session.cancel = lambda: ended.append(True)
            for _ in range(10):
                bench.wait(0.15)
                await bench.registry.refresh()
            assert not ended


async def test_overdue_stream_has_all_its_shards_polled_at_once() -> None:
    fakes = shards()
    async with bench_of(*fakes) as bench:
        with bench.place("bottom-0") as session:
            before = {fake.name: fake.polls for fake in fakes}
            bench.wait(QUICK.overdue_seconds)
            polled = session.chain.names
            await eventually(lambda: {fake.name for fake in fakes if fake.polls > before[fake.name]} == set(polled))


async def test_stream_is_not_ended_where_no_replica_could_continue() -> None:
    fakes = [FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")]
    async with bench_of(*fakes) as bench:
        with bench.place("bottom-0") as session:
            ended: list[bool] = []
            session.cancel = lambda: ended.append(True)
            await stops(bench, fakes[0])
            bench.wait(0.5)
            assert not ended
            # By the system's clock the poll times out, and the shard is gone.
            await eventually(lambda: not bench.registry.replicas["bottom-0"].serving)
            bench.wait(0.1)
            assert ended == [True]


async def test_new_sessions_prefer_replicas_that_answer_at_once() -> None:
    fakes = shards()
    async with bench_of(*fakes) as bench:
        await stops(bench, fakes[0])
        bench.wait(QUICK.doubt_seconds + QUICK.check_seconds)
        chain = bench.placement.choose("strong", Counter())
        assert chain is not None
        assert chain.first.config.name == "bottom-1"
        assert bench.ejections("unreachable") == 0


async def test_replica_that_is_far_slower_than_its_peer_is_ejected() -> None:
    async with bench_of(*shards()) as bench:
        with bench.place("bottom-0", other_than="top-1") as quick, bench.place("bottom-1", other_than="top-1") as slow:
            samples_seconds = 0.2 * (MIN_SAMPLES + 2)
            for step in range(1, 1000):
                bench.clock.now = step * 0.02
                quick.record(1)
                if step % 10 == 0:
                    slow.record(1)
                bench.monitor.check()
                if bench.registry.replicas["bottom-1"].avoided:
                    break
            assert EjectionPolicy().slow_seconds <= bench.clock.now <= EjectionPolicy().slow_seconds + samples_seconds
        assert bench.ejections("slow") == 1
        assert bench.registry.replicas["bottom-1"].avoided
        # Both streams pass it.
        assert not bench.registry.replicas["top-0"].avoided


async def test_only_replica_of_a_stage_is_not_slow() -> None:
    async with bench_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as bench:
        with bench.place("bottom-0") as session:
            for second in range(1, 2 * MIN_SAMPLES):
                bench.clock.now = float(second)
                session.record(1)
                bench.monitor.check()
                await asyncio.sleep(0)
        assert bench.ejections("slow") == 0


async def test_gateway_that_is_late_itself_finds_nobody_silent() -> None:
    fakes = shards()
    async with bench_of(*fakes) as bench:
        with bench.place("bottom-0") as session:
            ended: list[bool] = []
            session.cancel = lambda: ended.append(True)
            await stops(bench, fakes[0])
            bench.clock.now += 30.0
            bench.monitor.check()
            assert not ended
            assert not bench.registry.replicas["bottom-0"].avoided
