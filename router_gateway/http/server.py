"""The HTTP port: uvicorn's protocol in the gateway's loop, without a server, signals or logs of uvicorn's own.

In: an ASGI application. Out: a port, with HTTPS where the gateway has certificates. What can be counted before a
request is parsed is counted here: connections, headers, pipelined requests, and the time in which a request arrives.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from router_gateway.http.errors import Refusal, body_of
from stitch.cluster import GatewayLimits
from stitch.identity import Peer, read_certificate

MAX_HEADERS = 128
MAX_HEADER_BYTES = 65_536
# Requests that a client has sent on a connection before the answer to an earlier one.
MAX_PIPELINED = 8
# An idle connection lives longer than those that clients keep, so that none is closed as a request arrives.
IDLE_SECONDS = 75
# The application's own refusal of a request that doesn't arrive is earlier.
REFUSAL_SECONDS = 1.0
BACKLOG = 2_048
STOP_SECONDS = 1.0
# Uvicorn warns of each broken request; a client must not fill the log.
_log = logging.getLogger(f"{__name__}.protocol")
_log.setLevel(logging.ERROR)


class Connection(HttpToolsProtocol):
    """One connection of a client.

    The state of its requests has `peer`, what the client's certificate says, and `abort`, which ends the connection.
    """

    def __init__(self, config: Config, state: ServerState, limits: GatewayLimits) -> None:
        super().__init__(config, state, {})
        self.logger = _log
        self._limits = limits
        self._receiving: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            transport.abort()
            return
        self.app_state = {"peer": _peer(transport), "abort": transport.abort}
        self._start_receiving()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_receiving()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head and self._head_bytes > MAX_HEADER_BYTES:
            self.send_400_response(f"The head of the request has more than {MAX_HEADER_BYTES:,} bytes.")
            return
        self._head_bytes += len(data)
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        body = body_of(Refusal(400, "invalid_http", msg))
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[400] + head.encode() + body)
        self.transport.close()

    # The parser calls these; one that raises ends the connection.

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many pipelined requests")
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        if self._receiving is None:
            self._start_receiving()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._end_receiving()
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def _start_receiving(self) -> None:
        seconds = self._limits.receive_seconds + REFUSAL_SECONDS
        self._receiving = self.loop.call_later(seconds, self.transport.abort)

    def _end_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None


def _peer(transport: asyncio.Transport) -> Peer | None:
    """What the client's certificate says; None where it shows none that can be read."""
    secured: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    shown = None if secured is None else secured.getpeercert(binary_form=True)
    with suppress(ValueError):
        return read_certificate(ssl.DER_cert_to_PEM_cert(shown).encode()) if shown else None
    return None


class HttpServer:
    """Serves an application from `start` to `stop`."""

    def __init__(
        self, app: ASGIApp, limits: GatewayLimits, secured: ssl.SSLContext | None, end_calls: Callable[[], None]
    ) -> None:
        """`end_calls` makes the application end the calls that run."""
        self._limits = limits
        self._end_calls = end_calls
        self._secured = secured
        self._config = Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_SECONDS,
        )
        self._config.load()
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    @property
    def connections(self) -> int:
        """The number of open ones."""
        return len(self._state.connections)

    async def start(self, address: str) -> int:
        """Listens at `host:port` and returns the port, a free one for 0. Raises OSError where it is in use."""
        host, _, port = address.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        listener = socket.create_server((bare, int(port)), family=family, backlog=BACKLOG)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self._config, self._state, self._limits),
            sock=listener,
            ssl=self._secured,
            backlog=BACKLOG,
            ssl_handshake_timeout=None if self._secured is None else self._limits.receive_seconds,
        )
        return int(listener.getsockname()[1])

    def drain(self) -> None:
        """Ends every connection after the reply that it carries now."""
        for connection in list(self._state.connections):
            connection.shutdown()

    async def stop(self) -> None:
        """Listens no more, ends all calls, which then have a second to say so, and closes all connections."""
        if self._server is not None:
            self._server.close()
        self.drain()
        self._end_calls()
        if tasks := list(self._state.tasks):
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
        for task in (left := list(self._state.tasks)):
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for connection in list(self._state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        if self._server is not None:
            await self._server.wait_closed()
