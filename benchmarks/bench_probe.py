"""What does the probe add to prefill? The first shard's passes over one prompt, with the probe and with a named route.

One process with one segment per pass; both forms take the same route and alternate in changing order. It samples CPU
time, which other processes hardly lengthen. The probe has random weights, on which its time doesn't depend.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from benchmarks.clusters import preset, prompt, run
from benchmarks.report import Options, options, write
from stitch.cluster import ClusterConfig
from stitch.sampling import Sampling
from stitch.thresholds import FixedThresholds
from stitch_server.attention import backend_for
from stitch_server.build import LoadedStage, load_stage
from stitch_server.engine.types import Batch, LayerRange, Segment, Session
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import KVStore
from stitch_server.model.probe import PERCENTILES, Probe, ProbeBinding, feature_count
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import ParallelismTuner
from stitch_server.worker.route_probe import RouteProbe

ROUTES = ("weak", "strong")
WINDOW = 128
LENGTHS = (128, 256)
CPU = torch.device("cpu")


class Bottom:
    """The first shard's runner, and a probe per route that always takes that route."""

    def __init__(self, cluster: ClusterConfig) -> None:
        loaded = load_stage(cluster, cluster.shards[0], CPU)
        decoder, blocks = loaded.decoder, max(LENGTHS) // BLOCK_TOKENS
        self._chunk = cluster.batching.max_prefill_chunk
        self._cuts = loaded.layer_ranges
        self._earliest = LayerRange(0, cluster.earliest_cut)
        self._blocks = range(blocks)
        self._probes = {route: probe_for(route, loaded, cluster.earliest_cut) for route in ROUTES}
        self._runner = ModelRunner(
            decoder=decoder,
            attention=backend_for(
                KVStore(decoder.first, decoder.end, blocks, decoder.kv_heads, decoder.head_dim, CPU, torch.float32)
            ),
            device=CPU,
            tuner=ParallelismTuner(1, 1),
            embed=loaded.embedding,
            layer_ranges=loaded.layer_ranges,
        )

    def prefill_ms(self, token_ids: list[int], route: str, probed: bool) -> float:
        """CPU milliseconds of all chunks of a prompt; with `probed` the first chunk decides the route."""
        self._runner.probe = self._probes[route]
        sequence = Session(route, (), Sampling(), token_ids, len(token_ids))
        started = time.process_time()
        for position in range(0, len(token_ids), self._chunk):
            length = min(self._chunk, len(token_ids) - position)
            undecided = probed and position == 0
            cut = self._earliest if undecided else self._cuts[route]
            candidates = tuple(self._cuts) if undecided else ()
            segment = Segment(sequence, cut, position, length, False, self._blocks, candidates=candidates)
            output = self._runner.run(Batch((segment,)))
            if undecided and output.decisions[0].route != route:
                raise RuntimeError(f"the probe took {output.decisions[0].route} and not {route}")
        return (time.process_time() - started) * 1e3


def probe_for(route: str, loaded: LoadedStage, layer: int) -> RouteProbe:
    """A probe with random weights, and a threshold that its gain always or never exceeds."""
    drawn = torch.Generator().manual_seed(0)
    probe = Probe(
        weight=torch.randn(1, feature_count(loaded.model.hidden_size), generator=drawn),
        bias=torch.zeros(1),
        binding=ProbeBinding.of(loaded.model, layer, WINDOW, ROUTES, loaded.tokenizer),
        thresholds=(0.0,),
        percentiles=tuple(step / (PERCENTILES - 1) for step in range(PERCENTILES)),
    )
    return RouteProbe(probe, FixedThresholds((-1e9 if route == "strong" else 1e9,)))


async def measure(options: Options) -> None:
    """Samples every length on every route, with and without the probe; a ratio is the median over pairs."""
    rounds = 3 if options.tiny else 16
    bottom = Bottom(preset())
    samples: dict[str, list[float]] = {}
    for index in range(rounds + 1):
        for length in LENGTHS:
            for route in ROUTES:
                for probed in (index % 2 == 0, index % 2 == 1):
                    prefill_ms = bottom.prefill_ms(prompt(length, index), route, probed)
                    if index:
                        samples.setdefault(named(length, route, probed), []).append(prefill_ms)
    write(options, samples, {name: value for length in LENGTHS for name, value in added(samples, length).items()})


def named(length: int, route: str, probed: bool) -> str:
    return f"{length} tokens, {route} {'probed' if probed else 'named'}, ms"


def added(samples: dict[str, list[float]], length: int) -> dict[str, float]:
    """By route: probed ÷ named of consecutive runs, since the machine's speed drifts by more than the probe adds."""
    return {
        f"{length} tokens, {route}: probed / named": median(
            with_probe / by_name
            for with_probe, by_name in zip(
                samples[named(length, route, True)], samples[named(length, route, False)], strict=True
            )
        )
        for route in ROUTES
    }


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
