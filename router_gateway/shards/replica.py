"""One shard as the gateway sees it: whether it serves, drains or fits the others, and its load.

State comes from polls of `Describe` and from the ends of sessions; a change is reported to the registry. No state ends
a stream: streams end by their own errors, or by `progress.py` where they get no token and the shard is silent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import suppress

import grpc
from pydantic import Field

from router_gateway.shards.ejection import Ejection
from router_gateway.shards.load import Placed, ReplicaLoad
from stitch.cluster import ShardConfig
from stitch.settings import Settings
from stitch.v1 import shard_pb2, shard_pb2_grpc

_log = logging.getLogger(__name__)

# The weight of one answer to a poll in the mean time of the answers.
ANSWER_WEIGHT = 1 / 8

# A started call: an iterator over responses, with `cancel`.
GenerateCall = grpc.aio.UnaryStreamCall[shard_pb2.ShardGenerateRequest, shard_pb2.ShardGenerateResponse]


class HealthPolicy(Settings):
    """How shards are polled, when one counts as gone, and when a stream without tokens does."""

    poll_seconds: float = Field(default=1.0, gt=0)
    # A poll without an answer fails after this; a shard that says nothing for so long loses streams that wait for it.
    poll_timeout_seconds: float = Field(default=1.0, gt=0)
    # While a poll waits for longer than this, and than four times the mean of the answers, new sessions prefer other
    # replicas, and those without a token go there.
    doubt_seconds: float = Field(default=0.3, gt=0)
    # A shard is gone after this many failed polls in a row.
    max_failed_polls: int = Field(default=3, ge=1)
    # A refused connection counts when a second try of this length fails, too; the shard is gone then.
    confirm_seconds: float = Field(default=0.5, gt=0)
    # How often streams are checked for progress.
    check_seconds: float = Field(default=0.1, gt=0)
    # A stream is overdue after this time, or after this many times its peers' time for a token; its shards are polled.
    overdue_seconds: float = Field(default=0.25, gt=0)
    overdue_tokens: float = Field(default=4.0, ge=1)


class Replica:
    """The state of one shard, and the calls to it.

    `changed` is called after every change, `suspect` with its name and the names of the shards that it suspects.
    """

    def __init__(
        self,
        config: ShardConfig,
        channel: grpc.aio.Channel,
        policy: HealthPolicy,
        ejection: Ejection,
        clock: Callable[[], float],
        changed: Callable[[], object],
        suspect: Callable[[str, Collection[str]], object],
    ) -> None:
        self.config = config
        # Whether it is a shard of the cluster still; one that isn't finishes its sessions.
        self.wanted = True
        # Whether it answers: its streams run.
        self.serving = False
        # Whether it finishes its streams and refuses new ones.
        self.draining = False
        # Why it gets no sessions although it answers: in what it differs from the cluster file or from other shards.
        self.mismatch: str | None = None
        # None before the first answer; kept while the shard is gone.
        self.identity: shard_pb2.ShardIdentity | None = None
        # Names of the shards that wait for its replies in vain.
        self.suspected_by: set[str] = set()
        self.load = ReplicaLoad()
        self.ejection = ejection
        # When the latest poll was sent.
        self.polled_at = float("-inf")
        self._channel = channel
        self._stub = shard_pb2_grpc.ShardStub(channel)
        self._policy = policy
        self._clock = clock
        self._changed = changed
        self._suspect = suspect
        self._failed_polls = 0
        # Whether a poll was sent after the last answer.
        self._unanswered = False
        # How long a poll has waited, whether or not tokens came.
        self.unanswered_seconds = 0.0
        self._silent_seconds = 0.0
        # The mean time of the answers.
        self._usual_seconds = 0.0
        self._polling: asyncio.Task[None] | None = None
        self._poll_error: grpc.StatusCode | None = None

    @property
    def accepts_requests(self) -> bool:
        """Whether new sessions may be placed on it."""
        return self.wanted and self.serving and not self.draining and self.mismatch is None

    @property
    def state(self) -> str:
        """As `ShardDescription.state` has it."""
        if self.accepts_requests:
            return "ready"
        if self.serving and (self.draining or not self.wanted):
            return "draining"
        return "wanted" if self.serving or self.identity is None else "gone"

    @property
    def avoided(self) -> bool:
        """Whether placement prefers other replicas."""
        return self.doubted or bool(self.suspected_by) or self.ejection.avoided

    @property
    def doubted(self) -> bool:
        """Whether a poll waits for too long for new sessions; tokens may come still if one direction is cut off."""
        policy = self._policy
        longest = min(max(policy.doubt_seconds, 4 * self._usual_seconds), policy.poll_timeout_seconds)
        return self.unanswered_seconds >= longest

    @property
    def silent(self) -> bool:
        """Whether it neither answers a poll nor sends a token for the time of a poll."""
        return self._silent_seconds >= self._policy.poll_timeout_seconds

    def check_silence(self, heard: bool) -> None:
        """Called at a fixed interval: it is silent while a poll waits and no token came since the last call.

        Calls are counted, not seconds: a gateway that is late itself finds nobody silent.
        """
        passed = self._policy.check_seconds
        self.unanswered_seconds = self.unanswered_seconds + passed if self._unanswered else 0.0
        self._silent_seconds = self._silent_seconds + passed if self._unanswered and not heard else 0.0

    async def poll(self) -> None:
        """Asks the shard for its state, or waits for the poll in progress; reports what changed."""
        self.start_poll()
        if self._polling is not None:
            await asyncio.shield(self._polling)

    def start_poll(self) -> None:
        """Asks the shard for its state without waiting for the answer; no effect while a poll is in progress."""
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())

    def take_mismatch(self, mismatch: str | None) -> None:
        """Why it fits neither the cluster file nor the other shards, None where it does; a new reason is logged."""
        if mismatch is not None and mismatch != self.mismatch:
            _log.error("shard %s at %s gets no sessions: %s", self.config.name, self.config.address, mismatch)
        self.mismatch = mismatch

    async def close(self, calls_seconds: float | None = None) -> None:
        """Ends the poll in progress, and closes the channel; other calls have that time to end."""
        if self._polling is not None:
            self._polling.cancel()
            with suppress(asyncio.CancelledError):
                await self._polling
        await self._channel.close(calls_seconds)

    def generate(self, request: shard_pb2.ShardGenerateRequest, timeout_seconds: float | None) -> GenerateCall:
        return self._stub.Generate(request, timeout=timeout_seconds)

    def fetch_tokenizer(
        self, timeout_seconds: float
    ) -> grpc.aio.UnaryStreamCall[shard_pb2.FetchTokenizerRequest, shard_pb2.FetchTokenizerResponse]:
        return self._stub.FetchTokenizer(shard_pb2.FetchTokenizerRequest(), timeout=timeout_seconds)

    async def _poll(self) -> None:
        placed, self.polled_at = self.load.placed(), self._clock()
        self._unanswered = True
        try:
            answer = await self._describe()
        except grpc.aio.AioRpcError as error:
            self._poll_failed(error)
        else:
            self._poll_answered(answer, placed)

    async def _describe(self) -> shard_pb2.ShardDescribeResponse:
        """The shard's state; a connection that is refused is tried a second time."""
        request, policy = shard_pb2.ShardDescribeRequest(), self._policy
        try:
            return await self._stub.Describe(request, timeout=policy.poll_timeout_seconds)
        except grpc.aio.AioRpcError as error:
            if not self.serving or error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            first = error
        try:
            return await self._stub.Describe(request, timeout=policy.confirm_seconds, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            self._failed_polls = policy.max_failed_polls
            raise first from None

    def _poll_answered(self, answer: shard_pb2.ShardDescribeResponse, placed: Placed) -> None:
        self._failed_polls, self._poll_error = 0, None
        took = min(self.unanswered_seconds, self._policy.poll_timeout_seconds)
        self._usual_seconds += ANSWER_WEIGHT * (took - self._usual_seconds)
        self._unanswered, self._silent_seconds, self.unanswered_seconds = False, 0.0, 0.0
        self.load.reconcile(answer, placed)
        changed = self.identity != answer.identity
        self.identity = answer.identity
        self._update(serving=True, draining=answer.draining, changed=changed)
        self._suspect(self.config.name, answer.suspects)

    def _poll_failed(self, error: grpc.aio.AioRpcError) -> None:
        self._failed_polls += 1
        code = error.code()
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, self._poll_error):
            _log.error("shard %s refuses polls: %s: %s", self.config.name, code.name, error.details())
        self._poll_error = code
        if self._failed_polls >= self._policy.max_failed_polls:
            self._suspect(self.config.name, ())
            self._update(serving=False, draining=self.draining)

    def _update(self, serving: bool, draining: bool, changed: bool = False) -> None:
        before = (self.serving, self.draining)
        self.serving, self.draining = serving, draining
        if before != (serving, draining):
            state = "is gone" if not serving else "is draining" if draining else "is serving"
            _log.info("shard %s %s", self.config.name, state)
        if changed or before != (serving, draining):
            self._changed()
