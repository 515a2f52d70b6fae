"""A gRPC server of a test's own that listens for the length of a block, however the block ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from stitch.channels import listen


@asynccontextmanager
async def listening(
    server: grpc.aio.Server, credentials: grpc.ServerCredentials | None = None, address: str = "127.0.0.1:0"
) -> AsyncIterator[str]:
    """Yields `host:port`; on loopback at any free port by default."""
    port = listen(server, address, credentials)
    try:
        await server.start()
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
