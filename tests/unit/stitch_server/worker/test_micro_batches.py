"""Lanes compute what one pass would, at the same time, and none looks at what another has not yet made."""

from __future__ import annotations

import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import Tensor

from stitch.sampling import Sampling
from stitch_server.engine.types import LayerRange, Segment, Session
from stitch_server.model.linear import WeightFormat
from stitch_server.worker.micro_batches import UNEVEN, Lanes, Turns, apart, depend, divided
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import Parallelism, PassShape
from tests.support.runner_chain import Chain, Halves, load, prompt
from tests.support.tiny_model import write_tiny_pair


def segment(length: int, position: int = 0, sequence: Session | None = None) -> Segment:
    sequence = sequence or Session("strong", (), Sampling(), [], 0)
    return Segment(sequence, LayerRange(0, 4), position, length, wants_token=True, blocks=())


class TestDivided:
    @pytest.mark.parametrize("lanes", [1, 2, 3, 5])
    def test_every_row_is_in_one_part_of_about_one_size(self, lanes: int) -> None:
        draw = Random(lanes)
        for _ in range(50):
            segments = [segment(draw.choice([1, 1, 7, 60]), draw.randrange(9)) for _ in range(draw.randrange(5, 20))]
            parts = divided(segments, lanes)
            tokens = _tokens(segments)
            assert sorted(row for part in parts for row in part.rows) == list(range(len(tokens)))
            for part in parts:
                assert _tokens(part.segments) == [tokens[row] for row in part.rows]
                assert len(part.rows) < 1 + UNEVEN * len(tokens) / lanes

    def test_whole_sequences_stay_together_where_parts_are_even(self) -> None:
        segments = [segment(1), segment(60), segment(1), segment(40), segment(20)]
        assert [part.segments for part in divided(segments, 2)] == [
            [segments[0], segments[1]],
            [segments[2], segments[3], segments[4]],
        ]
        assert [part.rows for part in divided(segments, 2)] == [list(range(61)), list(range(61, 122))]

    def test_rows_of_a_part_may_lie_apart(self) -> None:
        segments = [segment(2), segment(4), segment(2)]
        assert [part.rows for part in divided(segments, 2)] == [[2, 3, 4, 5], [0, 1, 6, 7]]

    def test_a_prompt_is_cut_where_parts_would_be_uneven(self) -> None:
        segments = [segment(3), segment(1), segment(8, 2)]
        assert apart(segments, 2) is None
        first, second = divided(segments, 2)
        assert _tokens(first.segments) + _tokens(second.segments) == _tokens(segments)
        assert (first.rows, second.rows) == (list(range(6)), list(range(6, 12)))

    def test_chunks_of_one_sequence_are_not_parted(self) -> None:
        first, other = segment(4), segment(8)
        later = segment(4, position=4, sequence=first.session)
        assert [part.segments for part in divided([first, other, later], 2)] == [[first, later], [other]]

    def test_parts_depend_on_each_other_by_their_sequences_alone(self) -> None:
        twice, other = segment(4), segment(4)
        assert not depend(divided([twice, other], 2))
        assert depend(divided([twice, segment(2)], 2))
        later = segment(4, position=4, sequence=twice.session)
        assert depend(divided([twice, other, later], 3))


def _tokens(segments: list[Segment]) -> list[tuple[int, int]]:
    return [(one.session.id, one.position + offset) for one in segments for offset in range(one.length)]


class TestTurns:
    @pytest.mark.parametrize("over", [False, True])
    def test_a_layer_waits_for_the_lane_before_it(self, over: bool) -> None:
        turns, passed = Turns(), threading.Event()
        turns.reached(2)
        turns.wait_for(2)
        waiting = threading.Thread(target=lambda: (turns.wait_for(4), passed.set()))
        waiting.start()
        turns.reached(3)
        assert not passed.wait(0.05)
        turns.end() if over else turns.reached(4)
        assert passed.wait(10)
        waiting.join()


class TestLanes:
    def test_parts_are_computed_at_the_same_time(self) -> None:
        meeting = threading.Barrier(3, timeout=10)
        assert sorted(Lanes().run([meeting.wait] * 3)) == [0, 1, 2]

    def test_results_keep_the_order_of_the_parts(self) -> None:
        lanes = Lanes()
        for _ in range(20):
            assert lanes.run([lambda: "first", lambda: "second", lambda: "third"]) == ["first", "second", "third"]

    @pytest.mark.parametrize("failing", [0, 1])
    def test_an_error_comes_once_all_parts_have_ended(self, failing: int) -> None:
        ended: list[int] = []

        def part(number: int) -> None:
            if number == failing:
                raise ValueError(f"part {number}")
            threading.Event().wait(0.05)
            ended.append(number)

        with pytest.raises(ValueError, match=f"part {failing}"):
            Lanes().run([lambda: part(0), lambda: part(1)])
        assert ended == [1 - failing]


class TwoLanes:
    """In place of `Threads`: every pass that can be cut is."""

    def choose(self, work: PassShape) -> Parallelism:
        return Parallelism(2 if work.divisible else 1, 1)

    def took(self, *what: object) -> None:
        pass


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Halves:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return load(write_tiny_pair(folder, request.param), folder)


