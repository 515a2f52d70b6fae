"""One pair in this process, computed by kernels, by libraries, or by some of both. Measures no time."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from stitch.cluster import Cluster, Quantization
from stitch.sampling import Sampling
from stitch_server.cache.store import KVStore
from stitch_server.engine.batch import Batch, Cut, Segment, StepOutput
from stitch_server.engine.runner import Runner
from stitch_server.engine.sequence import Sequence as Session
from stitch_server.engine.threads import Threads
from stitch_server.kernels.matmul.int4_layout import GROUP, MOST_STEPS, PLACES, WORDS
from stitch_server.kernels.matmul.matrix import Matrix
from stitch_server.model.compiled_linear import CompiledLinear
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.lean import LeanLayer
from stitch_server.model.linear import Linear, TwoLayoutLinear
from stitch_server.model.quantized import PlainInt4Linear
from stitch_server.part import Part, load_part

# All by kernels; the same, but each matrix and each attention is a call of its own; attention by kernels and matrices
# by libraries, which is `kernels = false`; all by libraries.
LAYERS, CALLS, ATTENTION, LIBRARIES = "whole layers", "single calls", "attention alone", "libraries"
# int4 as libraries are used today, which makes float32 of all weights in every pass; and int8, all by kernels.
WIDENED, INT8 = "widened", "int8"

CPU = torch.device("cpu")
# That decode together, and for whom there is room.
SESSIONS = 16
# Room for a prompt of 512 tokens and its answer.
SESSION_BLOCKS = 34
MATRICES = ("query_key_value", "attention_output", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Pair:
    """Both halves of a route, a runner each."""

    route: str
    runners: Sequence[Runner]
    cuts: Sequence[Cut]

    def session(self, token_ids: Sequence[int], cached: int = 0) -> Session:
        """One whose first tokens count as computed."""
        return Session(self.route, (), Sampling(), list(token_ids), len(token_ids), cached=cached)

    def decode(self, sessions: Sequence[Session], steps: int) -> None:
        """Each session gets so many tokens."""
        for _ in range(steps):
            self._step(sessions, 1, wants=True)

    def prefill(self, session: Session, chunk: int) -> None:
        """Computes a prompt, `chunk` tokens a pass, and its first token."""
        tokens = len(session.token_ids)
        while session.cached < tokens:
            length = min(chunk, tokens - session.cached)
            self._step([session], length, wants=session.cached + length == tokens)

    def _step(self, sessions: Sequence[Session], length: int, wants: bool) -> None:
        """Takes the next `length` tokens of every session through all layers; where it `wants`, each gets a token."""
        output = StepOutput()
        for runner, cut in zip(self.runners, self.cuts, strict=True):
            hidden_states = output.hidden
            rows = [None] * len(sessions) if hidden_states is None else torch.split(hidden_states, length)
            segments = [
                Segment(one, cut, one.cached, length, wants, _blocks(index), hidden)
                for index, (one, hidden) in enumerate(zip(sessions, rows, strict=True))
            ]
            output = runner.run(Batch(tuple(segments)))
        for index, one in enumerate(sessions):
            one.cached += length
            one.token_ids.extend([output.tokens[index].id] if wants else [])


def pairs(cluster: Cluster) -> dict[str, Pair]:
    """By the names above: the cluster's last route in its dtype and quantization."""
    cluster = _one_route(cluster)
    kernels, plain = _parts(cluster, kernels=True), _parts(cluster, kernels=False)
    stores = [_store(cluster, part.decoder) for part in kernels]
    gathering = [_without_kernels(store) for store in stores]
    found = {LAYERS: (kernels, stores), CALLS: ([_in_calls(part) for part in kernels], stores)}
    if cluster.compute.quantization == "int4":
        packed = [_converted(part, _int4_of_torch) for part in plain]
        others = {WIDENED: (plain, gathering), INT8: (_parts(cluster, kernels=True, quantization="int8"), stores)}
        found |= {ATTENTION: (packed, stores), LIBRARIES: (packed, gathering)} | others
    else:
        found |= {ATTENTION: (plain, stores), LIBRARIES: (plain, gathering)}
    return {name: _pair(cluster, *one) for name, one in found.items()}


def _one_route(cluster: Cluster) -> Cluster:
    """With the layers of its last route alone, so that it is in memory twice."""
    route = cluster.routes[-1]
    bottom, top = (next(shard for shard in cluster.shards if shard.role == role) for role in ("bottom", "top"))
    shards = (
        bottom.model_copy(update={"layers": (0, route.bottom_layers)}),
        top.model_copy(update={"layers": (route.top_from, top.layers[1])}),
    )
    return cluster.model_copy(update={"routes": (route,), "shards": shards})


