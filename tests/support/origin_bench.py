"""An origin in front of a chain that answers by hand, and what its clients hear."""

from __future__ import annotations

from dataclasses import replace

from stitch.errors import StitchError
from stitch.v1.shard_pb2 import FailureCause
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.scheduler import Limits
from stitch_server.engine.session import Request, RequestOutput
from stitch_server.engine.types import Batch, LayerRange, OutgoingStep, SessionFailure, StepReply
from stitch_server.kv_cache.block_pool import BlockPool
from tests.support.engine_fakes import TOKEN_ID, FakeDownstream, ManualClock, computed, new_session

CUTS = {"weak": LayerRange(0, 3), "strong": LayerRange(0, 4)}


class OriginBench:
    """An origin in front of a chain that answers by hand."""

    def __init__(self, blocks: int = 64, **limits: int) -> None:
        self.pool, self.clock, self.downstream = BlockPool(blocks), ManualClock(), FakeDownstream()
        self.origin = FirstStage(
            self.pool,
            CUTS,
            Limits(**{"prompts_together": 1} | limits),
            StepsInFlight(self.downstream, window_steps=2),
            self.clock,
        )

    def admit(self, tokens: int = 20, **fields: object) -> tuple[Request, list[RequestOutput]]:
        heard: list[RequestOutput] = []
        session = new_session(tokens, heard=heard, **fields)  # type: ignore[arg-type]
        self.origin.admit(session)
        return session, heard

    def compose(self) -> Batch:
        batch = self.origin.next_batch()
        assert batch is not None
        return batch

    def compute(self) -> OutgoingStep:
        batch = self.compose()
        self.origin.deliver(batch, computed(batch))
        return self.downstream.last

    def reply(self, step: OutgoingStep, token_id: int = TOKEN_ID, **stages: float) -> None:
        self.origin.replied(replace(self.downstream.answer(step, token_id), stages=stages))

    def refuse(self, step: OutgoingStep, session: Request, cause: FailureCause) -> None:
        self.origin.replied(
            StepReply(step.number, failures=(SessionFailure(session.id, session.epoch, cause, "no more"),))
        )

    @property
    def idle(self) -> bool:
        origin = self.origin
        counts = (origin.running_sessions, origin.waiting_sessions, origin._sessions)
        return counts == (0, 0, {}) and self.pool.free_blocks == self.pool.blocks


def ids(heard: list[RequestOutput]) -> list[int]:
    """Of the tokens that a client heard."""
    return [progress.token.id for progress in heard if progress.token is not None]


def error_of(heard: list[RequestOutput]) -> StitchError:
    """The only thing that the client heard last."""
    assert heard[-1].error is not None
    assert (heard[-1].token, heard[-1].finish_reason) == (None, None)
    return heard[-1].error
