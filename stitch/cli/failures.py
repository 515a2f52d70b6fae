"""What a person reads when a command fails. Doesn't know which command."""

from __future__ import annotations

import grpc

from stitch.errors import StitchError


def sentence(error: Exception) -> str:
    """The failure in one sentence; raises it again where it is a defect of this program."""
    if isinstance(error, StitchError | OSError):
        return str(error)
    if isinstance(error, grpc.RpcError):
        return f"the gateway failed: {error.details() or error.code().name}"
    if isinstance(error, ImportError):
        return f"this needs more than the client ({error}): install stitch-serving[all]"
    raise error
