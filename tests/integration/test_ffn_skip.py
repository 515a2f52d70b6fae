"""A route that leaves out FFNs on real processes: one text alone, in a batch, over a kill, and the same described."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stitch.client import Client
from stitch.cluster import load_cluster
from stitch.errors import InvalidRequest
from tests.support.byte_tokenizer import tokens
from tests.support.processes import GATEWAY, Cluster, running_cluster
from tests.support.running_streams import RunningStreams
from tests.support.tiny_cluster import ENDS, WHOLE_BOTTOM, WHOLE_TOP, write_tiny_cluster
from tests.support.tiny_gates import ROUTE, SkippingReference, add_skipping_route
from tests.support.waiting import becomes_true

PROMPT, TOKENS, LONG_TOKENS = "stitch two models", 80, 900
WAIT_SECONDS = 30.0
BOTTOMS = ("bottom-0", "bottom-1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder, layers = tmp_path_factory.mktemp("pair"), {"bottoms": [WHOLE_BOTTOM] * 2, "tops": [WHOLE_TOP]}
    file = add_skipping_route(write_tiny_cluster(folder, name="skip", **layers, with_ends=True))
    with running_cluster(file, tmp_path_factory.mktemp("run")) as running:
        yield running


@pytest.fixture(scope="module")
def reference(cluster: Cluster) -> SkippingReference:
    folder = Path(load_cluster(str(cluster.file)).model_source("bottom")).parent
    return SkippingReference(folder / "bottom", folder / "gates.safetensors")


def test_log_probabilities_of_a_prompt_are_refused_where_it_would_skip(cluster: Cluster) -> None:
    fields: dict[str, Any] = {"max_tokens": 1, "logprobs": 1, "prompt_logprobs": True}
    assert cluster.generate(PROMPT, route="whole", **fields)
    with pytest.raises(InvalidRequest, match=r"prompt_logprobs is True, but route skipping has none"):
        cluster.generate(PROMPT, route=ROUTE, **fields)


def test_description_shows_gates_and_fewer_parameters(cluster: Cluster) -> None:
    routes = {route.name: route for route in cluster.client.describe().routes}
    assert routes[ROUTE].ffn_skip
    assert not routes["whole"].ffn_skip
    assert routes[ROUTE].parameters < routes["whole"].parameters


def test_text_is_the_same_alone_in_a_batch_and_over_a_kill(cluster: Cluster, reference: SkippingReference) -> None:
    assert becomes_true(cluster.all_serving, WAIT_SECONDS)
    fields: dict[str, Any] = {"prompt": PROMPT, "route": ROUTE, "max_tokens": TOKENS, "ignore_eos": True}
    alone = cluster.generate(**fields).token_ids
    assert list(alone) == reference.greedy(tokens(PROMPT), alone)
    others = [{**fields, "route": route} for route in ENDS for _ in range(2)]
    batched = cluster.client.batch([fields, *others, fields])
    assert [batched[0].token_ids, batched[-1].token_ids] == [alone, alone]  # type: ignore[union-attr]
    before = cluster.metric(GATEWAY, "stitch_replays_total")
    with Client(cluster.gateway) as client:
        streams = RunningStreams(client, [{**fields, "max_tokens": LONG_TOKENS}])
        assert becomes_true(lambda: streams.have_more_than([TOKENS]), WAIT_SECONDS)
        [used] = [name for name in BOTTOMS if cluster.metric(name, "stitch_sessions_running")]
        cluster.kill(used)
        assert streams.ended(8 * WAIT_SECONDS)
    (stream,) = streams.streams
    assert (stream.error, stream.finished, len(stream.token_ids)) == (None, True, LONG_TOKENS)
    assert cluster.metric(GATEWAY, "stitch_replays_total") > before
    assert tuple(stream.token_ids[:TOKENS]) == alone
    assert stream.token_ids == reference.greedy(tokens(PROMPT), stream.token_ids)
