"""The gateway's composition root: builds every component by hand, in order, and stops them in reverse."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import grpc
from grpc_health.v1 import health_pb2_grpc

from router_gateway.admission.admission import Admission
from router_gateway.admission.capacity import capacity_of
from router_gateway.admission.forecast import Forecast
from router_gateway.admission.tenants import open_tenants
from router_gateway.config import GatewaySettings, check
from router_gateway.http.app import build_app
from router_gateway.http.calls import Services
from router_gateway.http.server import HttpServer
from router_gateway.metrics import Metrics
from router_gateway.requests.failover import FailoverDependencies
from router_gateway.requests.pipeline import Pipeline
from router_gateway.requests.preparer import RequestPreparer
from router_gateway.routing.drift import DriftMonitor
from router_gateway.routing.heuristic import HeuristicRouter
from router_gateway.routing.learned.router import open_learned_router
from router_gateway.routing.probe import open_probe_router
from router_gateway.routing.router import REASON_KINDS, FallbackRouter, Ladder, Router
from router_gateway.routing.selector import Selector, conversation_routes
from router_gateway.routing.ttft_predictor import TtftPredictor
from router_gateway.rpc.health import SERVICES, Health
from router_gateway.rpc.receiver import Receiver
from router_gateway.rpc.servicer import InferenceServicer, ReceivingInterceptor, inference_methods
from router_gateway.shards.models import ModelRegistry
from router_gateway.shards.placement import Placement
from router_gateway.shards.progress import ProgressMonitor
from router_gateway.shards.registry import ShardRegistry
from router_gateway.tokenization.source import VocabularySource
from router_gateway.tokenization.text_queues import TextQueues
from stitch import channels, reflection
from stitch.access import Access
from stitch.certificates import Certificates, open_certificates
from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest
from stitch.membership import Membership, Resolve, resolve_by_system
from stitch.metrics_server import serving_metrics
from stitch.process import InFlightTracker, StopSignals, background_tasks, observe_event_loop
from stitch.telemetry import NO_TRACES, Tracer, tracing
from stitch.thresholds import Thresholds
from stitch.v1 import inference_pb2_grpc


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that listens."""

    # The bound ports: where the settings say 0, the system chose one.
    port: int
    metrics_port: int
    metrics: Metrics
    server: grpc.aio.Server
    health: Health
    in_flight: InFlightTracker
    # Where HTTP is served, its port.
    http: HttpServer | None
    http_port: int

    async def drain(self, seconds: float) -> None:
        """Reports NOT_SERVING, refuses new calls, and waits for running answers, at most `seconds`."""
        await self.health.shut_down()
        self.in_flight.close()
        if self.http is not None:
            self.http.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.in_flight.wait_until_empty()

    async def stop(self) -> None:
        """Ends all remaining calls, and with them their sessions on every shard."""
        self.in_flight.aborting = True
        if self.http is not None:
            await self.http.stop()
        await self.server.stop(None)


async def serve(settings: GatewaySettings, resolve: Resolve = resolve_by_system) -> None:
    """Runs a gateway until SIGTERM or SIGINT, drains it, and stops. Raises like `open_gateway`."""
    signals = StopSignals()
    signals.install()
    async with AsyncExitStack() as stack:
        tracer = stack.enter_context(tracing(settings.cluster.traces, "router-gateway", settings.address))
        gateway = await stack.enter_async_context(open_gateway(settings, resolve, tracer))
        host = settings.host
        print(f"router-gateway: listening on {host}:{gateway.port}", flush=True)
        if settings.http_address is not None:
            scheme = "http" if settings.cluster.tls is None else "https"
            host = settings.http_address.rpartition(":")[0]
            print(f"router-gateway: OpenAI's API at {scheme}://{host}:{gateway.http_port}/v1", flush=True)
        where = f"{settings.cluster.gateway.metrics_host}:{gateway.metrics_port}"
        print(f"router-gateway: metrics on {where}/metrics", flush=True)
        await signals.first.wait()
        await signals.drained(gateway.drain(settings.drain_seconds))


