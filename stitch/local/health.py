"""Asks a process whether it serves (grpc.health.v1); container images use this without the command's dependencies."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stitch.channels import open_sync_channel

CHECK_SECONDS = 1.0


def serves(address: str, credentials: grpc.ChannelCredentials | None = None) -> bool:
    """Whether the process at `host:port` reports SERVING now."""
    with open_sync_channel(address, credentials) as channel:
        try:
            health = health_pb2_grpc.HealthStub(channel)
            reply = health.Check(health_pb2.HealthCheckRequest(), timeout=CHECK_SECONDS)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
