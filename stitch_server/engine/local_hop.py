"""Routes that begin on a shard which also continues others: those of the top model alone.

The shard has a first stage for requests and a next stage for the steps of links. The first stage computes no layer: it
schedules prompts and decode steps as if for a next shard, embeds their tokens, and hands the steps to the next stage,
where they queue as those of one more link. So one pass holds sessions of both, and KV room, preemption and prefixes are
as between two shards. Invariant: only the next stage holds KV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stitch.errors import StitchError
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.types import (
    Batch,
    IncomingSegment,
    IncomingStep,
    KvRoom,
    LinkEvent,
    LinkReply,
    OutgoingStep,
    Segment,
    Session,
    StepOutput,
    StepReply,
)

if TYPE_CHECKING:
    from torch import Tensor


class LocalLink:
    """From the first stage to the next stage of one shard; every method is called in the engine's thread."""

    suspects: frozenset[str] = frozenset()
    doubted: frozenset[str] = frozenset()
    prefix_scope = ""
    is_local = True

    def __init__(
        self, shard: str, routes: frozenset[str], next_stage: NextStage, on_event: Callable[[LinkEvent], None]
    ) -> None:
        """`shard` is the name of this one, `routes` are those that begin here.

        `on_event` takes the next stage's replies for the first stage, which is not called while a step is delivered.
        """
        self._shard = shard
        self.routes = routes
        self._next_stage = next_stage
        self._on_event = on_event

    def send(self, neighbour: str, step: OutgoingStep) -> None:
        """Queues a step; `neighbour` is this shard."""
        segments = tuple(map(_incoming, step.segments, step.opens))
        self._next_stage.receive(self, IncomingStep(step.number, segments, lambda: step.hidden, pipelined=False))

    def close(self, neighbour: str, session_ids: Sequence[int]) -> None:
        self._next_stage.close(self, session_ids)

    def want(self, neighbour: str, tokens: int, chain: Sequence[str]) -> None:
        self._next_stage.want(self, tokens, tuple(chain))

    def reply(self, reply: StepReply) -> None:
        self._on_event(LinkReply(self._shard, reply))

    def grant(self, tokens: int) -> None:
        self._on_event(KvRoom(self._shard, tokens))


class BothStages:
    """The batch source of such a shard; every method runs in the engine's thread."""

    def __init__(
        self, shard: str, first_stage: FirstStage, next_stage: NextStage, embed: Callable[[list[int]], Tensor]
    ) -> None:
        """`first_stage` sends over a `LocalLink`; `embed` gives the hidden states `[tokens, hidden]` of token ids."""
        self._shard = shard
        self._first_stage = first_stage
        self._next_stage = next_stage
        self._embed = embed

    def next_batch(self) -> Batch | None:
        """The next pass of both; requests of this shard queue after the steps that have come over links."""
        if (batch := self._first_stage.next_batch()) is not None:
            self._first_stage.deliver(batch, StepOutput(hidden=self._embed(_token_ids(batch))))
        return self._next_stage.next_batch()

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        self._next_stage.deliver(batch, output)

    def fail(self, batch: Batch, error: Exception) -> None:
        self._next_stage.fail(batch, error)

    def on_reply(self, neighbour: str, reply: StepReply) -> None:
        self._sender_to(neighbour).on_reply(neighbour, reply)

    def on_kv_room(self, neighbour: str, tokens: int) -> None:
        self._sender_to(neighbour).on_kv_room(neighbour, tokens)

    def on_link_lost(self, neighbour: str, error: StitchError) -> None:
        self._sender_to(neighbour).on_link_lost(neighbour, error)

    def _sender_to(self, neighbour: str) -> FirstStage | NextStage:
        return self._first_stage if neighbour == self._shard else self._next_stage


def _incoming(segment: Segment, opens: bool) -> IncomingSegment:
    session = segment.session
    return IncomingSegment(
        session_id=session.id,
        epoch=session.epoch,
        position=segment.position,
        length=segment.length,
        wants_token=segment.wants_token,
        new_session=_new_session(session) if opens else None,
    )


def _new_session(session: Session) -> Session:
    """The next stage's own session, as a frame would open it."""
    return Session(
        route=session.route,
        chain=session.chain[1:],
        sampling=session.sampling,
        token_ids=list(session.token_ids),
        prompt_tokens=session.prompt_tokens,
        tenant=session.tenant,
        expected_tokens=session.expected_tokens,
        grammar=session.grammar,
        traceparent=session.traceparent,
        epoch=session.epoch,
        cached=session.reused,
        reused=session.reused,
    )


def _token_ids(batch: Batch) -> list[int]:
    return [id_ for one in batch.segments for id_ in one.session.token_ids[one.position : one.position + one.length]]
