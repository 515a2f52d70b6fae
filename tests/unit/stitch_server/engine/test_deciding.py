"""The pass that decides: undecided segments end up where those with the same route named do, whoever is beside."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

from stitch.sampling import Sampling
from stitch_server.engine.types import Batch, LayerRange, RouteDecision, Segment, Session, in_layer_order
from stitch_server.model.embedding import Embedding
from stitch_server.worker.model_runner import ModelRunner
from tests.support.runner_chain import CPU, DTYPE, new_runner, rows_of
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_probe import drawn

CUTS = {"weak": LayerRange(0, 2), "middle": LayerRange(0, 3), "strong": LayerRange(0, 4)}
WINDOW = 6


class Scripted:
    """A judge that takes the route which the number of tokens stands for, and remembers what it saw."""

    layer, tokens = 2, WINDOW

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def judge(self, states: torch.Tensor, candidates: tuple[str, ...]) -> RouteDecision:
        self.seen.append(states.clone())
        return RouteDecision(tuple(CUTS)[len(states) % 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture
def runner(folder: Path) -> ModelRunner:
    judge: object = Scripted()
    return new_runner(folder, 0, 4, embed=Embedding.load(folder, CPU, DTYPE), judge=judge, layer_ranges=CUTS)


def segment(route: str, tokens: int, slot: int, undecided: bool = False) -> Segment:
    """A prompt with four blocks of its own."""
    sequence = Session("" if undecided else route, (), Sampling(), drawn(slot, tokens), tokens)
    cut = CUTS["weak"] if undecided else CUTS[route]
    return Segment(
        sequence, cut, 0, tokens, True, range(4 * slot, 4 * slot + 4), candidates=tuple(CUTS) if undecided else ()
    )


def route_of(tokens: int) -> str:
    return tuple(CUTS)[tokens % 3]


def rows(runner: ModelRunner, *segments: Segment) -> dict[int, torch.Tensor]:
    """The hidden states by the first block of their segment."""
    batch = Batch(in_layer_order(segments))
    output = runner.run(batch)
    return {one.blocks[0]: hidden for one, hidden in zip(batch.segments, rows_of(batch, output), strict=True)}


@pytest.mark.parametrize("tokens", [6, 7, 8])
def test_an_undecided_segment_ends_as_with_its_route_named(runner: ModelRunner, tokens: int) -> None:
    named, undecided = segment(route_of(tokens), tokens, 0), segment("", tokens, 1, undecided=True)
    undecided.session.token_ids = named.session.token_ids
    assert torch.allclose(rows(runner, undecided)[4], rows(runner, named)[0], atol=1e-5)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_neighbours_of_all_kinds_change_nothing(runner: ModelRunner, order: tuple[int, ...]) -> None:
    undecided = [segment("", 6 + route, slot, undecided=True) for slot, route in enumerate(order)]
    decided = [segment(route, 5, 3 + slot) for slot, route in enumerate(CUTS)]
    decoding = [segment(route, 1, 6 + slot) for slot, route in enumerate(CUTS)]
    everyone = [*undecided, *decided, *decoding]
    together = rows(runner, *everyone)
    for one in everyone:
        assert torch.allclose(together[one.blocks[0]], rows(runner, one)[one.blocks[0]], atol=1e-5)


def test_verdicts_stand_at_their_segments(runner: ModelRunner) -> None:
    segments = (segment("strong", 3, 0), segment("", 8, 1, undecided=True), segment("", 6, 2, undecided=True))
    decisions = runner.run(Batch(segments)).decisions
    assert {index: decision.route for index, decision in decisions.items()} == {1: "strong", 2: "weak"}


def test_the_judge_sees_the_states_behind_its_layer(runner: ModelRunner, folder: Path) -> None:
    one = segment("", 7, 0, undecided=True)
    runner.run(Batch((segment("strong", 5, 1), one)))
    shallow = new_runner(folder, 0, 2, embed=Embedding.load(folder, CPU, DTYPE))
    states = shallow.run(Batch((replace(one, candidates=()),))).hidden
    (seen,) = runner.judge.seen  # type: ignore[union-attr]
    assert states is not None
    assert torch.allclose(seen, states, atol=1e-5)


def test_later_chunks_find_the_keys_of_the_deeper_layers(runner: ModelRunner) -> None:
    token_ids = drawn(9, 20)
    whole = Session("strong", (), Sampling(), token_ids, 20)
    wanted = runner.run(Batch((Segment(whole, CUTS["strong"], 0, 20, True, range(4)),))).hidden
    judged = Session("", (), Sampling(), token_ids, 20)
    runner.run(Batch((Segment(judged, CUTS["weak"], 0, 8, False, range(8, 12), candidates=tuple(CUTS)),)))
    judged.route = "strong"
    rest = runner.run(Batch((Segment(judged, CUTS["strong"], 8, 12, True, range(8, 12)),))).hidden
    assert rest is not None
    assert wanted is not None
    assert torch.allclose(rest, wanted[8:], atol=1e-5)
