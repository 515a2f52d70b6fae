"""How close is decode on a GPU to its memory bandwidth? Two shards on one GPU, against copies in its memory."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.clusters import first_shard, prompt, run, running
from benchmarks.random_pair import QWEN, ROUTE, TINY, bytes_per_token, write_pair
from benchmarks.report import SKIPPED, Options, options, ratio, write

PROMPT_TOKENS = 64
COPIED_BYTES, COPIED_BYTES_TINY = 1 << 30, 1 << 24


async def measure(options: Options) -> None:
    """Alternates one stream with copies. The tiny form has small shapes, and runs on the CPU where there is no GPU."""
    rounds, decoded, shapes = (2, 8, TINY) if options.tiny else (12, 128, QWEN)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens: list[float] = []
    limits: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        cluster = write_pair(Path(name), shapes, device)
        weight_bytes = bytes_per_token(Path(name), shapes)
        source = torch.ones(COPIED_BYTES_TINY if options.tiny else COPIED_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        with running(cluster) as local:
            async with first_shard(local) as shard:
                for index in range(rounds + 1):
                    timed = await shard.generate(prompt(PROMPT_TOKENS, index), decoded, ROUTE)
                    limit_ms = weight_bytes / _bytes_per_second(source, target) * 1e3
                    # The first round captures CUDA graphs.
                    if index:
                        tokens.append(timed.token_ms)
                        limits.append(limit_ms)
    samples = {"two shards, ms per token": tokens, f"reading {weight_bytes / 1e6:.1f} MB, ms": limits}
    facts = {"device": _device(device), "copy_gb_per_second": weight_bytes / median(limits) / 1e6}
    write(options, samples, {"limit / token": ratio(limits, tokens)}, weight_bytes=weight_bytes, **facts)


def _bytes_per_second(source: torch.Tensor, target: torch.Tensor) -> float:
    """The bandwidth of a copy, bytes read and written: the best of five."""
    times = []
    for _ in range(5):
        _wait(source.device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(source.device)
        times.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    parsed = options(__doc__ or "")
    if not parsed.tiny and not torch.cuda.is_available():
        print("  this machine has no GPU that torch can use: nothing was measured")
        sys.exit(SKIPPED)
    run(measure(parsed))
