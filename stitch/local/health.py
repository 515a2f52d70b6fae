"""Asks processes whether they serve (grpc.health.v1). Knows no service of theirs."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stitch.channels import open_sync_channel

ASK_SECONDS = 1.0


def serves(address: str, credentials: grpc.ChannelCredentials | None = None) -> bool:
    """Whether the process at `host:port` says now that it serves."""
    with open_sync_channel(address, credentials) as channel:
        try:
            health = health_pb2_grpc.HealthStub(channel)
            reply = health.Check(health_pb2.HealthCheckRequest(), timeout=ASK_SECONDS)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
