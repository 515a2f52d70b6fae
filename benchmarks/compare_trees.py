"""Is this tree as fast as an earlier one? The preset `smollm2` from two trees of this project, in alternation.

`--earlier DIR` names the other tree, such as a `git worktree` of the commit before a change. Each tree starts two
shards of its own. The benchmark sends token ids to both first shards in turns, and divides the medians of the time per
token: with one session, and with 16 sessions at once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from benchmarks.clusters import prompt, run
from benchmarks.report import Options, ratio, write
from stitch.channels import open_channel
from stitch.local.cluster import keep_port
from stitch.v1 import inference_pb2, shard_pb2, shard_pb2_grpc

SESSIONS = 16
PROMPT_TOKENS = 64
START_SECONDS = 300.0
ANY_ADDRESS = 'address = "127.0.0.1:0"'
ROOT = Path(__file__).parents[1]


class Tree:
    """Two running shards of one tree, reached through the first one."""

    def __init__(self, stub: shard_pb2_grpc.ShardAsyncStub, next_shard: str) -> None:
        self._stub = stub
        self._next_shard = next_shard

    async def token_ms(self, seed: int, tokens: int) -> float:
        """Milliseconds per token after the first, greedy."""
        token_ids = prompt(PROMPT_TOKENS, seed)
        request = shard_pb2.ShardGenerateRequest(
            token_ids=token_ids,
            prompt_tokens=len(token_ids),
            route="strong",
            chain=[self._next_shard],
            sampling=inference_pb2.Sampling(max_tokens=tokens),
        )
        arrivals = [time.perf_counter() async for response in self._stub.Generate(request) for _ in response.tokens]
        return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) * 1e3

    async def burst_ms(self, seed: int, tokens: int) -> float:
        """Milliseconds per token of 16 sessions that start at once, prefill included."""
        started = time.perf_counter()
        await asyncio.gather(*(self.token_ms(seed * SESSIONS + one, tokens) for one in range(SESSIONS)))
        return (time.perf_counter() - started) / (SESSIONS * tokens) * 1e3


async def measure(earlier: Path, options: Options) -> None:
    """Alternates the two trees, first with one session and then with 16; the first round warms up."""
    rounds, tokens = (1, 8) if options.tiny else (10, 64)
    one: dict[str, list[float]] = {"earlier": [], "this": []}
    many: dict[str, list[float]] = {"earlier": [], "this": []}
    async with running_tree(earlier) as old, running_tree(ROOT) as new:
        for index in range(rounds + 1):
            for name, tree in (("earlier", old), ("this", new)) if index % 2 else (("this", new), ("earlier", old)):
                single, burst = await tree.token_ms(index, tokens), await tree.burst_ms(index, tokens)
                if index:
                    one[name].append(single)
                    many[name].append(burst)
    samples = {f"1 session, {name} tree, ms per token": values for name, values in one.items()}
    samples |= {f"{SESSIONS} sessions, {name} tree, ms per token": values for name, values in many.items()}
    ratios = {
        "1 session, this / earlier": ratio(one["this"], one["earlier"]),
        f"{SESSIONS} sessions, this / earlier": ratio(many["this"], many["earlier"]),
    }
    write(options, samples, ratios)


@asynccontextmanager
async def running_tree(tree: Path) -> AsyncIterator[Tree]:
    """Starts both shards of a tree, and stops them at the end of the block."""
    with ExitStack() as bound, tempfile.TemporaryDirectory() as folder:
        addresses = [f"127.0.0.1:{keep_port(bound)}" for _ in range(2)]
        file = cluster_file(tree, Path(folder), addresses)
        shards = [start_shard(tree, name, file) for name in ("bottom-0", "top-0")]
        try:
            async with open_channel(addresses[0]) as first, open_channel(addresses[1]) as second:
                async with asyncio.timeout(START_SECONDS):
                    await asyncio.gather(first.channel_ready(), second.channel_ready())
                yield Tree(shard_pb2_grpc.ShardStub(first), "top-0" if names_shards(tree) else addresses[1])
        finally:
            for shard in shards:
                shard.terminate()
            for shard in shards:
                shard.wait()


def cluster_file(tree: Path, folder: Path, addresses: Sequence[str]) -> Path:
    """A copy of the preset of `tree` in which the first shards, in order, have these addresses."""
    copied = shutil.copytree(tree / "stitch" / "presets", folder / "presets") / "smollm2.toml"
    text = copied.read_text()
    for address in addresses:
        text = text.replace(ANY_ADDRESS, f'address = "{address}"', 1)
    copied.write_text(text)
    return copied


def names_shards(tree: Path) -> bool:
    """Whether chains are names of shards in `tree`; they were addresses in version 1 of the protocol."""
    return "PROTOCOL_VERSION = 1\n" not in (tree / "stitch_server" / "rpc" / "handshake.py").read_text()


def start_shard(tree: Path, name: str, file: Path) -> subprocess.Popen[bytes]:
    """A shard process that imports the code of `tree`; its log is next to the cluster file."""
    command = [sys.executable, "-m", "stitch_server.cli", "run", str(file), "--shard", name, "--metrics-port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    with file.with_name(f"{name}.log").open("wb") as output:
        return subprocess.Popen(command, cwd=tree, env=environment, stdout=output, stderr=output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--earlier", metavar="DIR", type=Path, required=True, help="a checkout of an earlier commit")
    parser.add_argument("--tiny", action="store_true", help="a few samples, to see that it runs")
    parser.add_argument("--out", metavar="FILE.json", type=Path, default=Path("build/benchmarks/compare_trees.json"))
    parsed = parser.parse_args()
    run(measure(parsed.earlier.resolve(), Options(parsed.tiny, parsed.out)))


if __name__ == "__main__":
    main()
