"""Both models alone on real processes: their answers go on over a kill, and every program shows their routes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stitch.cli.main import main
from stitch.client import Client
from stitch.cluster import load_cluster
from tests.support.exact_answers import ExactAnswers
from tests.support.processes import GATEWAY, Cluster, running_cluster
from tests.support.running_streams import RunningStreams
from tests.support.tiny_cluster import ENDS, WHOLE_BOTTOM, WHOLE_TOP, write_tiny_cluster
from tests.support.waiting import becomes_true

ROLES = {"small": ("top-0", "top-1"), "whole": ("bottom-0", "bottom-1")}
# The answer whose shard is killed is long enough that the others have tokens by then.
PROMPT, TOKENS, LONG_TOKENS = "stitch two models", 80, 1_900
WAIT_SECONDS = 30.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("pair")
    layers: dict[str, Any] = {"bottoms": [WHOLE_BOTTOM] * 2, "tops": [WHOLE_TOP] * 2}
    file = write_tiny_cluster(folder, name="both-ends", **layers, with_ends=True)
    with running_cluster(file, tmp_path_factory.mktemp("run")) as running:
        yield running


@pytest.fixture(scope="module")
def exact(cluster: Cluster) -> ExactAnswers:
    return ExactAnswers(Path(load_cluster(str(cluster.file)).model_source("bottom")).parent)


def running(cluster: Cluster, shard: str) -> int:
    return int(cluster.metric(shard, "stitch_sessions_running"))


@pytest.mark.parametrize("route", ROLES)
def test_answers_go_on_after_a_kill_as_the_models_give_them(cluster: Cluster, exact: ExactAnswers, route: str) -> None:
    assert becomes_true(cluster.all_serving, WAIT_SECONDS)
    before = cluster.metric(GATEWAY, "stitch_replays_total")
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True}
    sampled = {"temperature": 0.7, "seed": 5}
    with Client(cluster.gateway) as client:
        end = RunningStreams(client, [{**fields, "route": route, "max_tokens": LONG_TOKENS}])
        assert becomes_true(lambda: end.have_more_than([0]), WAIT_SECONDS)
        [used] = [name for name in ROLES[route] if running(cluster, name)]
        others = RunningStreams(client, [{**fields, "route": other, **sampled} for other in ENDS])
        assert becomes_true(lambda: any(others.tokens), WAIT_SECONDS)
        cluster.kill(used)
        assert end.ended(WAIT_SECONDS)
        assert others.ended(WAIT_SECONDS)
    cluster.restart(used)
    for stream in (*end.streams, *others.streams):
        assert (stream.error, stream.finished, len(stream.token_ids)) == (None, True, stream.fields["max_tokens"])
        chosen = {name: stream.fields[name] for name in sampled if name in stream.fields}
        assert exact.continuation(stream.fields["route"], PROMPT, stream.token_ids, **chosen) == stream.token_ids
    assert cluster.metric(GATEWAY, "stitch_replays_total") > before
    shards = [*ROLES["small"], *ROLES["whole"]]
    assert becomes_true(lambda: not any(running(cluster, name) for name in shards), WAIT_SECONDS)


def test_description_and_status_show_both_ends(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    routes = {route.name: route for route in cluster.client.describe().routes}
    assert next(iter(routes)) == "small"
    assert (routes["small"].bottom_layers, routes["small"].HasField("top_from")) == (0, True)
    assert (routes["whole"].bottom_layers, routes["whole"].HasField("top_from")) == (5, False)
    assert all(route.parameters for route in routes.values())
    assert main(["status", "--gateway", cluster.gateway]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {words[0]: words for words in lines if words and words[0] in ROLES}
    assert [word for word in rows["small"] if "–" in word] == ["–", "0–3"]
    assert [word for word in rows["whole"] if "–" in word] == ["0–4", "–"]


def test_stages_of_an_answer_are_those_of_its_chain(cluster: Cluster) -> None:
    stages = {route: list(cluster.generate("stitch", route=route, max_tokens=2).stages) for route in ROLES}
    assert stages["whole"] == ["route", "queue", "bottom_prefill", "sample"]
    assert stages["small"] == ["route", "queue", "wire", "stitch", "top_prefill", "sample"]


def test_router_chooses_among_all_routes(cluster: Cluster) -> None:
    chosen = {cluster.generate("Hi!", threshold=threshold, max_tokens=1).route for threshold in (0.0, 1.0)}
    assert chosen == {"small", "whole"}
