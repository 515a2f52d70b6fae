"""The shards that a cluster wants now, by its source: the cluster file, and DNS for the names in it.

In: the cluster that a program was started with. Out: the same cluster with other shards, whenever its source has
changed. A file is taken whole or not at all; one that is broken, or that changes more than shards, and a name without
an address leave everything as it is. Invariant: of a running program's cluster nothing changes but its shards.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from stitch.cluster import DNS_SCHEME, ClusterConfig, FoundShard, ShardConfig, load_cluster
from stitch.errors import InvalidRequest

_log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
# Names are resolved at most this often, but for a shard that meets an unknown name.
RESOLVE_SECONDS = 2.0
# A changed file is read once it has stayed the same for this time: its writer may still be writing it.
SETTLE_SECONDS = 0.1
# Between two readings, whatever callers say.
MIN_PAUSE_SECONDS = 0.2
# How long one name may take.
RESOLVE_TIMEOUT_SECONDS = 5.0
# Others may read the source this much later.
LATE_SECONDS = 10.0
CHANGES = ("added", "removed", "refused")

# The IP addresses of a host, by name. Raises OSError where there are none.
Resolve = Callable[[str], Awaitable[Collection[str]]]


async def resolve_by_system(host: str) -> Collection[str]:
    """The addresses that the system's resolver has for a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in found}


