"""The first shard's front: sessions from their admission to their last token. Knows no RPC and no tensor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from stitch.errors import Exhausted, OutOfStep, StitchError, Unavailable
from stitch.v1 import shard_pb2
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.scheduler import Limits, Scheduler
from stitch_server.engine.session import Request, RequestOutput
from stitch_server.engine.types import (
    Batch,
    LayerRange,
    Segment,
    SessionFailure,
    StepOutput,
    StepReply,
    Token,
    in_layer_order,
)
from stitch_server.kv_cache.block_pool import BlockPool


class FirstStage:
    """Drives sessions: feeds their tokens through the chain and every sampled token back into it."""

    def __init__(
        self,
        pool: BlockPool,
        cuts: Mapping[str, LayerRange],
        limits: Limits,
        forwarding: StepsInFlight,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = Scheduler(pool, cuts, limits, self._drop, clock)
        self._pool = pool
        self._forwarding = forwarding
        self._clock = clock
        self._sessions: dict[int, Request] = {}

    @property
    def running_sessions(self) -> int:
        return len(self.scheduler.running)

    @property
    def waiting_sessions(self) -> int:
        return len(self.scheduler.waiting)

    def admit(self, session: Request) -> None:
        """Queues a session; one that can't be taken hears why at once."""
        session.arrived = self._clock()
        try:
            self.scheduler.add(session)
        except StitchError as error:
            session.report(RequestOutput(error=error))
        else:
            self._sessions[session.id] = session

    def abandon(self, session: Request) -> None:
        """Its client is gone, or heard the end: every trace of it goes, here and behind."""
        if self._sessions.pop(session.id, None) is not None:
            self.scheduler.remove(session)
            self._drop(session)

    def next_batch(self) -> Batch | None:
        if self._forwarding.is_full:
            return None
        segments = self.scheduler.next_segments()
        if not segments:
            return None
        return Batch(in_layer_order(segments), pipelined=self._forwarding.count > 0)

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        for index, session, _ in _sessions_of(batch):
            if (decision := output.decisions.get(index)) is not None:
                session.settle(decision)
                self.scheduler.settled(session)
        self._forwarding.send(batch, output, pipelined=self.scheduler.ready)
        now = self._clock()
        for _, session, segment in _sessions_of(batch):
            session.last_sent = now
            if session.id in self.scheduler.running:
                self._pool.publish(session.id, segment.position + segment.length)

    def fail(self, batch: Batch, error: Exception) -> None:
        for _, session, _ in _sessions_of(batch):
            self._end(session, RequestOutput(error=StitchError(f"this shard failed to compute a step: {error}")))

    def replied(self, reply: StepReply) -> None:
        self._forwarding.settle(reply.step)
        for failure in reply.failures:
            session = self._current(failure.session_id, failure.epoch)
            if session is not None:
                self._failed(session, failure)
        for sampled in reply.tokens:
            session = self._current(sampled.session_id, sampled.epoch)
            if session is not None:
                self._advance(session, sampled.token, reply.stages)

    def lost(self, address: str, error: StitchError) -> None:
        for step, _ in self._forwarding.sent_to(address):
            self._forwarding.settle(step)
        for session in [one for one in self._sessions.values() if one.open_downstream and one.chain[0] == address]:
            self._end(session, RequestOutput(error=_with_progress(error, session)))

    def _current(self, number: int, epoch: int) -> Request | None:
        """The session, unless it ended or began anew since the step was sent."""
        session = self._sessions.get(number)
        return session if session is not None and session.epoch == epoch else None

    def _advance(self, session: Request, token: Token, behind: dict[str, float]) -> None:
        stages = {} if session.answered else self._stages(session, behind)
        session.answered = True
        session.token_ids.append(token.id)
        reason = session.finish_after(token)
        progress = RequestOutput(token, reason, stages)
        if reason is None:
            session.report(progress)
        else:
            self._end(session, progress)

    def _stages(self, session: Request, behind: dict[str, float]) -> dict[str, float]:
        """Where the time to the first token went; the parts add up to the whole."""
        waited = self._clock() - session.last_sent - sum(behind.values())
        return {
            **behind,
            "queue": session.first_scheduled - session.arrived + behind.get("queue", 0.0),
            "bottom_prefill": session.last_sent - session.first_scheduled + behind.get("bottom_prefill", 0.0),
            "wire": max(0.0, waited) + behind.get("wire", 0.0),
        }

    def _failed(self, session: Request, failure: SessionFailure) -> None:
        if failure.cause == shard_pb2.FAILURE_CAUSE_PREFIX_MISSING:
            session.reusable = False
            self.scheduler.preempt(session)
        elif failure.cause == shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED:
            self.scheduler.preempt(session)
        elif failure.cause == shard_pb2.FAILURE_CAUSE_TOO_LONG:
            self._end(session, RequestOutput(error=Exhausted(failure.message, 60.0)))
        elif failure.cause == shard_pb2.FAILURE_CAUSE_UNAVAILABLE:
            self._end(session, RequestOutput(error=_with_progress(Unavailable(failure.message), session)))
        else:
            self._end(session, RequestOutput(error=OutOfStep(failure.message)))

    def _end(self, session: Request, last: RequestOutput) -> None:
        self.abandon(session)
        session.report(last)

    def _drop(self, session: Request) -> None:
        if session.open_downstream:
            self._forwarding.close(session.chain, session.id)


def _sessions_of(batch: Batch) -> list[tuple[int, Request, Segment]]:
    """With each segment's index."""
    return [(i, one.session, one) for i, one in enumerate(batch.segments) if isinstance(one.session, Request)]


def _with_progress(error: StitchError, session: Request) -> StitchError:
    """A loss says how far the answer had come; a refusal stays what it is."""
    if isinstance(error, Unavailable):
        return Unavailable(str(error), len(session.token_ids) - session.prompt_tokens)
    return error
