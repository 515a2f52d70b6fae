"""Does a cheaper route answer where a request would be refused? Clients with TTFT objectives ask for too much.

Two gateways share the shards; one has `cheaper_under_load = false`. Requests come at a multiple of the rate at which
clients without objectives are answered, and go to both gateways in turn, block by block, with the same prompts. Each
has a `max_ttft_seconds` of 1 to 8 times the TTFT of the costliest route on an idle cluster.

The routes are the two models of `qwen2.5-coder`, or SmolLM2-135M and 10 of its 30 layers. These aren't trained to
answer without the others; only their speed counts here. Of both pairs, a prompt costs about 1 : 3.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.clusters import not_started, preset, quiet, run
from benchmarks.report import Options, flags, write
from stitch.cli.ttft import WORDS, Line, regression
from stitch.client import AsyncClient
from stitch.cluster import ClusterConfig, RouteConfig
from stitch.environment import cache_folder
from stitch.errors import Exhausted, Expired, ObjectivesUnmet
from stitch.local.cluster import prepared
from stitch.local.run_folder import RunFolder
from stitch.tls import GATEWAY
from stitch.tokenizer_files import tokenizer_hash
from stitch_server.model.description import ModelDescription
from stitch_server.model.stitch import Stitch, StitchBinding
from stitch_server.sources.resolve import resolve

# Cheapest first.
ROUTES = {"smollm2": ("third", "strong"), "qwen2.5-coder": ("small", "whole")}
THIRD = RouteConfig(name="third", bottom_layers=5, top_from=25, stitch="identity.safetensors")
SETTINGS = {"cheaper": True, "today": False}
# Requests whose score is below the threshold, and three above it by less and more.
EASY = "List these words: "
HARD = (
    "Explain why these belong together: ",
    "Explain step by step why each of these must differ: ",
    "Prove that x^2 + 3 = 7 has 2 solutions, compare them, and explain each step with only these: ",
)
HARD_SHARE = 0.6
LEAST_WORDS, MOST_WORDS = 8, 48
LEAST_SLACK, MOST_SLACK = 1.0, 8.0
ANSWER_TOKENS = 8
PEAK_CLIENTS = 4
# The TTFT predictor of a gateway needs 16 answers on each route.
IDLE_ANSWERS = 18
LEAST_SECONDS = 0.02
OUTCOMES = {ObjectivesUnmet: "objective", Exhausted: "exhausted", Expired: "expired"}


@dataclass(slots=True)
class Seen:
    """What clients of one gateway have seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    # TTFT divided by the objective, of answered requests.
    over_objective: list[float] = field(default_factory=list)
    routes: Counter[str] = field(default_factory=Counter)

    @property
    def refused(self) -> float:
        """The share that was not answered."""
        return 1 - len(self.over_objective) / max(self.outcomes.total(), 1)

    @property
    def kept(self) -> float:
        """The share of the answered that had their first text in time."""
        return sum(one <= 1 for one in self.over_objective) / max(len(self.over_objective), 1)


