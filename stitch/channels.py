"""Channel options that both ends of every connection share, in one place. Knows no service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

Options = Sequence[tuple[str, int | str]]

# No frame is larger than this; what is larger travels in several.
MAX_FRAME_BYTES = 1 << 20
# A prompt may be megabytes of text before it is refused with a reason.
MAX_MESSAGE_BYTES = 32 << 20

_CLIENT: Options = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Without this a ping during a long prefill counts as abuse and ends in GOAWAY.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

_SERVER: Options = (
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Otherwise two servers share a port silently.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)


def open_channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """A channel to `host:port`; it connects by itself, and again after a loss. Without credentials in the clear."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=list(_CLIENT))
    return grpc.aio.secure_channel(address, credentials, options=list(_CLIENT))


def open_sync_channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """The same for callers without an event loop."""
    if credentials is None:
        return grpc.insecure_channel(address, options=list(_CLIENT))
    return grpc.secure_channel(address, credentials, options=list(_CLIENT))


def open_server(interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = ()) -> grpc.aio.Server:
    """A server with the options that match `open_channel`, not yet listening."""
    return grpc.aio.server(options=list(_SERVER), interceptors=list(interceptors))


def listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Binds `server` to `host:port` (port 0: any free one) and returns the port; without credentials in the clear.

    Raises OSError where the port is taken.
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
