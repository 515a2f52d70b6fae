"""What does the hop cost? One stream over two shards, against one process and against a bare TCP round trip."""

from __future__ import annotations

from statistics import median

from benchmarks.clusters import first_shard, preset, prompt, run, running
from benchmarks.one_process import OneProcess
from benchmarks.report import Options, options, ratio, write
from benchmarks.tcp_echo import tcp_echo

# The hidden state of a token in float32, and about the size of the reply with a sampled token.
HIDDEN_BYTES, REPLY_BYTES = 576 * 4, 32
TRIPS = 200


async def measure(options: Options) -> None:
    """Samples decode after 64 prompt tokens, and TTFT at 512."""
    rounds, decoded = (2, 8) if options.tiny else (12, 48)
    cluster = preset()
    whole = OneProcess(cluster)
    samples: dict[str, list[float]] = {}
    with running(cluster) as local, tcp_echo(HIDDEN_BYTES, REPLY_BYTES) as server, server.connected() as echo:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                one, two = whole.generate(prompt(64), decoded), await shard.generate(prompt(64, index), decoded)
                long_one, long_two = whole.generate(prompt(512), 1), await shard.generate(prompt(512, index), 1)
                # The first round warms up.
                if index:
                    samples.setdefault("decode, one process, ms per token", []).append(one.token_ms)
                    samples.setdefault("decode, two shards, ms per token", []).append(two.token_ms)
                    samples.setdefault("TTFT at 512, one process, ms", []).append(long_one.ttft_ms)
                    samples.setdefault("TTFT at 512, two shards, ms", []).append(long_two.ttft_ms)
                    trips = [echo.seconds() * 1e3 for _ in range(TRIPS)]
                    samples.setdefault("bare round trip over TCP, ms", []).append(median(trips))
    one_token, two_token, one_first, two_first, bare = samples.values()
    ratios = {
        "decode": ratio(two_token, one_token),
        "TTFT at 512": ratio(two_first, one_first),
        "hop / bare round trip": (median(two_token) - median(one_token)) / median(bare),
    }
    write(options, samples, ratios)


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
