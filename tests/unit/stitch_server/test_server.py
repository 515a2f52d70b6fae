"""What ends a shard's process: a signal, or an engine whose loop broke."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from stitch.errors import StitchError
from stitch.process import StopSignals
from stitch_server import server
from stitch_server.engine.loop import Engine, Inbox
from stitch_server.engine.pass_age import PassAge
from stitch_server.engine.types import Batch, StepOutput, StepReply
from stitch_server.server import STUCK_EXIT_CODE, asked_to_stop, end_when_stuck
from tests.support.engine_fakes import ManualClock


class FakeBatchSource:
    """A batch source without batches, which may break the loop."""

    broken = False

    def next_batch(self) -> Batch | None:
        if self.broken:
            raise RuntimeError("out of paper")
        return None

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        raise NotImplementedError

    def fail(self, batch: Batch, error: Exception) -> None:
        raise NotImplementedError

    def on_reply(self, neighbour: str, reply: StepReply) -> None:
        raise NotImplementedError

    def on_link_lost(self, neighbour: str, error: StitchError) -> None:
        raise NotImplementedError


class FakeRunner:
    def run(self, batch: Batch) -> StepOutput:
        raise NotImplementedError


@pytest.fixture
def source() -> FakeBatchSource:
    return FakeBatchSource()


@pytest.fixture
def engine(source: FakeBatchSource) -> Iterator[Engine]:
    engine = Engine(source, FakeRunner(), Inbox())
    engine.start()
    yield engine
    engine.stop()


async def test_signal_stops_process(engine: Engine) -> None:
    signals = StopSignals()
    signals.received()
    await asked_to_stop(signals, engine)
    assert not engine.ended.done()


async def test_broken_engine_stops_process_with_its_error(engine: Engine, source: FakeBatchSource) -> None:
    source.broken = True
    with pytest.raises(RuntimeError, match="out of paper"):
        await asked_to_stop(StopSignals(), engine)


async def test_process_ends_when_pass_is_stuck(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "TICK_SECONDS", 0.0)
    clock, codes = ManualClock(), list[int]()
    age = PassAge(clock)
    age.begin()
    ending = asyncio.create_task(end_when_stuck(age, codes.append))
    while not ending.done():
        assert codes == []
        clock.advance(1.0)
        await asyncio.sleep(0)
    assert codes == [STUCK_EXIT_CODE]
    assert "the engine is stuck in a pass" in caplog.text
