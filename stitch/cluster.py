"""The configuration of a cluster: two models, their routes, their shards, the gateway, and how shards compute.

One file describes the whole cluster, and every program is started with it. People write TOML; `stitch up` writes JSON
after it has chosen every port. A `ClusterConfig` is valid as a whole: its shards cover every route.
"""

from __future__ import annotations

import json
import re
import tomllib
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from stitch.channels import MAX_BATCH_REQUESTS, MAX_REQUEST_BYTES
from stitch.errors import InvalidRequest
from stitch.settings import Settings
from stitch.tls import TlsFiles

Quantization = Literal["none", "int8", "int4"]
Role = Literal["bottom", "top"]
ROLES: tuple[Role, Role] = ("bottom", "top")
# Layers [first, end) of one model: what all replicas of a stage hold.
Stage = tuple[Role, tuple[int, int]]
SHARD_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
# Precedes the name of a host: every address of the host is a replica of the shard.
DNS_SCHEME = "dns:"
# A replica's name has the entry's name and up to 39 characters of an address.
MAX_DNS_ENTRY_NAME = 23


class ModelConfig(Settings):
    """A model and its source: a hub id, a folder, a GGUF file, or a GGUF file inside a PyPI package."""

    id: str
    source: str
    # What the source must be when it is imported: SHA-256 of a GGUF file in hex, or the commit of a hub id.
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")

    @property
    def pinned_source(self) -> str:
        """The source as `stitch-server import` takes it."""
        return self.pinned(self.source)

    def pinned(self, source: str) -> str:
        """A form of the source together with what it must be."""
        return f"{source}{f'#sha256={self.sha256}' if self.sha256 else ''}{f'@{self.commit}' if self.commit else ''}"


class PairConfig(Settings):
    bottom: ModelConfig
    top: ModelConfig


class FfnSkipConfig(Settings):
    """Gates by which generated tokens leave out a share of a model's feed-forward networks."""

    # A safetensors file, relative to the cluster file.
    file: str
    # One that the file is calibrated to.
    share: float = Field(gt=0, lt=1)


