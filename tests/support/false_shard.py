"""A next shard that answers steps with whatever a test tells it to, over a real link.

It shakes hands as an honest shard does, and then sends the scripted replies to the next steps, as bytes that need be
no message. A step without a scripted reply gets a failure of its sessions, which ends them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from stitch.v1 import shard_pb2

Reply = Callable[[shard_pb2.Step], bytes]


@dataclass(eq=False)
class FalseShard:
    """The shard that `identity` names."""

    identity: shard_pb2.ShardIdentity | None = None
    script: deque[Reply] = field(default_factory=deque)
    steps: int = 0

    def tell(self, script: Sequence[Reply]) -> None:
        """Replaces the replies to the next steps."""
        self.script.clear()
        self.script.extend(script)

    def link(self, requests: Iterator[shard_pb2.LinkRequest], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)
        yield shard_pb2.LinkResponse(welcome=shard_pb2.Welcome(identity=self.identity)).SerializeToString()
        for request in requests:
            if request.WhichOneof("frame") == "step":
                self.steps += 1
                yield self.script.popleft()(request.step) if self.script else refusal(request.step)
            elif request.WhichOneof("frame") == "heartbeat":
                yield shard_pb2.LinkResponse(heartbeat=request.heartbeat).SerializeToString()


def refusal(step: shard_pb2.Step) -> bytes:
    """The reply that ends all sessions of a step."""
    reply = shard_pb2.StepReply(step=step.step)
    for segment in step.segments:
        cause = shard_pb2.FAILURE_CAUSE_PRECONDITION
        reply.failures.add(session=segment.session, epoch=segment.epoch, cause=cause, message="refused")
    return shard_pb2.LinkResponse(reply=reply).SerializeToString()


@contextmanager
def false_shard(address: str) -> Iterator[FalseShard]:
    """Serves a false shard at `host:port` within the block."""
    shard = FalseShard()
    handlers: dict[str, Any] = {
        "Link": grpc.stream_stream_rpc_method_handler(
            shard.link, request_deserializer=shard_pb2.LinkRequest.FromString, response_serializer=bytes
        )
    }
    # As often as shards ask whether a connection lives.
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=[("grpc.http2.max_ping_strikes", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("stitch.v1.Shard", handlers),))
    server.add_insecure_port(address)
    server.start()
    try:
        yield shard
    finally:
        server.stop(None).wait()
