"""Does anybody notice a killed process? Kills of every role under 16 streams, with two processes of each role.

Every answer is compared with the one to the same request before the first kill: greedy ones, and ones sampled at
temperature 1. A killed process is started again at once; the other one of its role serves meanwhile. A client whose
gateway is killed asks the other one, and only that loses what it had. Too long for `python -m benchmarks`; run
`python -m benchmarks.chaos --out FILE.json`.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, cycle, islice, pairwise
from pathlib import Path
from typing import Any

from benchmarks.report import Options, flags, write
from stitch.client import Delta
from stitch.cluster import load_cluster
from stitch.errors import Exhausted, Expired, StitchError
from stitch.local.run_folder import RunFolder
from tests.support.processes import GATEWAY, Cluster, running_cluster
from tests.support.tiny_cluster import write_tiny_cluster

STREAMS = 16
# Half of them are greedy.
REQUESTS = 32
WORDS = ("river", "stone", "light", "seven", "garden", "winter", "paper", "music")
ANSWER_TOKENS = 64
# An answer that takes longer counts as hung.
HUNG_SECONDS = 120.0
POLL_SECONDS = 0.2
# Between the return of a process and the next kill of its role.
CALM_SECONDS = 0.5
# Of each shard of the preset.
KV_TOKENS = 8192
OTHER_GATEWAY = "gateway-1"


@dataclass(slots=True)
class Tally:
    """What the clients saw."""

    # The number of answers by outcome: equal, hung, refused, cut off with the gateway; else how they went wrong.
    outcomes: Counter[str] = field(default_factory=Counter)
    # The longest pause of each answer: between two tokens, or before the first one.
    pauses: list[float] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)

    def mistaken(self, outcome: str, what: str) -> None:
        self.outcomes[outcome] += 1
        self.mistakes.append(f"{outcome}: {what}")


def requests() -> list[dict[str, Any]]:
    """Prompts of 10 to 200 words on all routes, every second one sampled."""
    return [
        {
            "prompt": " ".join(WORDS[(number + index * index) % len(WORDS)] for index in range(10 + 6 * number)),
            "route": ("weak", "strong")[number // 2 % 2],
            "temperature": float(number % 2),
            "seed": number,
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
        }
        for number in range(REQUESTS)
    ]


class Chaos:
    """One cluster, its clients, and the process that kills its processes."""

    def __init__(self, cluster: Cluster, roles: Mapping[str, tuple[str, str]]) -> None:
        self._cluster = cluster
        self._roles = roles
        self._requests = requests()
        self._clients = {name: cluster.client_of(cluster.address(name)) for name in roles[GATEWAY]}
        self._expected = [self._clients[GATEWAY].generate(**fields).token_ids for fields in self._requests]
        # The kills of each process.
        self.kills: Counter[str] = Counter()
        # The last kill of each process, in seconds of `time.monotonic`, and those that are not back.
        self._killed_at: dict[str, float] = {}
        self._down: set[str] = set()
        self.over = threading.Event()
        self.tally = Tally()

    def kill_and_restart(self, kills: int) -> None:
        """Kills the roles in turn, each as soon as both of its processes serve again."""
        for pair in islice(cycle(self._roles.values()), kills):
            self._wait_until_calm(pair)
            # One of the two, and the other one next time.
            self._kill(pair[sum(self.kills[name] for name in pair) % 2])

    def _wait_until_calm(self, pair: tuple[str, str]) -> None:
        calm_since = None
        while calm_since is None or time.monotonic() < calm_since + CALM_SECONDS:
            if not all(map(self._serves, pair)):
                calm_since = None
            elif calm_since is None:
                calm_since = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _kill(self, name: str) -> None:
        self.kills[name] += 1
        self._killed_at[name] = time.monotonic()
        self._down.add(name)
        self._cluster.kill(name)
        self._cluster.start(name)
        print(f"  {self.kills.total()} kills; {dict(self.tally.outcomes)}", file=sys.stderr, flush=True)

    def _serves(self, name: str) -> bool:
        """Whether a gateway serves its clients, or a shard the sessions of every gateway that serves."""
        if not self._cluster.serves(name):
            return False
        if name not in self._clients:
            return all(self._is_placed_by(gateway, name) for gateway in self._clients if self._cluster.serves(gateway))
        with suppress(StitchError):
            self._clients[name].describe(timeout=HUNG_SECONDS)
            self._down.discard(name)
        return name not in self._down

    def _is_placed_by(self, gateway: str, shard: str) -> bool:
        with suppress(StitchError):
            shards = self._clients[gateway].describe(timeout=HUNG_SECONDS).shards
            return any(one.name == shard and one.serving for one in shards)
        return False

    def ask(self, stream: int) -> None:
        """Repeats requests until the kills are over, each at the gateway that answered the last one."""
        gateways = [*self._roles[GATEWAY]][:: 1 if stream % 2 else -1]
        for number in count(stream):
            if self.over.is_set():
                return
            self._ask_in_turn(number % len(self._requests), gateways)

    def _ask_in_turn(self, index: int, gateways: list[str]) -> None:
        """Sends a request that loses its gateway to the other one; each kill of a gateway may cost it one try."""
        kills = self._gateway_kills()
        for failures in count(1):
            if self._answer(index, gateways[0]):
                return
            gateways.reverse()
            if failures > self._gateway_kills() - kills + 1:
                self.tally.mistaken("lost", f"request {index} after {failures} tries")
                return

    def _gateway_kills(self) -> int:
        return sum(self.kills[name] for name in self._roles[GATEWAY])

    def _answer(self, index: int, gateway: str) -> bool:
        """Sends one request and records how its answer ends; False where the gateway was killed or is not back."""
        fields, started = self._requests[index], time.monotonic()
        arrivals, stream = [started], self._clients[gateway].stream(timeout=HUNG_SECONDS, **fields)
        try:
            for event in stream:
                if isinstance(event, Delta):
                    arrivals.append(time.monotonic())
            self._compare(index, stream.answer.token_ids)
        except Expired:
            self.tally.mistaken("hung", f"request {index} after {len(arrivals) - 1} texts")
        except Exhausted:
            self.tally.outcomes["refused"] += 1
        except StitchError as error:
            if gateway in self._down or self._killed_at.get(gateway, 0.0) > started:
                self.tally.outcomes["cut off with its gateway"] += 1
                return False
            self.tally.mistaken("lost", f"request {index}: {error}")
        self.tally.pauses.append(max((b - a for a, b in pairwise(arrivals)), default=0.0))
        return True

    def _compare(self, index: int, token_ids: tuple[int, ...]) -> None:
        expected = self._expected[index]
        if token_ids == expected:
            self.tally.outcomes["equal"] += 1
            return
        kind = "sampled" if self._requests[index]["temperature"] else "greedy"
        first = next((at for at, pair in enumerate(zip(token_ids, expected, strict=False)) if len(set(pair)) > 1), -1)
        self.tally.mistaken(f"different, {kind}", f"request {index} from token {first} on")


@contextmanager
def tiny_cluster(folder: Path) -> Iterator[Chaos]:
    """Random models of a few layers on three stages of two shards each."""
    file = write_tiny_cluster(folder, bottoms=[(0, 2), (0, 2), (2, 4), (2, 4)], tops=[(2, 4), (2, 4)])
    stages = {"first": ("bottom-0", "bottom-1"), "middle": ("bottom-2", "bottom-3"), "last": ("top-0", "top-1")}
    with running_cluster(file, folder / "run", gateways=2) as cluster:
        yield Chaos(cluster, {GATEWAY: (GATEWAY, OTHER_GATEWAY), **stages})


@contextmanager
def smollm2_cluster(folder: Path) -> Iterator[Chaos]:
    """The preset with a replica of each of its shards."""
    preset = load_cluster("smollm2")
    replicas = [one.model_copy(update={"name": f"{one.name}-replica"}) for one in preset.shards]
    compute = preset.compute.model_copy(update={"kv_tokens": KV_TOKENS})
    changed = preset.model_copy(update={"shards": (*preset.shards, *replicas), "compute": compute})
    written = RunFolder(folder / "file")
    written.begin(changed)
    stages = {one.name: (one.name, f"{one.name}-replica") for one in preset.shards}
    with running_cluster(written.cluster_file, folder / "run", gateways=2) as cluster:
        yield Chaos(cluster, {GATEWAY: (GATEWAY, OTHER_GATEWAY), **stages})


PAIRS = {"tiny": tiny_cluster, "smollm2": smollm2_cluster}


def measure(pair: str, kills: int) -> Chaos:
    """Runs the clients beside the kills, and a while longer, until every answer has ended."""
    with tempfile.TemporaryDirectory() as folder, PAIRS[pair](Path(folder)) as chaos:
        with ThreadPoolExecutor(STREAMS) as threads:
            asking = [threads.submit(chaos.ask, stream) for stream in range(STREAMS)]
            try:
                chaos.kill_and_restart(kills)
            finally:
                chaos.over.set()
            for one in asking:
                one.result()
        return chaos


def main() -> int:
    """Prints and writes what the clients saw; 1 where an answer was lost, hung or, greedy, different."""
    parser = flags(__doc__ or "")
    parser.add_argument("--kills", type=int, default=200, help="default: 200; --tiny: one of each role")
    parser.add_argument("--pair", choices=PAIRS, default="tiny", help="default: tiny")
    parsed = parser.parse_args()
    chaos = measure(parsed.pair, 4 if parsed.tiny else parsed.kills)
    tally = chaos.tally
    counts = dict(tally.outcomes)
    samples = {"longest pause of an answer, s": tally.pauses}
    write(Options(parsed.tiny, parsed.out), samples, {}, outcomes=counts, kills=chaos.kills, mistakes=tally.mistakes)
    print(f"  {chaos.kills.total()} kills: {dict(chaos.kills)}\n  {counts}")
    for mistake in tally.mistakes[:20]:
        print(f"  {mistake}")
    return int(any(tally.outcomes[name] for name in ("lost", "hung", "different, greedy")))


if __name__ == "__main__":
    sys.exit(main())
