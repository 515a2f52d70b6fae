"""What does each kernel of this project give on a CPU? Whole passes in one process, by kernels and by libraries.

Two models in four formats. All ways of computing take turns; shards and their links are left out, so that nothing but
passes is compared, and attention can be taken from its kernel, which no cluster file does. Beside the time of each
sample stands the CPU time of all threads, which hardly depends on who else uses the cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.clusters import preset, prompt
from benchmarks.pairs_of_kernels import ATTENTION, CALLS, INT8, LAYERS, LIBRARIES, SESSIONS, WIDENED, Pair, pairs
from benchmarks.report import Options, options, ratio, write
from stitch.cluster import Cluster
from stitch.local.running import import_models
from stitch_server.processor import has_tiles, knows_dots

MODELS = ("smollm2", "qwen2.5-coder")
FORMATS: Mapping[str, Mapping[str, str]] = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {},
}
# Enough to see that it runs.
TINY_FORMATS = ("int8", "int4")
CONTEXT_TOKENS, PROMPT_TOKENS = 128, 512
UNITS = ("ms", "CPU ms")
# What is divided by what: a path's own gain is that over the way which is the same but for it.
COMPARED = (
    (LAYERS, LIBRARIES),
    (LAYERS, CALLS),
    (CALLS, ATTENTION),
    (LAYERS, ATTENTION),
    (ATTENTION, LIBRARIES),
    (LAYERS, WIDENED),
    (LAYERS, INT8),
)
# Ways that are so slow that a few samples have to do.
SLOW = (WIDENED,)
SLOW_ROUNDS = 2
# A model in one format is measured for so many seconds, and at least and at most in so many rounds.
SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 60.0, 4, 24
# The first rounds don't count: runners try how passes are best spread over threads.
WARM_UP = 2


def measure(options: Options) -> None:
    """Samples are kept after each model and format, in case that a run ends early."""
    samples: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    machine = {"cpu": _cpu(), "amx": has_tiles(), "vnni": knows_dots()}
    for model in MODELS[:1] if options.tiny else MODELS:
        if not _is_here(preset(model)):
            print(f"  {model} is left out: its files are not on this machine")
            continue
        import_models(preset(model), lambda name, folder: None)
        for name in TINY_FORMATS if options.tiny else FORMATS:
            found = _measured(pairs(preset(model, **FORMATS[name])), options.tiny)
            samples |= {f"{model}, {name}, {key}": values for key, values in found.items()}
            ratios |= {f"{model}, {name}, {key}": value for key, value in _ratios(found).items()}
            with redirect_stdout(None):
                write(options, samples, ratios, **machine)
            print(f"  {model} in {name} is measured", flush=True)
    write(options, samples, ratios, **machine)


def _is_here(cluster: Cluster) -> bool:
    """Whether its files are on this machine, or can be had from a package index."""
    sources = [cluster.model_source(role) for role in ("bottom", "top")]
    return all(source.startswith("pypi:") or Path(source).expanduser().exists() for source in sources)


def _measured(ways: Mapping[str, Pair], tiny: bool) -> dict[str, list[float]]:
    """By workload and way of computing, time and CPU time in ms."""
    samples: dict[str, list[float]] = {}
    warm_up, most, seconds = (1, 1, 0.0) if tiny else (WARM_UP, MOST_ROUNDS, SECONDS)
    started = time.perf_counter()
    for index in range(-warm_up, most):
        if index == 0:
            started = time.perf_counter()
        if index >= min(FEWEST_ROUNDS, most) and time.perf_counter() - started > seconds:
            break
        for way, pair in _in_turns(ways, index):
            for workload, spent in _sample(pair, index, tiny or way in SLOW).items():
                for unit, milliseconds in zip(UNITS, spent, strict=True) if index >= 0 else ():
                    samples.setdefault(f"{workload}, {way}, {unit}", []).append(milliseconds)
    return samples


def _in_turns(ways: Mapping[str, Pair], index: int) -> list[tuple[str, Pair]]:
    """Each round begins with another one; slow ones are in the first rounds alone."""
    found = [(way, pair) for way, pair in ways.items() if way not in SLOW or 0 <= index < SLOW_ROUNDS]
    begin = index % len(found)
    return found[begin:] + found[:begin]


def _sample(pair: Pair, index: int, short: bool) -> dict[str, tuple[float, float]]:
    # While it warms up, more passes of the same kind let threads be tried.
    steps = 2 if short else 12 if index < 0 else 8
    return {
        "1 session, a token": _decode(pair, 1, steps, index),
        f"{SESSIONS} sessions, a step": _decode(pair, SESSIONS, steps, index),
        f"TTFT at {PROMPT_TOKENS}": _prefill(pair, index),
    }


def _decode(pair: Pair, sessions: int, steps: int, index: int) -> tuple[float, float]:
    """Of a step in which each session gets a token, after a context of noise; the mean of some steps."""
    crowd = [
        pair.session(prompt(CONTEXT_TOKENS + 1, index * SESSIONS + one), CONTEXT_TOKENS) for one in range(sessions)
    ]
    taken, used = _milliseconds(lambda: pair.decode(crowd, steps))
    return taken / steps, used / steps


def _prefill(pair: Pair, index: int) -> tuple[float, float]:
    """Of a prompt, in passes as large as those of a shard."""
    session, chunk = pair.session(prompt(PROMPT_TOKENS, index)), preset().compute.prefill_tokens
    return _milliseconds(lambda: pair.prefill(session, chunk))


def _milliseconds(call: Callable[[], None]) -> tuple[float, float]:
    """How long it takes, and how much of the CPU all threads take for it."""
    started, used = time.perf_counter(), time.process_time()
    call()
    return (time.perf_counter() - started) * 1e3, (time.process_time() - used) * 1e3


def _ratios(samples: Mapping[str, list[float]]) -> dict[str, float]:
    """Of all pairs of ways that were measured, in each workload."""
    workloads = dict.fromkeys(name.rsplit(", ", 2)[0] for name in samples)
    return {
        f"{workload}, {candidate} / {baseline}, {unit}": ratio(
            samples[f"{workload}, {candidate}, {unit}"], samples[f"{workload}, {baseline}, {unit}"]
        )
        for workload in workloads
        for candidate, baseline in COMPARED
        for unit in UNITS
        if f"{workload}, {baseline}, {unit}" in samples
    }


def _cpu() -> str:
    """The model's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    measure(options(__doc__ or ""))
