"""What does a grammar cost? Time per token of 16 sessions with a JSON schema each, and of 16 without."""

from __future__ import annotations

import asyncio
import json

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, ratio, write
from stitch.v1 import shard_pb2

SESSIONS = 16


async def measure(options: Options) -> None:
    """Alternates rounds with and without grammars; the first round of each is not counted."""
    rounds, tokens = (1, 8) if options.tiny else (8, 64)
    plain: list[float] = []
    constrained: list[float] = []
    with running(preset()) as local:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                without = await _token_ms(shard, index, tokens, None)
                within = await _token_ms(shard, index, tokens, _grammar(index))
                if index:
                    plain += without
                    constrained += within
    samples = {"without, ms per token": plain, "with a grammar, ms per token": constrained}
    write(options, samples, {"with / without": ratio(constrained, plain)})


def _grammar(index: int) -> shard_pb2.Grammar:
    """An object with a text that is longer than the answer, so that no session ends before the others."""
    schema = {
        "type": "object",
        "properties": {f"note {index}": {"type": "string", "minLength": 4_000}},
        "required": [f"note {index}"],
        "additionalProperties": False,
    }
    return shard_pb2.Grammar(json_schema=json.dumps(schema))


async def _token_ms(shard: FirstShard, index: int, tokens: int, grammar: shard_pb2.Grammar | None) -> list[float]:
    prompts = [prompt(32, index * SESSIONS + session) for session in range(SESSIONS)]
    timed = await asyncio.gather(*(shard.generate(ids, tokens, grammar=grammar) for ids in prompts))
    return [one.token_ms for one in timed]


if __name__ == "__main__":
    run(measure(options(__doc__)))
