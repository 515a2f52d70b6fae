"""A first stage whose next shards reply when a test asks for it, and the outputs that its clients receive."""

from __future__ import annotations

from dataclasses import replace

from stitch.errors import StitchError
from stitch.v1.shard_pb2 import FailureCause
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.request import Request, RequestOutput
from stitch_server.engine.scheduler import Scheduler
from stitch_server.engine.types import Batch, LayerRange, OutgoingStep, SessionFailure, StepReply
from stitch_server.kv_cache.block_pool import BlockPool
from tests.support.engine_fakes import TOKEN_ID, FakeDownstream, ManualClock, computed, new_request, without_states
from tests.support.scheduler_harness import new_batching

LAYER_RANGES = {"weak": LayerRange(0, 3), "strong": LayerRange(0, 4)}


def new_first_stage(
    pool: BlockPool, downstream: FakeDownstream, clock: ManualClock, window_steps: int = 2, **batching: int
) -> FirstStage:
    """A first stage over a downstream; fields of `BatchingConfig` are given by name."""
    kept, in_flight = without_states(pool), StepsInFlight(downstream, window_steps, clock)
    scheduler = Scheduler(
        kept,
        LAYER_RANGES,
        new_batching(**batching),
        close_downstream=in_flight.close_session,
        has_room=in_flight.has_room,
        is_late=in_flight.is_late,
        credit=in_flight.credit,
        clock=clock,
    )
    return FirstStage(kept, scheduler, in_flight, clock)


class FirstStageHarness:
    """A first stage and a chain that answers by hand."""

    def __init__(self, blocks: int = 64, **batching: int) -> None:
        self.pool, self.clock, self.downstream = BlockPool(blocks), ManualClock(), FakeDownstream()
        self.stage = new_first_stage(self.pool, self.downstream, self.clock, **batching)

    def admit(self, tokens: int = 20, **fields: object) -> tuple[Request, list[RequestOutput]]:
        """A new request, and the outputs that its client receives."""
        outputs: list[RequestOutput] = []
        request = new_request(tokens, outputs=outputs, **fields)  # type: ignore[arg-type]
        self.stage.admit(request)
        return request, outputs

    def next_batch(self) -> Batch:
        batch = self.stage.next_batch()
        assert batch is not None
        return batch

    def compute(self) -> OutgoingStep:
        """Computes the next batch; returns the last step that it sent."""
        batch = self.next_batch()
        self.stage.deliver(batch, computed(batch))
        return self.downstream.last

    def answer(self, reply: StepReply) -> None:
        """Receives the reply to a step from the shard that the step was sent to."""
        self.stage.on_reply(self.downstream.receiver_of(reply.step), reply)

    def reply(self, step: OutgoingStep, token_id: int = TOKEN_ID, **stages: float) -> None:
        self.answer(replace(self.downstream.answer(step, token_id), stages=stages))

    def refuse(self, step: OutgoingStep, request: Request, cause: FailureCause) -> None:
        failure = SessionFailure(request.id, request.epoch, cause, "no more")
        answer = self.downstream.answer(step)
        others = tuple(one for one in answer.tokens if one.session_id != request.id)
        self.answer(replace(answer, tokens=others, failures=(failure,)))

    @property
    def idle(self) -> bool:
        stage = self.stage
        counts = (stage.running_sessions, stage.waiting_sessions, stage._requests)
        return counts == (0, 0, {}) and self.pool.free_blocks == self.pool.blocks


def token_ids(outputs: list[RequestOutput]) -> list[int]:
    """The ids of the tokens that a client received."""
    return [output.token.id for output in outputs if output.token is not None]


def error_of(outputs: list[RequestOutput]) -> StitchError:
    """The error with which a request ended."""
    assert outputs[-1].error is not None
    assert (outputs[-1].token, outputs[-1].finish_reason) == (None, None)
    return outputs[-1].error
