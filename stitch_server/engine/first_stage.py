"""The first shard of a chain: drives requests from their admission to their last token.

In: requests, and the replies of the next shards. Out: batches for the engine, and `RequestOutput`s for the clients.
Every sampled token is fed back as the next input; that of a route which ends on this shard comes from the pass itself.
Invariant: a request's KV is freed on every shard of its chain whenever the request finishes or is preempted.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from stitch.errors import Draining, Exhausted, Expired, Incompatible, OutOfStep, StitchError, Unavailable
from stitch.sampling import Token
from stitch.v1 import shard_pb2
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.kept_states import KeptPrefixes
from stitch_server.engine.request import Chunk, Request, RequestOutput, RequestStatus
from stitch_server.engine.scheduler import TOO_LARGE_RETRY_SECONDS, Scheduler
from stitch_server.engine.session_table import Constrain
from stitch_server.engine.types import Batch, Segment, SessionFailure, StepOutput, StepReply, in_layer_order


class FirstStage:
    """The batch source of a shard that holds the embedding; every method runs in the engine's thread."""

    def __init__(
        self,
        kept: KeptPrefixes,
        scheduler: Scheduler,
        in_flight: StepsInFlight,
        clock: Callable[[], float] = time.perf_counter,
        shard: str = "",
        stage: str = "bottom_prefill",
        constrain: Constrain | None = None,
    ) -> None:
        """`kept` is that of the scheduler: the KV blocks of the requests, and the hidden states of their prefixes.

        `shard` is the name of this one, `stage` that of its time in the TTFT; with `constrain` routes end here.
        """
        self._shard = shard
        self._stage = stage
        self._constrain = constrain
        self.scheduler = scheduler
        self._pool = kept.pool
        self._kept = kept
        self._in_flight = in_flight
        self._clock = clock
        # Waiting and running ones, by id.
        self._requests: dict[int, Request] = {}

    @property
    def running_sessions(self) -> int:
        """The number of requests with KV blocks."""
        return len(self.scheduler.running)

    @property
    def waiting_sessions(self) -> int:
        """The number of requests that wait for KV blocks."""
        return len(self.scheduler.waiting)

    def admit(self, request: Request) -> None:
        """Queues a request, or reports at once why it is refused."""
        request.arrived_at = self._clock()
        try:
            if (refusal := self._in_flight.refusal(request.next_shards)) is not None:
                raise refusal
            self.scheduler.add(request)
            if request.grammar is not None and self._constrain is not None and request.may_end_here:
                generated = request.token_ids[request.prompt_tokens :]
                request.constraint = self._constrain(request.grammar, generated, request.sampling.stop_token_ids)
        except StitchError as error:
            request.status = RequestStatus.FINISHED
            request.on_output(RequestOutput(error=error))
        else:
            self._requests[request.id] = request

    def abandon(self, request: Request) -> None:
        """Finishes a request without an output and frees its KV on all shards; no effect on a finished one."""
        if self._requests.pop(request.id, None) is not None:
            self.scheduler.remove(request)
            self._in_flight.close_session(request)

    def next_batch(self) -> Batch | None:
        """The next pass; None where nothing is to be computed, or no next shard has room for it.

        Ends the waiting requests whose deadline has passed.
        """
        for request in self.scheduler.waiting.pop_expired():
            self._finish(request, RequestOutput(error=Expired("the deadline passed while the request waited")))
        segments = self.scheduler.next_segments()
        if not segments:
            return None
        segments = [self._kept.attach(segment) for segment in segments]
        return Batch(in_layer_order(segments), pipelined=self._in_flight.count > 0)

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        """Sends a pass's hidden states to the next shards, and takes the tokens of the routes that end here."""
        for index, request, _ in _requests_of(batch):
            if (decision := output.decisions.get(index)) is not None:
                request.take_route(decision)
                request.constraint = request.constraint if request.may_end_here else None
                self._in_flight.credit.open(request)
                self.scheduler.share_prefix(request)
        self._in_flight.send(batch, output, pipelined=self.scheduler.has_work)
        self._kept.keep(batch, output)
        now = self._clock()
        for _, request, segment in _requests_of(batch):
            request.last_sent_at = now
            if request.first_token_at is None:
                request.chunks.append(Chunk(segment.position, segment.length, now))
            if request.status is RequestStatus.RUNNING:
                self._pool.publish(request.id, segment.position + segment.length)
        for index, request, segment in _requests_of(batch):
            if not request.chain:
                self._take_sampled(request, segment, index, output)

    def _take_sampled(self, request: Request, segment: Segment, index: int, output: StepOutput) -> None:
        """Applies what the pass has of a segment whose route ends here: a token, a refusal, or neither."""
        if (values := output.non_finite.get(index)) is not None:
            message = f"{values} of request {request.id} at position {segment.position} are not finite"
            self._finish(request, RequestOutput(error=OutOfStep(message)))
        elif (reason := output.refused.get(index)) is not None:
            failure = SessionFailure(request.id, request.epoch, reason.cause, str(reason), reason.shard)
            self._apply_failure(request, failure)
        elif (token := output.tokens.get(index)) is not None:
            if request.constraint is not None:
                request.constraint.accept(token.id)
            seconds = output.stages.get("sample", 0.0)
            request.last_sent_at -= seconds
            self._append(request, token, {"sample": seconds})

    def fail(self, batch: Batch, error: Exception) -> None:
        """Ends the requests of a batch that could not be computed."""
        failure = Unavailable(f"this shard failed to compute a step: {error}", shard=self._shard)
        for _, request, _ in _requests_of(batch):
            self._finish(request, RequestOutput(error=_with_generated(failure, request)))

    def on_reply(self, neighbour: str, reply: StepReply) -> None:
        """Applies the tokens and failures of one step, which was sent to that next shard."""
        for answer in self._in_flight.settle(neighbour, reply):
            request = self._requests.get(answer.segment.session.id)
            # It may have finished since the step was sent, or been preempted.
            if request is None or request.epoch != answer.epoch:
                continue
            if answer.failure is not None:
                self._apply_failure(request, answer.failure)
            elif answer.token is not None:
                self._append(request, answer.token, reply.stages)

    def on_kv_room(self, neighbour: str, tokens: int) -> None:
        """Takes note of KV room that a next shard keeps for one of the waiting requests."""
        self._in_flight.credit.grant(neighbour, tokens)

    def on_link_lost(self, neighbour: str, error: StitchError) -> None:
        """Ends the requests with KV on the lost shard, and where it is suspect those that wait for it."""
        for step, _ in self._in_flight.sent_to(neighbour):
            self._in_flight.settle(neighbour, StepReply(step))
        self._in_flight.credit.forget(neighbour)
        is_suspect = self._in_flight.refusal([neighbour]) is not None
        for request in [one for one in self._requests.values() if neighbour in one.next_shards]:
            if request.open_downstream or is_suspect:
                self._finish(request, RequestOutput(error=_with_generated(error, request)))

    def _append(self, request: Request, token: Token, downstream: dict[str, float]) -> None:
        """Appends a sampled token, which the scheduler feeds into the next decode step unless it is the last one."""
        stages, cached_tokens = {}, 0
        if request.first_token_at is None:
            cached_tokens = request.reused
            request.first_token_at = self._clock()
            stages = _ttft_stages(request, request.first_token_at, downstream, self._stage)
        request.token_ids.append(token.id)
        reason = request.finish_reason_at(token)
        output = RequestOutput(token, reason, stages, cached_tokens)
        if reason is not None:
            self._finish(request, output)
        elif token.id >= request.vocabulary_size:
            rows = f"the embedding has {request.vocabulary_size} rows"
            self._finish(request, RequestOutput(error=Incompatible(f"the chain chose token {token.id}, but {rows}")))
        else:
            request.on_output(output)

    def _apply_failure(self, request: Request, failure: SessionFailure) -> None:
        """Recomputes the request later where that helps, and ends it otherwise."""
        match failure.cause:
            case shard_pb2.FAILURE_CAUSE_PREFIX_MISSING:
                request.skip_prefix_cache = True
                self.scheduler.preempt(request)
            case shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED | shard_pb2.FAILURE_CAUSE_NOT_COMPILED:
                self.scheduler.preempt(request)
            case shard_pb2.FAILURE_CAUSE_TOO_LONG:
                self._finish(request, RequestOutput(error=Exhausted(failure.message, TOO_LARGE_RETRY_SECONDS)))
            case shard_pb2.FAILURE_CAUSE_UNAVAILABLE:
                lost = Unavailable(failure.message, request.generated, failure.shard)
                self._finish(request, RequestOutput(error=lost))
            case shard_pb2.FAILURE_CAUSE_DRAINING:
                self._finish(request, RequestOutput(error=Draining(failure.message, request.generated)))
            case _:
                self._finish(request, RequestOutput(error=OutOfStep(failure.message)))

    def _finish(self, request: Request, last: RequestOutput) -> None:
        self.abandon(request)
        request.on_output(last)


def _requests_of(batch: Batch) -> list[tuple[int, Request, Segment]]:
    """The requests and segments of a batch, with each segment's index."""
    return [(i, one.session, one) for i, one in enumerate(batch.segments) if isinstance(one.session, Request)]


def _ttft_stages(request: Request, now: float, downstream: dict[str, float], own: str) -> dict[str, float]:
    """The time to first token by stage, this shard's own by that name; they add up to the time since arrival."""
    scheduled = request.arrived_at if request.first_scheduled_at is None else request.first_scheduled_at
    away = now - request.last_sent_at - sum(downstream.values())
    return {
        **downstream,
        "queue": scheduled - request.arrived_at + downstream.get("queue", 0.0),
        own: request.last_sent_at - scheduled + downstream.get(own, 0.0),
        **({"wire": max(0.0, away) + downstream.get("wire", 0.0)} if request.chain else {}),
    }


def _with_generated(error: StitchError, request: Request) -> StitchError:
    """An Unavailable that says how many tokens the client has received; other errors unchanged."""
    return Unavailable(str(error), request.generated, error.shard) if isinstance(error, Unavailable) else error
