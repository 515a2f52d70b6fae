"""A route decision compares the probe's gains with the current thresholds, inside the pass that computes them."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from stitch.sampling import Sampling
from stitch.thresholds import FixedThresholds, Thresholds
from stitch_server.engine.types import Batch, LayerRange, RouteDecision, Segment, Session, in_layer_order
from stitch_server.model.embedding_and_head import Embedding
from stitch_server.model.probe import Probe, ProbeBinding
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.route_probe import RouteProbe, fallback_decision
from tests.support.runner_chain import CPU, DTYPE, new_runner, rows_of
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_probe import random_prompt

ROUTES = ("weak", "strong")


def new_probe(gain: float, threshold: float, fallback_route: str | None = None) -> RouteProbe:
    """A probe that gives every prompt the same gain."""
    probe = Probe(
        weight=torch.zeros(1, 2),
        bias=torch.tensor([gain]),
        binding=ProbeBinding("id", "revision", 2, 1, 3, ROUTES, "t"),
        thresholds=(9.0,),
        percentiles=tuple(step / 100 for step in range(101)),
    )
    return RouteProbe(probe, FixedThresholds((threshold,)), fallback_route)


HIDDEN = torch.ones(5, 2)


def test_gain_above_the_threshold_selects_the_costlier_route() -> None:
    decision = new_probe(0.75, 0.5).decide(HIDDEN, ROUTES)
    assert (decision.route, decision.failure) == ("strong", "")
    assert (decision.gains, decision.thresholds) == ((0.0, 0.75), (0.5,))
    assert decision.score == 75 / 101


def test_gain_equal_to_the_threshold_selects_the_cheaper_route() -> None:
    assert new_probe(0.5, 0.5).decide(HIDDEN, ROUTES).route == "weak"


def test_only_the_first_tokens_are_read() -> None:
    probe = new_probe(0.75, 0.5)
    hidden = torch.cat([torch.ones(probe.tokens, 2), torch.full((4, 2), float("nan"))])
    assert probe.decide(hidden, ROUTES).failure == ""


def test_non_finite_gains_select_the_fallback_route() -> None:
    hidden = torch.full((3, 2), float("nan"))
    most_expensive, named = (new_probe(0.0, 0.5, route).decide(hidden, ROUTES) for route in (None, "weak"))
    assert (most_expensive.route, most_expensive.failure) == ("strong", "the probe's gains are not finite")
    assert named.route == "weak"


def test_route_that_is_no_candidate_is_replaced_by_the_most_expensive_candidate() -> None:
    candidates = ("weak", "middle")
    decision = new_probe(0.75, 0.5).decide(HIDDEN, candidates)
    assert (decision.route, decision.preferred, decision.gains) == ("middle", "strong", (0.0, 0.75))
    assert new_probe(0.25, 0.5).decide(HIDDEN, candidates).preferred == ""
    unread = new_probe(0.0, 0.5, "strong").decide(torch.full((3, 2), float("nan")), candidates)
    assert (unread.route, unread.preferred) == ("middle", "strong")
    assert fallback_decision(None, candidates, "why").route == "middle"


def test_score_is_a_percentile_of_the_calibration_if_there_is_one() -> None:
    probe = new_probe(0.75, 0.5)
    halves = tuple(step / 200 for step in range(101))
    calibration = Thresholds(routes=ROUTES, thresholds=(0.5,), router="r", budget=0.3, gain_percentiles=halves)
    probe._thresholds = Mock(current=lambda: (0.5,), calibration=calibration)
    assert probe.decide(HIDDEN, ROUTES).score == 1.0


LAYER_RANGES = {"weak": LayerRange(0, 2), "middle": LayerRange(0, 3), "strong": LayerRange(0, 4)}
WINDOW = 6


class ScriptedProbe:
    """A probe that selects the route by the number of tokens, and records what it read."""

    layer, tokens = 2, WINDOW

    def __init__(self) -> None:
        self.read: list[torch.Tensor] = []

    def decide(self, hidden: torch.Tensor, candidates: tuple[str, ...]) -> RouteDecision:
        self.read.append(hidden.clone())
        return RouteDecision(tuple(LAYER_RANGES)[len(hidden) % 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture
def runner(folder: Path) -> ModelRunner:
    probe: object = ScriptedProbe()
    return new_runner(folder, 0, 4, embed=Embedding.load(folder, CPU, DTYPE), probe=probe, layer_ranges=LAYER_RANGES)


def segment(route: str, tokens: int, slot: int, undecided: bool = False) -> Segment:
    """A prompt with four blocks of its own."""
    session = Session("" if undecided else route, (), Sampling(), random_prompt(slot, tokens), tokens)
    layers = LAYER_RANGES["weak"] if undecided else LAYER_RANGES[route]
    return Segment(
        session,
        layers,
        0,
        tokens,
        True,
        range(4 * slot, 4 * slot + 4),
        candidates=tuple(LAYER_RANGES) if undecided else (),
    )


def route_of(tokens: int) -> str:
    return tuple(LAYER_RANGES)[tokens % 3]


def rows(runner: ModelRunner, *segments: Segment) -> dict[int, torch.Tensor]:
    """The hidden states by the first block of their segment."""
    batch = Batch(in_layer_order(segments))
    output = runner.run(batch)
    return {one.blocks[0]: hidden for one, hidden in zip(batch.segments, rows_of(batch, output), strict=True)}


@pytest.mark.parametrize("tokens", [6, 7, 8])
def test_decided_segment_equals_one_with_that_route_from_the_start(runner: ModelRunner, tokens: int) -> None:
    named, undecided = segment(route_of(tokens), tokens, 0), segment("", tokens, 1, undecided=True)
    undecided.session.token_ids = named.session.token_ids
    assert torch.allclose(rows(runner, undecided)[4], rows(runner, named)[0], atol=1e-5)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_result_is_independent_of_other_segments_in_the_batch(runner: ModelRunner, order: tuple[int, ...]) -> None:
    undecided = [segment("", 6 + route, slot, undecided=True) for slot, route in enumerate(order)]
    named = [segment(route, 5, 3 + slot) for slot, route in enumerate(LAYER_RANGES)]
    decoding = [segment(route, 1, 6 + slot) for slot, route in enumerate(LAYER_RANGES)]
    segments = [*undecided, *named, *decoding]
    together = rows(runner, *segments)
    for one in segments:
        assert torch.allclose(together[one.blocks[0]], rows(runner, one)[one.blocks[0]], atol=1e-5)


def test_decisions_are_keyed_by_segment_index(runner: ModelRunner) -> None:
    segments = (segment("strong", 3, 0), segment("", 8, 1, undecided=True), segment("", 6, 2, undecided=True))
    decisions = runner.run(Batch(segments)).decisions
    assert {index: decision.route for index, decision in decisions.items()} == {1: "strong", 2: "weak"}


def test_probe_reads_the_hidden_states_after_its_layer(runner: ModelRunner, folder: Path) -> None:
    one = segment("", 7, 0, undecided=True)
    runner.run(Batch((segment("strong", 5, 1), one)))
    shallow = new_runner(folder, 0, 2, embed=Embedding.load(folder, CPU, DTYPE))
    hidden = shallow.run(Batch((replace(one, candidates=()),))).hidden
    (read,) = runner.probe.read  # type: ignore[union-attr]
    assert hidden is not None
    assert torch.allclose(read, hidden, atol=1e-5)


def test_later_chunks_attend_to_kv_of_the_decided_layers(runner: ModelRunner) -> None:
    token_ids = random_prompt(9, 20)
    whole = Session("strong", (), Sampling(), token_ids, 20)
    wanted = runner.run(Batch((Segment(whole, LAYER_RANGES["strong"], 0, 20, True, range(4)),))).hidden
    decided = Session("", (), Sampling(), token_ids, 20)
    runner.run(
        Batch((Segment(decided, LAYER_RANGES["weak"], 0, 8, False, range(8, 12), candidates=tuple(LAYER_RANGES)),))
    )
    decided.route = "strong"
    rest = runner.run(Batch((Segment(decided, LAYER_RANGES["strong"], 8, 12, True, range(8, 12)),))).hidden
    assert rest is not None
    assert wanted is not None
    assert torch.allclose(rest, wanted[8:], atol=1e-5)
