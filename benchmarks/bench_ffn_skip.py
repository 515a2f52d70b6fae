"""What does a decode step cost with FFNs left out? CPU time beside the whole model and beside layers left out.

One process over all layers of SmolLM2 with its head, in float32, on one thread; all forms alternate. It samples CPU
time, which other processes hardly lengthen. The gates read every token and always say the same, since the time of a
step depends on how many FFNs are left out, not on which: 3, 6 or 9 of 30. Beside them are 2, 4 and 7 layers left out,
which read about as many parameters, and gates that leave out nothing.
"""

from __future__ import annotations

import time

import torch

from benchmarks.clusters import preset, run
from benchmarks.report import Options, options, ratio, write
from stitch.environment import cache_folder
from stitch.sampling import Sampling
from stitch_server.attention import backend_for
from stitch_server.engine.types import Batch, LayerRange, Segment, Session, in_layer_order
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import KVStore
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.description import ModelDescription
from stitch_server.model.embedding_and_head import Embedding, Head
from stitch_server.model.ffn_skip import FIRST_GATED, SPARED_LAST, FfnSkip
from stitch_server.model.weights import WeightFormat
from stitch_server.sources.resolve import resolve
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import ParallelismTuner

WHOLE = "whole"
SKIPPED_FFNS, LEFT_OUT_LAYERS = (0, 3, 6, 9), (2, 4, 7)
RANK = 16
SESSIONS = (1, 8)
CPU = torch.device("cpu")


class WholeModel:
    """One runner over all layers, with a route for each form of a step."""

    def __init__(self) -> None:
        cluster = preset()
        folder = resolve(cluster.model_source("bottom"), cache_folder())
        model, weight_format = ModelDescription.read(folder, "smollm2"), WeightFormat.of(cluster.compute)
        decoder = DecoderLayers.load(folder, 0, model.layers, CPU, torch.float32, weight_format)
        store = KVStore(0, model.layers, max(SESSIONS), decoder.kv_heads, decoder.head_dim, CPU, torch.float32)
        self.layers = {WHOLE: model.layers}
        self.layers |= {f"{count} FFNs left out": model.layers for count in SKIPPED_FFNS}
        self.layers |= {f"{count} layers left out": model.layers - count for count in LEFT_OUT_LAYERS}
        self._runner = ModelRunner(
            decoder=decoder,
            attention=backend_for(store),
            device=CPU,
            tuner=ParallelismTuner(1, 1),
            embed=Embedding.load(folder, CPU, torch.float32),
            ffn_skips={f"{count} FFNs left out": _gates(model, count) for count in SKIPPED_FFNS},
            head=Head.load(folder, CPU, torch.float32, model.vocabulary_size, weight_format),
            ending=frozenset(self.layers),
        )

    def step_ms(self, form: str, sessions: int) -> float:
        """CPU milliseconds of one decode step of sessions with a context of some tokens."""
        layers = LayerRange(0, self.layers[form])
        segments = []
        for number in range(sessions):
            session = Session(form, (), Sampling(), list(range(100, 100 + BLOCK_TOKENS)), BLOCK_TOKENS - 1)
            segments.append(Segment(session, layers, BLOCK_TOKENS - 1, 1, True, (number,)))
        started = time.process_time()
        self._runner.run(Batch(in_layer_order(segments)))
        return (time.process_time() - started) * 1e3


def _gates(model: ModelDescription, count: int) -> FfnSkip:
    """Gates of which `count`, spread over the layers, are always open and the others never."""
    layers, width = model.layers - FIRST_GATED - SPARED_LAST, model.hidden_size
    bias = torch.full((layers,), -1.0)
    bias[[number * layers // count for number in range(count)]] = 1.0
    healing = Adapters(FIRST_GATED, torch.zeros(layers, RANK, width), torch.zeros(layers, width, RANK))
    return FfnSkip(torch.zeros(layers, width), bias, healing, tuple((bias > 0).float().tolist()), "")


async def measure(options: Options) -> None:
    """Samples every form at every number of sessions; ratios are those to the whole model."""
    rounds = 3 if options.tiny else 40
    model = WholeModel()
    samples: dict[str, list[float]] = {}
    for index in range(rounds + 1):
        for sessions in SESSIONS:
            for form in model.layers:
                milliseconds = model.step_ms(form, sessions)
                if index:
                    samples.setdefault(f"{form}, {sessions} sessions, ms", []).append(milliseconds)
    ratios = {
        f"{form} / {WHOLE}, {sessions} sessions": ratio(
            samples[f"{form}, {sessions} sessions, ms"], samples[f"{WHOLE}, {sessions} sessions, ms"]
        )
        for sessions in SESSIONS
        for form in model.layers
        if form != WHOLE
    }
    write(options, samples, ratios)


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
