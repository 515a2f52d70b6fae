"""One route in this process, whose passes are computed by kernels, by libraries, or by some of both.

`variants` takes a cluster and returns a `Variant` of its last route for each combination. All variants have the same
weights and the same KV cache, so they differ only in the code that computes a pass; `INT8` alone has other weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from stitch.cluster import ClusterConfig, Quantization
from stitch.sampling import Sampling
from stitch_server.attention import AttentionBackend, backend_for
from stitch_server.attention.sdpa import SdpaAttention
from stitch_server.build import LoadedStage, load_stage
from stitch_server.cpu import INT4_GROUP, INT4_MAX_STEPS, INT4_SHIFTS, INT4_WORDS, Matrix
from stitch_server.engine.types import Batch, LayerRange, Segment, Session, StepOutput
from stitch_server.kv_cache.block_pool import blocks_for
from stitch_server.kv_cache.store import KVStore
from stitch_server.model.compiled_linear import CompiledLinear
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.linear import Linear, TwoLayoutLinear
from stitch_server.model.llama import NativeLayer
from stitch_server.model.quantized import PlainInt4Linear
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import ParallelismTuner

# All layers in one call of the kernels, which is the default.
WHOLE_LAYERS = "whole layers"
# The same kernels, but a call for each matmul and each attention.
SINGLE_CALLS = "single calls"
# Attention by kernels and matmuls by libraries, which is `compute.kernels = false`.
ATTENTION_ALONE = "attention alone"
# Attention by PyTorch and matmuls by libraries.
LIBRARIES = "libraries"
# For int4 only: as `LIBRARIES`, but each pass makes float32 of all weights, as the project does without kernels.
DEQUANTIZED = "dequantized"
# For int4 only: int8 weights, all layers in one call of the kernels.
INT8 = "int8"

CPU = torch.device("cpu")
# The sessions that decode together, and for which the KV cache has room.
SESSIONS = 16
# Room for a prompt of 512 tokens and its answer.
SESSION_BLOCKS = blocks_for(544)
MATRICES = ("query_key_value", "attention_output", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Variant:
    """Both stages of a route, with a runner each."""

    route: str
    runners: Sequence[ModelRunner]
    layer_ranges: Sequence[LayerRange]

    def session(self, token_ids: Sequence[int], cached: int = 0) -> Session:
        """A session whose first `cached` tokens count as computed."""
        return Session(self.route, (), Sampling(), list(token_ids), len(token_ids), cached=cached)

    def decode(self, sessions: Sequence[Session], steps: int) -> None:
        """Samples `steps` tokens for each session, all sessions in one batch."""
        for _ in range(steps):
            self._step(sessions, 1, wants_token=True)

    def prefill(self, session: Session, chunk: int) -> None:
        """Computes a prompt in passes of `chunk` tokens, and samples its first token."""
        tokens = len(session.token_ids)
        while session.cached < tokens:
            length = min(chunk, tokens - session.cached)
            self._step([session], length, wants_token=session.cached + length == tokens)

    def _step(self, sessions: Sequence[Session], length: int, wants_token: bool) -> None:
        """Takes the next `length` tokens of every session through all layers, and samples a token if it is wanted."""
        output = StepOutput()
        for runner, layers in zip(self.runners, self.layer_ranges, strict=True):
            rows = [None] * len(sessions) if output.hidden is None else torch.split(output.hidden, length)
            segments = [
                Segment(session, layers, session.cached, length, wants_token, _blocks(index), hidden)
                for index, (session, hidden) in enumerate(zip(sessions, rows, strict=True))
            ]
            output = runner.run(Batch(tuple(segments)))
        for index, session in enumerate(sessions):
            session.cached += length
            session.token_ids.extend([output.tokens[index].id] if wants_token else [])


def variants(cluster: ClusterConfig) -> dict[str, Variant]:
    """The cluster's last route, in its dtype and quantization, by the names above."""
    cluster = _last_route(cluster)
    compiled, plain = _load(cluster, kernels=True), _load(cluster, kernels=False)
    stores = [_noise_store(cluster, stage.decoder) for stage in compiled]
    kernels: list[AttentionBackend] = [backend_for(store) for store in stores]
    sdpa: list[AttentionBackend] = [partial(SdpaAttention, store) for store in stores]
    found = {
        WHOLE_LAYERS: (compiled, kernels),
        SINGLE_CALLS: ([_in_single_calls(stage) for stage in compiled], kernels),
    }
    if cluster.compute.quantization == "int4":
        found[DEQUANTIZED] = (plain, sdpa)
        found[INT8] = (_load(cluster, kernels=True, quantization="int8"), kernels)
        plain = [_with_linears(stage, _torch_int4) for stage in plain]
    found |= {ATTENTION_ALONE: (plain, kernels), LIBRARIES: (plain, sdpa)}
    return {name: _variant(cluster, stages, attention) for name, (stages, attention) in found.items()}


