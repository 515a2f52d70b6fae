"""One session on one chain, until it ends or the chain is lost. Knows nothing of other chains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import grpc

from router_gateway.shards.placement import Chain
from stitch.errors import StitchError, from_rpc_error
from stitch.v1 import shard_pb2


class ChainLost(Exception):
    """The chain can't go on, but another one could; `cause` is one of metrics.REPLAY_CAUSES."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


async def attempt(
    chain: Chain, request: shard_pb2.ShardGenerateRequest, timeout_seconds: float | None
) -> AsyncGenerator[shard_pb2.ShardGenerateResponse, None]:
    """What the first shard of the chain answers; leaving this iterator cancels the session on every shard.

    Raises ChainLost, or the StitchError that a shard raised.
    """
    call = chain.first.generate(request, timeout_seconds)
    with chain.on_unavailable(call.cancel):
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from error
        except asyncio.CancelledError:
            # A call that was cancelled because a shard went away looks like this task's own cancellation.
            task = asyncio.current_task()
            if chain.serving or (task is not None and task.cancelling()):
                raise
            raise ChainLost("unreachable", f"a shard of {', '.join(chain.names)} does not answer") from None
        finally:
            call.cancel()


def _failure(error: grpc.aio.AioRpcError) -> Exception:
    code, message = error.code(), error.details() or ""
    # A process that dies in the middle of a frame may leave nothing but a reset stream.
    if code is grpc.StatusCode.UNAVAILABLE or (code is grpc.StatusCode.INTERNAL and "RST_STREAM" in message):
        return ChainLost("unavailable", message)
    if code is grpc.StatusCode.CANCELLED:
        return ChainLost("cancelled", message)
    known = from_rpc_error(error)
    return known if isinstance(known, StitchError) else StitchError(f"a shard failed: {message}")
