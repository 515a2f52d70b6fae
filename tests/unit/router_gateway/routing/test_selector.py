"""Tests of the selector: the request, its conversation, its objectives and the router decide a route."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from router_gateway.metrics import Metrics
from router_gateway.routing.drift import DriftMonitor
from router_gateway.routing.objectives import Objectives
from router_gateway.routing.router import (
    REASON_KINDS,
    DeferredDecision,
    Ladder,
    Query,
    ReasonKind,
    RouteDecision,
    Router,
)
from router_gateway.routing.selector import (
    CONVERSATION_SECONDS,
    LATEST_OBJECTIVES,
    MAX_CONVERSATIONS,
    RoutingOptions,
    Selector,
    Wait,
    conversation_routes,
)
from router_gateway.routing.ttft_predictor import MIN_SAMPLES, TtftPredictor
from router_gateway.shards.models import ModelRegistry
from stitch.errors import InvalidRequest, ObjectivesUnmet


class Pair:
    """Stands in for the model registry of a cluster with two routes."""

    def routes(self) -> list[str]:
        return ["weak", "strong"]

    def costs(self) -> dict[str, float]:
        return {"weak": 0.8, "strong": 1.0}


class Scripted:
    """A router with the decision that a test sets."""

    decision = RouteDecision("strong", 0.9, "hard", "gain", qualities=(0.25, 0.75))
    defers = False

    def decide(self, query: Query) -> RouteDecision | DeferredDecision:
        return DeferredDecision(query.routes) if self.defers else self.decision


class SelectorSetup:
    """A selector with everything that a test looks into."""

    def __init__(self) -> None:
        self.now = 0.0
        self.router = Scripted()
        self.predictor = TtftPredictor(["weak", "strong"], lambda: 1, lambda: self.now)
        self.metrics = Metrics(["weak", "strong"], REASON_KINDS)
        self.selector = self.selector_of(self.router)

    def selector_of(self, router: Router, cheaper_under_load: bool = True) -> Selector:
        models, monitor = cast(ModelRegistry, Pair()), DriftMonitor(self.metrics, None)
        conversations = conversation_routes(lambda: self.now)
        return Selector(router, models, self.predictor, conversations, monitor, cheaper_under_load)

    def learn(self, route: str, seconds_a_token: float) -> None:
        for index in range(2 * MIN_SAMPLES):
            run = self.predictor.track(10 + index, route)
            self.now += (10 + index) * seconds_a_token
            run.prompt_computed()
            run.text_sent()

    def ask(self, waited: float = 0.0, pressure: float = 0.0, **fields: Any) -> RouteDecision:
        """The decision for a request that is answered."""
        options = RoutingOptions(**fields)
        decision = self.selector.select(options, ("text",), 100, Wait(waited, pressure))
        if isinstance(decision, DeferredDecision):
            decision = decision.finalize(self.router.decision)
        self.selector.record(options, decision)
        return decision

    def explain(self, **fields: Any) -> RouteDecision | DeferredDecision:
        """The decision for a query without an answer."""
        return self.selector.select(RoutingOptions(**fields), ("text",), 100)

    def router_decides(self, route: str, kind: Any = "gain") -> None:
        self.router.decision = replace(self.router.decision, route=route, kind=kind)


@pytest.fixture
def setup() -> SelectorSetup:
    setup = SelectorSetup()
    setup.learn("weak", 0.01)
    setup.learn("strong", 0.02)
    return setup


class ByScore:
    """A router of one score."""

    kind: ReasonKind = "content"

    def decide(self, query: Query) -> RouteDecision:
        route, compared = Ladder((0.4,)).pick(0.6, query.routes, query.pressure)
        return RouteDecision(route, 0.6, compared, self.kind, qualities=(0.5, 0.6))


class TestUnderLoad:
    @pytest.fixture
    def setup(self, setup: SelectorSetup) -> SelectorSetup:
        setup.selector = setup.selector_of(ByScore())
        return setup

    @pytest.mark.parametrize(("pressure", "route"), [(0.0, "strong"), (0.3, "strong"), (0.34, "weak"), (1.0, "weak")])
    def test_thresholds_rise_with_the_pressure(self, setup: SelectorSetup, pressure: float, route: str) -> None:
        assert setup.ask(pressure=pressure).route == route

    def test_reply_says_so_with_the_router_s_score(self, setup: SelectorSetup) -> None:
        decision = setup.ask(pressure=0.5)
        assert (decision.kind, decision.score, decision.qualities) == ("load", 0.6, (0.5, 0.6))
        assert decision.reason == (
            "0.60, below 0.80, since requests wait for shards; otherwise it would be strong (0.60, at least 0.40)"
        )

    @pytest.mark.parametrize(
        ("seconds", "earlier_tokens", "route"),
        [(5.0, 0, "strong"), (10.0, 100, "strong"), (5.0, 100, "weak"), (5.0, 70, "strong"), (5.0, 90, "weak")],
    )
    def test_thresholds_rise_with_what_earlier_prompts_take_of_an_objective(
        self, setup: SelectorSetup, seconds: float, earlier_tokens: int, route: str
    ) -> None:
        # A token takes 0.02 s on the strong route, and 1/3 of the objective raises the threshold to the score.
        with setup.predictor.track(earlier_tokens, "strong"):
            decision = setup.ask(objectives=Objectives(max_ttft_seconds=seconds))
        assert (decision.route, decision.kind) == (route, "load" if route == "weak" else "content")

    def test_request_with_time_makes_way_for_tight_objectives(self, setup: SelectorSetup) -> None:
        relaxed = Objectives(max_ttft_seconds=100.0)
        with setup.predictor.track(100, "strong"):
            assert setup.ask(objectives=relaxed).route == "strong"
            setup.ask(objectives=Objectives(max_ttft_seconds=5.0))
            assert setup.ask(objectives=relaxed).route == "weak"
            # A client without an objective has said nothing of its time.
            assert setup.ask().route == "strong"
            for _ in range(LATEST_OBJECTIVES):
                setup.ask(objectives=relaxed)
            assert setup.ask(objectives=relaxed).route == "strong"

    def test_objectives_of_one_tenant_move_no_request_of_another(self, setup: SelectorSetup) -> None:
        relaxed = Objectives(max_ttft_seconds=100.0)
        with setup.predictor.track(100, "strong"):
            setup.ask(objectives=Objectives(max_ttft_seconds=5.0), tenant="hurried")
            assert setup.ask(objectives=relaxed, tenant="hurried").route == "weak"
            assert setup.ask(objectives=relaxed, tenant="patient").route == "strong"

    def test_objective_that_no_idle_route_meets_moves_no_other_request(self, setup: SelectorSetup) -> None:
        with setup.predictor.track(100, "strong"):
            with pytest.raises(ObjectivesUnmet):
                setup.ask(objectives=Objectives(max_ttft_seconds=0.5))
            assert setup.ask(objectives=Objectives(max_ttft_seconds=100.0)).route == "strong"

    def test_waiting_for_room_counts_against_an_objective(self, setup: SelectorSetup) -> None:
        objectives = Objectives(max_ttft_seconds=6.0)
        assert setup.ask(waited=2.5, pressure=0.01, objectives=objectives).route == "weak"
        # Since the arrival, without a queue.
        assert setup.ask(waited=2.5, pressure=0.0, objectives=objectives).route == "strong"

    def test_objectives_raise_no_threshold_where_cheaper_routes_are_switched_off(self, setup: SelectorSetup) -> None:
        setup.selector = setup.selector_of(ByScore(), cheaper_under_load=False)
        with setup.predictor.track(100, "strong"):
            assert setup.ask(objectives=Objectives(max_ttft_seconds=5.0)).route == "strong"

    def test_what_the_request_names_holds(self, setup: SelectorSetup) -> None:
        assert setup.ask(pressure=1.0, route="strong").route == "strong"
        assert setup.ask(pressure=1.0, threshold=0.5).route == "strong"
        # The cheapest route of that quality, whatever the load.
        assert setup.ask(pressure=1.0, objectives=Objectives(min_quality=0.55)).route == "strong"

    def test_conversation_keeps_its_route_and_is_not_kept_on_the_cheaper_one(self, setup: SelectorSetup) -> None:
        assert setup.ask(pressure=1.0, conversation_id="new").route == "weak"
        assert setup.ask(conversation_id="new").route == "strong"
        assert setup.ask(pressure=1.0, conversation_id="new").route == "strong"

    def test_router_that_fails_under_load_changes_nothing(
        self, setup: SelectorSetup, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(self: ByScore, query: Query) -> RouteDecision:
            kind: ReasonKind = "fallback" if query.pressure else "content"
            return RouteDecision("weak" if query.pressure else "strong", 0.6, "", kind)

        monkeypatch.setattr(ByScore, "decide", failing)
        decision = setup.ask(pressure=0.5)
        assert (decision.route, decision.kind) == ("strong", "content")

    def test_fallback_stays(self, setup: SelectorSetup, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ByScore, "kind", "fallback")
        assert setup.ask(pressure=1.0).route == "strong"


class TestThreshold:
    @pytest.mark.parametrize(("threshold", "route"), [(0.0, "strong"), (0.3, "strong"), (0.31, "weak"), (1.0, "weak")])
    def test_takes_the_place_of_the_router_s(self, threshold: float, route: str) -> None:
        setup = SelectorSetup()
        setup.router.decision = RouteDecision("weak", 0.3, "easy", "content", qualities=(0.5, 0.6))
        decision = setup.ask(threshold=threshold)
        assert (decision.route, decision.score, decision.kind, decision.qualities) == (
            route,
            0.3,
            "content",
            (0.5, 0.6),
        )
        compared = f"at least {threshold:.2f}" if route == "strong" else f"below {threshold:.2f}"
        assert decision.reason == (f"0.30, {compared}, by the request's threshold; the router would take weak (easy)")

    def test_has_equal_steps_below_it_with_more_routes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        setup, ladder = SelectorSetup(), ["a", "b", "c", "d"]
        monkeypatch.setattr(Pair, "routes", lambda self: ladder)
        taken = []
        for score in (0.19, 0.2, 0.4, 0.59, 0.6, 1.0):
            setup.router.decision = RouteDecision("a", score, "", "content")
            decision = setup.explain(threshold=0.6)
            assert isinstance(decision, RouteDecision)
            taken.append(decision.route)
        assert taken == ["a", "b", "c", "c", "d", "d"]

    def test_conversation_and_fallback_keep_their_route(self, setup: SelectorSetup) -> None:
        setup.ask(conversation_id="mine")
        assert setup.ask(conversation_id="mine", threshold=1.0).route == "strong"
        setup.router_decides("weak", kind="fallback")
        assert setup.ask(threshold=0.0).route == "weak"

    def test_is_refused_where_a_probe_decides(self, setup: SelectorSetup) -> None:
        setup.router.defers = True
        with pytest.raises(InvalidRequest, match=r"threshold is 0\.5, but the probe of the first shard decides"):
            setup.explain(threshold=0.5)


class TestObjectives:
    def test_without_objectives_the_router_decides(self, setup: SelectorSetup) -> None:
        assert setup.ask() is setup.router.decision

    def test_max_ttft_excludes_the_slow_route(self, setup: SelectorSetup) -> None:
        assert setup.ask(objectives=Objectives(max_ttft_seconds=2.1)).route == "strong"
        moved = setup.ask(objectives=Objectives(max_ttft_seconds=1.5))
        assert (moved.route, moved.kind) == ("weak", "objective")
        assert "ttft 1.00 s ≤ 1.5 s on weak; strong has ttft 2.00 s" in moved.reason

    def test_waited_time_counts_towards_the_ttft(self, setup: SelectorSetup) -> None:
        with pytest.raises(ObjectivesUnmet, match=r"weak has ttft 1\.60 s; strong has ttft 2\.60 s"):
            setup.ask(waited=0.6, objectives=Objectives(max_ttft_seconds=1.5))

    def test_pending_prompts_count_towards_the_ttft(self, setup: SelectorSetup) -> None:
        setup.predictor.track(200, "weak")
        with pytest.raises(ObjectivesUnmet, match=r"weak has ttft 3\.00 s"):
            setup.ask(objectives=Objectives(max_ttft_seconds=1.5))

    def test_route_without_samples_counts_as_fast_enough(self) -> None:
        decision = SelectorSetup().ask(objectives=Objectives(max_ttft_seconds=0.001))
        assert (decision.route, decision.reason) == ("strong", "hard; ttft not known yet")

    def test_max_cost_excludes_the_costly_route(self, setup: SelectorSetup) -> None:
        assert setup.ask(objectives=Objectives(max_cost=0.9)).route == "weak"
        with pytest.raises(ObjectivesUnmet, match=r"weak has cost 0\.80; strong has cost 1\.00"):
            setup.ask(objectives=Objectives(max_cost=0.7))

    def test_min_quality_takes_the_cheapest_route_that_fits(self, setup: SelectorSetup) -> None:
        assert setup.ask(objectives=Objectives(min_quality=0.25)).route == "weak"
        assert setup.ask(objectives=Objectives(min_quality=0.5)).route == "strong"

    def test_min_quality_is_refused_without_learned_router(self, setup: SelectorSetup) -> None:
        setup.router.decision = RouteDecision("strong", 0.9, "12 words", "length")
        with pytest.raises(InvalidRequest, match=r"objectives\.min_quality is 0\.5, but only a learned router"):
            setup.ask(objectives=Objectives(min_quality=0.5))

    def test_min_quality_is_ignored_after_a_router_failure(self, setup: SelectorSetup) -> None:
        setup.router.decision = RouteDecision("strong", 1.0, "it failed", "fallback")
        assert setup.ask(objectives=Objectives(min_quality=0.5)).route == "strong"
        assert setup.ask(objectives=Objectives(min_quality=0.5, max_cost=0.9)).route == "weak"

    def test_named_route_must_meet_the_objectives(self, setup: SelectorSetup) -> None:
        kept = setup.ask(route="weak", objectives=Objectives(max_ttft_seconds=1.5))
        assert kept.kind == "requested"
        assert kept.reason == "the request names it; the router would take strong (hard); ttft 1.00 s ≤ 1.5 s"
        with pytest.raises(ObjectivesUnmet, match=r"≤ 1\.5 s: strong has ttft 2\.00 s$"):
            setup.ask(route="strong", objectives=Objectives(max_ttft_seconds=1.5))


class TestConversations:
    def test_follow_up_keeps_the_conversation_route(self, setup: SelectorSetup) -> None:
        setup.ask(conversation_id="c")
        setup.router_decides("weak")
        kept = setup.ask(conversation_id="c")
        assert (kept.route, kept.kind) == ("strong", "conversation")
        assert kept.reason == "the conversation keeps strong; the router would take weak (hard)"
        assert setup.ask(conversation_id="other").route == "weak"
        assert setup.ask().route == "weak"

    def test_named_route_moves_the_conversation(self, setup: SelectorSetup) -> None:
        setup.router_decides("weak")
        setup.ask(conversation_id="c")
        setup.ask(conversation_id="c", route="strong")
        assert setup.ask(conversation_id="c").route == "strong"

    def test_query_without_answer_records_no_conversation(self, setup: SelectorSetup) -> None:
        setup.explain(conversation_id="c")
        setup.router_decides("weak")
        assert setup.ask(conversation_id="c").route == "weak"
        setup.router_decides("strong")
        explained = setup.explain(conversation_id="c")
        assert isinstance(explained, RouteDecision)
        assert explained.route == "weak"

    def test_fallback_is_not_kept_for_the_conversation(self, setup: SelectorSetup) -> None:
        setup.router_decides("strong", "fallback")
        setup.ask(conversation_id="c")
        setup.router_decides("weak")
        assert setup.ask(conversation_id="c").kind == "gain"

    def test_route_by_objective_is_not_kept_for_the_conversation(self, setup: SelectorSetup) -> None:
        setup.ask(conversation_id="c", objectives=Objectives(max_cost=0.9))
        assert setup.ask(conversation_id="c").kind == "gain"
        aside = setup.ask(conversation_id="c", objectives=Objectives(max_cost=0.9))
        assert (aside.route, aside.kind) == ("weak", "objective")
        assert setup.ask(conversation_id="c").route == "strong"

    def test_only_decisions_of_the_router_count_as_shares(self, setup: SelectorSetup) -> None:
        for fields in ({}, {"route": "weak"}, {"conversation_id": "c"}, {"conversation_id": "c"}):
            setup.ask(**fields)
        setup.explain()
        setup.router_decides("weak")
        setup.ask()
        shares = [
            setup.metrics.registry.get_sample_value("stitch_route_share", {"route": r}) for r in ("weak", "strong")
        ]
        assert shares == [pytest.approx(1 / 3), pytest.approx(2 / 3)]

    def test_refused_request_records_no_conversation(self, setup: SelectorSetup) -> None:
        with pytest.raises(ObjectivesUnmet):
            setup.ask(conversation_id="c", route="strong", objectives=Objectives(max_cost=0.9))
        setup.router_decides("weak")
        assert setup.ask(conversation_id="c").route == "weak"


class TestDeferred:
    """The first shard decides; the gateway applies the objectives that it has predictions for."""

    @pytest.fixture(autouse=True)
    def defers(self, setup: SelectorSetup) -> None:
        setup.router.defers = True

    def test_deferred_decision_has_all_routes(self, setup: SelectorSetup) -> None:
        deferred = setup.explain()
        assert isinstance(deferred, DeferredDecision)
        assert deferred.routes == ("weak", "strong")

    def test_named_or_kept_route_is_not_deferred(self, setup: SelectorSetup) -> None:
        assert setup.explain(route="weak") == RouteDecision("weak", None, "the request names it", "requested")
        setup.ask(conversation_id="c")
        kept = RouteDecision("strong", None, "the conversation keeps strong", "conversation")
        assert setup.explain(conversation_id="c") == kept

    def test_objectives_restrict_the_candidates(self, setup: SelectorSetup) -> None:
        narrow = setup.explain(objectives=Objectives(max_ttft_seconds=1.5))
        assert isinstance(narrow, RouteDecision)
        assert (narrow.route, narrow.kind) == ("weak", "objective")
        wide = setup.explain(objectives=Objectives(max_ttft_seconds=2.5))
        assert isinstance(wide, DeferredDecision)

    def test_min_quality_is_refused_for_deferred_decisions(self, setup: SelectorSetup) -> None:
        with pytest.raises(
            InvalidRequest, match=r"objectives\.min_quality is 0\.5, but only a learned router of texts"
        ):
            setup.explain(objectives=Objectives(min_quality=0.5))

    def test_decision_without_score_is_no_share(self, setup: SelectorSetup) -> None:
        setup.ask(objectives=Objectives(max_cost=0.9))
        assert setup.metrics.registry.get_sample_value("stitch_route_share", {"route": "weak"}) in (
            None,
            0,
        )


class TestConversationRoutes:
    def test_route_expires_after_the_last_request(self) -> None:
        now = 0.0
        routes = conversation_routes(lambda: now)
        routes["a"] = "weak"
        now = 0.9 * CONVERSATION_SECONDS
        routes["a"] = "strong"
        now = 1.8 * CONVERSATION_SECONDS
        assert routes.get("a") == "strong"
        now = 1.91 * CONVERSATION_SECONDS
        assert routes.get("a") is None

    def test_least_recently_used_conversation_makes_room(self) -> None:
        routes = conversation_routes(lambda: 0.0)
        for name in ("a", "b", "a"):
            routes[name] = "weak"
        for index in range(MAX_CONVERSATIONS - 1):
            routes[str(index)] = "weak"
        assert (routes.get("a"), routes.get("b")) == ("weak", None)
