"""What do the kernels for CPUs gain? Measures whole passes in one process, by kernels and by libraries.

Measures two models in four weight formats. The variants of `kernel_variants.py` alternate. Shards and the links between
them are left out, so that only passes are compared. For each sample the benchmark writes the elapsed time, and the CPU
time of all threads, which depends less on other programs that use the cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.clusters import preset, prompt
from benchmarks.kernel_variants import (
    ATTENTION_ALONE,
    DEQUANTIZED,
    INT8,
    LIBRARIES,
    SESSIONS,
    SINGLE_CALLS,
    WHOLE_LAYERS,
    Variant,
    variants,
)
from benchmarks.report import Options, options, ratio, write
from stitch.cluster import ClusterConfig
from stitch.local.cluster import import_models
from stitch_server.cpu import has_amx, has_vnni

# The small model first, so that an interrupted run has all of its formats.
MODELS = ("smollm2", "qwen2.5-coder")
FORMATS: Mapping[str, Mapping[str, str]] = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {},
}
TINY_FORMATS = ("int8", "int4")
CONTEXT_TOKENS, PROMPT_TOKENS = 128, 512
UNITS = ("ms", "CPU ms")
# Candidate and baseline of each ratio. What one path gains is the ratio of two variants that differ in it alone.
COMPARED = (
    (WHOLE_LAYERS, LIBRARIES),
    (WHOLE_LAYERS, SINGLE_CALLS),
    (SINGLE_CALLS, ATTENTION_ALONE),
    (WHOLE_LAYERS, ATTENTION_ALONE),
    (ATTENTION_ALONE, LIBRARIES),
    (WHOLE_LAYERS, DEQUANTIZED),
    (WHOLE_LAYERS, INT8),
)
# Variants that are measured in the first SLOW_ROUNDS rounds only.
SLOW_VARIANTS = (DEQUANTIZED,)
SLOW_ROUNDS = 2
# A model in one format is measured for this many seconds, but in no fewer and no more rounds than these. With loading,
# both models take about 20 minutes on two quiet cores.
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 30.0, 3, 12
# Rounds that are not sampled: in them each runner tries how many threads and micro-batches are fastest.
WARM_UP_ROUNDS = 2
# Decode steps of one sample, of a warm-up round (more trials), and of a slow variant or a tiny run.
STEPS, WARM_UP_STEPS, FEW_STEPS = 8, 12, 2


def measure(options: Options) -> None:
    """Measures all models and formats; writes the samples after each of them, in case the run is interrupted."""
    samples: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    machine = {"cpu": _cpu_model(), "amx": has_amx(), "vnni": has_vnni()}
    for model in MODELS[:1] if options.tiny else MODELS:
        if not _is_available(preset(model)):
            print(f"  {model} is skipped: its files are not on this machine")
            continue
        import_models(preset(model), lambda name, folder: None)
        for name in TINY_FORMATS if options.tiny else FORMATS:
            measured = _measure_variants(variants(preset(model, **FORMATS[name])), options.tiny)
            samples |= {f"{model}, {name}, {key}": values for key, values in measured.items()}
            ratios |= {f"{model}, {name}, {key}": value for key, value in _ratios(measured).items()}
            with redirect_stdout(None):
                write(options, samples, ratios, **machine)
            print(f"  {model} in {name} is measured", flush=True)
    write(options, samples, ratios, **machine)


def _is_available(cluster: ClusterConfig) -> bool:
    """Whether the models' files are on this machine, or come from a package index."""
    sources = [cluster.model_source(role) for role in ("bottom", "top")]
    return all(source.startswith("pypi:") or Path(source).expanduser().exists() for source in sources)


def _measure_variants(found: Mapping[str, Variant], tiny: bool) -> dict[str, list[float]]:
    """Elapsed and CPU milliseconds by workload, variant and unit."""
    samples: dict[str, list[float]] = {}
    warm_up, max_rounds, seconds = (1, 1, 0.0) if tiny else (WARM_UP_ROUNDS, MAX_ROUNDS, SECONDS)
    started = time.perf_counter()
    for index in range(-warm_up, max_rounds):
        if index == 0:
            started = time.perf_counter()
        if index >= min(MIN_ROUNDS, max_rounds) and time.perf_counter() - started > seconds:
            break
        for name, variant in _alternated(found, index):
            for workload, spent in _sample(variant, index, tiny or name in SLOW_VARIANTS).items():
                for unit, milliseconds in zip(UNITS, spent, strict=True) if index >= 0 else ():
                    samples.setdefault(f"{workload}, {name}, {unit}", []).append(milliseconds)
    return samples


def _alternated(found: Mapping[str, Variant], index: int) -> list[tuple[str, Variant]]:
    """The variants of one round; each round starts with another one."""
    with_slow = 0 <= index < SLOW_ROUNDS
    chosen = [(name, variant) for name, variant in found.items() if name not in SLOW_VARIANTS or with_slow]
    start = index % len(chosen)
    return chosen[start:] + chosen[:start]


def _sample(variant: Variant, index: int, short: bool) -> dict[str, tuple[float, float]]:
    """Elapsed and CPU milliseconds by workload, in the round `index`."""
    steps = FEW_STEPS if short else WARM_UP_STEPS if index < 0 else STEPS
    return {
        "1 session, a token": _decode(variant, 1, steps, index),
        f"{SESSIONS} sessions, a step": _decode(variant, SESSIONS, steps, index),
        f"TTFT at {PROMPT_TOKENS}": _prefill(variant, index),
    }


def _decode(variant: Variant, num_sessions: int, steps: int, index: int) -> tuple[float, float]:
    """The mean of `steps` steps, in each of which every session gets a token, after a context of noise."""
    sessions = [
        variant.session(prompt(CONTEXT_TOKENS + 1, index * SESSIONS + number), CONTEXT_TOKENS)
        for number in range(num_sessions)
    ]
    elapsed, cpu = _milliseconds(lambda: variant.decode(sessions, steps))
    return elapsed / steps, cpu / steps


def _prefill(variant: Variant, index: int) -> tuple[float, float]:
    """The prefill of one prompt, in chunks as large as those of a shard, and its first token."""
    session, chunk = variant.session(prompt(PROMPT_TOKENS, index)), preset().batching.max_prefill_chunk
    return _milliseconds(lambda: variant.prefill(session, chunk))


def _milliseconds(call: Callable[[], None]) -> tuple[float, float]:
    """Elapsed time of `call`, and the CPU time of all threads meanwhile."""
    started, cpu_started = time.perf_counter(), time.process_time()
    call()
    return (time.perf_counter() - started) * 1e3, (time.process_time() - cpu_started) * 1e3


def _ratios(samples: Mapping[str, list[float]]) -> dict[str, float]:
    """The ratios in COMPARED of the variants that were measured, in each workload and unit."""
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


def _cpu_model() -> str:
    """The CPU's model name, on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    measure(options(__doc__ or ""))
