"""What do int8 and int4 weights gain and lose? Two shards with each and with float32 weights, in alternation."""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from statistics import mean

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, ratio, write
from stitch.cluster import Quantization
from stitch.environment import cache_folder
from stitch_server.attention import backend_for
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import KVStore, Span
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.description import read_config
from stitch_server.model.embedding_and_head import Embedding, Head
from stitch_server.model.weights import WeightFormat
from stitch_server.sources.resolve import resolve

KINDS: tuple[Quantization, ...] = ("none", "int8", "int4")
SEQUENCE_TOKENS = 512
CPU = torch.device("cpu")


async def measure(options: Options) -> None:
    """Samples decode and TTFT of one stream, then the whole model's loss on this project's documentation."""
    rounds, decoded, sequences = (2, 8, 2) if options.tiny else (12, 48, 40)
    samples: dict[str, list[float]] = {}
    clusters = {kind: preset(quantization=kind) for kind in KINDS}
    with ExitStack() as processes:
        running_clusters = {kind: processes.enter_context(running(one)) for kind, one in clusters.items()}
        async with AsyncExitStack() as links:
            shards = {kind: await links.enter_async_context(first_shard(one)) for kind, one in running_clusters.items()}
            for index in range(rounds + 1):
                for kind, shard in shards.items():
                    found = await _sample(shard, index, decoded)
                    for name, milliseconds in found.items() if index else ():
                        samples.setdefault(f"{name}, {kind}, ms", []).append(milliseconds)
    names = ("time per token", "TTFT at 512")
    ratios = {
        f"{name}, none / {kind}": ratio(samples[f"{name}, none, ms"], samples[f"{name}, {kind}, ms"])
        for name in names
        for kind in KINDS[1:]
    }
    folder = resolve(clusters["none"].models.bottom.source, cache_folder())
    losses = {kind: _losses(folder, kind, sequences) for kind in KINDS}
    write(options, samples, ratios, losses=losses)
    exact = mean(losses["none"])
    for kind, values in losses.items():
        loss = mean(values) - exact
        print(f"  cross-entropy per token, {kind:<16} {mean(values):10.4f}, {loss:.4f} nats above float32")


async def _sample(shard: FirstShard, index: int, decoded: int) -> dict[str, float]:
    timed = await shard.generate(prompt(64, index), decoded)
    long = await shard.generate(prompt(512, index), 1)
    return {"time per token": timed.token_ms, "TTFT at 512": long.ttft_ms}


@torch.inference_mode()
def _losses(folder: Path, kind: Quantization, sequences: int) -> list[float]:
    """The mean cross-entropy of each sequence of the documentation, in nats per token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "\n".join(path.read_text() for path in sorted(Path().glob("**/*.md")) if ".venv" not in path.parts)
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    layers, weights = read_config(folder).num_hidden_layers, WeightFormat(kind)
    decoder = DecoderLayers.load(folder, 0, layers, CPU, torch.float32, weights)
    embed = Embedding.load(folder, CPU, torch.float32)
    head = Head.load(folder, CPU, torch.float32, None, weights)
    blocks = SEQUENCE_TOKENS // BLOCK_TOKENS
    store = KVStore(0, decoder.end, blocks, decoder.kv_heads, decoder.head_dim, CPU, torch.float32)
    losses = []
    for row in ids[: len(ids) // SEQUENCE_TOKENS * SEQUENCE_TOKENS].view(-1, SEQUENCE_TOKENS)[:sequences]:
        attention = backend_for(store)([Span(0, SEQUENCE_TOKENS, range(blocks))])
        rotary = decoder.rotary(torch.arange(SEQUENCE_TOKENS))
        logits = head(decoder.run(embed(row), rotary, attention, 0, decoder.end))
        losses.append(float(functional.cross_entropy(logits[:-1], row[1:])))
    return losses


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