@asynccontextmanager
async def open_gateway(
    settings: GatewaySettings, resolve: Resolve = resolve_by_system, tracer: Tracer = NO_TRACES
) -> AsyncIterator[Gateway]:
    """A gateway that listens within the block. `resolve` finds the addresses of names in the cluster file.

    `tracer` records its requests.

    Raises InvalidRequest, or OSError where a port is in use.
    """
    check(settings)
    cluster, routes = settings.cluster, [route.name for route in settings.cluster.routes]
    certificates = open_certificates(cluster, "gateway", "gateway")
    metrics, in_flight, health = Metrics(routes, REASON_KINDS), InFlightTracker("this gateway"), Health(routes)
    if certificates is not None:
        certificates.export(metrics.registry)
    async with AsyncExitStack() as stack:
        serving = serving_metrics(metrics.registry, settings.metrics_address, certificates)
        metrics_port = await stack.enter_async_context(serving)
        shards = await stack.enter_async_context(_following_shards(settings, resolve, certificates, metrics))
        queues = stack.enter_context(TextQueues(cluster.gateway.limits.text_wait_seconds))
        pipeline, admission = _build_pipeline(settings, shards, queues, metrics, lambda: in_flight.aborting, tracer)
        services = Services(
            config=cluster.gateway,
            pipeline=pipeline,
            models=shards.models,
            source=shards.source,
            authenticate=admission.authenticate,
            receiver=Receiver(cluster.gateway.limits),
            in_flight=in_flight,
            ready=lambda: health.serving,
            access=_client_access(certificates),
        )
        server, port = await _listening(services, health, settings, certificates, metrics)
        # Also where the HTTP port is in use.
        stack.push_async_callback(server.stop, None)
        http, http_port = await _listening_http(services, settings, certificates, metrics)
        gateway = Gateway(port, metrics_port, metrics, server, health, in_flight, http, http_port)
        stack.push_async_callback(gateway.stop)
        loading = shards.source.follow(settings.health.poll_seconds)
        readiness = health.follow(shards.registry, lambda: _ready(shards, routes, metrics))
        observed = observe_event_loop(metrics.event_loop_delay, metrics.event_loop_tasks)
        renewed = [] if certificates is None else [certificates.follow()]
        tasks = background_tasks(loading, readiness, observed, admission.keep_promises(), *renewed)
        await stack.enter_async_context(tasks)
        yield gateway


@dataclass(frozen=True, slots=True)
class _Shards:
    """What the gateway knows of the shards, kept up to date."""

    registry: ShardRegistry
    placement: Placement
    models: ModelRegistry
    # Of the tokenizer that the shards have.
    source: VocabularySource


@asynccontextmanager
async def _following_shards(
    settings: GatewaySettings, resolve: Resolve, certificates: Certificates | None, metrics: Metrics
) -> AsyncIterator[_Shards]:
    """Follows, within the block, which shards are wanted, polls them, and watches the progress of their sessions."""
    connect = certificates.rotating_channel if certificates else channels.open_plain_channel
    count = lambda change: metrics.membership_changes.labels(kind=change).inc()  # noqa: E731
    membership = Membership(settings.cluster, resolve, count)
    registry = ShardRegistry(settings.cluster, connect, settings.health, settings.ejection, metrics)
    membership.on_change.append(registry.take)
    if certificates is not None:
        membership.on_change.append(certificates.policy.take)
    placement = Placement(registry)
    progress = ProgressMonitor(placement, settings.health, settings.ejection)
    models, source = ModelRegistry(membership, registry), VocabularySource(registry)
    async with registry.polling(), background_tasks(membership.follow()), background_tasks(progress.run()):
        yield _Shards(registry, placement, models, source)


def _build_pipeline(
    settings: GatewaySettings,
    shards: _Shards,
    queues: TextQueues,
    metrics: Metrics,
    aborting: Callable[[], bool],
    tracer: Tracer,
) -> tuple[Pipeline, Admission]:
    """The pipeline of requests, and the admission that they pass. Raises like `open_router`."""
    cluster, registry = settings.cluster, shards.registry
    routes = [route.name for route in cluster.routes]
    predictor = TtftPredictor(routes, registry.count_first_shards, time.monotonic)
    metrics.read_fits(routes, predictor.fit)
    selector = _build_selector(cluster, shards.models, predictor, metrics)
    preparer = RequestPreparer(cluster, shards.models, shards.source, selector, queues)
    failover = FailoverDependencies(registry, shards.placement, metrics, settings.retry, time.monotonic)
    admission = Admission(
        open_tenants(cluster.keys_file, routes),
        cluster.gateway,
        Forecast(predictor.predict_seconds, shards.models.costs),
        partial(capacity_of, registry),
        metrics,
        time.monotonic,
    )
    return Pipeline(preparer, selector, failover, admission, predictor, metrics, aborting, tracer), admission


