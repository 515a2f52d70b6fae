"""Which callers a server takes a call from: roles for each method, and the certificates that are revoked.

In: every call of a server whose callers show certificates. Out: the call, or PERMISSION_DENIED with a short sentence;
the log alone has the reason. Invariant: a method that the table of roles doesn't name is refused.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from stitch.cluster import ClusterConfig
from stitch.errors import Forbidden, InvalidRequest, translated_errors
from stitch.identity import Identity, Peer, Role, peer_of

_log = logging.getLogger(__name__)

REFUSED = "the caller's certificate does not allow this call"
Context = grpc.aio.ServicerContext[Any, Any]
# A call whose certificate is revoked ends after this, although its caller doesn't read the response on its way.
BLOCKED_SECONDS = 1.0
# The roles that may call each method, by its full path.
Methods = Mapping[str, frozenset[Role]]


class CallerPolicy:
    """Checks the certificates of callers: the cluster and the role that they name, and whether they are revoked."""

    def __init__(self, cluster: ClusterConfig, is_revoked: Callable[[Peer], bool]) -> None:
        self.is_revoked = is_revoked
        self._cluster = cluster.name
        self.take(cluster)

    def take(self, cluster: ClusterConfig) -> None:
        """The cluster has these shards now."""
        self._shards = frozenset(shard.name for shard in cluster.shards)

    def objection(self, peer: Peer | None, roles: frozenset[Role] | None) -> str | None:
        """Why the caller has none of these roles, None: it has one. Where `roles` is None, any certificate will do."""
        if peer is None:
            return "it shows no certificate"
        if self.is_revoked(peer):
            return f"its {peer} is revoked"
        # A connection, or a resumed TLS session, may be older than that.
        if peer.expires < datetime.now(UTC):
            return f"its {peer} expired at {peer.expires}"
        if roles is None or any(identity.role in roles and self._contains(identity) for identity in peer.identities):
            return None
        return f"its {peer} names no {' or '.join(sorted(roles)) or 'caller'} of cluster {self._cluster}"

    def misses_shard(self, peer: Peer | None) -> bool:
        """Whether the certificate names a shard of this cluster that is not in it."""
        return peer is not None and any(
            (one.cluster, one.role) == (self._cluster, "shard") and one.name not in self._shards
            for one in peer.identities
        )

    def _contains(self, identity: Identity) -> bool:
        return identity.cluster == self._cluster and (identity.role != "shard" or identity.name in self._shards)


class _Revoked(Exception):
    """The certificate of a call's caller has been revoked while a response was on its way."""


class _Running:
    """A running call, with what its caller's certificate says."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.scope = asyncio.timeout(None)
        self._is_writing = self._is_revoked = False

    def end(self) -> None:
        """Ends the call as soon as its status can be sent: gRPC sends none beside a response."""
        if self._is_revoked:
            return
        self._is_revoked, now = True, asyncio.get_running_loop().time()
        self.scope.reschedule(now + BLOCKED_SECONDS if self._is_writing else now)

    async def write(self, context: Context, response: Any) -> None:
        """Sends a response. Raises _Revoked where the call was to end meanwhile."""
        self._is_writing = True
        await context.write(response)
        self._is_writing = False
        if self._is_revoked:
            raise _Revoked


class Access(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Refuses calls before their requests are decoded, and ends running calls whose certificate is revoked."""

    def __init__(
        self, policy: CallerPolicy, methods: Methods | None, refresh: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Without `methods`, every caller with a certificate may call every method.

        `refresh` is awaited before a caller is refused, who may be a shard that the cluster has only just got.
        """
        self._policy = policy
        self._methods = methods
        self._refresh = refresh
        self._running: set[_Running] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        # The stubs have only the handlers of threaded servers.
        handler: Any = await continuation(handler_call_details)
        return None if handler is None else self._guarded(handler, handler_call_details.method)  # type: ignore[return-value]

    def end_revoked(self) -> None:
        """Ends the running calls whose certificate is revoked by now."""
        for running in self._running:
            if self._policy.is_revoked(running.peer):
                running.end()

    def _guarded(self, handler: Any, method: str) -> Any:
        kinds = ("stream" if stream else "unary" for stream in (handler.request_streaming, handler.response_streaming))
        kind, decode = "_".join(kinds), handler.request_deserializer
        call = getattr(handler, kind)

        async def guarded(request: Any, context: Context) -> Any:
            peer, caller = _peer(context), context.peer()
            async with translated_errors(context), self.admitted(method, peer, caller) as running:
                message = request if handler.request_streaming else _decoded(decode, request)
                return await _respond(call, message, context, running)

        # The messages of a stream are decoded when the call reads them.
        kept = decode if handler.request_streaming else None
        return handler._replace(**{kind: guarded, "request_deserializer": kept})

    @asynccontextmanager
    async def admitted(self, method: str, peer: Peer | None, caller: str) -> AsyncIterator[_Running]:
        """Raises Forbidden where the caller may not call the method, and once its certificate is revoked.

        `caller` is its address, for the log; a `peer` of None shows no certificate that can be read.
        """
        roles = None if self._methods is None else self._methods.get(method, frozenset())
        if self._refresh is not None and self._policy.misses_shard(peer):
            await self._refresh()
        objection = self._policy.objection(peer, roles)
        if peer is None or objection is not None:
            raise _refusal(method, caller, str(objection))
        running = _Running(peer)
        try:
            async with running.scope:
                self._running.add(running)
                try:
                    yield running
                finally:
                    self._running.remove(running)
        except (_Revoked, TimeoutError) as error:
            if isinstance(error, _Revoked) or running.scope.expired():
                raise _refusal(method, caller, f"its {peer} has been revoked") from None
            raise


def _refusal(method: str, caller: str, reason: str) -> Forbidden:
    _log.warning("refused %s to %s: %s", method, caller, reason)
    return Forbidden(REFUSED)


def _peer(context: Context) -> Peer | None:
    """What the caller's certificate says; None where it shows none that can be read."""
    try:
        return peer_of(context)
    except ValueError as error:
        _log.warning("the certificate of %s can't be read: %s", context.peer(), error)
        return None


def check_shard_name(context: Context, name: str) -> bool:
    """Whether the caller's certificate names the shard `name`; False without one.

    Raises Forbidden where it names none or another one.

    The role and the cluster of the certificate have been checked by `Access`.
    """
    peer = peer_of(context)
    if peer is None:
        return False
    if any((one.role, one.name) == ("shard", name) for one in peer.identities):
        return True
    _log.warning("refused a link to %s: its %s does not name shard %.80r", context.peer(), peer, name)
    raise Forbidden(REFUSED)


def _decoded(decode: Callable[[bytes], Any] | None, data: Any) -> Any:
    """The message of a call. Raises InvalidRequest for bytes that are none."""
    try:
        return data if decode is None else decode(data)
    except DecodeError as error:
        raise InvalidRequest("request", "these bytes", f"they are no message: {error}") from error


async def _respond(call: Any, request: Any, context: Context, running: _Running) -> Any:
    """Runs a method, which is a coroutine, or an async generator of its responses."""
    if not inspect.isasyncgenfunction(call):
        return await call(request, context)
    async with aclosing(call(request, context)) as responses:
        async for response in responses:
            await running.write(context, response)
    return None