def _last_route(cluster: ClusterConfig) -> ClusterConfig:
    """The cluster with the layers of its last route of both models alone: variants keep several copies of them."""
    route = [one for one in cluster.routes if one.joins_models][-1]
    bottom, top = (next(shard for shard in cluster.shards if shard.role == role) for role in ("bottom", "top"))
    shards = (
        bottom.model_copy(update={"layers": (0, route.bottom_layers)}),
        top.model_copy(update={"layers": (route.top_from, top.layers[1])}),
    )
    return cluster.model_copy(update={"routes": (route,), "shards": shards})


def _load(cluster: ClusterConfig, kernels: bool, quantization: Quantization | None = None) -> list[LoadedStage]:
    compute = cluster.compute
    changed = {"kernels": kernels, "quantization": quantization or compute.quantization}
    changed_cluster = cluster.model_copy(update={"compute": compute.model_copy(update=changed)})
    return [load_stage(changed_cluster, shard, CPU) for shard in cluster.shards]


def _noise_store(cluster: ClusterConfig, decoder: DecoderLayers) -> KVStore:
    """A KV cache filled with noise, so that sessions can start after a context that was never computed."""
    dtype: torch.dtype = getattr(torch, cluster.compute.dtype)
    blocks = SESSIONS * SESSION_BLOCKS
    store = KVStore(decoder.first, decoder.end, blocks, decoder.kv_heads, decoder.head_dim, CPU, dtype)
    store.kv.normal_()
    return store


def _variant(cluster: ClusterConfig, stages: Sequence[LoadedStage], attention: Sequence[AttentionBackend]) -> Variant:
    route, cores = cluster.routes[0].name, len(os.sched_getaffinity(0))
    runners = [
        ModelRunner(
            decoder=stage.decoder,
            attention=backend,
            device=CPU,
            tuner=ParallelismTuner(cores, cores),
            embed=stage.embedding,
            stitches={name: stitch for name, stitch in stage.stitches.items() if stitch is not None},
            adapters=stage.adapters,
            head=stage.head,
            ending=stage.ending,
        )
        for stage, backend in zip(stages, attention, strict=True)
    ]
    return Variant(route, runners, [stage.layer_ranges[route] for stage in stages])


def _in_single_calls(stage: LoadedStage) -> LoadedStage:
    """The stage with its kernels for matmuls, but without the call for whole layers."""
    compiled = stage.decoder._compiled
    if compiled is None:
        raise ValueError("these layers are not packed for the CPU kernels")

    def by_kernels(index: int, name: str, linear: Linear) -> Linear:
        if isinstance(linear, CompiledLinear):
            return linear
        matrix = cast(Matrix, getattr(compiled.layers, name))
        few = CompiledLinear(Matrix(matrix.weight[index], matrix.scales[index], matrix.bias[index]))
        return TwoLayoutLinear(linear, few)

    return _with_linears(stage, by_kernels)


def _with_linears(stage: LoadedStage, convert: Callable[[int, str, Linear], Linear]) -> LoadedStage:
    """The stage layer by layer with other linear layers: `convert` takes a layer's index in the stage and a name."""
    layers = []
    for index, layer in enumerate(cast(Sequence[NativeLayer], stage.decoder._layers)):
        linears: dict[str, Any] = {name: convert(index, name, getattr(layer, name)) for name in MATRICES}
        layers.append(replace(layer, **linears))
    return replace(stage, decoder=replace(stage.decoder, _layers=layers, _compiled=None))


def _torch_int4(index: int, name: str, linear: Linear) -> Linear:
    return TorchInt4Linear.of(cast(PlainInt4Linear, linear))


@dataclass(frozen=True, slots=True)
class TorchInt4Linear:
    """A linear layer by PyTorch's int4 operator, which is fast for inputs in bfloat16 only."""

    packed: Tensor
    # [groups, outputs, 2]: a group's step, and the weight that eight steps stand for.
    scales: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, plain: PlainInt4Linear) -> TorchInt4Linear:
        """Packs the same weights in the operator's layout."""
        groups = plain.words.view(torch.int32).view(len(plain.words), -1, INT4_WORDS)
        steps = (groups[..., :-1].unsqueeze(-1) >> torch.tensor(INT4_SHIFTS) & INT4_MAX_STEPS).flatten(1)
        step, least = groups[..., -1:].contiguous().view(torch.float16).float().unbind(-1)
        middle = least + (INT4_MAX_STEPS + 1) / 2 * step
        scales = torch.stack([step, middle], -1).transpose(0, 1).bfloat16().contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.int().contiguous(), 1)
        return cls(packed, scales, plain.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, inputs]` to `[tokens, outputs]`; the inputs fill whole groups."""
        inputs = x.bfloat16().contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, self.packed, INT4_GROUP, self.scales)
        result: Tensor = product.to(x.dtype)
        return result if self.bias is None else result.add_(self.bias)


def _blocks(index: int) -> range:
    """The KV blocks of the session with this index in its batch."""
    return range(index * SESSION_BLOCKS, (index + 1) * SESSION_BLOCKS)