def _build_selector(
    cluster: ClusterConfig, models: ModelRegistry, predictor: TtftPredictor, metrics: Metrics
) -> Selector:
    """What chooses the routes of requests. Raises like `open_router`."""
    router, calibration = open_router(cluster)
    monitor = DriftMonitor(metrics, calibration)
    conversations, cheaper = conversation_routes(time.monotonic), cluster.gateway.cheaper_under_load
    return Selector(router, models, predictor, conversations, monitor, cheaper)


def _ready(shards: _Shards, routes: Sequence[str], metrics: Metrics) -> Mapping[str, bool]:
    """By route: whether the shards' tokenizer is loaded, and the shards of the route accept requests."""
    ready = {route: shards.placement.reachable(route) for route in routes}
    for route, is_ready in ready.items():
        metrics.route_ready.labels(route=route).set(is_ready)
    return {route: is_ready and shards.source.is_current for route, is_ready in ready.items()}


async def _listening(
    services: Services, health: Health, settings: GatewaySettings, certificates: Certificates | None, metrics: Metrics
) -> tuple[grpc.aio.Server, int]:
    """The gRPC server and its port."""
    limits = services.config.limits
    methods = inference_methods()
    interceptor = ReceivingInterceptor(methods, services.authenticate, limits, services.receiver)
    interceptors = [interceptor] if services.access is None else [services.access, interceptor]
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", limits.request_bytes),
        ("grpc.max_concurrent_streams", limits.calls_per_connection),
        ("grpc.max_allowed_incoming_connections", limits.connections),
    ]
    if certificates is not None:
        options += certificates.server_options
    server = channels.open_server(interceptors, options)
    concurrency = settings.batch_concurrency
    servicer = InferenceServicer(services.pipeline, services.models, services.in_flight, metrics, concurrency)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    if settings.reflects:
        reflection.enable((*filter(None, SERVICES), "grpc.health.v1.Health"), server)
    await health.set({})
    port = channels.listen(server, settings.address, certificates.to_clients() if certificates else None)
    await server.start()
    return server, port


def _client_access(certificates: Certificates | None) -> Access | None:
    """What checks the certificates of clients; None where they show none."""
    if certificates is None or certificates.files.client_authority is None:
        return None
    access = Access(certificates.policy, methods=None)
    certificates.on_change.append(access.end_revoked)
    return access


async def _listening_http(
    services: Services, settings: GatewaySettings, certificates: Certificates | None, metrics: Metrics
) -> tuple[HttpServer | None, int]:
    """The HTTP server and its port; None and 0 where the settings name no address for it."""
    if settings.http_address is None:
        return None, 0
    secured = None if certificates is None else certificates.https_to_clients()
    server = HttpServer(build_app(services, metrics.http_requests), services.config.limits, secured, services.end_calls)
    return server, await server.start(settings.http_address)


def open_router(cluster: ClusterConfig) -> tuple[Router, Callable[[], Thresholds | None] | None]:
    """The router that the cluster file names, and a function for its calibration; None where its scores have none.

    Raises InvalidRequest where the router was trained for other routes.
    """
    config = cluster.gateway
    if config.probe is not None:
        probe = open_probe_router(cluster)
        return probe, lambda: probe.calibration
    if config.router is None:
        return FallbackRouter(HeuristicRouter(Ladder(config.thresholds)), config.fallback_route), None
    thresholds = None if config.router_thresholds is None else cluster.folder / config.router_thresholds
    learned = open_learned_router(cluster.folder / config.router, thresholds)
    differing = set(learned.routes) ^ {route.name for route in cluster.routes}
    if differing:
        raise InvalidRequest(
            "gateway.router", config.router, f"it and the cluster disagree on {', '.join(sorted(differing))}"
        )
    return FallbackRouter(learned, config.fallback_route), lambda: learned.calibration
