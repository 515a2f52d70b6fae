"""The health check of a process, against the standard servicer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from stitch.channels import serves
from tests.support.fake_gateway import FakeGateway


@pytest.fixture
def servicer() -> health.HealthServicer:
    return health.HealthServicer()


@pytest.fixture
def address(servicer: health.HealthServicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize(("status", "expected"), [("SERVING", True), ("NOT_SERVING", False), ("UNKNOWN", False)])
def test_serves_is_true_for_status_serving_alone(
    servicer: health.HealthServicer, address: str, status: str, expected: bool
) -> None:
    servicer.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    assert serves(address) is expected


def test_serves_is_false_without_process() -> None:
    assert not serves("127.0.0.1:1")


def test_serves_is_false_without_health_service(gateway: FakeGateway) -> None:
    assert not serves(gateway.address)
