"""Are answers correct and memory steady under overload? 64 sessions for ten minutes over a KV cache for 20.

Every answer is compared with a reference from one process, and every process's resident memory is sampled. Too long
for `python -m benchmarks`; run `python -m benchmarks.soak --out FILE.json`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import grpc

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.one_process import OneProcess
from benchmarks.report import Options, options, write
from stitch.local.cluster import LocalCluster
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS

SESSIONS = 64
SESSIONS_OF_KV = 20
PROMPTS = 24
ROUTES = ("weak", "strong")
# An answer that takes longer counts as hung.
HUNG_SECONDS = 300.0


@dataclass(slots=True)
class Tally:
    """The outcomes of the requests, and the memory of the processes."""

    # The number of answers by outcome: equal, different, hung, or the status code of a failed request.
    outcomes: Counter[str] = field(default_factory=Counter)
    resident_mb: dict[str, list[float]] = field(default_factory=dict)
    longest_seconds: float = 0.0


async def measure(options: Options) -> None:
    """Sends prompts of 20 to 250 tokens for answers of 16 to 100, greedily, on both routes."""
    seconds, sessions, prompts = (5.0, 8, 4) if options.tiny else (600.0, SESSIONS, PROMPTS)
    requests = [(prompt(20 + 10 * number, number), 16 + number * 84 // PROMPTS) for number in range(prompts)]
    longest = max(len(ids) + tokens for ids, tokens in requests)
    kv_tokens = SESSIONS_OF_KV * sessions // SESSIONS * -(-longest // BLOCK_TOKENS) * BLOCK_TOKENS
    cluster = preset(kv_tokens=kv_tokens)
    expected = {}
    for route in ROUTES:
        whole = OneProcess(cluster, route)
        for number, (ids, tokens) in enumerate(requests):
            expected[route, number] = whole.generate(ids, tokens).token_ids
    tally = Tally()
    with running(cluster) as local:
        async with first_shard(local) as shard:
            end = time.monotonic() + seconds
            clients = [_client(shard, requests, expected, number, end, tally) for number in range(sessions)]
            sampler = asyncio.create_task(_sample_memory(local, tally, seconds / 20))
            await asyncio.gather(*clients)
            sampler.cancel()
    resident = {f"{name}, resident MB": values for name, values in tally.resident_mb.items()}
    growth = {f"{name}, last / middle": values[-1] / values[len(values) // 2] for name, values in resident.items()}
    write(options, resident, growth, outcomes=dict(tally.outcomes), kv_tokens=kv_tokens)
    print(f"  KV for {kv_tokens} tokens; {dict(tally.outcomes)}; longest answer {tally.longest_seconds:.1f} s")


async def _client(
    shard: FirstShard,
    requests: list[tuple[list[int], int]],
    expected: dict[tuple[str, int], list[int]],
    client: int,
    end: float,
    tally: Tally,
) -> None:
    for index in count(client):
        if time.monotonic() > end:
            return
        number, route = index % len(requests), ROUTES[index // len(requests) % len(ROUTES)]
        ids, tokens = requests[number]
        started = time.monotonic()
        try:
            async with asyncio.timeout(HUNG_SECONDS):
                answer = await shard.generate(ids, tokens, route)
        except TimeoutError:
            tally.outcomes["hung"] += 1
        except grpc.aio.AioRpcError as error:
            tally.outcomes[error.code().name] += 1
        else:
            same = answer.token_ids == expected[route, number]
            tally.outcomes["equal" if same else "different"] += 1
        tally.longest_seconds = max(tally.longest_seconds, time.monotonic() - started)


async def _sample_memory(local: LocalCluster, tally: Tally, every_seconds: float) -> None:
    while True:
        await asyncio.sleep(every_seconds)
        for name, process in local.processes.items():
            tally.resident_mb.setdefault(name, []).append(_resident_mb(process.pid))


def _resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
