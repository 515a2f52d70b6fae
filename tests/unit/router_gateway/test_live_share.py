"""Tests that a calibrated router keeps its budget: trained, calibrated and live on different prompts.

Where $STITCH_ROUTING_DATA names a folder with the public labels that docs/routing.md has figures of, those are taken,
else made-up ones.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stitch.v1 import inference_pb2
from stitch_training.calibration import calibrate_router
from stitch_training.labels import read_json_lines
from stitch_training.router import train
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard
from tests.support.labelled_prompts import rows, write
from tests.unit.router_gateway.conftest import Reach, Reached

pytestmark = pytest.mark.slow

ROUTES = ("weak", "strong")
AT_ONCE = 16
PUBLIC = os.environ.get("STITCH_ROUTING_DATA")
MADE_UP = 5_000
JUDGED = 2_000 if PUBLIC else 1_000
TASKS_PAIR = {"weak": "qwen2.5-7b-instruct", "strong": "llama-3.1-nemotron-51b-instruct"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Disjoint rows for training (one half), calibration and live use, and a router trained on the first."""
    folder = tmp_path_factory.mktemp("live-share")
    labelled = _public(Path(PUBLIC)) if PUBLIC else rows(MADE_UP)
    random.Random(0).shuffle(labelled)
    half = len(labelled) // 2
    write(folder / "training.jsonl", labelled[:half])
    write(folder / "calibration.jsonl", labelled[half:-JUDGED])
    write(folder / "live.jsonl", labelled[-JUDGED:])
    train([folder / "training.jsonl"], folder / "router.safetensors", ROUTES, {}, count=2)
    return folder


@pytest.mark.parametrize("budget", [0.2, 0.3, 0.5] if PUBLIC else [0.3])
async def test_live_share_is_the_budget(folder: Path, reach: Reach, budget: float) -> None:
    router, thresholds = folder / "router.safetensors", folder / f"thresholds-{budget}.json"
    calibrated, _ = calibrate_router(router, [folder / "calibration.jsonl"], budget, None, None)
    calibrated.write(thresholds)
    prompts = [row["prompt"] for _, row in read_json_lines(folder / "live.jsonl")]
    assert len(prompts) == JUDGED
    bottom, top = FakeShard("bottom-0", "bottom", tokens("yes")), FakeShard("top-0", "top")
    for shard in (bottom, top):
        shard.context_tokens = shard.kv_capacity_tokens = shard.free_kv_tokens = 10_000_000
    cluster = {"router": str(router), "router_thresholds": str(thresholds)}
    async with reach(bottom, top, cluster=cluster) as gateway:
        await _ask(gateway, prompts)
        share = gateway.metric("stitch_route_share", route="strong") or 0.0
        cost, drift = (gateway.metric(f"stitch_route_{name}") or 0.0 for name in ("mean_cost", "drift"))
    print(f"budget {budget}: live share {share:.4f}, {share / budget - 1:+.1%}, drift {drift:.3f}")
    assert share == pytest.approx(sum(request.route == "strong" for request in bottom.requests) / JUDGED)
    assert cost == pytest.approx(share)
    assert cost == pytest.approx(budget, rel=0.1)
    assert drift < 0.1


async def _ask(gateway: Reached, prompts: list[str]) -> None:
    turns = iter(prompts)

    async def work() -> None:
        for prompt in turns:
            await gateway.generate(prompt, sampling=inference_pb2.Sampling(max_tokens=1))

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


def _public(data: Path) -> list[dict[str, Any]]:
    """The rows of all sets that label a weak and a strong model."""
    found = []
    for path in sorted(data.glob("routing_*.jsonl.gz")):
        for _, row in read_json_lines(path):
            scores: Mapping[str, float] = row.get("scores", row)
            named = {route: scores.get(TASKS_PAIR[route] if "scores" in row else route) for route in ROUTES}
            if None not in named.values():
                found.append({"prompt": row["prompt"], "task": f"{path.name} {row['task']}", "routes": named})
    return found
