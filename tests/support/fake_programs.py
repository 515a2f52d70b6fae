"""Programs that replace `stitch-server` and `router-gateway` in tests: they answer health checks, and echo prompts.

`python -m` searches the current folder first, so a test that changes into `installed(folder)` starts these programs.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from stitch.cluster import load_cluster
from stitch.health import route_service
from stitch.v1 import inference_pb2_grpc
from tests.support.fake_gateway import FakeGateway

# Environment variable with the name of the process that exits at its start.
DYING = "FAKE_PROGRAM_DYING"
# Environment variable with the name of the process that ignores SIGTERM.
STUBBORN = "FAKE_PROGRAM_STUBBORN"
# Environment variable with the name of the process that never finishes loading.
LOADING = "FAKE_PROGRAM_LOADING"
# Environment variable with the name of the route whose shards the gateway never reaches.
UNREACHED = "FAKE_PROGRAM_UNREACHED"

_PROGRAM = """
from tests.support.fake_programs import main

main()
"""


def installed(folder: Path) -> Path:
    """Writes a module for each program into the folder, and returns the folder."""
    for package in ("stitch_server", "router_gateway"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
        (folder / package / "cli.py").write_text(_PROGRAM)
    return folder


def main() -> None:
    """Runs `import SOURCE`, `run CLUSTER --shard NAME` or `run CLUSTER`."""
    verb, argument, *rest = sys.argv[1:]
    if verb == "import":
        print(f"importing {argument}", file=sys.stderr, flush=True)
        print(f"/models/{argument}", flush=True)
        sys.exit(1 if argument == "nowhere" else 0)
    _run(argument, rest[1] if rest else "gateway")


def _run(cluster_file: str, name: str) -> None:
    cluster = load_cluster(cluster_file)
    print(f"{name} begins", flush=True)
    if os.environ.get(DYING) == name:
        print("there is no room for my weights", flush=True)
        sys.exit(3)
    if os.environ.get(LOADING) == name:
        print("weights: 3 of 7 ü", flush=True)
        threading.Event().wait()
    if os.environ.get(STUBBORN) == name:
        import signal

        signal.signal(signal.SIGTERM, lambda number, frame: print("not now", flush=True))
    if name == "gateway":
        reached = [route.name for route in cluster.routes if route.name != os.environ.get(UNREACHED)]
        _serve(cluster.gateway.address, ["", *map(route_service, reached)])
    else:
        _serve(cluster.shard(name).address, [""])


def _serve(address: str, services: Sequence[str]) -> None:
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    servicer = health.HealthServicer()
    for service in services:
        servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    inference_pb2_grpc.add_InferenceServicer_to_server(FakeGateway(), server)
    server.add_insecure_port(address)
    server.start()
    server.wait_for_termination()
