"""A tiny pair on real processes, used through the clients, the command line and the metrics."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from stitch.channels import serves
from stitch.cli.main import main
from stitch.client import Answer, AsyncClient
from stitch.errors import InvalidRequest
from stitch.local.cluster import keep_port
from stitch.local.processes import spawn, stop
from tests.support.processes import START_SECONDS, Cluster
from tests.support.waiting import becomes_true


def test_answer_has_tokens_times_and_stages(tiny_cluster: Cluster) -> None:
    answer = tiny_cluster.generate("stitch", route="weak", max_tokens=8, ignore_eos=True)
    assert (answer.route, len(answer.token_ids), answer.generated_tokens) == ("weak", 8, 8)
    assert answer.finish_reason == "length"
    assert 0 < (answer.ttft_seconds or 0) <= answer.total_seconds
    assert list(answer.stages) == ["route", "queue", "bottom_prefill", "wire", "stitch", "top_prefill", "sample"]


def test_repeated_prompt_has_the_same_answer(tiny_cluster: Cluster) -> None:
    first, second = (tiny_cluster.generate("stitch", route="strong", max_tokens=8) for _ in range(2))
    assert first.token_ids == second.token_ids


def test_forced_answer_has_the_logprobs_of_the_sampled_answer(tiny_cluster: Cluster) -> None:
    sampled = tiny_cluster.generate("stitch", route="weak", max_tokens=6, ignore_eos=True, logprobs=0)
    options = {"ignore_eos": True, "logprobs": 0}
    partly_forced = tiny_cluster.generate(
        "stitch", route="weak", max_tokens=6, forced_token_ids=sampled.token_ids[:3], **options
    )
    assert partly_forced.token_ids == sampled.token_ids
    assert [one.logprob for one in partly_forced.logprobs] == pytest.approx(
        [one.logprob for one in sampled.logprobs], rel=1e-4
    )
    forced = tiny_cluster.generate("stitch", route="strong", forced_answer="another text", **options)
    assert (forced.text, forced.finish_reason) == ("another text", "length")
    assert len(forced.logprobs) == forced.generated_tokens > 1


def test_log_probabilities_of_a_prompt_are_those_of_the_same_tokens_as_an_answer(tiny_cluster: Cluster) -> None:
    options = {"route": "weak", "max_tokens": 4, "ignore_eos": True, "logprobs": 0}
    ids = tiny_cluster.client.tokenize("stitch two models")
    plain = tiny_cluster.generate("stitch two models", **options)
    scored = tiny_cluster.generate("stitch two models", prompt_logprobs=True, **options)
    assert (scored.text, scored.token_ids) == (plain.text, (*ids[1:], *plain.token_ids))
    assert (scored.prompt_tokens, scored.generated_tokens) == (len(ids), 4)
    forced = {**options, "forced_token_ids": ids[1:], "max_tokens": len(ids) - 1}
    answer = tiny_cluster.client.generate(token_ids=ids[:1], **forced)
    expected = [one.logprob for one in (*answer.logprobs, *plain.logprobs)]
    assert [one.logprob for one in scored.logprobs] == pytest.approx(expected, rel=1e-4)


def test_gateway_is_ready_after_less_than_three_cpu_seconds(tiny_cluster: Cluster, tmp_path: Path) -> None:
    """Its CPU time does not grow with the load of the machine."""
    with ExitStack() as ports:
        address = f"127.0.0.1:{keep_port(ports)}"
        own_ports = ["--listen", address, "--metrics-port", "0", "--http", "127.0.0.1:0"]
        arguments = ["run", str(tiny_cluster.file), *own_ports]
        gateway = spawn("another gateway", "router_gateway.cli", arguments, tmp_path / "log")
        try:
            assert becomes_true(lambda: serves(address), START_SECONDS), (tmp_path / "log").read_text()
            used = psutil.Process(gateway.pid).cpu_times()
        finally:
            stop([gateway], grace_seconds=10.0)
    assert 0 < used.user + used.system < 3


def test_routes_give_different_answers(tiny_cluster: Cluster) -> None:
    answers = {
        tiny_cluster.generate("stitch", route=route, max_tokens=8, ignore_eos=True).token_ids
        for route in ("weak", "strong")
    }
    assert len(answers) == 2


def test_batch_gives_the_answers_of_single_requests(tiny_cluster: Cluster) -> None:
    prompts = ["one", "two", "three"]
    requests = [{"prompt": prompt, "route": "weak", "max_tokens": 5, "ignore_eos": True} for prompt in prompts]
    outcomes = tiny_cluster.client.batch([*requests, {"prompt": "", "max_tokens": 1}])
    alone = [tiny_cluster.generate(prompt, route="weak", max_tokens=5, ignore_eos=True) for prompt in prompts]
    tokens = [outcome.token_ids for outcome in outcomes if isinstance(outcome, Answer)]
    assert tokens == [answer.token_ids for answer in alone]
    assert isinstance(outcomes[-1], InvalidRequest)


async def test_async_client_gives_the_answer_of_the_blocking_client(tiny_cluster: Cluster) -> None:
    async with AsyncClient(tiny_cluster.gateway) as client:
        answer = await client.generate("stitch", route="weak", max_tokens=6, ignore_eos=True)
    assert answer.token_ids == tiny_cluster.generate("stitch", route="weak", max_tokens=6, ignore_eos=True).token_ids


def test_commands_reach_a_running_cluster(tiny_cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--gateway", tiny_cluster.gateway]
    assert main(["status", *flags]) == 0
    assert "48 → 32" in capsys.readouterr().out
    assert main(["ask", "hi", "--json", "--max-tokens", "3", "--ignore-eos", *flags]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 3
    assert main(["ttft", "--lengths", "16,64", "--repeat", "1", *flags]) == 0
    assert "ms per token" in capsys.readouterr().out


def test_every_process_serves_its_metrics(tiny_cluster: Cluster) -> None:
    before = tiny_cluster.metric("gateway", "stitch_generated_tokens_total", route="weak")
    tiny_cluster.generate("stitch", route="weak", max_tokens=4, ignore_eos=True)
    assert tiny_cluster.metric("gateway", "stitch_generated_tokens_total", route="weak") == before + 4
    for shard in ("bottom-0", "top-0"):
        assert f'stitch_kv_cache_usage_ratio{{shard="{shard}"}}' in tiny_cluster.metrics(shard)


def test_missing_metric_is_named(tiny_cluster: Cluster) -> None:
    with pytest.raises(KeyError, match="gateway has no stitch_nothing"):
        tiny_cluster.metric("gateway", "stitch_nothing")


def test_restarted_shard_gives_the_same_answer(tiny_cluster: Cluster) -> None:
    before = tiny_cluster.generate("stitch", route="weak", max_tokens=6, ignore_eos=True)
    first = tiny_cluster.pid("top-0")
    tiny_cluster.kill("top-0")
    assert not tiny_cluster.running("top-0")
    tiny_cluster.restart("top-0")
    assert tiny_cluster.pid("top-0") != first
    after = tiny_cluster.generate("stitch", route="weak", max_tokens=6, ignore_eos=True)
    assert after.token_ids == before.token_ids


def test_resumed_shard_answers(tiny_cluster: Cluster) -> None:
    tiny_cluster.pause("top-0")
    tiny_cluster.resume("top-0")
    assert len(tiny_cluster.generate("stitch", max_tokens=3, ignore_eos=True).token_ids) == 3


def test_sigterm_stops_a_shard_with_exit_code_0(tiny_cluster: Cluster) -> None:
    tiny_cluster.signal("top-0", signal.SIGTERM)
    assert tiny_cluster.wait_for_end("top-0") == 0
    assert "top-0" in tiny_cluster.log("top-0")
    tiny_cluster.restart("top-0")