def _parts(cluster: Cluster, kernels: bool, quantization: Quantization | None = None) -> list[Part]:
    compute = cluster.compute
    changed = {"kernels": kernels, "quantization": quantization or compute.quantization}
    changed_cluster = cluster.model_copy(update={"compute": compute.model_copy(update=changed)})
    return [load_part(changed_cluster, shard, CPU) for shard in cluster.shards]


def _store(cluster: Cluster, decoder: DecoderLayers) -> KVStore:
    """Filled with noise, so that sessions may begin after tokens that nobody has computed."""
    dtype: torch.dtype = getattr(torch, cluster.compute.dtype)
    blocks = SESSIONS * SESSION_BLOCKS
    store = KVStore(decoder.first, decoder.end, blocks, decoder.kv_heads, decoder.head_dim, CPU, dtype)
    store.kv.normal_()
    return store


def _without_kernels(store: KVStore) -> KVStore:
    """The same memory, which PyTorch attends over."""
    without = copy.copy(store)
    without._numbers = None
    return without


def _pair(cluster: Cluster, parts: Sequence[Part], stores: Sequence[KVStore]) -> Pair:
    route, cores = cluster.routes[0].name, len(os.sched_getaffinity(0))
    runners = [
        Runner(
            decoder=part.decoder,
            store=store,
            device=CPU,
            threads=Threads(cores, cores),
            embed=part.embedding,
            stitches={name: stitch for name, stitch in part.stitches.items() if stitch is not None},
            adapters=part.adapters,
            head=part.head,
        )
        for part, store in zip(parts, stores, strict=True)
    ]
    return Pair(route, runners, [part.cuts[route] for part in parts])


def _in_calls(part: Part) -> Part:
    """Its kernels for matrices without the one for whole layers."""
    whole = part.decoder._compiled
    if whole is None:
        raise ValueError("these layers are not kept for kernels")

    def by_kernels(place: int, name: str, kept: Linear) -> Linear:
        if isinstance(kept, CompiledLinear):
            return kept
        matrix = cast(Matrix, getattr(whole.layers, name))
        few = CompiledLinear(Matrix(matrix.weight[place], matrix.scales[place], matrix.bias[place]))
        return TwoLayoutLinear(kept, few)

    return _converted(part, by_kernels)


def _converted(part: Part, convert: Callable[[int, str, Linear], Linear]) -> Part:
    """With other linear layers, in calls of their own; `convert` is told a layer's place here and the name in it."""
    layers = []
    for place, layer in enumerate(cast(Sequence[LeanLayer], part.decoder._layers)):
        linears: dict[str, Any] = {name: convert(place, name, getattr(layer, name)) for name in MATRICES}
        layers.append(replace(layer, **linears))
    return replace(part, decoder=replace(part.decoder, _layers=layers, _compiled=None))


def _int4_of_torch(place: int, name: str, kept: Linear) -> Linear:
    return Int4OfTorch.of(cast(PlainInt4Linear, kept))


@dataclass(frozen=True, slots=True)
class Int4OfTorch:
    """int4 weights in the layout of PyTorch's operator for them, which is fast for rows of bfloat16 alone."""

    packed: Tensor
    # [groups, outputs, 2]: a step, and what stands for eight steps.
    scales: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, plain: PlainInt4Linear) -> Int4OfTorch:
        """The same weights."""
        groups = plain.words.view(torch.int32).view(len(plain.words), -1, WORDS)
        steps = (groups[..., :-1].unsqueeze(-1) >> torch.tensor(PLACES) & MOST_STEPS).flatten(1)
        step, least = groups[..., -1:].contiguous().view(torch.float16).float().unbind(-1)
        scales = torch.stack([step, least + (MOST_STEPS + 1) / 2 * step], -1).transpose(0, 1).bfloat16().contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.int().contiguous(), 1)
        return cls(packed, scales, plain.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, inputs]` to `[rows, outputs]`; inputs fill whole groups."""
        rows = x.bfloat16().contiguous()
        result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales).to(x.dtype)
        return result if self.bias is None else result.add_(self.bias)


def _blocks(index: int) -> range:
    return range(index * SESSION_BLOCKS, (index + 1) * SESSION_BLOCKS)