@pytest.fixture(scope="module")
def in_kernels(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    folder = tmp_path_factory.mktemp("kernels")
    return load(write_tiny_pair(folder, "qwen2"), folder, weight_format=WeightFormat(kernels=True))


@pytest.fixture
def chain(loaded: Halves, monkeypatch: pytest.MonkeyPatch) -> Chain:
    return _in_lanes(loaded, monkeypatch)


@pytest.fixture
def compiled(in_kernels: Halves, monkeypatch: pytest.MonkeyPatch) -> Chain:
    return _in_lanes(in_kernels, monkeypatch)


def _in_lanes(halves: Halves, monkeypatch: pytest.MonkeyPatch) -> Chain:
    for runner in (halves.bottom, halves.top):
        monkeypatch.setattr(runner, "threads", TwoLanes())
    return Chain(halves)


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of every pass's lanes."""
    noted: list[list[int]] = []
    run = Lanes.run

    def noting(self: Lanes, parts: Any) -> Any:
        # The part's own segments are the second of its arguments.
        noted.append([sum(one.length for one in part.args[1]) for part in parts])
        return run(self, parts)

    monkeypatch.setattr(Lanes, "run", noting)
    return noted


class TestRunner:
    @pytest.mark.parametrize("route", ["weak", "strong"])
    def test_one_prompt_goes_on_in_the_second_lane(self, chain: Chain, lanes: list[list[int]], route: str) -> None:
        for seed in range(10):
            kept = chain.session(route, prompt(40, seed))
            assert chain.run(chain.segment(kept)) == {kept.id: chain.expected(kept)}
            chain.free.extend(chain.blocks[kept.id])
        assert lanes == [[20, 20]] * 20

    def test_routes_of_all_depths_share_every_lane(self, chain: Chain, lanes: list[list[int]]) -> None:
        kept = [chain.session("weak" if seed % 2 else "strong", prompt(9 + seed, seed)) for seed in range(6)]
        answers = chain.run(*(chain.segment(one) for one in kept))
        assert answers == {one.id: chain.expected(one) for one in kept}
        assert lanes == [[35, 34]] * 2

    def test_prompts_share_a_pass_with_those_that_decode(self, chain: Chain, lanes: list[list[int]]) -> None:
        decoding = [chain.session(route, prompt(5, seed)) for seed, route in enumerate(("weak", "strong"))]
        for one in decoding:
            one.token_ids.append(chain.run(chain.segment(one))[one.id])
        coming = chain.session("weak", prompt(60, 7))
        for length in (25, 35):
            answers = chain.run(*(chain.segment(one) for one in decoding), chain.segment(coming, length))
            for one in decoding:
                assert answers[one.id] == chain.expected(one)
                one.token_ids.append(answers[one.id])
        assert answers[coming.id] == chain.expected(coming)
        assert [sum(rows) for rows in lanes] == [27, 27, 37, 37]

    def test_a_sequence_may_come_in_two_chunks_apart(self, chain: Chain, lanes: list[list[int]]) -> None:
        kept, other = (chain.session("weak", prompt(tokens, tokens)) for tokens in (30, 12))
        first, between, last = chain.segment(kept, 16), chain.segment(other), chain.segment(kept)
        assert chain.run(first, between, last)[kept.id] == chain.expected(kept)
        assert lanes == [[21, 21]] * 2

    @pytest.mark.parametrize(
        ("lengths", "rows"),
        [
            ((100, 100), [100, 100]),
            ((70, 58), [70, 58]),
            ((90, 48, 41), [90, 89]),
            ((120, 30, 21), []),
            ((64, 63), []),
        ],
    )
    def test_kernels_have_lanes_where_rows_are_many(
        self, compiled: Chain, lanes: list[list[int]], lengths: tuple[int, ...], rows: list[int]
    ) -> None:
        for turn in range(3):
            lanes.clear()
            routes = ["weak", "strong", "weak"]
            kept = [compiled.session(*one) for one in zip(routes, [prompt(n, turn + n) for n in lengths], strict=False)]
            answers = compiled.run(*(compiled.segment(one) for one in kept))
            assert answers == {one.id: compiled.expected(one) for one in kept}
            assert lanes == [rows] * 2 * bool(rows)
            for one in kept:
                compiled.free.extend(compiled.blocks[one.id])

    def test_single_tokens_alone_have_one_lane(self, chain: Chain, lanes: list[list[int]]) -> None:
        kept = [chain.session("weak", prompt(1, seed)) for seed in range(7)]
        chain.run(*(chain.segment(one) for one in kept))
        assert lanes == []

    def test_a_lane_that_fails_ends_its_pass_alone(self, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = chain.session("weak", prompt(40))
        lane = ModelRunner._lane

        def failing(self: ModelRunner, segments: Any, hidden: Tensor, *turns: Any) -> Tensor:
            if segments[0].position == 0:
                raise RuntimeError("no memory")
            return lane(self, segments, hidden, *turns)

        with monkeypatch.context() as broken:
            broken.setattr(ModelRunner, "_lane", failing)
            with pytest.raises(RuntimeError, match="no memory"):
                chain.bottom(chain.segment(kept))
        kept.cached = 0
        assert chain.run(chain.segment(kept)) == {kept.id: chain.expected(kept)}
