"""A cluster as its operator writes it down: two models, their routes, their shards. Knows no process.

One file describes the whole; every program is started with it and told which part it plays. People write TOML,
`stitch up` writes JSON once it knows every port.
"""

from __future__ import annotations

import json
import tomllib
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from stitch.errors import InvalidRequest
from stitch.settings import Settings
from stitch.tls import TlsFiles

Quantization = Literal["none", "int8", "int4"]
Role = Literal["bottom", "top"]
ROLES: tuple[Role, Role] = ("bottom", "top")


class ModelConfig(Settings):
    """Where a model comes from: a hub id, a folder, a GGUF file, or a GGUF file inside a PyPI package."""

    id: str
    source: str


class PairConfig(Settings):
    bottom: ModelConfig
    top: ModelConfig


class RouteConfig(Settings):
    """Layers [0, bottom_layers) of the bottom model, a stitch, layers [top_from, …) of the top model."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")
    bottom_layers: int = Field(ge=1)
    top_from: int = Field(ge=0)
    # A safetensors file, relative to the cluster file. Absent: bottom and top are one model, cut at one place.
    stitch: str | None = None

    @model_validator(mode="after")
    def _name_is_free(self) -> RouteConfig:
        if self.name == "auto":
            raise ValueError("`auto` asks for the router's judgement and can't name a route")
        return self


class ShardConfig(Settings):
    """A process with layers [first, end) of one model, and where it is reached."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    role: Role
    layers: tuple[int, int] = Field(strict=False)
    # host:port for neighbours and the gateway; port 0 is for `stitch up` alone, which fills it in.
    address: str
    metrics_port: int = Field(default=0, ge=0, le=65535)

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> ShardConfig:
        first, end = self.layers
        if not 0 <= first < end:
            raise ValueError(f"layers {first} to {end} are no range")
        return self


class GatewayConfig(Settings):
    address: str
    metrics_port: int = Field(default=0, ge=0, le=65535)
    # Where the router fails or does not know, it takes this route; by default the most expensive one.
    fallback_route: str | None = None
    # A learned router, and the thresholds of its calibration, which are read again when they change; relative to the
    # cluster file. Without one, hand-set weights judge.
    router: str | None = None
    router_thresholds: str | None = None
    # Instead of a router: a probe, with which the first shards decide by hidden states at the earliest cut, and the
    # thresholds of its calibration; relative to the cluster file as well.
    probe: str | None = None
    probe_thresholds: str | None = None
    # For the hand-set weights: scores from here on take the next dearer route; one threshold between two neighbours.
    thresholds: tuple[float, ...] | None = Field(default=None, strict=False)


class ComputeConfig(Settings):
    """How shards compute; the same for all of them, so that every answer is the same wherever it is made."""

    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # How the weights of layers and head are kept: as `dtype`, or in fewer bits, which is faster and less exact. With
    # int4 the head is in bytes.
    quantization: Quantization = "none"
    # On a processor: whole decoder layers by kernels that are compiled for it, as attention always is, instead of by
    # oneDNN. Bfloat16 weights, and int8 without AMX, then take twice the memory.
    kernels: bool = True
    wire_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    # Tokens for which each shard keeps KV; 0: planned from the memory that is free at start.
    kv_tokens: int = Field(default=0, ge=0)
    # Tokens in one block of KV; 0: 16, or 256 on a GPU whose kernel for attention wants as many. Blocks of a chain are
    # alike, so one over a GPU and a processor has to say 256.
    kv_block_tokens: int = Field(default=0, ge=0, le=4096)
    # On a GPU whose kernel attends over blocks: steps of single tokens as one captured pass.
    captured_decode: bool = True
    # Tokens of several waiting steps that a shard computes in one pass.
    batch_tokens: int = Field(default=512, ge=16)
    # Tokens of one prompt in one pass of the first shard ...
    prefill_tokens: int = Field(default=128, ge=1)
    # ... which holds as many as so many prompts bring ...
    prompts_together: int = Field(default=2, ge=1)
    # ... and so many, while others decode, whose next token they delay, for each prompt that waits and each two that
    # decode; fewer behind many tokens.
    prefill_tokens_beside_decode: int = Field(default=28, ge=1)
    # Into how many groups the decoding sessions are split: two or more, so that neighbouring shards work at the same
    # time, or one, so that they take turns; 0: one where they share the cores of a machine, two elsewhere.
    groups: int = Field(default=0, ge=0)
    max_waiting_sessions: int = Field(default=256, ge=1)
    # Processor threads of one shard; 0: all cores.
    threads: int = Field(default=0, ge=0)
    # The same while a neighbour computes at the same time; 0: as many. For shards that share one machine.
    threads_while_pipelined: int = Field(default=0, ge=0)


