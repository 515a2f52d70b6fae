"""A shard's process: opens its parts in order, drains on the first signal, and closes the parts in reverse order.

A draining shard refuses `Generate` and new sessions of links, and exits when its own sessions have ended.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from stitch import channels, reflection
from stitch.access import Access, Methods
from stitch.certificates import Certificates, open_certificates
from stitch.environment import step_log_folder
from stitch.membership import Membership, Resolve, resolve_by_system
from stitch.metrics_server import serving_metrics
from stitch.process import StopSignals, background_tasks, observe_event_loop
from stitch.telemetry import NO_TRACES, Tracer, tracing
from stitch.v1 import shard_pb2, shard_pb2_grpc
from stitch_server.build import load_stage
from stitch_server.config import ShardSettings
from stitch_server.devices import pick_device
from stitch_server.engine.loop import Engine
from stitch_server.engine.pass_age import TICK_SECONDS, PassAge
from stitch_server.engine.types import LinkEvent
from stitch_server.metrics import Metrics, StepLog
from stitch_server.neighbours import Neighbours
from stitch_server.rpc.link_client import LinkClient
from stitch_server.rpc.servicer import LenientDecoding, ShardServicer
from stitch_server.shard import Shard, build_shard

log = logging.getLogger(__name__)

# The event loop carries every token between two steps. Python's default lets it wait 5 ms for the engine's thread.
SWITCH_SECONDS = 0.0002
# After the last session, for its status to leave before the server stops.
LAST_STATUS_SECONDS = 0.05
# Of a process whose engine is stuck: EX_SOFTWARE, for a supervisor to start it again.
STUCK_EXIT_CODE = 70
# Of a token of a prompt that is also forced: in a request for one, and in the frame that opens its session.
ID_BYTES = 10
SERVICE = shard_pb2.DESCRIPTOR.services_by_name["Shard"].full_name
HEALTH = "grpc.health.v1.Health"
# Who may call what, by the roles in certificates.
CALLERS: Methods = {
    f"/{SERVICE}/Generate": frozenset({"gateway"}),
    f"/{SERVICE}/FetchTokenizer": frozenset({"gateway"}),
    f"/{SERVICE}/Link": frozenset({"shard"}),
    f"/{SERVICE}/Describe": frozenset({"gateway", "shard"}),
    **dict.fromkeys(
        (
            *(f"/{HEALTH}/{method}" for method in ("Check", "List", "Watch")),
            *(f"/{service}/{reflection.METHOD}" for service in reflection.SERVICES),
        ),
        frozenset({"gateway", "shard", "monitor"}),
    ),
}


async def serve(settings: ShardSettings, resolve: Resolve = resolve_by_system) -> None:
    """Runs a shard until SIGTERM or SIGINT, lets running sessions finish, and stops."""
    sys.setswitchinterval(SWITCH_SECONDS)
    signals = StopSignals()
    signals.install()
    print(f"stitch-server: shard {settings.shard.name} loads; the first start here compiles its kernels", flush=True)
    async with AsyncExitStack() as stack:
        tracer = stack.enter_context(tracing(settings.cluster.traces, "stitch-server", settings.shard.name))
        running = await stack.enter_async_context(open_shard(settings, resolve, tracer))
        # What exists now lives as long as the process: no collection needs to visit it, least of all the one at exit.
        gc.freeze()
        print(f"stitch-server: shard {settings.shard.name} listens on {settings.host}:{running.port}", flush=True)
        await asked_to_stop(signals, running.shard.engine)
        await signals.drained(running.drain(settings.drain_seconds))


async def end_when_stuck(pass_age: PassAge, end: Callable[[int], None] = os._exit) -> None:
    """Ends the process at once when a pass of its engine is stuck: no thread of it can be stopped any more."""
    while not pass_age.is_stuck:
        await asyncio.sleep(TICK_SECONDS)
        pass_age.tick()
    log.critical("the engine is stuck in a pass: this process ends")
    end(STUCK_EXIT_CODE)


async def asked_to_stop(signals: StopSignals, engine: Engine) -> None:
    """Waits for the first signal. Raises what broke the engine's loop, so that the process ends with it."""
    asked, ended = asyncio.create_task(signals.first.wait()), asyncio.wrap_future(engine.ended)
    both: set[asyncio.Future[Any]] = {asked, ended}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if ended.done():
        ended.result()


