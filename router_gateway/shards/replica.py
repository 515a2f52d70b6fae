"""One shard as the gateway sees it: whether it serves or drains, what it holds, and its free KV tokens.

State comes from polls of `Describe`, and a change is reported to the registry. A replica that is gone ends the streams
that run on it, by their `on_unavailable` callbacks; one that drains keeps them and gets no new ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from pydantic import Field

from stitch.cluster import ShardConfig
from stitch.settings import Settings
from stitch.v1 import shard_pb2, shard_pb2_grpc

_log = logging.getLogger(__name__)

# A started call: an iterator over responses, with `cancel`.
GenerateCall = grpc.aio.UnaryStreamCall[shard_pb2.ShardGenerateRequest, shard_pb2.ShardGenerateResponse]


class HealthPolicy(Settings):
    """How shards are polled, and when one counts as gone."""

    poll_seconds: float = Field(default=1.0, gt=0)
    # A poll without an answer fails after this.
    poll_timeout_seconds: float = Field(default=3.0, gt=0)
    # A shard is gone after this many timeouts in a row; one that refuses the connection is gone at once.
    max_timeouts: int = Field(default=2, ge=1)


class CompatibilityCheck:
    """What all shards of a cluster must have in common, so that a replay on another chain gives the same tokens.

    The first shard that states a fact fixes it for the life of the gateway, whose tokenizer comes from that cluster.
    """

    def __init__(self) -> None:
        self._fixed: dict[str, str] = {}

    def mismatch(self, identity: shard_pb2.ShardIdentity) -> str | None:
        """In what the shard differs from the others, naming both sides; None where it fits."""
        for fact, stated in _facts(identity):
            fixed = self._fixed.setdefault(fact, stated)
            if stated != fixed:
                return f"its {fact} is {stated}, but the other shards have {fixed}"
        return None


def _facts(identity: shard_pb2.ShardIdentity) -> Iterator[tuple[str, str]]:
    """The fingerprints that a shard states; those that it does not know are empty and left out."""
    facts = [
        ("tokenizer", identity.tokenizer),
        ("bottom model", identity.bottom.revision),
        ("top model", identity.top.revision),
        ("probe", identity.probe),
        *((f"stitch of route {route.name}", route.stitch) for route in identity.routes),
    ]
    return ((fact, stated) for fact, stated in facts if stated)


class Replica:
    """The state of one shard by its latest poll, and the calls to it."""

    def __init__(
        self,
        config: ShardConfig,
        channel: grpc.aio.Channel,
        check: CompatibilityCheck,
        changed: Callable[[], None],
        policy: HealthPolicy,
    ) -> None:
        self.config = config
        # Whether it answers and fits the cluster: its streams run.
        self.serving = False
        # Whether it finishes its streams and refuses new ones.
        self.draining = False
        # None before the first answer; kept while the shard is gone.
        self.identity: shard_pb2.ShardIdentity | None = None
        self.free_kv_tokens = 0
        self._check = check
        self._stub = shard_pb2_grpc.ShardStub(channel)
        self._changed = changed
        self._policy = policy
        self._timeouts = 0
        self._callbacks: set[Callable[[], object]] = set()

    @property
    def accepts_requests(self) -> bool:
        """Whether new sessions may be placed on it."""
        return self.serving and not self.draining

    async def poll(self) -> None:
        """Asks the shard for its state; reports it where it came, went, or began to drain."""
        request, timeout = shard_pb2.ShardDescribeRequest(), self._policy.poll_timeout_seconds
        try:
            answer = await self._stub.Describe(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            self._poll_failed(error)
        else:
            self._poll_answered(answer)

    def reserve(self, tokens: int) -> None:
        """Counts KV tokens as used until the next poll states how many are free."""
        self.free_kv_tokens -= tokens

    def generate(self, request: shard_pb2.ShardGenerateRequest, timeout_seconds: float | None) -> GenerateCall:
        return self._stub.Generate(request, timeout=timeout_seconds)

    def fetch_tokenizer(
        self, timeout_seconds: float
    ) -> grpc.aio.UnaryStreamCall[shard_pb2.FetchTokenizerRequest, shard_pb2.FetchTokenizerResponse]:
        return self._stub.FetchTokenizer(shard_pb2.FetchTokenizerRequest(), timeout=timeout_seconds)

    @contextmanager
    def on_unavailable(self, callback: Callable[[], object]) -> Iterator[None]:
        """Calls `callback` if the shard is gone within the block; draining does not call it."""
        self._callbacks.add(callback)
        try:
            yield
        finally:
            self._callbacks.discard(callback)

    def _poll_answered(self, answer: shard_pb2.ShardDescribeResponse) -> None:
        self._timeouts = 0
        self.free_kv_tokens = answer.kv_free_tokens
        changed = self.identity != answer.identity
        self.identity = answer.identity
        mismatch = self._mismatch(answer.identity)
        if mismatch and changed:
            _log.error("shard %s at %s gets no sessions: %s", self.config.name, self.config.address, mismatch)
        self._update(serving=mismatch is None, draining=answer.draining, changed=changed)

    def _poll_failed(self, error: grpc.aio.AioRpcError) -> None:
        self._timeouts += 1
        timed_out = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if not timed_out or self._timeouts >= self._policy.max_timeouts:
            self._update(serving=False, draining=self.draining)

    def _mismatch(self, identity: shard_pb2.ShardIdentity) -> str | None:
        """Why it would compute something other than the cluster file says; None where it would not."""
        held = (identity.role, identity.first_layer, identity.end_layer)
        if held != (self.config.role, *self.config.layers):
            return "it holds {} layers {} to {}, but the cluster file says {} to {} of {}".format(
                *held, *self.config.layers, self.config.role
            )
        return self._check.mismatch(identity)

    def _update(self, serving: bool, draining: bool, changed: bool = False) -> None:
        before = (self.serving, self.draining)
        went = self.serving and not serving
        self.serving, self.draining = serving, draining
        if went:
            for callback in list(self._callbacks):
                callback()
        if before != (serving, draining):
            state = "is gone" if not serving else "is draining" if draining else "is serving"
            _log.info("shard %s %s", self.config.name, state)
        if changed or before != (serving, draining):
            self._changed()