class ClusterConfig(Settings):
    # Also the name of the folder where `stitch up` keeps the cluster's state.
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    models: PairConfig
    routes: tuple[RouteConfig, ...] = Field(min_length=1, strict=False)
    shards: tuple[ShardConfig, ...] = Field(min_length=2, strict=False)
    gateway: GatewayConfig
    compute: ComputeConfig = ComputeConfig()
    # Without it everything travels in the clear.
    tls: TlsFiles | None = None
    # The folder that relative paths start from; set by `load_cluster`.
    folder: Path = Field(default=Path("."), strict=False)

    @model_validator(mode="after")
    def _parts_fit(self) -> ClusterConfig:
        for part in ("routes", "shards"):
            names = [item.name for item in getattr(self, part)]
            if len(set(names)) < len(names):
                raise ValueError(f"two {part} have one name: {', '.join(names)}")
        for role in ROLES:
            self._check_apart(role)
        for route in self.routes:
            self._check_covered("bottom", 0, route.bottom_layers, route)
            if route.stitch is None and route.bottom_layers != route.top_from:
                raise ValueError(f"route {route.name} leaves out or repeats layers, so it needs a stitch")
        if self.gateway.fallback_route not in (None, *(route.name for route in self.routes)):
            raise ValueError(f"gateway.fallback_route names no route: {self.gateway.fallback_route}")
        self._check_probe()
        return self

    def _check_apart(self, role: Role) -> None:
        for (first, end), (start, stop) in pairwise(self._ranges(role)):
            if start < end:
                ranges = f"{first} to {end} and {start} to {stop}"
                raise ValueError(f"{role} shards hold layers {ranges}: ranges are equal, of replicas, or apart")

    def _ranges(self, role: Role) -> list[tuple[int, int]]:
        """The different ranges of layers that shards of a model hold, in order."""
        return sorted({shard.layers for shard in self.shards if shard.role == role})

    def _check_probe(self) -> None:
        """A first shard that decides must see the states that it decides by."""
        gateway, cut = self.gateway, self.earliest_cut
        if gateway.probe is None:
            if gateway.probe_thresholds is not None:
                raise ValueError("gateway.probe_thresholds needs gateway.probe")
            return
        if gateway.router is not None:
            raise ValueError("gateway.router and gateway.probe exclude each other: one of them judges")
        for shard in self.shards:
            if (shard.role, shard.layers[0]) == ("bottom", 0) and shard.layers[1] < cut:
                held = shard.layers[1]
                raise ValueError(f"gateway.probe reads behind layer {cut}, but shard {shard.name} ends at {held}")

    def _check_covered(self, role: Role, first: int, end: int, route: RouteConfig) -> None:
        reached = first
        for start, stop in self._ranges(role):
            if start <= reached < stop:
                reached = stop
        if reached < end:
            raise ValueError(f"route {route.name} passes {role} layer {reached}, which no shard holds")

    def route(self, name: str) -> RouteConfig:
        """The route of that name; InvalidRequest where there is none."""
        for route in self.routes:
            if route.name == name:
                return route
        known = ", ".join(route.name for route in self.routes)
        raise InvalidRequest("route", name, f"this cluster has: {known}, auto")

    def shard(self, name: str) -> ShardConfig:
        """The shard of that name; InvalidRequest where there is none."""
        for shard in self.shards:
            if shard.name == name:
                return shard
        raise InvalidRequest("shard", name, f"the cluster file has: {', '.join(shard.name for shard in self.shards)}")

    def model_source(self, role: Role) -> str:
        """Where that model comes from; paths start from the cluster file's folder, too."""
        source = (self.models.bottom if role == "bottom" else self.models.top).source
        path = self.folder / source
        return str(path) if path.exists() else source

    def stitch_file(self, route: RouteConfig) -> Path | None:
        """The route's stitch as a path, or None where it needs none."""
        return None if route.stitch is None else self.folder / route.stitch

    @property
    def gateway_endpoint(self) -> tuple[str, Path | None]:
        """What a client of this cluster takes: the gateway's address and the authority's file; None: no TLS."""
        return self.gateway.address, self.folder / self.tls.authority if self.tls else None

    @property
    def earliest_cut(self) -> int:
        """The bottom layers that all routes pass."""
        return min(route.bottom_layers for route in self.routes)

    @property
    def probe_file(self) -> Path | None:
        """The probe as a path, or None where no shard decides."""
        return None if self.gateway.probe is None else self.folder / self.gateway.probe

    @property
    def probe_thresholds_file(self) -> Path | None:
        """The probe's thresholds as a path, or None where its own are in force."""
        named = self.gateway.probe_thresholds
        return None if named is None else self.folder / named

    def stages(self, route: RouteConfig) -> list[list[ShardConfig]]:
        """The chain of a route: for every stage the replicas that can take it, in order."""
        ranges: list[tuple[Role, tuple[int, int]]] = []
        for role in ROLES:
            ranges += [(role, layers) for layers in self._ranges(role) if _takes_part(role, layers, route)]
        return [[shard for shard in self.shards if (shard.role, shard.layers) == stage] for stage in ranges]


def _takes_part(role: Role, layers: tuple[int, int], route: RouteConfig) -> bool:
    first, end = layers
    return first < route.bottom_layers if role == "bottom" else end > route.top_from


def presets() -> list[str]:
    """The names of the cluster files that come with the package."""
    folder = resources.files("stitch") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_cluster(name_or_path: str) -> ClusterConfig:
    """Reads a cluster file, or a preset by its name.

    Raises InvalidRequest, which names the field at fault, where it does not describe a cluster.
    """
    path = _cluster_path(name_or_path)
    try:
        fields = json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
        return ClusterConfig.model_validate({**fields, "folder": path.parent})
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