class RouteConfig(Settings):
    """Layers [0, bottom_layers) of the bottom model, a stitch, layers [top_from, …) of the top model.

    Or one of the two models alone, with its own embedding and head: the bottom without `top_from`, the top where
    `bottom_layers` is 0.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")
    bottom_layers: int = Field(ge=0)
    # None: the route ends with the bottom's last layer and head.
    top_from: int | None = Field(default=None, ge=0)
    # A safetensors file, relative to the cluster file. None: one model, whole, or cut at one layer into bottom and top.
    stitch: str | None = None
    # None: every token passes every layer whole.
    ffn_skip: FfnSkipConfig | None = None

    @property
    def joins_models(self) -> bool:
        """Whether it has layers of both, the bottom and the top."""
        return self.bottom_layers > 0 and self.top_from is not None

    @model_validator(mode="after")
    def _is_possible(self) -> RouteConfig:
        if self.name == "auto":
            raise ValueError("`auto` lets the router decide and can't name a route")
        if self.bottom_layers == 0 and self.top_from != 0:
            raise ValueError(f"route {self.name} has no bottom layer, so it has all of the top's: top_from must be 0")
        if self.stitch is not None and not self.joins_models:
            raise ValueError(f"route {self.name} is one model alone, so it has no stitch")
        if self.joins_models and self.stitch is None and self.bottom_layers != self.top_from:
            raise ValueError(f"route {self.name} leaves out or repeats layers, so it needs a stitch")
        if self.ffn_skip is not None and self.stitch is not None:
            raise ValueError(f"route {self.name} has a stitch, and gates of FFNs are trained for a whole model")
        return self


class ShardConfig(Settings):
    """A process that computes layers [first, end) of one model, and its address."""

    name: str = Field(pattern=rf"^{SHARD_NAME.pattern}$")
    role: Role
    layers: tuple[int, int] = Field(strict=False)
    # host:port for other shards and the gateway. Port 0 is for `stitch up` alone, which chooses one. `dns:host:port`:
    # every address that DNS has for the host is a replica of this shard.
    address: str
    metrics_port: int = Field(default=0, ge=0, le=65535)
    # Beyond loopback, metrics are served over HTTPS, to programs and monitors with a certificate of the cluster.
    metrics_host: str = "127.0.0.1"

    @property
    def certified_name(self) -> str:
        """The name in its certificate."""
        return self.name

    @property
    def stage(self) -> Stage:
        """What its replicas hold, too."""
        return self.role, self.layers

    @property
    def dns_host(self) -> str | None:
        """The host whose addresses are its replicas; None: it is one process at its address."""
        return self.address[len(DNS_SCHEME) :].rpartition(":")[0] if self.address.startswith(DNS_SCHEME) else None

    def at(self, address: str) -> FoundShard:
        """The replica at an IP address that DNS has for this shard."""
        name = f"{self.name}-{address.replace('.', '-').replace(':', '-')}"
        host, port = f"[{address}]" if ":" in address else address, self.address.rpartition(":")[2]
        found = {**self.model_dump(), "name": name, "address": f"{host}:{port}", "entry": self.name}
        return FoundShard.model_validate(found)

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> ShardConfig:
        first, end = self.layers
        if not 0 <= first < end:
            raise ValueError(f"layers {first} to {end} are an empty range")
        if self.dns_host is not None and len(self.name) > MAX_DNS_ENTRY_NAME:
            limit = f"such a name has at most {MAX_DNS_ENTRY_NAME} characters"
            raise ValueError(f"{self.name} has replicas by DNS with longer names: {limit}")
        return self


class FoundShard(ShardConfig):
    """One of the replicas that DNS has for an entry of the cluster file."""

    # The entry's name, which all of its replicas have in their certificates.
    entry: str

    @property
    def certified_name(self) -> str:
        """The name in its certificate."""
        return self.entry


class GatewayLimits(Settings):
    """What the gateway's port takes in, counted before it is parsed; what goes beyond is refused at once.

    Calls are those of `stitch.v1.Inference`: health checks have no limit of their own.
    """

    # Of one call's request; clients send larger batches in several calls.
    request_bytes: int = Field(default=MAX_REQUEST_BYTES, ge=1024)
    # Of the requests of all calls that run.
    in_flight_bytes: int = Field(default=64 << 20, ge=1024)
    connections: int = Field(default=1_000, ge=1)
    calls: int = Field(default=2_048, ge=1)
    # Further ones of that connection wait on the client's side.
    calls_per_connection: int = Field(default=512, ge=1)
    # Calls whose request has not arrived; beyond these the oldest ones are ended.
    receiving_calls: int = Field(default=32, ge=1)
    # A request must have arrived by then.
    receive_seconds: float = Field(default=20.0, gt=0)
    batch_requests: int = Field(default=MAX_BATCH_REQUESTS, ge=1)
    # Texts that would wait longer for a thread that tokenizes them are refused.
    text_wait_seconds: float = Field(default=5.0, gt=0)


class GatewayConfig(Settings):
    # host:port for clients that speak gRPC.
    address: str
    # host:port for clients of OpenAI's API over HTTP; None: there is no such port.
    http: str | None = None
    metrics_port: int = Field(default=0, ge=0, le=65535)
    # As for a shard.
    metrics_host: str = "127.0.0.1"
    # The route where the router fails or can't decide; None: the most expensive one.
    fallback_route: str | None = None
    # A learned router and the thresholds of its calibration, which are reloaded when the file changes; relative to the
    # cluster file. Without a router the heuristic one decides.
    router: str | None = None
    router_thresholds: str | None = None
    # In place of a router: a probe, by which the first shards decide from hidden states at the earliest cut, and the
    # thresholds of its calibration; relative to the cluster file, too.
    probe: str | None = None
    probe_thresholds: str | None = None
    # For the heuristic router: one threshold between each two neighbouring routes; a score of at least the threshold
    # takes the costlier of the two.
    thresholds: tuple[float, ...] | None = Field(default=None, strict=False)
    # The tenants with the hashes of their keys, reloaded when the file changes; relative to the cluster file. None: one
    # tenant, and no call needs a key.
    keys: str | None = None
    # A request whose client sets no deadline expires after this.
    default_deadline_seconds: float = Field(default=600.0, gt=0, strict=False)
    # A request that would wait longer for shards is refused, whatever its deadline.
    max_queue_seconds: float = Field(default=300.0, gt=0, strict=False)
    # While requests wait for shards, the router's thresholds rise, so that more of them take cheaper routes.
    cheaper_under_load: bool = True
    limits: GatewayLimits = GatewayLimits()


class ComputeConfig(Settings):
    """How shards compute; all shards share it, so that an answer doesn't depend on the replica."""

    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # The format of the weights of layers and head: `dtype`, or fewer bits, which are faster and less exact. With int4
    # the head is int8.
    quantization: Quantization = "none"
    # On a CPU: Numba kernels compute whole decoder layers instead of oneDNN; attention always uses them. Bfloat16
    # weights, and int8 weights without AMX, then take twice the memory.
    kernels: bool = True
    wire_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    # The tokens that each shard's KV cache holds; 0: as many as fit into the memory that is free at start.
    kv_tokens: int = Field(default=0, ge=0)
    # Tokens per KV block; 0: 16, or 256 on a GPU with the flash-attention kernel. All shards of a chain need blocks of
    # one size, so a chain of a GPU and a CPU has to set 256.
    kv_block_tokens: int = Field(default=0, ge=0, le=4096)
    # Bytes of hidden states that each bottom shard keeps at the cuts of routes, so that a conversation which moves to
    # another route computes only the layers that it has not passed; 0: none.
    state_cache_bytes: int = Field(default=256 << 20, ge=0)
    # On a GPU with the flash-attention kernel: decode steps replay a captured CUDA graph.
    captured_decode: bool = True
    # CPU threads of one shard; 0: as many as CPUs that it may use, by affinity and the quota of its container.
    threads: int = Field(default=0, ge=0)
    # CPU threads while another shard of this machine computes at the same time; 0: `threads`.
    threads_while_pipelined: int = Field(default=0, ge=0)


