"""What is answered in time when clients ask for 1 to 10 times of what the shards can bear, and how tenants share them?

Goodput is answers within the deadline, by the client's clock, per second of the measured time, which begins one
deadline after the load. The peak is the most goodput of clients that ask again as soon as they have their answer. Too
long for `python -m benchmarks`; run `python -m benchmarks.overload --seconds 300 --loads 10 --out FILE.json`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import grpc

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, flags, write
from stitch.cli.ttft import WORDS
from stitch.client import AsyncClient, Delta
from stitch.cluster import ClusterConfig
from stitch.errors import Exhausted, Expired, StitchError
from stitch.local.cluster import LocalCluster

DEADLINE_SECONDS = 10.0
LOADS = (1.0, 2.0, 4.0, 10.0)
PEAK_CLIENTS = (8, 16, 32, 64)
PROMPT_WORDS, ANSWER_TOKENS = (16, 64), (16, 48)
ROUTE = "strong"
# Of the refused requests that come back when they are told to.
RETURNING_SHARE = 0.5
WEIGHTS = {"one": 1, "three": 3}
SHARING_CLIENTS = 40
# Until the requests have ended that started before the other tenant's had arrived.
SHARING_WARM_UP_SECONDS = 20.0
FLOOD = 330
FLOOD_TOKENS = 64


@dataclass(slots=True)
class Tally:
    """What clients have seen; times are of `time.monotonic`, durations in seconds."""

    outcomes: Counter[str] = field(default_factory=Counter)
    # When answers within their deadline were complete.
    finished_at: list[float] = field(default_factory=list)
    refusal_seconds: list[float] = field(default_factory=list)
    told_seconds: list[float] = field(default_factory=list)
    # Requests that came back when they were told to, by their outcome then.
    returned: Counter[str] = field(default_factory=Counter)

    def goodput(self, begin: float, end: float) -> float:
        """Answers in time per second."""
        return sum(begin <= at < end for at in self.finished_at) / (end - begin)


class Requests:
    """Sends requests of random words and lengths, and counts what becomes of them."""

    def __init__(self, client: AsyncClient, seed: int) -> None:
        self.client = client
        self.draw = random.Random(seed)
        self.tally = Tally()

    async def send(self, text: str, tokens: int) -> tuple[str, float]:
        """The outcome of one request, and the seconds after which it is told to come back."""
        began = time.monotonic()
        try:
            await self.client.generate(text, route=ROUTE, max_tokens=tokens, ignore_eos=True, timeout=DEADLINE_SECONDS)
        except Exhausted as error:
            self.tally.refusal_seconds.append(time.monotonic() - began)
            self.tally.told_seconds.append(error.retry_after_seconds)
            return self._count("refused"), error.retry_after_seconds
        except Expired:
            return self._count("late"), 0.0
        except StitchError as error:
            return self._count(type(error).__name__), 0.0
        self.tally.finished_at.append(time.monotonic())
        return self._count("finished"), 0.0

    async def send_and_return(self, end: float) -> None:
        """One request, of which some come back when they are told to, if that is before `end`."""
        text, tokens = self.text(), self.tokens()
        outcome, told = await self.send(text, tokens)
        returns = self.draw.random() < RETURNING_SHARE
        while outcome == "refused" and returns and time.monotonic() + told < end:
            await asyncio.sleep(told)
            outcome, told = await self.send(text, tokens)
            self.tally.returned[outcome] += 1

    def text(self) -> str:
        return " ".join(self.draw.choices(WORDS, k=self.draw.randint(*PROMPT_WORDS)))

    def tokens(self) -> int:
        return self.draw.randint(*ANSWER_TOKENS)

    def _count(self, outcome: str) -> str:
        self.tally.outcomes[outcome] += 1
        return outcome


async def measure(options: Options, peak_seconds: float, seconds: float, loads: Sequence[float]) -> None:
    """Measures the peak, the loads one after the other, the tenants' shares, and a flood of one tenant."""
    with tempfile.TemporaryDirectory() as folder, running(_with_tenants(Path(folder))) as local:
        direct, direct_by_clients = await _peak_of_shards(local, peak_seconds)
        async with _client(local, "any") as client:
            peak, by_clients = await _peak(client, peak_seconds)
            print(f"  peak {peak:.2f}/s through the gateway, {by_clients}", flush=True)
            print(f"  and {direct:.2f}/s without, {direct_by_clients}", flush=True)
            found = {load: await _load(client, load * peak, seconds) for load in loads}
        shares = await _shares(local, peak_seconds)
        alone, beside = await _flood(local, options.tiny)
    samples: dict[str, Sequence[float]] = {}
    ratios: dict[str, float] = {}
    for load, (goodput, tally) in found.items():
        name = f"{load:g} × peak"
        samples[f"{name}, refusal, s"] = tally.refusal_seconds or [0.0]
        samples[f"{name}, told, s"] = tally.told_seconds or [0.0]
        ratios |= {f"{name}: goodput / peak": goodput / peak, f"{name}: goodput / without gateway": goodput / direct}
        if tally.returned:
            kept = 1 - tally.returned["refused"] / tally.returned.total()
            ratios[f"{name}: admitted / came back"] = kept
        at_once = sum(one <= 1.0 for one in tally.refusal_seconds) / max(len(tally.refusal_seconds), 1)
        ratios[f"{name}: refused within 1 s / refused"] = at_once
        print(f"  {name}: {dict(tally.outcomes)}, came back: {dict(tally.returned)}", flush=True)
    samples |= {"TTFT alone, s": alone, f"TTFT beside {FLOOD} requests, s": beside}
    ratios |= {
        "tokens, weight 3 / weight 1": shares["three"] / max(shares["one"], 1),
        "TTFT beside / alone, median": median(beside) / median(alone),
        "TTFT beside / alone, p90": quantiles(beside, n=10)[-1] / median(alone),
    }
    outcomes = {f"{load:g}": dict(tally.outcomes) for load, (_, tally) in found.items()}
    write(options, samples, ratios, peak_per_second=peak, direct_per_second=direct, seconds=seconds, outcomes=outcomes)


