"""The same stitched pair in one process, with the same layers, cache and sampler but no gRPC, as a baseline."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from benchmarks.clusters import Timed
from stitch.cluster import ClusterConfig
from stitch.sampling import Sampling
from stitch_server.attention import backend_for
from stitch_server.build import LoadedStage, load_stage
from stitch_server.engine.types import Batch, Segment, Session, StepOutput
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import KVStore
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import ParallelismTuner

MAX_TOKENS = 4096


class OneProcess:
    """All stages of a route, called one after the other."""

    def __init__(self, cluster: ClusterConfig, route: str = "strong", threads: int = 0) -> None:
        device = torch.device("cpu")
        cut = cluster.route(route)
        self._chunk = cluster.batching.max_prefill_chunk
        self._threads = threads or len(os.sched_getaffinity(0))
        self._stages = [load_stage(cluster, replicas[0], device) for replicas in cluster.stages(cut)]
        self._runners = [self._runner(stage, device) for stage in self._stages]
        self._route = cut.name

    def generate(self, token_ids: Sequence[int], tokens: int) -> Timed:
        """Generates exactly `tokens` tokens greedily; prefills the prompt in chunks of the cluster's size."""
        session = Session(self._route, (), Sampling(), list(token_ids), len(token_ids))
        timed = Timed([], [])
        started = time.perf_counter()
        while len(timed.token_ids) < tokens:
            length = min(self._chunk, len(session.token_ids) - session.cached)
            wants = session.cached + length == len(session.token_ids)
            token = self._step(session, length, wants)
            if token is not None:
                session.token_ids.append(token)
                timed.token_ids.append(token)
                timed.arrivals.append(time.perf_counter() - started)
        return timed

    def _step(self, session: Session, length: int, wants: bool) -> int | None:
        hidden, output = None, StepOutput()
        for stage, runner in zip(self._stages, self._runners, strict=True):
            blocks = range(MAX_TOKENS // BLOCK_TOKENS)
            cut = stage.layer_ranges[session.route]
            segment = Segment(session, cut, session.cached, length, wants, blocks, hidden)
            output = runner.run(Batch((segment,)))
            hidden = output.hidden
        session.cached += length
        return output.tokens[0].id if output.tokens else None

    def _runner(self, stage: LoadedStage, device: torch.device) -> ModelRunner:
        decoder = stage.decoder
        kv_heads, head_dim = decoder.kv_heads, decoder.head_dim
        blocks = MAX_TOKENS // BLOCK_TOKENS
        return ModelRunner(
            decoder=decoder,
            attention=backend_for(
                KVStore(decoder.first, decoder.end, blocks, kv_heads, head_dim, device, torch.float32)
            ),
            device=device,
            tuner=ParallelismTuner(self._threads, self._threads),
            embed=stage.embedding,
            ending=stage.ending,
            stitches={route: stitch for route, stitch in stage.stitches.items() if stitch is not None},
            adapters=stage.adapters,
            head=stage.head,
        )
