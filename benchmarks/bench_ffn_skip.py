"""What does a decode step cost with FFNs left out? CPU time beside the whole model and beside layers left out.

One process over all layers of a preset's bottom with its head, in float32, on one thread; all forms alternate. It
samples CPU time, which other processes hardly lengthen. The gates read every token and always say the same, since the
time of a step depends on how many FFNs are left out, not on which: none, or about 10, 20 and 30 %. Beside them are as
many layers left out as have about as many parameters.
"""

from __future__ import annotations

import time

import torch

from benchmarks.clusters import preset
from benchmarks.report import Options, flags, ratio, write
from stitch.environment import cache_folder
from stitch.sampling import Sampling
from stitch_server.attention import backend_for
from stitch_server.engine.types import Batch, LayerRange, Segment, Session, in_layer_order
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import KVStore
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.description import ModelDescription, ParameterCount
from stitch_server.model.embedding_and_head import Embedding, Head
from stitch_server.model.ffn_skip import FIRST_GATED, SPARED_LAST, FfnSkip
from stitch_server.model.weights import WeightFormat
from stitch_server.sources.resolve import resolve
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import ParallelismTuner

WHOLE = "whole"
SHARES = (0.0, 0.1, 0.2, 0.3)
RANK = 16
SESSIONS = (1, 8)
CPU = torch.device("cpu")


class WholeModel:
    """One runner over all layers, with a route for each form of a step."""

    def __init__(self, name: str) -> None:
        cluster = preset(name)
        folder = resolve(cluster.model_source("bottom"), cache_folder())
        model, weight_format = ModelDescription.read(folder, name), WeightFormat.of(cluster.compute)
        decoder = DecoderLayers.load(folder, 0, model.layers, CPU, torch.float32, weight_format)
        store = KVStore(0, model.layers, max(SESSIONS), decoder.kv_heads, decoder.head_dim, CPU, torch.float32)
        skipped = {f"{count} FFNs left out": count for count in (round(share * model.layers) for share in SHARES)}
        count = ParameterCount.read(folder)
        of_ffns = count.feed_forward[0] / count.layers[0]
        layers = [round(some * of_ffns) for some in skipped.values() if some]
        left_out = {f"{some} layers left out": some for some in layers}
        self.layers = {WHOLE: model.layers, **dict.fromkeys(skipped, model.layers)}
        self.layers |= {form: model.layers - some for form, some in left_out.items()}
        self._runner = ModelRunner(
            decoder=decoder,
            attention=backend_for(store),
            device=CPU,
            tuner=ParallelismTuner(1, 1),
            embed=Embedding.load(folder, CPU, torch.float32),
            ffn_skips={form: _gates(model, some) for form, some in skipped.items()},
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


def measure(name: str, options: Options) -> None:
    """Samples every form at every number of sessions; ratios are those to the whole model."""
    rounds = 3 if options.tiny else 40
    model = WholeModel(name)
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
    parser = flags(__doc__ or "")
    parser.add_argument("--preset", default="smollm2", help="whose bottom to measure; default: smollm2")
    parsed = parser.parse_args()
    measure(parsed.preset, Options(parsed.tiny, parsed.out))
