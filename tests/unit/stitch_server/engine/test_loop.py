"""The loop takes a batch, computes it and delivers; what fails fails alone."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

import pytest

from stitch.errors import StitchError
from stitch_server.engine.loop import Engine
from stitch_server.engine.types import Batch, LayerRange, Segment, StepOutput, StepReply
from tests.support.engine_fakes import new_session

# Far more than any of these tests needs; only a broken engine waits so long.
PATIENCE_SECONDS = 30.0


def new_batch(length: int = 3) -> Batch:
    return Batch((Segment(new_session(), LayerRange(0, 1), 0, length, wants_token=True, blocks=[]),))


@dataclass
class FakeFront:
    """Hands out the batches that it was given."""

    batches: list[Batch] = field(default_factory=list)
    delivered: list[tuple[Batch, StepOutput]] = field(default_factory=list)
    failed: list[tuple[Batch, Exception]] = field(default_factory=list)
    settled: threading.Event = field(default_factory=threading.Event)

    def next_batch(self) -> Batch | None:
        return self.batches.pop(0) if self.batches else None

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        self.delivered.append((batch, output))
        self.settled.set()

    def fail(self, batch: Batch, error: Exception) -> None:
        self.failed.append((batch, error))

    def replied(self, reply: StepReply) -> None:
        raise NotImplementedError

    def lost(self, address: str, error: StitchError) -> None:
        raise NotImplementedError


@dataclass
class FakeRunner:
    """Computes nothing, and fails where it is told to."""

    errors: list[Exception] = field(default_factory=list)
    output: StepOutput = field(default_factory=StepOutput)
    threads: set[str] = field(default_factory=set)

    def run(self, batch: Batch) -> StepOutput:
        self.threads.add(threading.current_thread().name)
        if self.errors:
            raise self.errors.pop()
        return self.output


@pytest.fixture
def front() -> FakeFront:
    return FakeFront()


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


class TestStep:
    def test_without_a_batch_there_is_nothing_to_do(self, front: FakeFront, runner: FakeRunner) -> None:
        assert not Engine(front, runner).step()
        assert runner.threads == set()

    def test_a_batch_is_computed_observed_and_delivered(self, front: FakeFront, runner: FakeRunner) -> None:
        batch, seen = new_batch(), list[tuple[Batch, float, float]]()
        front.batches.append(batch)
        before = time.perf_counter()
        assert Engine(front, runner, lambda *what: seen.append(what)).step()
        assert front.delivered == [(batch, runner.output)]
        [(observed, started, ended)] = seen
        assert observed is batch
        assert before <= started <= ended <= time.perf_counter()

    def test_a_batch_that_fails_is_told_and_logged(
        self, front: FakeFront, runner: FakeRunner, caplog: pytest.LogCaptureFixture
    ) -> None:
        batch, error, seen = new_batch(), RuntimeError("out of paper"), list[object]()
        front.batches.append(batch)
        runner.errors.append(error)
        assert Engine(front, runner, lambda *what: seen.append(what)).step()
        assert (front.failed, front.delivered, seen) == ([(batch, error)], [], [])
        assert "a batch of 3 tokens failed" in caplog.text

    def test_a_batch_that_can_not_be_delivered_is_told_too(
        self, front: FakeFront, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch, error = new_batch(), RuntimeError("out of paper")

        def fail(batch: Batch, output: StepOutput) -> None:
            raise error

        monkeypatch.setattr(front, "deliver", fail)
        front.batches.append(batch)
        assert Engine(front, runner).step()
        assert front.failed == [(batch, error)]

    def test_the_next_batch_is_computed_all_the_same(self, front: FakeFront, runner: FakeRunner) -> None:
        front.batches += [new_batch(), new_batch()]
        runner.errors.append(RuntimeError("out of paper"))
        engine = Engine(front, runner)
        assert [engine.step(), engine.step(), engine.step()] == [True, True, False]
        assert (len(front.failed), len(front.delivered)) == (1, 1)


class TestLoop:
    def test_it_computes_in_a_thread_of_its_own(self, front: FakeFront, runner: FakeRunner) -> None:
        engine = Engine(front, runner)
        engine.start()
        engine.post(lambda: front.batches.append(new_batch()))
        assert front.settled.wait(PATIENCE_SECONDS)
        engine.stop()
        assert runner.threads == {"engine"}

    def test_commands_are_obeyed_in_order(self, front: FakeFront, runner: FakeRunner) -> None:
        engine, obeyed = Engine(front, runner), list[int]()
        engine.start()
        for number in range(100):
            engine.post(lambda number=number: obeyed.append(number))  # type: ignore[misc]
        engine.stop()
        assert obeyed == list(range(100))

    def test_what_has_arrived_is_obeyed_before_the_next_batch(self, front: FakeFront, runner: FakeRunner) -> None:
        engine = Engine(front, runner)
        front.batches.append(new_batch())
        engine.post(front.batches.clear)
        engine.start()
        engine.stop()
        assert front.delivered == []

    def test_a_command_that_fails_stops_nothing(
        self, front: FakeFront, runner: FakeRunner, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine, obeyed = Engine(front, runner), list[str]()
        engine.start()
        with caplog.at_level(logging.ERROR):
            engine.post(lambda: obeyed.append(str(1 // len(obeyed))))
            engine.post(lambda: obeyed.append("after"))
            engine.stop()
        assert obeyed == ["after"]
        assert "a command failed" in caplog.text

    def test_stopping_ends_the_thread(self, front: FakeFront, runner: FakeRunner) -> None:
        engine = Engine(front, runner)
        engine.start()
        engine.stop()
        engine.post(lambda: front.batches.append(new_batch()))
        assert not engine._thread.is_alive()
        assert engine.ended.result(timeout=0) is None
        assert front.batches == []

    def test_whoever_waits_for_the_end_hears_what_broke_the_loop(
        self, front: FakeFront, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken() -> Batch | None:
            raise RuntimeError("out of paper")

        monkeypatch.setattr(front, "next_batch", broken)
        engine = Engine(front, runner)
        engine.start()
        with pytest.raises(RuntimeError, match="out of paper"):
            engine.ended.result(PATIENCE_SECONDS)
        engine.stop()
