"""The TTFT histogram counts exactly the answers that had text."""

from __future__ import annotations

import pytest

from stitch.errors import InvalidRequest
from tests.support.processes import GATEWAY, Cluster

COUNT = "stitch_time_to_first_token_seconds_count"
BY_PROMPT = "stitch_time_to_first_token_by_prompt_seconds_count"
PROMPT = "stitch"


def counted(cluster: Cluster) -> dict[str, float]:
    """The number of recorded TTFTs by route."""
    return {route: cluster.metric(GATEWAY, COUNT, route=route) for route in ("weak", "strong")}


def test_ttft_histogram_counts_each_answer_with_text_once(tiny_cluster: Cluster) -> None:
    before, by_prompt = counted(tiny_cluster), tiny_cluster.metric(GATEWAY, BY_PROMPT)
    for route, number in (("weak", 2), ("strong", 3)):
        for _ in range(number):
            tiny_cluster.generate(PROMPT, route=route, max_tokens=12, ignore_eos=True)
    outcomes = tiny_cluster.client.batch(
        [{"prompt": PROMPT, "route": "weak", "max_tokens": 12, "ignore_eos": True}] * 4
    )
    assert len(outcomes) == 4
    assert counted(tiny_cluster) == {"weak": before["weak"] + 6, "strong": before["strong"] + 3}
    assert tiny_cluster.metric(GATEWAY, BY_PROMPT) == by_prompt + 9


def test_ttft_histogram_skips_answer_without_text(tiny_cluster: Cluster) -> None:
    text = tiny_cluster.generate(PROMPT, route="weak", max_tokens=12, ignore_eos=True).text
    before = counted(tiny_cluster)
    stopped = tiny_cluster.generate(PROMPT, route="weak", max_tokens=12, ignore_eos=True, stop=text[0])
    assert (stopped.text, stopped.finish_reason, stopped.ttft_seconds) == ("", "stop", None)
    assert counted(tiny_cluster) == before


def test_ttft_histogram_skips_refused_request_and_route_query(tiny_cluster: Cluster) -> None:
    before = counted(tiny_cluster)
    with pytest.raises(InvalidRequest):
        tiny_cluster.generate("", route="weak")
    tiny_cluster.client.route(PROMPT)
    assert counted(tiny_cluster) == before


def test_ttft_histogram_records_the_ttft_of_the_answer(tiny_cluster: Cluster) -> None:
    name = "stitch_time_to_first_token_seconds_sum"
    before = tiny_cluster.metric(GATEWAY, name, route="strong")
    answer = tiny_cluster.generate(PROMPT, route="strong", max_tokens=12, ignore_eos=True)
    counted_seconds = tiny_cluster.metric(GATEWAY, name, route="strong") - before
    assert counted_seconds == pytest.approx(answer.ttft_seconds)
