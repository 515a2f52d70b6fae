"""From gRPC failures to the errors of this project. Doesn't know which call failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from stitch.errors import from_rpc_error


@contextmanager
def translated_rpc_errors() -> Iterator[None]:
    """Raises the StitchError that the gateway raised; a failure of another kind passes as it is."""
    try:
        yield
    except grpc.RpcError as error:
        translated = from_rpc_error(error)
        if translated is error:
            raise
        raise translated from error
