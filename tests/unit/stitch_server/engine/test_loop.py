"""The engine's loop takes a batch, computes it and delivers it; a failure ends its own batch or command alone."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field, replace

import pytest
import torch

from stitch.errors import StitchError, Unavailable
from stitch_server.engine.loop import Engine, EngineBroken, Inbox
from stitch_server.engine.types import (
    Batch,
    KvRoom,
    LayerRange,
    LinkEvent,
    LinkLost,
    LinkReply,
    Segment,
    StepOutput,
    StepReply,
)
from tests.support.engine_fakes import new_request

# Only a broken engine takes this long.
TIMEOUT_SECONDS = 30.0


def new_batch(length: int = 3) -> Batch:
    return Batch((Segment(new_request(), LayerRange(0, 1), 0, length, wants_token=True, blocks=[]),))


@dataclass
class FakeBatchSource:
    """Returns given batches and records what the engine calls."""

    batches: list[Batch] = field(default_factory=list)
    delivered: list[tuple[Batch, StepOutput]] = field(default_factory=list)
    failed: list[tuple[Batch, Exception]] = field(default_factory=list)
    events: list[LinkEvent] = field(default_factory=list)
    settled: threading.Event = field(default_factory=threading.Event)

    def next_batch(self) -> Batch | None:
        return self.batches.pop(0) if self.batches else None

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        self.delivered.append((batch, output))
        self.settled.set()

    def fail(self, batch: Batch, error: Exception) -> None:
        self.failed.append((batch, error))

    def on_reply(self, neighbour: str, reply: StepReply) -> None:
        self.events.append(LinkReply(neighbour, reply))

    def on_kv_room(self, neighbour: str, tokens: int) -> None:
        self.events.append(KvRoom(neighbour, tokens))

    def on_link_lost(self, neighbour: str, error: StitchError) -> None:
        self.events.append(LinkLost(neighbour, error))


@dataclass
class FakeRunner:
    """Computes nothing; raises the given errors."""

    errors: list[Exception] = field(default_factory=list)
    output: StepOutput = field(default_factory=StepOutput)
    threads: set[str] = field(default_factory=set)

    def run(self, batch: Batch) -> StepOutput:
        self.threads.add(threading.current_thread().name)
        if self.errors:
            raise self.errors.pop()
        return self.output


@pytest.fixture
def source() -> FakeBatchSource:
    return FakeBatchSource()


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


class TestStep:
    def test_step_without_batch_computes_nothing(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        assert not Engine(source, runner, Inbox()).step()
        assert runner.threads == set()

    def test_step_computes_observes_and_delivers_batch(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        batch, seen = new_batch(), list[tuple[Batch, float, float]]()
        source.batches.append(batch)
        before = time.perf_counter()
        assert Engine(source, runner, Inbox(), lambda *what: seen.append(what)).step()
        assert source.delivered == [(batch, runner.output)]
        [(observed, started, ended)] = seen
        assert observed is batch
        assert before <= started <= ended <= time.perf_counter()

    def test_failed_batch_is_reported_and_logged(
        self, source: FakeBatchSource, runner: FakeRunner, caplog: pytest.LogCaptureFixture
    ) -> None:
        batch, error, seen = new_batch(), RuntimeError("out of paper"), list[object]()
        source.batches.append(batch)
        runner.errors.append(error)
        assert Engine(source, runner, Inbox(), lambda *what: seen.append(what)).step()
        assert (source.failed, source.delivered, seen) == ([(batch, error)], [], [])
        assert "a batch of 3 tokens failed" in caplog.text

    def test_batch_whose_delivery_fails_is_reported(
        self, source: FakeBatchSource, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch, error = new_batch(), RuntimeError("out of paper")

        def fail(batch: Batch, output: StepOutput) -> None:
            raise error

        monkeypatch.setattr(source, "deliver", fail)
        source.batches.append(batch)
        assert Engine(source, runner, Inbox()).step()
        assert source.failed == [(batch, error)]

    def test_batch_after_failed_one_is_computed(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        source.batches += [new_batch(), new_batch()]
        runner.errors.append(RuntimeError("out of paper"))
        engine = Engine(source, runner, Inbox())
        assert [engine.step(), engine.step(), engine.step()] == [True, True, False]
        assert (len(source.failed), len(source.delivered)) == (1, 1)

    def test_failed_batch_of_several_sessions_is_computed_by_session(
        self, source: FakeBatchSource, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, guilty, last = (new_batch(length).segments[0] for length in (3, 2, 1))
        chunk = replace(first, position=3, length=2)
        error = RuntimeError("out of paper")

        def run(batch: Batch) -> StepOutput:
            if guilty in batch.segments:
                raise error
            return runner.output

        monkeypatch.setattr(runner, "run", run)
        source.batches.append(Batch((first, guilty, chunk, last), pipelined=True))
        assert Engine(source, runner, Inbox()).step()
        assert [batch for batch, _ in source.failed] == [Batch((guilty,), pipelined=True)]
        assert [batch.segments for batch, _ in source.delivered] == [(first, chunk), (last,)]


class TestLoop:
    def test_engine_computes_in_its_own_thread(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        engine = Engine(source, runner, Inbox())
        engine.start()
        engine.post(lambda: source.batches.append(new_batch()))
        assert source.settled.wait(TIMEOUT_SECONDS)
        engine.stop()
        assert runner.threads == {"engine"}

    def test_commands_run_in_order(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        engine, handled = Engine(source, runner, Inbox()), list[int]()
        engine.start()
        for number in range(100):
            engine.post(lambda number=number: handled.append(number))  # type: ignore[misc]
        engine.stop()
        assert handled == list(range(100))

    def test_link_events_reach_batch_source_in_order(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        first, second = LinkReply("top-0", StepReply(1)), LinkReply("top-1", StepReply(2))
        inbox, lost = Inbox(), LinkLost("top-0", Unavailable("top-0 is gone"))
        engine = Engine(source, runner, inbox)
        inbox.put(first)
        inbox.put(lost)
        inbox.put(second)
        engine.start()
        engine.stop()
        assert source.events == [first, lost, second]

    def test_commands_run_before_next_batch(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        engine = Engine(source, runner, Inbox())
        source.batches.append(new_batch())
        engine.post(source.batches.clear)
        engine.start()
        engine.stop()
        assert source.delivered == []

    def test_failed_command_does_not_end_loop(
        self, source: FakeBatchSource, runner: FakeRunner, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine, handled = Engine(source, runner, Inbox()), list[str]()
        engine.start()
        with caplog.at_level(logging.ERROR):
            engine.post(lambda: handled.append(str(1 // len(handled))))
            engine.post(lambda: handled.append("after"))
            engine.stop()
        assert handled == ["after"]
        assert "the engine failed to handle" in caplog.text

    def test_stop_ends_thread(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        engine = Engine(source, runner, Inbox())
        engine.start()
        engine.stop()
        engine.post(lambda: source.batches.append(new_batch()))
        assert not engine._thread.is_alive()
        assert engine.ended.result(timeout=0) is None
        assert source.batches == []

    def test_error_of_broken_loop_is_in_ended(
        self, source: FakeBatchSource, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken() -> Batch | None:
            raise RuntimeError("out of paper")

        monkeypatch.setattr(source, "next_batch", broken)
        engine = Engine(source, runner, Inbox())
        engine.start()
        with pytest.raises(RuntimeError, match="out of paper"):
            engine.ended.result(TIMEOUT_SECONDS)
        engine.stop()


class TestFaults:
    """What ends the loop, and with it the process."""

    def fail(self, engine: Engine, source: FakeBatchSource, runner: FakeRunner, *prompts: int) -> None:
        """Computes a batch for each prompt, of that many tokens; every pass fails."""
        for tokens in prompts:
            source.batches.append(batch_of(tokens))
            runner.errors.append(RuntimeError("out of paper"))
            engine.step()

    def test_fault_of_gpu_ends_loop(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        error = RuntimeError("CUDA error: an illegal memory access was encountered")
        source.batches.append(new_batch())
        runner.errors.append(error)
        engine = Engine(source, runner, Inbox())
        engine.start()
        assert engine.ended.exception(TIMEOUT_SECONDS) is error
        assert [failed for _, failed in source.failed] == [error]
        engine.stop()

    def test_fault_of_gpu_during_delivery_ends_loop(
        self, source: FakeBatchSource, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(batch: Batch, output: StepOutput) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

        monkeypatch.setattr(source, "deliver", fail)
        source.batches.append(new_batch())
        with pytest.raises(RuntimeError, match="device-side assert"):
            Engine(source, runner, Inbox()).step()

    def test_memory_that_gpu_lacks_ends_session_alone(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        source.batches.append(new_batch())
        runner.errors.append(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
        assert Engine(source, runner, Inbox()).step()
        assert len(source.failed) == 1

    def test_failed_passes_of_several_prompts_end_loop(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        engine = Engine(source, runner, Inbox())
        self.fail(engine, source, runner, 5, 6)
        with pytest.raises(EngineBroken, match="the passes of 3 prompts failed in a row: out of paper"):
            self.fail(engine, source, runner, 7)

    def test_prompt_that_is_replayed_counts_once(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        engine = Engine(source, runner, Inbox())
        self.fail(engine, source, runner, 5, 5, 5, 5, 5)
        assert len(source.failed) == 5

    def test_pass_that_succeeds_clears_record(self, source: FakeBatchSource, runner: FakeRunner) -> None:
        engine = Engine(source, runner, Inbox())
        self.fail(engine, source, runner, 5, 6)
        source.batches.append(new_batch())
        engine.step()
        self.fail(engine, source, runner, 7, 8)
        assert len(source.failed) == 4


def batch_of(tokens: int) -> Batch:
    """The batch of a prompt that differs from those of other lengths."""
    return Batch((Segment(new_request(tokens), LayerRange(0, 1), 0, tokens, wants_token=True, blocks=[]),))
