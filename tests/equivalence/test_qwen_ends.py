"""`small` and `whole` of the preset `qwen2.5-coder` answer as `generate` of the 0.5B and the 1.5B does.

The servers have stopped before a whole model is loaded by `transformers`, so that memory holds one of them at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from stitch.client import Client
from stitch.cluster import load_cluster
from stitch.environment import cache_folder
from stitch_server.sources.resolve import resolve
from tests.support.processes import GATEWAY, Cluster, running_cluster
from tests.support.prompts import PROMPTS
from tests.support.running_streams import RunningStream, RunningStreams
from tests.support.waiting import becomes_true
from tests.support.whole_model import generated, greedy

PRESET = "qwen2.5-coder"
FILES = [
    Path(model.source).expanduser() for model in (load_cluster(PRESET).models.bottom, load_cluster(PRESET).models.top)
]
MISSING = [str(file) for file in FILES if not file.is_file()]

pytestmark = [
    # A quarter of an hour; `pytest -m qwen` runs them.
    pytest.mark.full,
    pytest.mark.qwen,
    pytest.mark.slow,
    pytest.mark.timeout(3_600),
    pytest.mark.skipif(bool(MISSING), reason=f"the weights are not there: {', '.join(MISSING)}"),
]

ANSWER_TOKENS = 48
ENDS = {"small": "top", "whole": "bottom"}
# Compared with `generate`, which is slow; the other answers are compared by one pass over prompt and answer.
GENERATED = PROMPTS[:2]
# Prompts that each rung has, beside all of those of the ends.
RUNG_PROMPTS = PROMPTS[:3]
WAIT_SECONDS, END_SECONDS = 120.0, 1_800.0
# A shard in float32, with embedding, head and KV.
BOTTOM_GB, TOP_GB = 8.5, 3.5


def skip_without_memory(gigabytes: float) -> None:
    """Skips where programs can't take that much without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6
    if available < gigabytes:
        pytest.skip(f"{available:.1f} GB are available, and the shards take {gigabytes:.1f}")


def write_cluster(folder: Path, name: str, routes: Sequence[str], shards: Sequence[Mapping[str, Any]]) -> Path:
    """The preset with these routes and shards."""
    preset = load_cluster(PRESET)
    fields = preset.model_dump(mode="json", exclude={"folder"}) | {"name": name, "shards": list(shards)}
    fields["routes"] = [route for route in fields["routes"] if route["name"] in routes]
    for route in fields["routes"]:
        route["stitch"] = route["stitch"] and str(preset.folder / route["stitch"])
    fields["compute"]["kv_tokens"] = 4_096
    file = folder / f"{name}.json"
    file.write_text(json.dumps(fields))
    return file


def shard(name: str, role: str, end: int) -> dict[str, Any]:
    return {"name": name, "role": role, "layers": [0, end], "address": "127.0.0.1:0"}


def request(prompt: str, route: str) -> dict[str, Any]:
    return {"prompt": prompt, "route": route, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}


@dataclass(frozen=True)
class Answers:
    """The token ids by prompt: of one request at a time, and of all at once over the kill of a shard."""

    alone: dict[str, list[int]] = field(default_factory=dict)
    at_once: dict[str, list[int]] = field(default_factory=dict)


def over_a_kill(cluster: Cluster, requests: Sequence[dict[str, Any]], shards: Sequence[str]) -> Sequence[RunningStream]:
    """All requests at once; one of `shards` with sessions is killed while they run."""
    with Client(cluster.gateway) as client:
        streams = RunningStreams(client, requests)
        assert becomes_true(lambda: sum(map(bool, streams.tokens)) > len(requests) // 2, WAIT_SECONDS)
        used = [name for name in shards if cluster.metric(name, "stitch_sessions_running")]
        cluster.kill(used[0])
        assert streams.ended(END_SECONDS)
    assert cluster.metric(GATEWAY, "stitch_replays_total") > 0
    assert [(one.error, one.finished) for one in streams.streams] == [(None, True)] * len(requests)
    return streams.streams


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """By route, of a cluster with all routes that loses a top shard."""
    skip_without_memory(BOTTOM_GB + 2 * TOP_GB)
    folder = tmp_path_factory.mktemp("qwen-ends")
    routes = [route.name for route in load_cluster(PRESET).routes]
    shards = [shard("bottom-0", "bottom", 28), shard("top-0", "top", 24), shard("top-1", "top", 24)]
    requests = [request(prompt, route) for route in ENDS for prompt in PROMPTS]
    requests += [request(prompt, route) for route in routes if route not in ENDS for prompt in RUNG_PROMPTS]
    found = {route: Answers() for route in ENDS}
    with running_cluster(write_cluster(folder, "all-routes", routes, shards), folder / "run") as cluster:
        assert becomes_true(cluster.all_serving, WAIT_SECONDS)
        for route, prompt in product(ENDS, PROMPTS):
            answer = cluster.generate(**request(prompt, route), timeout=END_SECONDS)
            found[route].alone[prompt] = list(answer.token_ids)
        for stream in over_a_kill(cluster, requests, ("top-0", "top-1")):
            if (ends := found.get(stream.fields["route"])) is not None:
                ends.at_once[stream.fields["prompt"]] = stream.token_ids
    return found


def whole_model(role: str) -> tuple[Any, PreTrainedModel]:
    """The tokenizer and the model."""
    models = load_cluster(PRESET).models
    folder = resolve((models.bottom if role == "bottom" else models.top).pinned_source, cache_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("route", ENDS)
def test_answers_equal_the_model_alone_and_with_all_routes_over_a_kill(route: str, answers: dict[str, Answers]) -> None:
    tokenizer, model = whole_model(ENDS[route])
    found = answers[route]
    for prompt, answer in found.alone.items():
        assert len(answer) == ANSWER_TOKENS
        assert answer == greedy(model, tokenizer(prompt)["input_ids"], answer), prompt
    for prompt in GENERATED:
        assert found.alone[prompt] == generated(model, tokenizer(prompt)["input_ids"], ANSWER_TOKENS)
    assert found.at_once == found.alone


def test_answers_of_the_bottom_alone_equal_the_model_over_a_kill(tmp_path: Path) -> None:
    skip_without_memory(2 * BOTTOM_GB)
    shards = [shard("bottom-0", "bottom", 28), shard("bottom-1", "bottom", 28)]
    with running_cluster(write_cluster(tmp_path, "bottom-alone", ["whole"], shards), tmp_path / "run") as cluster:
        assert becomes_true(cluster.all_serving, WAIT_SECONDS)
        requests = [request(prompt, "whole") for prompt in PROMPTS]
        streams = over_a_kill(cluster, requests, ("bottom-0", "bottom-1"))
    tokenizer, model = whole_model("bottom")
    for stream in streams:
        assert stream.token_ids == greedy(model, tokenizer(stream.fields["prompt"])["input_ids"], stream.token_ids)
