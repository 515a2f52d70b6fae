"""Does the pipeline stay full? The busy time of both shards under 16 sessions in two micro-batches, and a timeline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, write
from benchmarks.steps import Step, step_logs

SESSIONS = 16
SHOWN_SECONDS = 1.0


async def measure(options: Options) -> None:
    """Keeps 16 streams running; the slower shard is the one that the other waits for."""
    warm_up, seconds = (1.0, 2.0) if options.tiny else (5.0, 30.0)
    with step_logs() as logs, running(preset(num_micro_batches=2)) as local:
        async with first_shard(local) as shard:
            streams = [asyncio.create_task(_stream(shard, number)) for number in range(SESSIONS)]
            await asyncio.sleep(warm_up)
            started = time.perf_counter()
            await asyncio.sleep(seconds)
            ended = time.perf_counter()
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        steps = logs.read()
    busy = {name: _busy(logged, started, ended) for name, logged in steps.items()}
    samples = {
        f"{name}, ms per step": [one.milliseconds for one in logged if started <= one.started <= ended]
        for name, logged in steps.items()
    }
    write(options, samples, {f"{name} busy": share for name, share in busy.items()})
    middle = (started + ended) / 2
    _draw(steps, busy, middle, middle + SHOWN_SECONDS, options.out.with_suffix(".png"))


async def _stream(shard: FirstShard, number: int) -> None:
    for index in count():
        await shard.generate(prompt(128, number * 100 + index), 64 + 7 * number)


def _busy(steps: Sequence[Step], started: float, ended: float) -> float:
    inside = (max(0.0, min(step.ended, ended) - max(step.started, started)) for step in steps)
    return sum(inside) / (ended - started)


def _draw(
    steps: Mapping[str, Sequence[Step]], busy: Mapping[str, float], started: float, ended: float, file: Path
) -> None:
    figure = Figure(figsize=(10, 1 + len(steps)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for row, logged in enumerate(steps.values()):
        shown = [step for step in logged if step.ended > started and step.started < ended]
        for prefills, color in ((False, "C0"), (True, "C1")):
            kind = [step for step in shown if (step.tokens > step.sessions) == prefills]
            bars = [(step.started - started, step.ended - step.started) for step in kind]
            axes.broken_barh(bars, (row - 0.4, 0.8), color=color, edgecolor="white", linewidth=0.5)
    axes.set_yticks(range(len(steps)), [f"{name}\n{busy[name]:.0%} busy" for name in steps])
    axes.set(
        xlabel="seconds", xlim=(0, ended - started), title=f"{SESSIONS} sessions; decode blue, with prefill orange"
    )
    axes.invert_yaxis()
    figure.savefig(file)


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
