"""The table of roles names every method that a shard serves, and gives each to those who need it alone."""

from __future__ import annotations

from typing import get_args

from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2

from stitch import reflection
from stitch.identity import Role
from stitch.v1 import shard_pb2
from stitch_server.server import CALLERS

SERVED = (shard_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, *reflection.FILES)


def test_table_names_every_method_of_the_served_services() -> None:
    assert set(CALLERS) == {path for file in SERVED for path in _methods(file)}


def test_table_gives_sessions_to_gateways_and_links_to_shards() -> None:
    own = {path.rpartition("/")[2]: set(CALLERS[path]) for path in _methods(shard_pb2.DESCRIPTOR)}
    assert own == {
        "Generate": {"gateway"},
        "FetchTokenizer": {"gateway"},
        "Link": {"shard"},
        "Describe": {"gateway", "shard"},
    }


def test_no_client_may_call_a_shard() -> None:
    assert set().union(*CALLERS.values()) == set(get_args(Role)) - {"client"}


def _methods(file: FileDescriptor) -> list[str]:
    services = file.services_by_name.values()
    return [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