class Prompts:
    """Draws prompts of both kinds and many lengths that share no prefix of more than a few words."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def next(self) -> str:
        head = self.draw.choice(HARD) if self.draw.random() < HARD_SHARE else EASY
        words = self.draw.choices(WORDS, k=self.draw.randint(LEAST_WORDS, MOST_WORDS))
        return f"{' '.join(words[:4])}. {head}{' '.join(words[4:])}"


async def measure(options: Options, name: str, load: float, blocks: int, block_seconds: float) -> None:
    """Measures both routes idle and the rate without objectives, then both settings in turn at `load` times of it."""
    with tempfile.TemporaryDirectory() as folder, _two_gateways(_two_routes(name, Path(folder))) as addresses:
        async with AsyncClient(addresses["cheaper"]) as cheaper, AsyncClient(addresses["today"]) as today:
            clients = {"cheaper": cheaper, "today": today}
            line = [await _learn(client, ROUTES[name]) for client in clients.values()][-1]
            # Both gateways see this load before they are compared.
            peak = sum([await _peak(client, block_seconds / 2) for client in clients.values()]) / len(clients)
            print(f"  {peak:.2f} answers/s without objectives; offered {load * peak:.2f}/s", flush=True)
            seen = {setting: Seen() for setting in SETTINGS}
            for block in range(blocks):
                order = list(SETTINGS) if block % 2 else list(SETTINGS)[::-1]
                for setting in order:
                    await _block(clients[setting], seen[setting], line, load * peak, block_seconds, block)
                    print(f"  {setting}: {dict(seen[setting].outcomes)}, {dict(seen[setting].routes)}", flush=True)
    samples = {f"TTFT / objective, {setting}": found.over_objective for setting, found in seen.items()}
    costliest = ROUTES[name][-1]
    ratios = {"refused, cheaper / today": seen["cheaper"].refused / max(seen["today"].refused, 1e-9)}
    for setting, found in seen.items():
        answered = max(len(found.over_objective), 1)
        ratios |= {
            f"refused / all, {setting}": found.refused,
            f"kept / answered, {setting}": found.kept,
            f"{costliest} / answered, {setting}": found.routes[costliest] / answered,
        }
    outcomes = {setting: dict(found.outcomes) for setting, found in seen.items()}
    more = {"cluster": name, "load": load, "peak_per_second": peak, "outcomes": outcomes}
    write(options, {kind: values for kind, values in samples.items() if values}, ratios, **more)


def _two_routes(name: str, folder: Path) -> ClusterConfig:
    """Returns the cluster with both routes; writes a stitch into `folder` where one is needed."""
    if name != "smollm2":
        cluster = preset(name, quantization="int8")
        return cluster.model_copy(update={"routes": tuple(cluster.route(route) for route in ROUTES[name])})
    cluster = preset(name)
    source = resolve(cluster.model_source("bottom"), cache_folder())
    model = ModelDescription.read(source, cluster.models.bottom.id)
    binding = StitchBinding.of(model, model, THIRD.bottom_layers, THIRD.top_from or 0, tokenizer_hash(source))
    file = folder / str(THIRD.stitch)
    Stitch(torch.eye(model.hidden_size), torch.zeros(model.hidden_size), binding).save(file)
    third = THIRD.model_copy(update={"stitch": str(file)})
    return cluster.model_copy(update={"routes": (third, cluster.route("strong"))})


@contextmanager
def _two_gateways(cluster: ClusterConfig) -> Iterator[dict[str, str]]:
    """Runs shards with two gateways, and yields the addresses of these by setting."""
    with not_started(cluster) as local, tempfile.TemporaryDirectory() as folder, ExitStack() as bound:
        gateway = cluster.gateway.model_copy(update={"cheaper_under_load": False})
        other = prepared(local.cluster.model_copy(update={"gateway": gateway}), RunFolder(Path(folder)), bound)
        local.start_all(quiet)
        try:
            other.start(GATEWAY)
            other.wait_until_serving([GATEWAY], quiet)
            yield {"cheaper": local.gateway, "today": other.gateway}
        finally:
            other.stop()


async def _learn(client: AsyncClient, routes: Sequence[str]) -> Line:
    """Lets the gateway measure both routes idle; returns the line of the costliest one's TTFT over its words."""
    prompts, found = Prompts(0), list[tuple[int, float]]()
    for route in routes:
        found.clear()
        for _ in range(IDLE_ANSWERS):
            prompt = prompts.next()
            answer = await client.generate(prompt, route=route, max_tokens=ANSWER_TOKENS, ignore_eos=True)
            found.append((len(prompt.split()), answer.ttft_seconds or 0.0))
    return regression(found)


async def _peak(client: AsyncClient, seconds: float) -> float:
    """Answers per second of clients that ask again as soon as they are answered, without objectives."""
    prompts, answered, end = Prompts(1), 0, time.perf_counter() + seconds
    began = time.perf_counter()

    async def ask() -> None:
        nonlocal answered
        while time.perf_counter() < end:
            await client.generate(prompts.next(), max_tokens=ANSWER_TOKENS, ignore_eos=True)
            answered += 1

    await asyncio.gather(*(ask() for _ in range(PEAK_CLIENTS)))
    return answered / (time.perf_counter() - began)


async def _block(client: AsyncClient, seen: Seen, line: Line, rate: float, seconds: float, block: int) -> None:
    """Sends requests at that rate, and waits for the last answer; a block has the same ones for every gateway."""
    prompts, tasks = Prompts(100 + block), []
    due = began = time.perf_counter()
    while due < began + seconds:
        prompt, slack = prompts.next(), MOST_SLACK ** prompts.draw.random() * LEAST_SLACK
        objective = max(line.at(len(prompt.split())), LEAST_SECONDS) * slack
        tasks.append(asyncio.create_task(_send(client, seen, prompt, objective)))
        due += prompts.draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    await asyncio.gather(*tasks)


async def _send(client: AsyncClient, seen: Seen, prompt: str, objective: float) -> None:
    try:
        answer = await client.generate(
            prompt, max_ttft_seconds=objective, max_tokens=ANSWER_TOKENS, ignore_eos=True, timeout=60.0
        )
    except (ObjectivesUnmet, Exhausted, Expired) as error:
        seen.outcomes[OUTCOMES[type(error)]] += 1
    else:
        seen.outcomes["answered"] += 1
        seen.routes[answer.route] += 1
        seen.over_objective.append((answer.ttft_seconds or 0.0) / objective)


def main() -> None:
    parser = flags(__doc__ or "")
    parser.add_argument("--cluster", choices=sorted(ROUTES), default="smollm2", help="whose two ends are the routes")
    parser.add_argument("--load", metavar="X", type=float, default=2.0, help="offered, of the rate without objectives")
    parser.add_argument("--blocks", metavar="N", type=int, default=4, help="for each setting, in turn (4)")
    parser.add_argument("--block-seconds", metavar="S", type=float, default=30.0, help="of requests (30)")
    parsed = parser.parse_args()
    if parsed.tiny:
        parsed.blocks, parsed.block_seconds = 1, 4.0
    options = Options(parsed.tiny, parsed.out)
    run(measure(options, parsed.cluster, parsed.load, parsed.blocks, parsed.block_seconds))


if __name__ == "__main__":
    main()