class BatchingConfig(Settings):
    """How a shard batches sessions: what the scheduler of a first shard takes."""

    # Prompt tokens in one pass of the first shard; fewer while sessions decode, see `prefill_budget_while_decoding`.
    max_num_batched_tokens: int = Field(default=256, ge=1)
    # Tokens of one prompt in one pass: longer prompts are computed in chunks.
    max_prefill_chunk: int = Field(default=128, ge=1)
    # While sessions decode, whose next token they delay, the prompt tokens of one pass for each prompt that waits and
    # for each two sessions that decode; fewer for prompts with a long context.
    prefill_budget_while_decoding: int = Field(default=28, ge=1)
    # Into how many micro-batches the decoding sessions are split. With two or more, neighbouring shards compute at the
    # same time; with one, they compute in turn. 0: one where the shards share the cores of a machine, two elsewhere.
    num_micro_batches: int = Field(default=0, ge=0)
    # Sessions that wait for KV blocks; further ones are refused.
    max_waiting_sessions: int = Field(default=256, ge=1)
    # Tokens of several waiting steps that a next shard merges into one pass.
    max_merged_tokens: int = Field(default=512, ge=16)


class ClusterConfig(Settings):
    # Also the name of the folder in which `stitch up` writes the cluster's files.
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    models: PairConfig
    routes: tuple[RouteConfig, ...] = Field(min_length=1, strict=False)
    shards: tuple[ShardConfig, ...] = Field(min_length=1, strict=False)
    gateway: GatewayConfig
    compute: ComputeConfig = ComputeConfig()
    batching: BatchingConfig = BatchingConfig()
    # None: connections are not encrypted.
    tls: TlsFiles | None = None
    # Whether every process sends traces of requests over OTLP, as the `OTEL_*` variables say.
    traces: bool = False
    # The folder of relative paths, and the file; set by `load_cluster`.
    folder: Path = Field(default=Path("."), strict=False)
    file: Path | None = Field(default=None, exclude=True)
    # The replicas that DNS has for names of hosts; set by `stitch.membership`.
    found: tuple[FoundShard, ...] = Field(default=(), exclude=True)

    @model_validator(mode="after")
    def _sections_fit(self) -> ClusterConfig:
        for section in ("routes", "shards"):
            names = [item.name for item in getattr(self, section)]
            if len(set(names)) < len(names):
                raise ValueError(f"two {section} have one name: {', '.join(names)}")
        for role in ROLES:
            self._check_disjoint(role)
        for route in self.routes:
            self._check_layers(route)
        if self.gateway.fallback_route not in (None, *(route.name for route in self.routes)):
            raise ValueError(f"gateway.fallback_route names no route: {self.gateway.fallback_route}")
        self._check_probe()
        return self

    def _check_disjoint(self, role: Role) -> None:
        for (first, end), (start, stop) in pairwise(self._ranges(role)):
            if start < end:
                ranges = f"{first} to {end} and {start} to {stop}"
                raise ValueError(
                    f"{role} shards hold layers {ranges}: two ranges must be equal, of replicas, or disjoint"
                )

    def _ranges(self, role: Role) -> list[tuple[int, int]]:
        """The distinct layer ranges that shards of a model hold, in order."""
        return sorted({shard.layers for shard in self.shards if shard.role == role})

    def _check_probe(self) -> None:
        """Raises ValueError where a first shard doesn't compute the hidden states that the probe reads."""
        gateway, cut = self.gateway, self.earliest_cut
        if gateway.probe is None:
            if gateway.probe_thresholds is not None:
                raise ValueError("gateway.probe_thresholds needs gateway.probe")
            return
        if gateway.router is not None:
            raise ValueError("gateway.router and gateway.probe exclude each other: one of them decides")
        for route in self.routes:
            if not route.bottom_layers:
                limit = f"which has none of the bottom's layers that gateway.probe reads after layer {cut}"
                raise ValueError(f"a first shard of the bottom can't choose route {route.name}, {limit}")
        for shard in self.shards:
            if (shard.role, shard.layers[0]) == ("bottom", 0) and shard.layers[1] < cut:
                held = shard.layers[1]
                raise ValueError(f"gateway.probe reads after layer {cut}, but shard {shard.name} ends at {held}")

    def _check_layers(self, route: RouteConfig) -> None:
        """Raises ValueError where no shard holds a layer of the route; how many the top has, only its shards know."""
        self._check_covered("bottom", 0, route.bottom_layers, route)
        held = {role: max((end for _, end in self._ranges(role)), default=0) for role in ROLES}
        if route.top_from is None:
            if route.bottom_layers != held["bottom"]:
                last = f"but bottom shards hold {held['bottom']}"
                raise ValueError(f"route {route.name} has no top and {route.bottom_layers} bottom layers, {last}")
        else:
            self._check_covered("top", route.top_from, max(held["top"], route.top_from + 1), route)

    def _check_covered(self, role: Role, first: int, end: int, route: RouteConfig) -> None:
        reached = first
        for start, stop in self._ranges(role):
            if start <= reached < stop:
                reached = stop
        if reached < end:
            raise ValueError(f"route {route.name} passes {role} layer {reached}, which no shard holds")

    def route(self, name: str) -> RouteConfig:
        """The route with that name; raises InvalidRequest where there is none."""
        for route in self.routes:
            if route.name == name:
                return route
        known = ", ".join(route.name for route in self.routes)
        raise InvalidRequest("route", name, f"this cluster has: {known}, auto")

    @property
    def members(self) -> tuple[ShardConfig, ...]:
        """The shards that are processes: those of the file with the replicas of a host's name in its place."""
        return *(shard for shard in self.shards if shard.dns_host is None), *self.found

    def shard(self, name: str) -> ShardConfig:
        """The entry of the file with that name; raises InvalidRequest where there is none."""
        for shard in self.shards:
            if shard.name == name:
                return shard
        raise InvalidRequest("shard", name, f"the cluster file has: {', '.join(shard.name for shard in self.shards)}")

    def model_source(self, role: Role) -> str:
        """The source of that model; a path is relative to the cluster file."""
        model = self.models.bottom if role == "bottom" else self.models.top
        path = self.folder / model.source
        return model.pinned(str(path) if path.exists() else model.source)

    def stitch_file(self, route: RouteConfig) -> Path | None:
        """The path of the route's stitch; None where it has none."""
        return None if route.stitch is None else self.folder / route.stitch

    def ffn_skip_file(self, route: RouteConfig) -> Path | None:
        """The path of the gates by which the route leaves out feed-forward networks; None where it has none."""
        return None if route.ffn_skip is None else self.folder / route.ffn_skip.file

    @property
    def gateway_endpoint(self) -> tuple[str, Path | None]:
        """What a client of this cluster takes: the gateway's address and the authority's file; None: no TLS."""
        return self.gateway.address, None if self.tls is None else self.tls.trusted_by_clients(self.folder)

    @property
    def openai_url(self) -> str | None:
        """The base URL for clients of OpenAI's API; None where the gateway serves no HTTP."""
        scheme = "http" if self.tls is None else "https"
        return None if self.gateway.http is None else f"{scheme}://{self.gateway.http}/v1"

    @property
    def keys_file(self) -> Path | None:
        """The path of the tenants' file; None: one tenant, without a key."""
        return None if self.gateway.keys is None else self.folder / self.gateway.keys

    @property
    def earliest_cut(self) -> int:
        """The number of bottom layers that all routes with any share; 0 where none has any."""
        return min((route.bottom_layers for route in self.routes if route.bottom_layers), default=0)

    @property
    def probe_file(self) -> Path | None:
        """The path of the probe; None where no shard decides."""
        return None if self.gateway.probe is None else self.folder / self.gateway.probe

    @property
    def probe_thresholds_file(self) -> Path | None:
        """The path of the probe's thresholds; None where those in the probe's file apply."""
        named = self.gateway.probe_thresholds
        return None if named is None else self.folder / named

    def stages(self, route: RouteConfig) -> list[list[ShardConfig]]:
        """The chain of a route: for every stage, in order, the replicas that compute it."""
        return [[shard for shard in self.members if shard.stage == stage] for stage in self.stage_layers(route)]

    def stage_layers(self, route: RouteConfig) -> list[Stage]:
        """The layers of every stage of a route, in order."""
        return [(role, layers) for role in ROLES for layers in self._ranges(role) if _is_stage(role, layers, route)]

    def passing(self, stage: Stage) -> frozenset[str]:
        """The names of the routes that pass a stage."""
        return frozenset(route.name for route in self.routes if stage in self.stage_layers(route))

    def beginning_on(self, stage: Stage) -> frozenset[str]:
        """The names of the routes whose first stage it is."""
        return frozenset(route.name for route in self.routes if self.stage_layers(route)[0] == stage)

    def ending_on(self, stage: Stage) -> frozenset[str]:
        """The names of the routes whose last stage it is."""
        return frozenset(route.name for route in self.routes if self.stage_layers(route)[-1] == stage)


