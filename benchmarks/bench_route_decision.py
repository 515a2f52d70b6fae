"""How long does a route decision take? The learned router against the heuristic one, in alternation on the same texts.

It samples the CPU time of one thread, which other processes hardly lengthen, and the wall time. The learned router has
random weights and the size of one that was trained on 16,000 prompts.
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks.report import Options, options, ratio, write
from router_gateway.routing.heuristic import HeuristicRouter
from router_gateway.routing.learned.artifact import RouterArtifact, fingerprint_of
from router_gateway.routing.learned.features import BUCKETS, SURFACE_FEATURES
from router_gateway.routing.learned.model import LearnedModel
from router_gateway.routing.learned.router import LearnedRouter
from router_gateway.routing.router import Ladder, Query, Router

WORDS = 130_000
SOURCES = 3
TOPICS = 72
ROUTES = ("weak", "strong")
# About four characters per token.
CHARACTERS = {"20 tokens": 80, "200 tokens": 800, "2,000 tokens": 8_000, "100,000 characters": 100_000}
PIECES = [
    "stitch",
    "route",
    "the",
    "layers",
    "of",
    "larger",
    "model,",
    "its",
    "prompt?",
    "What",
    "is",
    "(faster)",
    "\n",
]


def random_router(seed: int = 0) -> LearnedRouter:
    """A router of random weights with the size of a real one."""
    draw = np.random.default_rng(seed)
    columns, surface = SOURCES + TOPICS + SOURCES * len(ROUTES), len(SURFACE_FEATURES)

    def tensor(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return draw.random(shape).astype(np.float32) + np.float32(0.1)

    model = LearnedModel(
        routes=ROUTES,
        sources=tuple(f"source-{number}" for number in range(SOURCES)),
        buckets=np.sort(draw.choice(BUCKETS, WORDS, replace=False)).astype(np.int32),
        idf=tensor(WORDS, 1 + SOURCES),
        weights=tensor(WORDS, columns).astype(np.float16),
        surface_mean=tensor(1 + SOURCES, surface),
        surface_scale=tensor(1 + SOURCES, surface),
        surface_weights=tensor(surface, columns),
        bias=tensor(columns),
        centre=tensor(SOURCES * len(ROUTES)),
        topic_source=np.sort(np.arange(TOPICS) % SOURCES).astype(np.int32),
        topic_weights=tensor(TOPICS, len(ROUTES)),
        source_weights=tensor(SOURCES),
    )
    return LearnedRouter(
        RouterArtifact(model, (0.1,), tuple(np.linspace(0, 1, 101).tolist()), {}, fingerprint_of(model))
    )


def text_of(characters: int, seed: int) -> str:
    """Words and numbers, different for every seed."""
    draw = np.random.default_rng(seed)
    pieces = draw.choice(PIECES, characters // 4)
    numbers = draw.integers(9, size=len(pieces))
    return " ".join(f"{piece}{number}" for piece, number in zip(pieces, numbers, strict=True))[:characters]


def decision_ms(router: Router, text: str) -> tuple[float, float]:
    """Milliseconds of one route decision: CPU time and wall time."""
    started, started_cpu = time.perf_counter(), time.thread_time()
    router.decide(Query((text,), ROUTES))
    return 1e3 * (time.thread_time() - started_cpu), 1e3 * (time.perf_counter() - started)


def measure(chosen: Options) -> None:
    """Alternates the two routers over the same texts."""
    routers: dict[str, Router] = {"learned": random_router(), "heuristic": HeuristicRouter(Ladder())}
    samples: dict[str, list[float]] = {}
    for size, characters in CHARACTERS.items():
        for seed in range(20 if chosen.tiny else 1_000):
            for name, router in routers.items():
                cpu, wall = decision_ms(router, text_of(characters, seed))
                samples.setdefault(f"{name}, {size}, cpu", []).append(cpu)
                samples.setdefault(f"{name}, {size}, wall", []).append(wall)
    ratios = {size: ratio(samples[f"learned, {size}, cpu"], samples[f"heuristic, {size}, cpu"]) for size in CHARACTERS}
    p99 = {name: float(np.quantile(values, 0.99)) for name, values in samples.items()}
    write(chosen, samples, ratios, p99_milliseconds=p99)
    print(*(f"p99 {name}: {value:.3f} ms" for name, value in p99.items()), sep="\n")


if __name__ == "__main__":
    measure(options("How long does a route decision take?"))
