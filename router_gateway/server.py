"""The gateway put together: everything is built here by hand, in order, and stopped in reverse. Judges nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from router_gateway.background import running
from router_gateway.config import FleetSettings, GatewaySettings, check
from router_gateway.metrics import Metrics
from router_gateway.requests.failover import FailoverDependencies, RetryPolicy
from router_gateway.requests.pipeline import Generator
from router_gateway.requests.preparation import Preparation
from router_gateway.routing.conversations import Conversations
from router_gateway.routing.drift_monitor import DriftMonitor
from router_gateway.routing.heuristic import HeuristicRouter
from router_gateway.routing.learned.router import open_learned_router
from router_gateway.routing.probe import open_probe_router
from router_gateway.routing.router import REASON_KINDS, FallbackRouter, Ladder, Router
from router_gateway.routing.selector import Selection
from router_gateway.routing.ttft_predictor import TtftPredictor
from router_gateway.rpc.decoding import LenientDecoding, methods_of_inference
from router_gateway.rpc.health import SERVICES, Health
from router_gateway.rpc.servicer import InferenceServicer
from router_gateway.shards.models import ModelRegistry
from router_gateway.shards.placement import Placement
from router_gateway.shards.registry import ShardRegistry, watched
from router_gateway.shards.replica import HealthPolicy
from router_gateway.tokenization.source import VocabularySource, first_shards
from stitch import channels
from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest
from stitch.process import InFlightTracker, StopSignals, observe_delay
from stitch.thresholds import Thresholds
from stitch.tls import Tls, load_tls
from stitch.v1 import inference_pb2_grpc

# Tokenizing long texts; more threads would take the cores from shards on the same machine.
TEXT_THREADS = 2


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that listens."""

    # As bound: where the configuration says 0, the system chose.
    port: int
    metrics_port: int
    metrics: Metrics
    server: grpc.aio.Server
    health: Health
    in_flight: InFlightTracker

    async def drain(self, seconds: float) -> None:
        """Says NOT_SERVING, lets nobody in, and waits so long for the answers that are on their way."""
        await self.health.leave()
        self.in_flight.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.in_flight.wait_until_empty(), seconds)

    async def stop(self) -> None:
        """Ends every call that is left, and with it its session on every shard."""
        self.in_flight.aborting = True
        await self.server.stop(None)


async def serve(settings: GatewaySettings) -> None:
    """Runs a gateway until SIGTERM or SIGINT, lets running answers finish, and stops. Raises as `open_gateway`."""
    signals = StopSignals()
    signals.install()
    async with open_gateway(settings) as gateway:
        host = settings.host
        print(f"router-gateway: listening on {host}:{gateway.port}", flush=True)
        print(f"router-gateway: metrics on http://{host}:{gateway.metrics_port}/metrics", flush=True)
        await signals.first.wait()
        await signals.drained(gateway.drain(settings.drain_seconds))


@asynccontextmanager
async def open_gateway(settings: GatewaySettings) -> AsyncIterator[Gateway]:
    """A gateway that listens inside of the block. Raises InvalidRequest, or OSError where a port is taken."""
    check(settings)
    cluster = settings.cluster
    tls = load_tls(cluster.tls, cluster.folder)
    async with AsyncExitStack() as stack:
        metrics = Metrics([route.name for route in cluster.routes], REASON_KINDS)
        metrics_port = await stack.enter_async_context(_exposed(metrics, settings))
        fleet = await stack.enter_async_context(_fleet(cluster, settings.fleet, tls))
        placement, catalogue = Placement(cluster, fleet), ModelRegistry(cluster, fleet)
        threads = stack.enter_context(ThreadPoolExecutor(TEXT_THREADS, "text"))
        firsts = [fleet.replicas[name] for name in first_shards(cluster)]
        source = VocabularySource(firsts)
        pace = TtftPredictor(
            [route.name for route in cluster.routes], lambda: sum(first.serving for first in firsts), time.monotonic
        )
        router, calibration = router_of(cluster)
        conversations, watch = Conversations(time.monotonic), DriftMonitor(metrics, calibration)
        selection = Selection(router, catalogue, pace, conversations, watch)
        preparation = Preparation(cluster, catalogue, source, selection, threads)
        persistence = RetryPolicy(**settings.replay.model_dump())
        around = FailoverDependencies(fleet, placement, metrics.replays, persistence, time.monotonic)
        in_flight, health = InFlightTracker("this gateway"), Health()
        generator = Generator(preparation, selection, around, pace, metrics, lambda: in_flight.aborting)
        servicer = InferenceServicer(generator, catalogue, in_flight, metrics, settings.batch_at_once)
        server, port = await _listening(servicer, health, settings.address, tls)
        gateway = Gateway(port, metrics_port, metrics, server, health, in_flight)
        stack.push_async_callback(gateway.stop)
        coming_up = _serve_health(health, source, fleet, placement, settings)
        await stack.enter_async_context(running(coming_up, observe_delay(metrics.event_loop_delay)))
        yield gateway


async def _serve_health(
    health: Health, source: VocabularySource, fleet: ShardRegistry, placement: Placement, settings: GatewaySettings
) -> None:
    """SERVING from the moment on when a prompt can be read and a route is whole."""
    await source.load(settings.fleet.poll_seconds)
    await health.follow(fleet, lambda: any(map(placement.reachable, settings.cluster.routes)))


async def _listening(
    servicer: InferenceServicer, health: Health, address: str, tls: Tls | None
) -> tuple[grpc.aio.Server, int]:
    server = channels.open_server([LenientDecoding(methods_of_inference())])
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    names = (*filter(None, SERVICES), "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    await health.set(False)
    port = channels.listen(server, address, tls.server(mutual=False) if tls else None)
    await server.start()
    return server, port


@asynccontextmanager
async def _exposed(metrics: Metrics, settings: GatewaySettings) -> AsyncIterator[int]:
    """Serves the metrics over HTTP on the interface of the gateway, and gives the port."""
    configured = settings.metrics_port
    wanted = settings.cluster.gateway.metrics_port if configured is None else configured
    server, thread = start_http_server(wanted, settings.host.strip("[]"), metrics.registry)
    try:
        yield server.server_port
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()


@asynccontextmanager
async def _fleet(cluster: ClusterConfig, settings: FleetSettings, tls: Tls | None) -> AsyncIterator[ShardRegistry]:
    patience = HealthPolicy(settings.answer_seconds, settings.silent_polls)
    connect = partial(channels.open_channel, credentials=tls.client() if tls else None)
    async with watched(ShardRegistry(cluster, connect, patience), settings.poll_seconds) as fleet:
        yield fleet


def router_of(cluster: ClusterConfig) -> tuple[Router, Callable[[], Thresholds | None] | None]:
    """The router that the cluster file names, and what a learned one is calibrated to at the moment.

    Raises InvalidRequest where it was trained for other routes.
    """
    place = cluster.gateway
    if place.probe is not None:
        probe = open_probe_router(cluster)
        return probe, lambda: probe.calibration
    if place.router is None:
        return FallbackRouter(HeuristicRouter(Ladder(place.thresholds)), place.fallback_route), None
    thresholds = None if place.router_thresholds is None else cluster.folder / place.router_thresholds
    learned = open_learned_router(cluster.folder / place.router, thresholds)
    unknown = set(learned.routes) ^ {route.name for route in cluster.routes}
    if unknown:
        raise InvalidRequest(
            "gateway.router", place.router, f"it and the cluster disagree on {', '.join(sorted(unknown))}"
        )
    return FallbackRouter(learned, place.fallback_route), lambda: learned.calibration