def _is_stage(role: Role, layers: tuple[int, int], route: RouteConfig) -> bool:
    first, end = layers
    if role == "bottom":
        return first < route.bottom_layers
    return route.top_from is not None and end > route.top_from


def presets() -> list[str]:
    """The names of the cluster files in the package."""
    folder = resources.files("stitch") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_cluster(name_or_path: str) -> ClusterConfig:
    """Reads a cluster file, or a preset by its name.

    Raises InvalidRequest with the field's name where the file is invalid.
    """
    path = _cluster_path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        fields = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return ClusterConfig.model_validate({**fields, "folder": path.parent, "file": path, "found": ()})
    except (TypeError, ValueError) as error:
        raise _invalid(path, error) from error


def _invalid(path: Path, error: TypeError | ValueError) -> InvalidRequest:
    if not isinstance(error, ValidationError):
        return InvalidRequest("cluster", str(path), f"it can't be read: {error}")
    first = error.errors()[0]
    field = ".".join(str(step) for step in first["loc"]) or "cluster"
    return InvalidRequest(field, first["input"], f"{path.name}: {first['msg']}")


def _cluster_path(name_or_path: str) -> Path:
    if name_or_path in presets():
        return Path(str(resources.files("stitch") / "presets" / f"{name_or_path}.toml"))
    path = Path(name_or_path)
    if not path.is_file():
        raise InvalidRequest("cluster", name_or_path, f"it is no file and none of the presets: {', '.join(presets())}")
    return path
