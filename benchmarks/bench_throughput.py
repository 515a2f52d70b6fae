"""How many tokens a second at 1, 8 and 16 sessions? Two shards against transformers `generate`, in alternation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import median

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, write
from stitch.cluster import Cluster
from stitch.environment import cache_folder
from stitch_server.sources.resolve import resolve

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 33


async def measure(options: Options) -> None:
    """Output tokens a second, from the first request to the last token, prefill included."""
    rounds, crowds = (1, (1, 2)) if options.tiny else (5, (1, 8, 16))
    cluster = preset()
    model = _whole_model(cluster)
    samples: dict[str, list[float]] = {}
    ratios = {}
    with running(cluster) as local:
        async with first_shard(local) as shard:
            for sessions in crowds:
                for index in range(rounds + 1):
                    prompts = [prompt(PROMPT_TOKENS, index * 100 + number) for number in range(sessions)]
                    theirs, ours = _generated(model, prompts), await _served(shard, prompts)
                    if index:
                        samples.setdefault(f"generate, {sessions} sessions, tokens/s", []).append(theirs)
                        samples.setdefault(f"two shards, {sessions} sessions, tokens/s", []).append(ours)
                ours_all, theirs_all = (
                    samples[f"{who}, {sessions} sessions, tokens/s"] for who in ("two shards", "generate")
                )
                ratios[f"{sessions} sessions, two shards / generate"] = median(ours_all) / median(theirs_all)
    write(options, samples, ratios)


def _whole_model(cluster: Cluster) -> PreTrainedModel:
    folder = resolve(cluster.models.bottom.source, cache_folder())
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def _generated(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> float:
    ids = torch.tensor(prompts)
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=OUTPUT_TOKENS,
            min_new_tokens=OUTPUT_TOKENS,
            pad_token_id=0,
        )
    return len(prompts) * OUTPUT_TOKENS / (time.perf_counter() - started)


async def _served(shard: FirstShard, prompts: Sequence[Sequence[int]]) -> float:
    started = time.perf_counter()
    await asyncio.gather(*(shard.generate(one, OUTPUT_TOKENS) for one in prompts))
    return len(prompts) * OUTPUT_TOKENS / (time.perf_counter() - started)


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
