"""What decides a route: the request, its conversation, its objectives, the router."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from router_gateway.metrics import Metrics
from router_gateway.requests.types import Request
from router_gateway.routing.conversations import Conversations
from router_gateway.routing.drift_monitor import DriftMonitor
from router_gateway.routing.objectives import Objectives
from router_gateway.routing.router import REASON_KINDS, DeferredDecision, Query, RouteDecision
from router_gateway.routing.selector import Selection
from router_gateway.routing.ttft_predictor import TtftPredictor
from router_gateway.routing.ttft_regression import LEAST_SAMPLES
from router_gateway.shards.models import ModelRegistry
from stitch.errors import InvalidRequest, ObjectivesUnmet
from stitch.sampling import Sampling


class Pair:
    """Stands for the catalogue of two routes."""

    def routes(self) -> list[str]:
        return ["weak", "strong"]

    def costs(self) -> dict[str, float]:
        return {"weak": 0.8, "strong": 1.0}


class Scripted:
    """A router that says what a test wants."""

    decision = RouteDecision("strong", 0.9, "hard", "gain", qualities=(0.25, 0.75))
    defers = False

    def decide(self, query: Query) -> RouteDecision | DeferredDecision:
        return DeferredDecision(query.routes) if self.defers else self.decision


class Desk:
    """A selection with everything that a test looks into."""

    def __init__(self) -> None:
        self.now = 0.0
        self.router = Scripted()
        self.pace = TtftPredictor(["weak", "strong"], lambda: 1, lambda: self.now)
        catalogue = cast(ModelRegistry, Pair())
        self.metrics = Metrics(["weak", "strong"], REASON_KINDS)
        watch = DriftMonitor(self.metrics, None)
        self.selection = Selection(self.router, catalogue, self.pace, Conversations(lambda: self.now), watch)

    def learn(self, route: str, seconds_a_token: float) -> None:
        for index in range(2 * LEAST_SAMPLES):
            run = self.pace.begin(10 + index, route)
            self.now += (10 + index) * seconds_a_token
            run.token()
            run.text()

    def ask(self, waited: float = 0.0, **fields: Any) -> RouteDecision:
        """As for a request that is answered."""
        request = Request("id", "text", Sampling(), **fields)
        decision = self.selection.select(request, 100, waited)
        if isinstance(decision, DeferredDecision):
            decision = decision.finalize(self.router.decision)
        self.selection.take(request, decision)
        return decision

    def explain(self, **fields: Any) -> RouteDecision | DeferredDecision:
        """As for a request that is only judged."""
        return self.selection.select(Request("", "text", Sampling(), **fields), 100)

    def now_judged(self, route: str, kind: Any = "gain") -> None:
        self.router.decision = replace(self.router.decision, route=route, kind=kind)


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    desk.learn("weak", 0.01)
    desk.learn("strong", 0.02)
    return desk


class TestObjectives:
    def test_none_leaves_the_router_s_judgement(self, desk: Desk) -> None:
        assert desk.ask() is desk.router.decision

    def test_a_first_text_in_time(self, desk: Desk) -> None:
        assert desk.ask(objectives=Objectives(max_ttft_seconds=2.1)).route == "strong"
        moved = desk.ask(objectives=Objectives(max_ttft_seconds=1.5))
        assert (moved.route, moved.kind) == ("weak", "objective")
        assert "ttft 1.00 s ≤ 1.5 s on weak; strong has ttft 2.00 s" in moved.reason

    def test_the_time_that_a_request_has_waited_counts(self, desk: Desk) -> None:
        with pytest.raises(ObjectivesUnmet, match=r"weak has ttft 1\.60 s; strong has ttft 2\.60 s"):
            desk.ask(waited=0.6, objectives=Objectives(max_ttft_seconds=1.5))

    def test_prompts_that_stand_before_it_count(self, desk: Desk) -> None:
        desk.pace.begin(200, "weak")
        with pytest.raises(ObjectivesUnmet, match=r"weak has ttft 3\.00 s"):
            desk.ask(objectives=Objectives(max_ttft_seconds=1.5))

    def test_a_route_that_is_new_is_tried(self) -> None:
        judged = Desk().ask(objectives=Objectives(max_ttft_seconds=0.001))
        assert (judged.route, judged.reason) == ("strong", "hard; ttft not known yet")

    def test_a_cost(self, desk: Desk) -> None:
        assert desk.ask(objectives=Objectives(max_cost=0.9)).route == "weak"
        with pytest.raises(ObjectivesUnmet, match=r"weak has cost 0\.80; strong has cost 1\.00"):
            desk.ask(objectives=Objectives(max_cost=0.7))

    def test_a_quality(self, desk: Desk) -> None:
        assert desk.ask(objectives=Objectives(min_quality=0.25)).route == "weak"
        assert desk.ask(objectives=Objectives(min_quality=0.5)).route == "strong"

    def test_a_quality_needs_a_learned_router(self, desk: Desk) -> None:
        desk.router.decision = RouteDecision("strong", 0.9, "12 words", "length")
        with pytest.raises(InvalidRequest, match=r"objectives\.min_quality is 0\.5, but only a learned router"):
            desk.ask(objectives=Objectives(min_quality=0.5))

    def test_a_router_that_failed_fails_no_request_for_its_quality(self, desk: Desk) -> None:
        desk.router.decision = RouteDecision("strong", 1.0, "it failed", "fallback")
        assert desk.ask(objectives=Objectives(min_quality=0.5)).route == "strong"
        assert desk.ask(objectives=Objectives(min_quality=0.5, max_cost=0.9)).route == "weak"

    def test_a_named_route_is_held_against_them(self, desk: Desk) -> None:
        kept = desk.ask(route="weak", objectives=Objectives(max_ttft_seconds=1.5))
        assert kept.kind == "requested"
        assert kept.reason == "the request names it; the router would take strong (hard); ttft 1.00 s ≤ 1.5 s"
        with pytest.raises(ObjectivesUnmet, match=r"≤ 1\.5 s: strong has ttft 2\.00 s$"):
            desk.ask(route="strong", objectives=Objectives(max_ttft_seconds=1.5))


class TestConversations:
    def test_a_follow_up_keeps_the_route(self, desk: Desk) -> None:
        desk.ask(conversation_id="c")
        desk.now_judged("weak")
        kept = desk.ask(conversation_id="c")
        assert (kept.route, kept.kind) == ("strong", "conversation")
        assert kept.reason == "the conversation keeps strong; the router would take weak (hard)"
        assert desk.ask(conversation_id="other").route == "weak"
        assert desk.ask().route == "weak"

    def test_a_request_moves_its_conversation(self, desk: Desk) -> None:
        desk.now_judged("weak")
        desk.ask(conversation_id="c")
        desk.ask(conversation_id="c", route="strong")
        assert desk.ask(conversation_id="c").route == "strong"

    def test_a_judgement_alone_sees_and_keeps_nothing(self, desk: Desk) -> None:
        desk.explain(conversation_id="c")
        desk.now_judged("weak")
        assert desk.ask(conversation_id="c").route == "weak"
        desk.now_judged("strong")
        explained = desk.explain(conversation_id="c")
        assert isinstance(explained, RouteDecision)
        assert explained.route == "weak"

    def test_a_fallback_is_no_route_to_stay_on(self, desk: Desk) -> None:
        desk.now_judged("strong", "fallback")
        desk.ask(conversation_id="c")
        desk.now_judged("weak")
        assert desk.ask(conversation_id="c").kind == "gain"

    def test_an_objective_turns_one_answer_aside_and_no_conversation(self, desk: Desk) -> None:
        desk.ask(conversation_id="c", objectives=Objectives(max_cost=0.9))
        assert desk.ask(conversation_id="c").kind == "gain"
        aside = desk.ask(conversation_id="c", objectives=Objectives(max_cost=0.9))
        assert (aside.route, aside.kind) == ("weak", "objective")
        assert desk.ask(conversation_id="c").route == "strong"

    def test_only_what_was_decided_counts_as_a_share(self, desk: Desk) -> None:
        for fields in ({}, {"route": "weak"}, {"conversation_id": "c"}, {"conversation_id": "c"}):
            desk.ask(**fields)
        desk.explain()
        desk.now_judged("weak")
        desk.ask()
        shares = [
            desk.metrics.registry.get_sample_value("stitch_route_share", {"route": r}) for r in ("weak", "strong")
        ]
        assert shares == [pytest.approx(1 / 3), pytest.approx(2 / 3)]

    def test_a_refused_request_leaves_nothing(self, desk: Desk) -> None:
        with pytest.raises(ObjectivesUnmet):
            desk.ask(conversation_id="c", route="strong", objectives=Objectives(max_cost=0.9))
        desk.now_judged("weak")
        assert desk.ask(conversation_id="c").route == "weak"


class TestDeferred:
    """The first shard judges; the gateway holds what it can against its own predictions."""

    @pytest.fixture(autouse=True)
    def defers(self, desk: Desk) -> None:
        desk.router.defers = True

    def test_both_routes_are_open(self, desk: Desk) -> None:
        deferred = desk.explain()
        assert isinstance(deferred, DeferredDecision)
        assert deferred.routes == ("weak", "strong")

    def test_what_a_request_or_its_conversation_says_needs_no_judgement(self, desk: Desk) -> None:
        assert desk.explain(route="weak") == RouteDecision("weak", None, "the request names it", "requested")
        desk.ask(conversation_id="c")
        kept = RouteDecision("strong", None, "the conversation keeps strong", "conversation")
        assert desk.explain(conversation_id="c") == kept

    def test_objectives_narrow_the_choice(self, desk: Desk) -> None:
        narrow = desk.explain(objectives=Objectives(max_ttft_seconds=1.5))
        assert isinstance(narrow, RouteDecision)
        assert (narrow.route, narrow.kind) == ("weak", "objective")
        wide = desk.explain(objectives=Objectives(max_ttft_seconds=2.5))
        assert isinstance(wide, DeferredDecision)

    def test_a_quality_is_not_predicted(self, desk: Desk) -> None:
        with pytest.raises(
            InvalidRequest, match=r"objectives\.min_quality is 0\.5, but only a learned router of texts"
        ):
            desk.explain(objectives=Objectives(min_quality=0.5))

    def test_what_nobody_judged_is_no_share(self, desk: Desk) -> None:
        desk.ask(objectives=Objectives(max_cost=0.9))
        assert desk.metrics.registry.get_sample_value("stitch_route_share", {"route": "weak"}) in (None, 0)
