"""What ends a shard's process: a signal, or an engine whose loop broke."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stitch.process import StopSignals
from stitch_server.engine.loop import Engine
from stitch_server.engine.types import Batch, StepOutput, StepReply
from stitch_server.server import asked_to_stop


class BatchSource:
    """Has nothing to compute, or breaks."""

    broken = False

    def next_batch(self) -> Batch | None:
        if self.broken:
            raise RuntimeError("out of paper")
        return None

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        raise NotImplementedError

    def fail(self, batch: Batch, error: Exception) -> None:
        raise NotImplementedError

    def replied(self, reply: StepReply) -> None:
        raise NotImplementedError

    def lost(self, address: str, error: Exception) -> None:
        raise NotImplementedError


class ModelRunner:
    def run(self, batch: Batch) -> StepOutput:
        raise NotImplementedError


@pytest.fixture
def front() -> BatchSource:
    return BatchSource()


@pytest.fixture
def engine(front: BatchSource) -> Iterator[Engine]:
    engine = Engine(front, ModelRunner())
    engine.start()
    yield engine
    engine.stop()


async def test_a_signal_does(engine: Engine) -> None:
    signals = StopSignals()
    signals.received()
    await asked_to_stop(signals, engine)
    assert not engine.ended.done()


async def test_an_engine_that_broke_does_and_is_named(engine: Engine, front: BatchSource) -> None:
    front.broken = True
    with pytest.raises(RuntimeError, match="out of paper"):
        await asked_to_stop(StopSignals(), engine)
