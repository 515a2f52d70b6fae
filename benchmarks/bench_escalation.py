"""What do kept hidden states save when a conversation moves to a costlier route?

The next turn, with states kept at the cheaper route's cut and with none: two clusters in alternation. TTFT, and the CPU
time of the shards up to the first token, which other programs on the machine hardly change.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack

import psutil

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, flags, ratio, write
from stitch.local.cluster import LocalCluster

# Of the answer on the cheaper route, of the next question, and of the next answer.
ANSWER_TOKENS, QUESTION_TOKENS, NEXT_TOKENS = 32, 24, 8
KINDS = ("kept", "dropped")


class Conversations:
    """Conversations with the shards of one cluster."""

    def __init__(self, local: LocalCluster, shard: FirstShard, routes: tuple[str, str]) -> None:
        self._shards = [psutil.Process(local.processes[one.name].pid) for one in local.cluster.shards]
        self._shard = shard
        self._routes = routes

    async def escalate(self, tokens: int, seed: int) -> tuple[dict[str, float], list[int]]:
        """The figures and the tokens of the first turn on the second route, after `tokens` on the first one."""
        begin = prompt(tokens - ANSWER_TOKENS, seed)
        answer = await self._shard.generate(begin, ANSWER_TOKENS, self._routes[0])
        conversation = [*begin, *answer.token_ids, *prompt(QUESTION_TOKENS, seed + 500)]
        started, ended = self._cpu_seconds(), list[float]()
        turn = await self._shard.generate(
            conversation, NEXT_TOKENS, self._routes[1], arrived=lambda: ended.append(self._cpu_seconds())
        )
        return {"TTFT": turn.ttft_ms, "CPU time": (ended[0] - started) * 1e3}, turn.token_ids

    def _cpu_seconds(self) -> float:
        return sum(sum(one.cpu_times()[:2]) for one in self._shards)


async def measure(
    options: Options, name: str, quantization: str, routes: tuple[str, str], tokens: int, rounds: int
) -> None:
    """Samples conversations of `tokens` tokens, none of which begins as another one."""
    samples: dict[str, list[float]] = {}
    unequal = 0
    clusters = [
        preset(name, quantization=quantization),
        preset(name, quantization=quantization, state_cache_bytes=0),
    ]
    with ExitStack() as processes:
        local = [processes.enter_context(running(one)) for one in clusters]
        async with AsyncExitStack() as links:
            talks = {
                kind: Conversations(one, await links.enter_async_context(first_shard(one)), routes)
                for kind, one in zip(KINDS, local, strict=True)
            }
            for one in talks.values():
                await one.escalate(tokens // 8, seed=0)
            for index in range(1, rounds + 1):
                kinds = KINDS if index % 2 else KINDS[::-1]
                turns = {kind: await talks[kind].escalate(tokens, 1000 * index) for kind in kinds}
                unequal += turns["kept"][1] != turns["dropped"][1]
                for kind in KINDS:
                    for figure, value in turns[kind][0].items():
                        samples.setdefault(f"{figure}, states {kind}, ms", []).append(value)
    ratios = {
        f"{figure}, {' to '.join(routes)}, kept / dropped": ratio(
            *(samples[f"{figure}, states {kind}, ms"] for kind in KINDS)
        )
        for figure in ("TTFT", "CPU time")
    }
    write(options, samples, ratios, tokens=tokens, unequal_answers=unequal)
    print(f"  answers that differ: {unequal} of {rounds}")


if __name__ == "__main__":
    parser = flags(__doc__ or "")
    parser.add_argument("--preset", default="smollm2")
    parser.add_argument("--quantization", default="none", help="as in [compute]")
    parser.add_argument("--routes", nargs=2, metavar="ROUTE", default=("weak", "strong"), help="before and after")
    parser.add_argument("--tokens", type=int, default=2_000, help="of the conversation before the next turn")
    parser.add_argument("--rounds", type=int, default=9)
    parsed = parser.parse_args()
    rounds = 1 if parsed.tiny else parsed.rounds
    options = Options(parsed.tiny, parsed.out)
    run(measure(options, parsed.preset, parsed.quantization, tuple(parsed.routes), parsed.tokens, rounds))
