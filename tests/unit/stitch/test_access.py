"""Calls over TLS to a server in this process, by callers with certificates of several roles."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from stitch.access import REFUSED, Access, CallerPolicy, check_shard_name
from stitch.channels import open_channel, open_server
from stitch.cluster import ClusterConfig, load_cluster
from stitch.identity import Identity, Role, peer_of, read_certificate
from stitch.issuing import Authority, Issued, new_authority
from tests.support.listening import listening

Context = grpc.aio.ServicerContext[Any, Any]
DAY = timedelta(days=1)
CLUSTER = "smollm2"
GATEWAY = Identity(CLUSTER, "gateway", "any")
ROLES: frozenset[Role] = frozenset({"gateway", "shard"})
METHODS = {"/t.T/Ask": ROLES, "/t.T/Stream": ROLES}


class Server:
    """Answers `Ask` with the caller's name, `Stream` with what it gets; the table of roles has no `Unnamed`."""

    def __init__(self, cluster: ClusterConfig, authority: Authority) -> None:
        self.authority = authority
        self.revoked: set[int] = set()
        self.policy = CallerPolicy(cluster, lambda peer: peer.serial in self.revoked)
        self.access = Access(self.policy, METHODS)
        self.decoded: list[bytes] = []
        self.stream_ended = asyncio.Event()
        # Called before `Stream` writes.
        self.before_response: Callable[[], object] = lambda: None
        self.address = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Server]:
        own = self.authority.issue(Identity(CLUSTER, "shard", "top-0"), (), DAY)
        pairs = [(own.key, own.certificate)]
        credentials = grpc.ssl_server_credentials(pairs, self.authority.pem.certificate, require_client_auth=True)
        server = open_server([self.access])
        ask = grpc.unary_unary_rpc_method_handler(self._ask, request_deserializer=self._decode)
        handlers = {"Ask": ask, "Unnamed": ask, "Stream": grpc.stream_stream_rpc_method_handler(self._stream)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
        async with listening(server, credentials) as self.address:
            yield self

    def channel(self, own: Issued) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(self.authority.pem.certificate, own.key, own.certificate)
        host = Identity(CLUSTER, "shard", "top-0").host
        return open_channel(self.address, credentials, host=host)

    async def call(self, identity: Identity, method: str = "Ask", request: bytes = b"hello") -> str:
        """The reply to a caller with a certificate of this identity. Raises AioRpcError."""
        async with self.channel(self.authority.issue(identity, ("a host",), DAY)) as channel:
            reply: bytes = await channel.unary_unary(f"/t.T/{method}")(request)
            return reply.decode()

    def _decode(self, request: bytes) -> bytes:
        self.decoded.append(request)
        return request

    async def _ask(self, request: bytes, context: Context) -> bytes:
        return str(getattr(peer_of(context), "name", None)).encode()

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        try:
            async for request in requests:
                self.before_response()
                yield request
        finally:
            self.stream_ended.set()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server(load_cluster(CLUSTER), new_authority(CLUSTER, DAY)).serving() as started:
        yield started


@pytest.mark.parametrize("identity", [GATEWAY, Identity(CLUSTER, "shard", "bottom-0")], ids=lambda one: one.role)
async def test_caller_with_a_role_of_the_method_is_served_under_its_name(server: Server, identity: Identity) -> None:
    assert await server.call(identity) == identity.uri
    assert server.decoded == [b"hello"]


@pytest.mark.parametrize(
    "identity",
    [
        Identity(CLUSTER, "client", "laptop"),
        Identity(CLUSTER, "monitor", "prometheus"),
        Identity("other", "gateway", "gateway"),
        Identity(CLUSTER, "shard", "bottom-7"),
        Identity("other", "shard", "bottom-0"),
    ],
    ids=lambda one: one.uri,
)
async def test_other_caller_is_refused_before_decoding_and_named_in_the_log_alone(
    server: Server, identity: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.call(identity)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, REFUSED)
    assert server.decoded == []
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "/t.T/Ask" in line
    assert identity.uri in line
    assert "names no gateway or shard of cluster smollm2" in line


async def test_method_without_roles_is_refused_to_everybody(server: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=REFUSED):
        await server.call(GATEWAY, "Unnamed")


async def test_unknown_method_is_unimplemented(server: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.call(GATEWAY, "Nothing")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_line_breaks_in_a_name_stay_one_line_of_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=REFUSED):
        await server.call(Identity(CLUSTER, "client", "eve\nERROR all is lost"))
    [line] = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert "\n" not in line


async def test_stream_passes_and_its_method_ends_with_its_caller(server: Server) -> None:
    async with server.channel(server.authority.issue(GATEWAY, (), DAY)) as channel:
        call = channel.stream_stream("/t.T/Stream")()
        await call.write(b"one")
        assert await call.read() == b"one"
        call.cancel()
        await asyncio.wait_for(server.stream_ended.wait(), 10)


async def test_revoked_certificate_ends_its_running_calls_and_gets_no_others(server: Server) -> None:
    kept, lost = server.authority.issue(GATEWAY, (), DAY), server.authority.issue(GATEWAY, (), DAY)
    async with server.channel(kept) as ours, server.channel(lost) as theirs:
        calls = [channel.stream_stream("/t.T/Stream")() for channel in (ours, theirs)]
        for call in calls:
            await call.write(b"one")
            assert await call.read() == b"one"
        server.revoked.add(lost.serial)
        server.access.end_revoked()
        assert (await calls[1].code(), await calls[1].details()) == (grpc.StatusCode.PERMISSION_DENIED, REFUSED)
        with pytest.raises(grpc.aio.AioRpcError, match=REFUSED):
            await theirs.unary_unary("/t.T/Ask")(b"")
        await calls[0].write(b"two")
        assert await calls[0].read() == b"two"


async def test_call_that_is_revoked_while_a_response_is_on_its_way_ends_for_its_caller_too(server: Server) -> None:
    own, loop = server.authority.issue(GATEWAY, (), DAY), asyncio.get_running_loop()

    def revoke() -> None:
        server.revoked.add(own.serial)
        # Runs once the response is being written. Later readings of the files may come before the call has ended.
        loop.call_soon(server.access.end_revoked)
        loop.call_soon(server.access.end_revoked)

    server.before_response = revoke
    async with server.channel(own) as channel, asyncio.timeout(20):
        call = channel.stream_stream("/t.T/Stream")()
        await call.write(b"one")
        with suppress(grpc.aio.AioRpcError):
            assert await call.read() == b"one"
        assert (await call.code(), await call.details()) == (grpc.StatusCode.PERMISSION_DENIED, REFUSED)


async def test_call_that_is_revoked_ends_although_its_caller_reads_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stitch.access.BLOCKED_SECONDS", 0.2)
    own = server.authority.issue(GATEWAY, (), DAY)
    async with server.channel(own) as channel:
        call = channel.stream_stream("/t.T/Stream")()
        # More than gRPC takes from a server before its client reads.
        sending = asyncio.create_task(_write_all(call, [bytes(1 << 20)] * 16))
        await asyncio.sleep(0.5)
        server.revoked.add(own.serial)
        server.access.end_revoked()
        await asyncio.wait_for(server.stream_ended.wait(), 10)
        call.cancel()
        await sending


async def _write_all(call: Any, messages: list[bytes]) -> None:
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
        for message in messages:
            await call.write(message)


async def test_shard_that_the_cluster_has_just_got_is_served_and_another_one_is_not() -> None:
    cluster = load_cluster(CLUSTER)
    server = Server(cluster, new_authority(CLUSTER, DAY))
    added = cluster.shards[0].model_copy(update={"name": "bottom-7"})
    refreshed: list[str] = []

    async def refresh() -> None:
        refreshed.append("once")
        server.policy.take(cluster.model_copy(update={"shards": (*cluster.shards, added)}))

    server.access = Access(server.policy, METHODS, refresh)
    async with server.serving():
        newcomer = Identity(CLUSTER, "shard", "bottom-7")
        assert await server.call(newcomer) == newcomer.uri
        assert await server.call(newcomer) == newcomer.uri
        assert refreshed == ["once"]
        for stranger in Identity(CLUSTER, "shard", "bottom-8"), Identity("other", "shard", "bottom-7"):
            with pytest.raises(grpc.aio.AioRpcError, match=REFUSED):
                await server.call(stranger)
        assert refreshed == ["once"] * 2


def test_certificate_that_has_expired_since_the_handshake_is_refused() -> None:
    policy = CallerPolicy(load_cluster(CLUSTER), lambda peer: False)
    peer = read_certificate(new_authority(CLUSTER, DAY).issue(GATEWAY, (), DAY).certificate)
    assert policy.objection(peer, ROLES) is None
    assert "expired at" in str(policy.objection(replace(peer, expires=datetime.now(UTC) - DAY), ROLES))


class _Called:
    """The context of a call without TLS."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


def test_without_tls_a_link_may_come_from_any_shard() -> None:
    context: Any = _Called()
    check_shard_name(context, "bottom-0")
    assert peer_of(context) is None
