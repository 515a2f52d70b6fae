"""Is this tree as fast as an earlier one? The preset `smollm2` from two trees of this project, in alternation.

`--earlier DIR` names the other tree, such as a `git worktree` of the commit before a change. Each tree starts two
shards and a gateway of its own; this tree's gateway has tenants. The benchmark sends token ids to both first shards and
texts to both gateways, in turns, with one session and with 16 sessions at once. It divides the medians of the time per
token, and those of the time to the first token through the gateways.
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
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from statistics import mean

import grpc

from benchmarks.clusters import prompt, run
from benchmarks.overload import write_keys
from benchmarks.report import Options, ratio, write
from stitch.cli.ttft import WORDS
from stitch.client.messages import generate_request, key_metadata
from stitch.local.cluster import keep_port
from stitch.v1 import inference_pb2, inference_pb2_grpc, shard_pb2, shard_pb2_grpc

SESSIONS = 16
PROMPT_TOKENS = 64
START_SECONDS = 300.0
ANY_ADDRESS = 'address = "127.0.0.1:0"'
GATEWAY_SECTION = "[gateway]\n"
TENANTS = {"measured": 1, "absent": 1}
ROOT = Path(__file__).parents[1]


class Tree:
    """Two running shards and the gateway of one tree."""

    def __init__(
        self, stub: shard_pb2_grpc.ShardAsyncStub, next_shard: str, gateway: inference_pb2_grpc.InferenceAsyncStub
    ) -> None:
        self._stub = stub
        self._next_shard = next_shard
        self._gateway = gateway

    async def direct_ms(self, seed: int, tokens: int) -> float:
        """Milliseconds per token after the first, greedy, from the first shard."""
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

    async def gateway_ms(self, seed: int, tokens: int) -> tuple[float, float]:
        """Milliseconds to the first token, and per token after it, from the gateway."""
        text = " ".join(Random(seed).choices(WORDS, k=PROMPT_TOKENS))
        request = generate_request({"prompt": text, "route": "strong", "max_tokens": tokens, "ignore_eos": True})
        started, arrivals = time.perf_counter(), list[float]()
        async for response in self._gateway.Generate(request, metadata=key_metadata("measured")):
            arrivals += [time.perf_counter()] * len(response.delta.token_ids)
        return (arrivals[0] - started) * 1e3, (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) * 1e3

    async def sample(self, seed: int, tokens: int) -> dict[str, float]:
        """Every quantity once. The time per token of 16 sessions has their prefill in it."""
        found = {"1 session, token": await self.direct_ms(seed, tokens)}
        started = time.perf_counter()
        seeds = range(seed * SESSIONS, (seed + 1) * SESSIONS)
        await asyncio.gather(*(self.direct_ms(one, tokens) for one in seeds))
        found[f"{SESSIONS} sessions, token"] = (time.perf_counter() - started) / (SESSIONS * tokens) * 1e3
        ttft, token = await self.gateway_ms(seed, tokens)
        found |= {"gateway, 1 session, TTFT": ttft, "gateway, 1 session, token": token}
        started = time.perf_counter()
        burst = await asyncio.gather(*(self.gateway_ms(one, tokens) for one in seeds))
        found[f"gateway, {SESSIONS} sessions, token"] = (time.perf_counter() - started) / (SESSIONS * tokens) * 1e3
        return found | {f"gateway, {SESSIONS} sessions, TTFT": mean(ttft for ttft, _ in burst)}

    async def until_serving(self) -> None:
        """Returns once the gateway answers."""
        while True:
            try:
                await self.gateway_ms(0, 2)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)
            else:
                return


async def measure(earlier: Path, options: Options) -> None:
    """Alternates the two trees; the first round warms up."""
    rounds, tokens = (1, 8) if options.tiny else (10, 64)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"earlier": [], "this": []})
    async with running_tree(earlier) as old, running_tree(ROOT) as new:
        for index in range(rounds + 1):
            for name, tree in (("earlier", old), ("this", new)) if index % 2 else (("this", new), ("earlier", old)):
                for quantity, value in (await tree.sample(index, tokens)).items():
                    if index:
                        found[quantity][name].append(value)
    samples = {f"{one}, {name} tree, ms": values for one, by_tree in found.items() for name, values in by_tree.items()}
    ratios = {f"{one}, this / earlier": ratio(by_tree["this"], by_tree["earlier"]) for one, by_tree in found.items()}
    write(options, samples, ratios)


@asynccontextmanager
async def running_tree(tree: Path) -> AsyncIterator[Tree]:
    """Starts the programs of a tree, and stops them at the end of the block."""
    with ExitStack() as bound, tempfile.TemporaryDirectory() as folder:
        addresses = [f"127.0.0.1:{keep_port(bound)}" for _ in range(3)]
        file = cluster_file(tree, Path(folder), addresses)
        programs = [start(tree, file, "stitch_server.cli", "--shard", name) for name in ("bottom-0", "top-0")]
        programs.append(start(tree, file, "router_gateway.cli"))
        try:
            # Without the keepalive of this tree, of which an earlier server may have enough.
            plain = grpc.aio.insecure_channel
            async with plain(addresses[0]) as first, plain(addresses[2]) as gateway:
                next_shard = "top-0" if names_shards(tree) else addresses[1]
                stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(gateway)
                running = Tree(shard_pb2_grpc.ShardStub(first), next_shard, stub)
                async with asyncio.timeout(START_SECONDS):
                    await running.until_serving()
                yield running
        finally:
            for program in programs[::-1]:
                program.terminate()
            for program in programs:
                program.wait()


def cluster_file(tree: Path, folder: Path, addresses: Sequence[str]) -> Path:
    """A copy of the preset of `tree` with these addresses for its shards and its gateway, and with tenants."""
    copied = shutil.copytree(tree / "stitch" / "presets", folder / "presets") / "smollm2.toml"
    text = copied.read_text()
    for address in addresses:
        text = text.replace(ANY_ADDRESS, f'address = "{address}"', 1)
    if has_tenants(tree):
        write_keys(folder / "keys.toml", TENANTS)
        text = text.replace(GATEWAY_SECTION, f'{GATEWAY_SECTION}keys = "{folder / "keys.toml"}"\n')
    copied.write_text(text)
    return copied


def names_shards(tree: Path) -> bool:
    """Whether chains are names of shards in `tree`; they were addresses in version 1 of the protocol."""
    return "PROTOCOL_VERSION = 1\n" not in (tree / "stitch_server" / "rpc" / "handshake.py").read_text()


def has_tenants(tree: Path) -> bool:
    """Whether the gateway of `tree` knows tenants."""
    return (tree / "router_gateway" / "admission" / "tenants.py").exists()


def start(tree: Path, file: Path, module: str, *flags: str) -> subprocess.Popen[bytes]:
    """A process that imports the code of `tree`; its log is next to the cluster file."""
    command = [sys.executable, "-m", module, "run", str(file), *flags, "--metrics-port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    with file.with_name(f"{flags[-1] if flags else module}.log").open("wb") as output:
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