class Membership:
    """The cluster as its source has it now. `on_change` are called with each other one, in the event loop.

    `count` is called with one of CHANGES for every shard that comes or goes, and for every source that is refused.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        resolve: Resolve = resolve_by_system,
        count: Callable[[str], object] = lambda change: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cluster = cluster
        self.on_change: list[Callable[[ClusterConfig], object]] = []
        # What changed last, as text; empty: nothing.
        self.last_change = ""
        self._changed_at = clock()
        self._removed: list[ShardConfig] = []
        # Why a source is refused now, by its name.
        self.problems: dict[str, str] = {}
        self._resolve = resolve
        self._count = count
        self._clock = clock
        # Of the file that was read last; the one that the program was started with may have changed since.
        self._stamp: object = ()
        self._addresses: dict[str, Collection[str]] = {}
        self._resolved_at = float("-inf")
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    @property
    def source(self) -> str:
        """Where the shards come from, for people."""
        names = [shard.dns_host for shard in self.cluster.shards if shard.dns_host is not None]
        parts = [] if self.cluster.file is None else [f"file {self.cluster.file.name}"]
        return ", ".join(parts + [f"DNS {name}" for name in names]) or "fixed"

    @property
    def seconds_since_change(self) -> float:
        """The time since the last change, or since the start."""
        return self._clock() - self._changed_at

    @property
    def just_removed(self) -> list[ShardConfig]:
        """The shards that the last change has removed, where others may not know it yet."""
        return self._removed if self.seconds_since_change < LATE_SECONDS else []

    async def follow(self) -> None:
        """Reads the source at a fixed interval; never returns."""
        while True:
            try:
                await self.refresh(resolve_seconds=RESOLVE_SECONDS)
            # Whatever is wrong with the source, it is read again.
            except Exception as error:
                self._refuse(self.source, repr(error))
            await asyncio.sleep(CHECK_SECONDS)

    async def refresh(self, resolve_seconds: float = 0.0) -> None:
        """Reads the source; callers at the same time share a reading that begins after their call.

        Names that were resolved within `resolve_seconds` are not resolved again.
        """
        asked_at = self._clock()
        async with self._reading:
            if self._read_at > asked_at:
                return
            await asyncio.sleep(max(0.0, self._read_at + MIN_PAUSE_SECONDS - self._clock()))
            self._read_at = self._clock()
            cluster = await self._of_file()
            if self._read_at >= self._resolved_at + resolve_seconds:
                self._resolved_at = self._read_at
                await self._look_up({shard.dns_host for shard in cluster.shards if shard.dns_host is not None})
            self._take(cluster.model_copy(update={"found": self._found(cluster)}))

    async def _of_file(self) -> ClusterConfig:
        """The cluster with the shards of its file; as it is where the file is unchanged or can't be taken."""
        file = self.cluster.file
        if file is None or (stamp := await asyncio.to_thread(_stamp, file)) == self._stamp:
            return self.cluster
        await asyncio.sleep(SETTLE_SECONDS)
        if await asyncio.to_thread(_stamp, file) != stamp:
            return self.cluster
        self._stamp = stamp
        try:
            read = await asyncio.to_thread(load_cluster, str(file))
            _check_rest(self.cluster, read)
            check_addresses(read)
        except InvalidRequest as error:
            self._refuse(f"file {file.name}", str(error))
            return self.cluster
        self.problems.pop(f"file {file.name}", None)
        return self.cluster.model_copy(update={"shards": read.shards})

    async def _look_up(self, hosts: Collection[str]) -> None:
        """Resolves names; one that has no address now keeps those that it had."""

        async def look_up(host: str) -> None:
            try:
                async with asyncio.timeout(RESOLVE_TIMEOUT_SECONDS):
                    found = await self._resolve(host)
            except (OSError, UnicodeError, TimeoutError) as error:
                return self._refuse(f"DNS {host}", str(error) or "it takes too long")
            if not found:
                return self._refuse(f"DNS {host}", "it has no address")
            self._addresses[host] = found
            self.problems.pop(f"DNS {host}", None)

        await asyncio.gather(*map(look_up, hosts))

    def _found(self, cluster: ClusterConfig) -> tuple[FoundShard, ...]:
        return tuple(
            shard.at(address)
            for shard in cluster.shards
            if shard.dns_host is not None
            for address in sorted(self._addresses.get(shard.dns_host, ()))
        )

    def _take(self, cluster: ClusterConfig) -> None:
        before, after = _by_name(self.cluster), _by_name(cluster)
        self.cluster = cluster
        if list(before.values()) == list(after.values()):
            return
        added = [name for name, shard in after.items() if before.get(name) != shard]
        removed = [name for name, shard in before.items() if after.get(name) != shard]
        for change, names in ("added", added), ("removed", removed):
            for _ in names:
                self._count(change)
        self._removed = [shard for name, shard in before.items() if name not in after]
        what = [f"added {', '.join(added)}"] * bool(added) + [f"removed {', '.join(removed)}"] * bool(removed)
        self.last_change, self._changed_at = "; ".join(what) or "another order", self._clock()
        _log.info("the cluster's shards have changed: %s", self.last_change)
        for call in self.on_change:
            call(cluster)

    def _refuse(self, source: str, reason: str) -> None:
        """Logs, once, why a source changes nothing."""
        if self.problems.get(source) != reason:
            _log.error("the shards from %s stay as they are: %s", source, reason)
            self._count("refused")
        self.problems[source] = reason


def check_addresses(cluster: ClusterConfig) -> None:
    """Raises InvalidRequest for an address that others can't connect to."""
    for shard in cluster.shards:
        host, _, port = shard.address.removeprefix(DNS_SCHEME).rpartition(":")
        if not host or not port.isdecimal() or not int(port):
            limit = "it needs a host and a port; only `stitch up` chooses free ones"
            raise InvalidRequest(f"shards.{shard.name}.address", shard.address, limit)


def _check_rest(present: ClusterConfig, read: ClusterConfig) -> None:
    """Raises InvalidRequest where more has changed than the replicas of the stages."""
    for section in ClusterConfig.model_fields:
        if section not in ("shards", "found") and getattr(read, section) != getattr(present, section):
            raise InvalidRequest("cluster", section, "only shards may change while programs run: restart them")
    for route in read.routes:
        stages = read.stage_layers(route)
        if stages != present.stage_layers(route):
            limit = f"while programs run, route {route.name} has {present.stage_layers(route)}: restart them"
            raise InvalidRequest("shards.layers", stages, limit)


def _by_name(cluster: ClusterConfig) -> dict[str, ShardConfig]:
    return {shard.name: shard for shard in cluster.members}


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Changes with the file's content; None where it does not exist."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
