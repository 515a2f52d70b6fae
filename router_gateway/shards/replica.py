"""One shard as the gateway sees it: reachable or not, what it holds, what is free. Knows no other shard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from router_gateway.shards.compatibility import CompatibilityCheck
from stitch.cluster import ShardConfig
from stitch.v1 import shard_pb2, shard_pb2_grpc

_log = logging.getLogger(__name__)

# A call that has begun: an iterator over responses, and `cancel`.
GenerateCall = grpc.aio.UnaryStreamCall[shard_pb2.ShardGenerateRequest, shard_pb2.ShardGenerateResponse]


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """When a shard counts as gone."""

    answer_seconds: float
    # A shard that refuses the connection is gone at once; one that is silent only after so many polls in a row.
    silent_polls: int


class Replica:
    """Polled for its state; tells those who wait for its tokens when it is gone."""

    def __init__(
        self,
        place: ShardConfig,
        channel: grpc.aio.Channel,
        agreement: CompatibilityCheck,
        changed: Callable[[], None],
        patience: HealthPolicy,
    ) -> None:
        self.place = place
        self.serving = False
        # Known from the first answer on; kept while the shard is away.
        self.identity: shard_pb2.ShardIdentity | None = None
        self.free_kv_tokens = 0
        self._agreement = agreement
        self._stub = shard_pb2_grpc.ShardStub(channel)
        self._changed = changed
        self._patience = patience
        self._silent_polls = 0
        self._waiting: set[Callable[[], object]] = set()

    async def poll(self) -> None:
        """Asks the shard for its state, and tells everyone if it came or went."""
        try:
            answer = await self._stub.Describe(shard_pb2.ShardDescribeRequest(), timeout=self._patience.answer_seconds)
        except grpc.aio.AioRpcError as error:
            self._missed(error)
        else:
            self._answered(answer)

    def reserve(self, tokens: int) -> None:
        """Counts tokens as taken until the next poll says what is really free."""
        self.free_kv_tokens -= tokens

    def generate(self, request: shard_pb2.ShardGenerateRequest, timeout_seconds: float | None) -> GenerateCall:
        return self._stub.Generate(request, timeout=timeout_seconds)

    def fetch_tokenizer(
        self, timeout_seconds: float
    ) -> grpc.aio.UnaryStreamCall[shard_pb2.FetchTokenizerRequest, shard_pb2.FetchTokenizerResponse]:
        return self._stub.FetchTokenizer(shard_pb2.FetchTokenizerRequest(), timeout=timeout_seconds)

    @contextmanager
    def on_unavailable(self, tell: Callable[[], object]) -> Iterator[None]:
        """Calls `tell` if the shard goes away inside of the block."""
        self._waiting.add(tell)
        try:
            yield
        finally:
            self._waiting.discard(tell)

    def _answered(self, answer: shard_pb2.ShardDescribeResponse) -> None:
        self._silent_polls = 0
        self.free_kv_tokens = answer.kv_free_tokens
        known, self.identity = self.identity, answer.identity
        news = known != answer.identity
        objection = self._objection(answer.identity)
        if objection and news:
            _log.error("%s at %s is not asked: %s", self.place.name, self.place.address, objection)
        self._set_serving(objection is None, news)

    def _missed(self, error: grpc.aio.AioRpcError) -> None:
        self._silent_polls += 1
        silent = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if not silent or self._silent_polls >= self._patience.silent_polls:
            self._set_serving(False)

    def _objection(self, identity: shard_pb2.ShardIdentity) -> str | None:
        """Why it would compute something else than the cluster file promises; None where it would not."""
        held = (identity.role, identity.first_layer, identity.end_layer)
        if held != (self.place.role, *self.place.layers):
            return "it holds {} layers {} to {}, but the cluster file says {} to {} of {}".format(
                *held, *self.place.layers, self.place.role
            )
        return self._agreement.objection(identity)

    def _set_serving(self, serving: bool, news: bool = False) -> None:
        went, came = self.serving and not serving, serving and not self.serving
        self.serving = serving
        if went:
            for tell in list(self._waiting):
                tell()
        if went or came:
            _log.info("shard %s %s", self.place.name, "is serving" if serving else "is gone")
        if went or came or news:
            self._changed()