@dataclass(frozen=True, slots=True)
class RunningShard:
    """A shard that listens."""

    port: int
    metrics_port: int
    shard: Shard
    health: HealthServicer

    async def drain(self, seconds: float) -> None:
        """Reports NOT_SERVING, refuses new sessions, and waits at most `seconds` for the running ones to end.

        The tracker holds one entry for each `Generate` call and for each session of a link, from the frame that opens
        it to the frame that closes it; so it is empty when all sessions of this shard have ended.
        """
        self.shard.start_draining()
        await self.health.enter_graceful_shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.shard.in_flight.wait_until_empty()
        await asyncio.sleep(LAST_STATUS_SECONDS)


@asynccontextmanager
async def open_shard(
    settings: ShardSettings, resolve: Resolve = resolve_by_system, tracer: Tracer = NO_TRACES
) -> AsyncIterator[RunningShard]:
    """A shard that listens inside of the block. `resolve` finds the addresses of names in the cluster file.

    `tracer` records its sessions.

    Raises Incompatible, InvalidRequest for a certificate, or OSError for a port that is taken.
    """
    certificates = open_certificates(settings.cluster, "shard", settings.shard.certified_name)
    membership = Membership(settings.cluster, resolve)
    device = pick_device(settings.cluster.compute.device)
    loaded = await asyncio.to_thread(load_stage, settings.cluster, settings.shard, device)
    async with AsyncExitStack() as stack:
        folder, name = step_log_folder(), settings.shard.name
        metrics, neighbours = Metrics(name), Neighbours(membership, settings.shard)
        step_log = None if folder is None else stack.enter_context(StepLog(folder, name))

        def connect(neighbour: str, address: str) -> grpc.aio.Channel:
            if certificates is None:
                return channels.open_channel(address)
            return certificates.open_channel(neighbours.certified_name(neighbour), address)

        def open_links(identity: shard_pb2.ShardIdentity, on_event: Callable[[LinkEvent], None]) -> LinkClient:
            sent = metrics.link_bytes_sent.inc
            links = LinkClient(identity, on_event, sent, neighbours.address_of, connect, neighbours.has_replica)
            membership.on_change.append(lambda cluster: links.end_moved())
            stack.push_async_callback(links.aclose)
            return links

        shard = build_shard(settings.cluster, settings.shard, loaded, device, open_links, metrics, neighbours, step_log)
        shard.engine.start()
        stack.push_async_callback(asyncio.to_thread, shard.engine.stop)
        if certificates is not None:
            certificates.export(metrics.registry)
        serving = serving_metrics(metrics.registry, settings.metrics_address, certificates)
        metrics_port = await stack.enter_async_context(serving)
        health = HealthServicer()
        server, port = await _listening(shard, health, settings, membership, certificates, tracer)
        stack.push_async_callback(server.stop, None)
        observed = observe_event_loop(metrics.event_loop_delay, metrics.event_loop_tasks)
        watched = end_when_stuck(shard.engine.pass_age)
        following = [] if certificates is None else [certificates.follow()]
        await stack.enter_async_context(background_tasks(observed, watched, membership.follow(), *following))
        yield RunningShard(port, metrics_port, shard, health)


async def _listening(
    shard: Shard,
    health: HealthServicer,
    settings: ShardSettings,
    membership: Membership,
    certificates: Certificates | None,
    tracer: Tracer,
) -> tuple[grpc.aio.Server, int]:
    interceptors: list[grpc.aio.ServerInterceptor[Any, Any]] = [LenientDecoding()]
    largest = channels.MAX_FRAME_BYTES + ID_BYTES * shard.loaded.model.context_length
    options = [("grpc.max_receive_message_length", largest)]
    if certificates is None:
        server, credentials = channels.open_server(interceptors, options), None
    else:
        access = Access(certificates.policy, CALLERS, membership.refresh)
        membership.on_change.append(certificates.policy.take)
        certificates.on_change.append(access.end_revoked)
        server = channels.open_server([access, *interceptors], [*options, *certificates.server_options])
        credentials = certificates.to_programs()
    shard_pb2_grpc.add_ShardServicer_to_server(ShardServicer(shard, tracer), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if settings.reflects:
        reflection.enable((SERVICE, HEALTH), server)
    port = channels.listen(server, settings.listen, credentials)
    for service in ("", SERVICE):
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    return server, port
