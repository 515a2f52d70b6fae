"""gRPC channels and servers with the options that both ends of every connection share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from stitch.environment import PROXY_VARIABLES, proxy_variable
from stitch.errors import InvalidRequest

Options = Sequence[tuple[str, int | str]]

# A larger step is split into several frames.
MAX_FRAME_BYTES = 1 << 20
# A shard answers with messages below this, and takes them from a gateway and from other shards.
MAX_MESSAGE_BYTES = 32 << 20
# A request of a client: more than any context holds, and a bound of what a gateway reads at once.
MAX_REQUEST_BYTES = 2 << 20
# Requests of one batch call.
MAX_BATCH_REQUESTS = 4_096
HEALTH_CHECK_SECONDS = 1.0

# A connection on which nothing comes for KEEPALIVE_MS is pinged, and ended where no answer comes for PING_TIMEOUT_MS.
# gRPC answers pings in threads of its own, also while a process computes. In grpcio 1.85 `grpc.keepalive_timeout_ms`
# has no effect: measured through a relay that stalled, nothing was found in 20 s with it, and in 3 to 4 s with these.
KEEPALIVE_MS = 2_000
PING_TIMEOUT_MS = 2_500
# How long one attempt to connect may take. gRPC has no other name for it: TCP, TLS and HTTP/2 take four round trips.
CONNECT_TIMEOUT_MS = 10_000

_CLIENT: Options = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    # Without this the server answers pings during a long prefill with GOAWAY.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

_SERVER: Options = (
    # A server ends connections that are pinged more often.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Otherwise two servers could share a port unnoticed.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None = None, proxy: bool = False, host: str | None = None
) -> grpc.aio.Channel:
    """A channel to `host:port`, which connects and reconnects by itself; without credentials it is not encrypted.

    The certificate of the other side must be of `host`, by default of the host in the address.

    It is direct, whatever proxy the environment names; with `proxy` it goes through that one, and InvalidRequest is
    raised where the environment names none that gRPC can use.
    """
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=_client_options(proxy))
    return grpc.aio.secure_channel(address, credentials, options=_client_options(proxy, host))


def open_plain_channel(shard: str, address: str) -> grpc.aio.Channel:
    """A channel without TLS to whatever listens at the address, which counts as that shard."""
    return open_channel(address)


def open_sync_channel(
    address: str, credentials: grpc.ChannelCredentials | None = None, proxy: bool = False, host: str | None = None
) -> grpc.Channel:
    """A channel like `open_channel`'s, for callers without an event loop."""
    if credentials is None:
        return grpc.insecure_channel(address, options=_client_options(proxy))
    return grpc.secure_channel(address, credentials, options=_client_options(proxy, host))


def _client_options(proxy: bool, host: str | None = None) -> list[tuple[str, int | str]]:
    named: Options = () if host is None else [("grpc.ssl_target_name_override", host)]
    if not proxy:
        return [*_CLIENT, *named, ("grpc.enable_http_proxy", 0)]
    found = proxy_variable()
    if found is None:
        raise InvalidRequest("proxy", proxy, f"none of {', '.join(PROXY_VARIABLES)} names one")
    if not found[1].startswith("http://"):
        raise InvalidRequest(*found, "the URL of a proxy must start with http://")
    return [*_CLIENT, *named, ("grpc.http_proxy", found[1])]


def open_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (), options: Options = ()
) -> grpc.aio.Server:
    """A server with options that match `open_channel`'s, and those given in place of them; it doesn't listen yet."""
    merged = {**dict(_SERVER), **dict(options)}
    return grpc.aio.server(options=list(merged.items()), interceptors=list(interceptors))


def listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Binds `server` to `host:port`, any free port for 0, and returns the port; without credentials not encrypted.

    Raises OSError where the port is in use.
    """
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"can't listen on {address}: {error}") from error
    if port == 0:
        raise OSError(f"can't listen on {address}")
    return port


def serves(
    address: str, credentials: grpc.ChannelCredentials | None = None, host: str | None = None, service: str = ""
) -> bool:
    """Whether the process at `host:port`, or that service of it, reports SERVING now, by grpc.health.v1."""
    # Clients that check no health need no stubs for it.
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with open_sync_channel(address, credentials, host=host) as channel:
        try:
            health = health_pb2_grpc.HealthStub(channel)
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=HEALTH_CHECK_SECONDS)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
