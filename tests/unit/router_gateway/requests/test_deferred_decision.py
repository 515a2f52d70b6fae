"""Tests of deferred decisions: the first shard decides once, before the first token, and replays keep the route."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from router_gateway.routing.router import DeferredDecision
from stitch.errors import Unavailable
from stitch.thresholds import Thresholds
from stitch.v1 import inference_pb2, shard_pb2
from tests.support.fake_shard import END_TOKEN, FakeShard, aborts
from tests.support.waiting import eventually
from tests.unit.router_gateway.requests.test_stream import SCRIPT, bottoms, ids, stream_input, streaming, top

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
UNDECIDED = replace(stream_input(), decision=DeferredDecision(("weak", "strong")))


class TestStream:
    async def test_first_shard_gets_a_chain_for_every_candidate(self) -> None:
        [bottom], above = bottoms(1), top()
        async with streaming(bottom, above) as stream:
            first, *steps = await stream.all(UNDECIDED)
        [request] = bottom.requests
        chains = {one.route: list(one.chain) for one in request.candidates}
        assert chains == {route: [above.name] for route in ("weak", "strong")}
        assert (request.route, list(request.chain)) == ("", [])
        assert first.decision is not None
        assert (first.decision.route, first.decision.score, first.decision.kind) == ("weak", 0.3, "probe")
        assert first.decision.reason == "probe 0.25 ≤ 0.50"
        assert [step.decision for step in steps] == [None] * len(steps)
        assert ids(steps) == [*SCRIPT, END_TOKEN]

    @pytest.mark.parametrize("before_token", [0, 3])
    async def test_replay_keeps_the_decided_route(self, before_token: int) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        first.faults[before_token] = aborts(UNAVAILABLE)
        # The second shard would decide differently.
        second.decision = shard_pb2.ProbeDecision(route="strong", gains=[0.0, 1.0], thresholds=[0.5])
        async with streaming(first, second, top()) as stream:
            steps = await stream.all(UNDECIDED)
        [again] = second.requests
        assert (again.route, len(again.candidates)) == ("weak", 0)
        assert [step.decision.route for step in steps if step.decision is not None] == ["weak"]
        assert ids(steps) == [*SCRIPT, END_TOKEN]

    async def test_chain_lost_before_the_decision_is_replaced_for_all_candidates(self) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        first.decision = None
        first.faults[0] = aborts(UNAVAILABLE)
        async with streaming(first, second, top()) as stream:
            steps = await stream.all(UNDECIDED)
        assert len(second.requests[0].candidates) == 2
        assert ids(steps) == [*SCRIPT, END_TOKEN]

    @pytest.mark.parametrize("decision", [None, shard_pb2.ProbeDecision(route="other")])
    async def test_decision_for_no_candidate_counts_as_out_of_step(
        self, decision: shard_pb2.ProbeDecision | None
    ) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        first.decision = decision
        async with streaming(first, second, top()) as stream:
            steps = await stream.all(UNDECIDED)
        assert stream.replays == {"out_of_step": 1}
        assert ids(steps) == [*SCRIPT, END_TOKEN]

    async def test_unavailable_names_all_candidate_routes(self) -> None:
        [bottom] = bottoms(1)
        bottom.faults[0] = aborts(UNAVAILABLE)
        bottom.decision = None
        async with streaming(bottom, top(), max_failures=0) as stream:
            with pytest.raises(Unavailable, match="route weak or strong"):
                await stream.all(UNDECIDED)


class TestGateway:
    """The same through a whole gateway."""

    @staticmethod
    def shards(**fields: Any) -> tuple[FakeShard, FakeShard]:
        bottom = FakeShard("bottom-0", "bottom", SCRIPT)
        for name, value in fields.items():
            setattr(bottom, name, value)
        return bottom, top()

    async def test_client_gets_the_decision_before_any_delta(self, reach: Any) -> None:
        async with reach(*self.shards(), cluster={"probe": "probe.safetensors"}) as reached:
            first, *others = await reached.generate()
            assert first.started.decision.route == "weak"
            assert first.started.decision.reason == "probe 0.25 ≤ 0.50"
            assert {one.WhichOneof("event") for one in others} == {"delta", "finished"}
            value = reached.gateway.metrics.registry.get_sample_value
            assert value("stitch_routed_total", {"route": "weak", "reason": "probe"}) == 1
            assert value("stitch_route_score_sum") == pytest.approx(0.3)

    async def test_failed_probe_is_counted_as_fallback(self, reach: Any) -> None:
        decision = shard_pb2.ProbeDecision(route="strong", score=1.0, failure="the probe's gains are not finite")
        async with reach(*self.shards(decision=decision), cluster={"probe": "probe.safetensors"}) as reached:
            started = (await reached.generate())[0].started
            assert started.decision.reason == "the probe's gains are not finite, so the fallback"
            value = reached.gateway.metrics.registry.get_sample_value
            assert value("stitch_routed_total", {"route": "strong", "reason": "fallback"}) == 1

    async def test_named_route_is_not_deferred(self, reach: Any) -> None:
        bottom, above = self.shards()
        async with reach(bottom, above, cluster={"probe": "probe.safetensors"}) as reached:
            started = (await reached.generate(route="strong"))[0].started
            assert (started.decision.route, started.decision.reason) == ("strong", "the request names it")
            assert [len(request.candidates) for request in bottom.requests] == [0]
            value = reached.gateway.metrics.registry.get_sample_value
            assert value("stitch_route_score_count") == 0

    async def test_route_rpc_returns_the_probe_decision_without_an_answer(self, reach: Any) -> None:
        bottom, above = self.shards()
        async with reach(bottom, above, cluster={"probe": "probe.safetensors"}) as reached:
            response = await reached.stub.Route(inference_pb2.RouteRequest(prompt="hello"))
            assert (response.decision.route, response.decision.reason) == ("weak", "probe 0.25 ≤ 0.50")
            assert response.prompt_tokens == 1
            [request] = bottom.requests
            assert request.sampling.max_tokens == 1
            await eventually(lambda: bottom.running == 0)

    async def test_conversation_keeps_the_route_of_the_probe(self, reach: Any) -> None:
        bottom, above = self.shards()
        async with reach(bottom, above, cluster={"probe": "probe.safetensors"}) as reached:
            await reached.generate(conversation_id="c")
            started = (await reached.generate(conversation_id="c"))[0].started
            assert (started.decision.route, started.decision.reason) == ("weak", "the conversation keeps weak")
            assert [len(request.candidates) for request in bottom.requests] == [2, 0]

    async def test_objective_that_only_one_route_meets_is_not_deferred(self, reach: Any) -> None:
        bottom, above = self.shards()
        async with reach(bottom, above, cluster={"probe": "probe.safetensors"}) as reached:
            wanted = inference_pb2.Objectives(max_cost=0.8)
            started = (await reached.generate(objectives=wanted))[0].started
            assert started.decision.reason.startswith("only weak meets the objectives: weak has cost 0.79")
            assert [len(request.candidates) for request in bottom.requests] == [0]

    async def test_budget_gauge_shows_the_probe_thresholds(self, reach: Any, tmp_path: Path) -> None:
        file = tmp_path / "thresholds.json"
        Thresholds(routes=("weak", "strong"), thresholds=(0.5,), router="r", budget=0.3).write(file)
        place = {"probe": "probe.safetensors", "probe_thresholds": str(file)}
        async with reach(*self.shards(), cluster=place) as reached:
            await reached.generate()
            assert reached.metric("stitch_route_budget") == 0.3
            assert reached.metric("stitch_route_share", route="weak") == 1
