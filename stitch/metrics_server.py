"""Serves a program's Prometheus metrics: over HTTP on loopback, elsewhere over HTTPS to programs of the cluster.

With `--insecure`, a cluster without certificates serves them over HTTP on every interface.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Info, make_wsgi_app

from stitch.certificates import Certificates
from stitch.identity import Role, read_certificate
from stitch.tls import is_loopback

_log = logging.getLogger(__name__)

READERS: frozenset[Role] = frozenset({"monitor", "gateway", "shard"})
# A caller that is silent for this long is dropped.
SILENT_SECONDS = 10.0
# Further callers are dropped at once.
MAX_CALLERS = 32


@asynccontextmanager
async def serving_metrics(
    registry: CollectorRegistry, address: str, certificates: Certificates | None
) -> AsyncIterator[int]:
    """Serves the metrics at `host:port` within the block and yields the port. Raises OSError where it is in use.

    Adds the program's version to them.
    """
    host, _, port = address.rpartition(":")
    kind = _Server6 if ":" in host else _Server
    server = make_server(host.strip("[]"), int(port), make_wsgi_app(registry), kind, _QuietHandler)
    build = {"version": version("stitch-serving"), "python": platform.python_version()}
    info = Info("stitch_build", "What this process runs.", registry=registry)
    info.info(build)
    server.certificates = None if is_loopback(host) else certificates
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()
        registry.unregister(info)


class _Server(ThreadingMixIn, WSGIServer):
    """Meets each caller in a thread of its own, from the handshake on, so that a silent one delays nobody."""

    daemon_threads = True
    certificates: Certificates | None = None
    # The context of the certificates.
    _context: ssl.SSLContext | None = None

    def __init__(self, *arguments: Any) -> None:
        self._room = threading.Semaphore(MAX_CALLERS)
        super().__init__(*arguments)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for the caller."""
        return self._room.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(SILENT_SECONDS)
        if self.certificates is None:
            super().finish_request(request, client_address)
            return
        if self._context is None:
            self._context = self.certificates.https_to_programs()
        with self._context.wrap_socket(request, server_side=True) as secured:
            shown = ssl.DER_cert_to_PEM_cert(secured.getpeercert(binary_form=True) or b"")
            objection = self.certificates.policy.objection(read_certificate(shown.encode()), READERS)
            if objection is not None:
                raise PermissionError(objection)
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.warning("metrics were not sent to %s: %s", client_address[0], sys.exception())


class _Server6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs no request."""
