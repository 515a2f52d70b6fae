"""The first shard's front: sessions from their admission to their last token. Knows no RPC and no tensor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from stitch.errors import Exhausted, OutOfStep, StitchError, Unavailable
from stitch.v1 import shard_pb2
from stitch_server.engine.in_flight import Failure, Reply, StepsInFlight
from stitch_server.engine.scheduler import Limits, Scheduler
from stitch_server.engine.session import Progress, Session
from stitch_server.engine.types import Batch, Cut, Segment, StepOutput, Token, ordered
from stitch_server.kv_cache.block_pool import BlockPool


class FirstStage:
    """Drives sessions: feeds their tokens through the chain and every sampled token back into it."""

    def __init__(
        self,
        pool: BlockPool,
        cuts: Mapping[str, Cut],
        limits: Limits,
        forwarding: StepsInFlight,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = Scheduler(pool, cuts, limits, self._drop, clock)
        self._pool = pool
        self._forwarding = forwarding
        self._clock = clock
        self._sessions: dict[int, Session] = {}

    @property
    def running_sessions(self) -> int:
        return len(self.scheduler.running)

    @property
    def waiting_sessions(self) -> int:
        return len(self.scheduler.waiting)

    def admit(self, session: Session) -> None:
        """Queues a session; one that can't be taken hears why at once."""
        session.arrived = self._clock()
        try:
            self.scheduler.add(session)
        except StitchError as error:
            session.report(Progress(error=error))
        else:
            self._sessions[session.number] = session

    def abandon(self, session: Session) -> None:
        """Its client is gone, or heard the end: every trace of it goes, here and behind."""
        if self._sessions.pop(session.number, None) is not None:
            self.scheduler.remove(session)
            self._drop(session)

    def next_batch(self) -> Batch | None:
        if self._forwarding.full:
            return None
        segments = self.scheduler.next_segments()
        if not segments:
            return None
        return Batch(ordered(segments), pipelined=self._forwarding.steps_in_flight > 0)

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        for index, session, _ in _sessions_of(batch):
            if (decision := output.decisions.get(index)) is not None:
                session.settle(decision)
                self.scheduler.settled(session)
        self._forwarding.send(batch, output, pipelined=self.scheduler.ready)
        now = self._clock()
        for _, session, segment in _sessions_of(batch):
            session.last_sent = now
            if session.number in self.scheduler.running:
                self._pool.publish(session.number, segment.position + segment.length)

    def fail(self, batch: Batch, error: Exception) -> None:
        for _, session, _ in _sessions_of(batch):
            self._end(session, Progress(error=StitchError(f"this shard failed to compute a step: {error}")))

    def replied(self, reply: Reply) -> None:
        self._forwarding.settle(reply.step)
        for failure in reply.failures:
            session = self._current(failure.number, failure.epoch)
            if session is not None:
                self._failed(session, failure)
        for number, epoch, token in reply.tokens:
            session = self._current(number, epoch)
            if session is not None:
                self._advance(session, token, reply.stages)

    def lost(self, address: str, error: StitchError) -> None:
        for step, _ in self._forwarding.lost(address):
            self._forwarding.settle(step)
        for session in [one for one in self._sessions.values() if one.opened and one.chain[0] == address]:
            self._end(session, Progress(error=_with_progress(error, session)))

    def _current(self, number: int, epoch: int) -> Session | None:
        """The session, unless it ended or began anew since the step was sent."""
        session = self._sessions.get(number)
        return session if session is not None and session.epoch == epoch else None

    def _advance(self, session: Session, token: Token, behind: dict[str, float]) -> None:
        stages = {} if session.answered else self._stages(session, behind)
        session.answered = True
        session.token_ids.append(token.id)
        reason = session.finish_after(token)
        progress = Progress(token, reason, stages)
        if reason is None:
            session.report(progress)
        else:
            self._end(session, progress)

    def _stages(self, session: Session, behind: dict[str, float]) -> dict[str, float]:
        """Where the time to the first token went; the parts add up to the whole."""
        waited = self._clock() - session.last_sent - sum(behind.values())
        return {
            **behind,
            "queue": session.first_scheduled - session.arrived + behind.get("queue", 0.0),
            "bottom_prefill": session.last_sent - session.first_scheduled + behind.get("bottom_prefill", 0.0),
            "wire": max(0.0, waited) + behind.get("wire", 0.0),
        }

    def _failed(self, session: Session, failure: Failure) -> None:
        if failure.cause == shard_pb2.FAILURE_CAUSE_PREFIX_MISSING:
            session.reusable = False
            self.scheduler.preempt(session)
        elif failure.cause == shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED:
            self.scheduler.preempt(session)
        elif failure.cause == shard_pb2.FAILURE_CAUSE_TOO_LONG:
            self._end(session, Progress(error=Exhausted(failure.message, 60.0)))
        elif failure.cause == shard_pb2.FAILURE_CAUSE_UNAVAILABLE:
            self._end(session, Progress(error=_with_progress(Unavailable(failure.message), session)))
        else:
            self._end(session, Progress(error=OutOfStep(failure.message)))

    def _end(self, session: Session, last: Progress) -> None:
        self.abandon(session)
        session.report(last)

    def _drop(self, session: Session) -> None:
        if session.opened:
            self._forwarding.close(session.chain, session.number)


def _sessions_of(batch: Batch) -> list[tuple[int, Session, Segment]]:
    """With each segment's index."""
    return [(i, one.sequence, one) for i, one in enumerate(batch.segments) if isinstance(one.sequence, Session)]


def _with_progress(error: StitchError, session: Session) -> StitchError:
    """A loss says how far the answer had come; a refusal stays what it is."""
    if isinstance(error, Unavailable):
        return Unavailable(str(error), len(session.token_ids) - session.prompt_tokens)
    return error