def write_keys(file: Path, weights: Mapping[str, float]) -> None:
    """A keys file in which a tenant's key is its name."""
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in weights}
    sections = (f'[tenants.{name}]\nkeys = ["{hashes[name]}"]\nweight = {weight}\n' for name, weight in weights.items())
    file.write_text("\n".join(sections))


def _with_tenants(folder: Path) -> ClusterConfig:
    """The preset with one tenant for each use."""
    write_keys(folder / "keys.toml", {"any": 1, "flood": 1, "other": 1, **WEIGHTS})
    cluster = preset()
    gateway = cluster.gateway.model_copy(update={"keys": str(folder / "keys.toml")})
    return cluster.model_copy(update={"gateway": gateway})


@asynccontextmanager
async def _client(local: LocalCluster, tenant: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(local.gateway, key=tenant) as client:
        yield client


async def _closed_loop(clients: int, seconds: float, one: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Clients that ask again and again; returns the begin and the end of the measured time."""
    begin = time.monotonic() + DEADLINE_SECONDS
    end = begin + seconds

    async def ask() -> None:
        while time.monotonic() < end:
            await one()

    await asyncio.gather(*(ask() for _ in range(clients)))
    return begin, end


async def _peak(client: AsyncClient, seconds: float) -> tuple[float, dict[int, float]]:
    """The most goodput through the gateway, and that of each number of clients."""
    found = {}
    for clients in PEAK_CLIENTS:
        requests = Requests(client, clients)

        async def one(requests: Requests = requests) -> None:
            text, tokens = requests.text(), requests.tokens()
            outcome, told = await requests.send(text, tokens)
            while outcome == "refused":
                await asyncio.sleep(min(told, DEADLINE_SECONDS))
                outcome, told = await requests.send(text, tokens)

        begin, end = await _closed_loop(clients, seconds, one)
        found[clients] = round(requests.tally.goodput(begin, end), 2)
    return max(found.values()), found


async def _peak_of_shards(local: LocalCluster, seconds: float) -> tuple[float, dict[int, float]]:
    """The same of clients of the first shard, which nothing stands in front of."""
    found = {}
    async with first_shard(local) as shard:
        for clients in PEAK_CLIENTS[:-1]:
            finished: list[float] = []
            draw = random.Random(clients)

            async def one(finished: list[float] = finished, draw: random.Random = draw) -> None:
                began = time.monotonic()
                await _generate(shard, draw)
                if time.monotonic() - began <= DEADLINE_SECONDS:
                    finished.append(time.monotonic())

            begin, end = await _closed_loop(clients, seconds, one)
            found[clients] = round(sum(begin <= at < end for at in finished) / seconds, 2)
    return max(found.values()), found


async def _generate(shard: FirstShard, draw: random.Random) -> None:
    with suppress(grpc.aio.AioRpcError):
        # A word of WORDS has about one token.
        ids = prompt(draw.randint(*PROMPT_WORDS), draw.randrange(1_000_000))
        await shard.generate(ids, draw.randint(*ANSWER_TOKENS), ROUTE)


async def _load(client: AsyncClient, rate: float, seconds: float) -> tuple[float, Tally]:
    """Goodput and tally of clients that ask at random moments, whatever becomes of the others."""
    requests = Requests(client, seed=1)
    begin = time.monotonic() + DEADLINE_SECONDS
    end = begin + seconds
    tasks = []
    due = time.monotonic()
    while due < end:
        due += requests.draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(requests.send_and_return(end)))
    await asyncio.gather(*tasks)
    return requests.tally.goodput(begin, end), requests.tally


async def _shares(local: LocalCluster, seconds: float) -> dict[str, int]:
    """Tokens of each tenant in the measured time, while both always have requests that wait."""
    begin = time.monotonic() + SHARING_WARM_UP_SECONDS
    end = begin + seconds
    given = dict.fromkeys(WEIGHTS, 0)

    async def ask(tenant: str, client: AsyncClient, seed: int) -> None:
        requests = Requests(client, seed)
        while time.monotonic() < end:
            stream = client.stream(requests.text(), route=ROUTE, max_tokens=requests.tokens(), ignore_eos=True)
            with suppress(Exhausted):
                async for event in stream:
                    if isinstance(event, Delta) and begin <= time.monotonic() < end:
                        given[tenant] += len(event.token_ids)

    async with _client(local, "one") as one, _client(local, "three") as three:
        clients = {"one": one, "three": three}
        await asyncio.gather(*(ask(name, clients[name], seed) for seed in range(SHARING_CLIENTS) for name in clients))
    return given


async def _flood(local: LocalCluster, is_tiny: bool) -> tuple[list[float], list[float]]:
    """The TTFT of one tenant's "Hello" alone, and beside 330 requests of another tenant's connection."""
    async with _client(local, "flood") as flood, _client(local, "other") as other:
        await _ttft(other)
        alone = [await _ttft(other) for _ in range(3 if is_tiny else 10)]
        requests = Requests(flood, seed=2)
        text = requests.text
        tasks = [
            asyncio.create_task(flood.generate(text(), route=ROUTE, max_tokens=FLOOD_TOKENS, ignore_eos=True))
            for _ in range(FLOOD)
        ]
        await asyncio.sleep(2.0)
        beside = []
        for _ in range(5 if is_tiny else 20):
            beside.append(await _ttft(other))
            await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return alone, beside


async def _ttft(client: AsyncClient) -> float:
    answer = await client.generate(
        messages=[{"role": "user", "content": "Hello"}], route=ROUTE, max_tokens=4, timeout=60.0
    )
    return answer.ttft_seconds or answer.total_seconds


def main() -> None:
    parser = flags(__doc__ or "")
    parser.add_argument("--seconds", metavar="S", type=float, default=60.0, help="measured for each load (60)")
    parser.add_argument(
        "--peak-seconds", metavar="S", type=float, default=30.0, help="measured for each number of clients (30)"
    )
    parser.add_argument(
        "--loads", metavar="N", type=float, nargs="+", default=LOADS, help="multiples of the peak (1 2 4 10)"
    )
    parsed = parser.parse_args()
    if parsed.tiny:
        parsed.peak_seconds, parsed.seconds, parsed.loads = 3.0, 3.0, (4.0,)
    run(measure(Options(parsed.tiny, parsed.out), parsed.peak_seconds, parsed.seconds, parsed.loads))


if __name__ == "__main__":
    main()
