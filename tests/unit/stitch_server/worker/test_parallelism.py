"""The tuner picks what was fastest, and micro-batches change the speed of a pass but not its result."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import Tensor

from stitch.sampling import Sampling
from stitch_server.engine.types import LayerRange, Segment, Session
from stitch_server.model.weights import WeightFormat
from stitch_server.worker import parallelism
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import (
    FIRST_RETRIAL_PASSES,
    MAX_IMBALANCE,
    MAX_RETRIAL_PASSES,
    LayerBarrier,
    MicroBatch,
    MicroBatchPool,
    Parallelism,
    ParallelismTuner,
    PassShape,
    share_a_sequence,
    split,
    split_by_sequence,
)
from tests.support.runner_chain import Chain, Halves, load, prompt
from tests.support.tiny_model import write_tiny_pair

Cost = Callable[[Parallelism], float]

ONE_TOKEN = PassShape(1)


def chosen(tuner: ParallelismTuner, passes: int, cost: Cost, shape: PassShape = ONE_TOKEN) -> list[Parallelism]:
    """The choices for `passes` passes, each of which takes `cost(choice)` seconds."""
    choices = []
    for _ in range(passes):
        choice = tuner.choose(shape)
        tuner.record(shape, choice, cost(choice))
        choices.append(choice)
    return choices


def slower(choice: Parallelism) -> float:
    """With more threads."""
    return float(choice.threads)


def faster(choice: Parallelism) -> float:
    return 1 / choice.threads


@pytest.mark.parametrize(("cost", "best"), [(slower, 1), (faster, 8)])
def test_tuner_chooses_the_fastest_candidate_after_the_trials(cost: Cost, best: int) -> None:
    choices = chosen(ParallelismTuner(8, 8), FIRST_RETRIAL_PASSES, cost)
    assert set(choices[:9]) == {Parallelism(1, 8), Parallelism(1, 2), Parallelism(1, 1)}
    assert set(choices[9:]) == {Parallelism(1, best)}


def test_splittable_pass_may_get_two_micro_batches() -> None:
    choices = chosen(
        ParallelismTuner(8, 8),
        MAX_RETRIAL_PASSES,
        lambda choice: 1 / choice.num_micro_batches,
        PassShape(100, splittable=True),
    )
    assert set(choices) == {Parallelism(1, 8), Parallelism(1, 2), Parallelism(1, 1), Parallelism(2, 4)}
    assert choices[-1] == Parallelism(2, 4)


@pytest.mark.parametrize(("slowdown", "trials"), [(1.2, 3), (1.4, 2)])
def test_dominated_candidate_is_tried_twice_at_first(slowdown: float, trials: int) -> None:
    choices = Counter(
        chosen(ParallelismTuner(4, 4), FIRST_RETRIAL_PASSES, lambda choice: slowdown if choice.threads == 4 else 1.0)
    )
    assert choices[Parallelism(1, 4)] == trials


@pytest.mark.parametrize(("slowdown", "trials"), [(1.2, 3), (1.4, 0)])
def test_dominated_candidate_is_retried_at_the_maximum_interval(slowdown: float, trials: int) -> None:
    tuner, cost = ParallelismTuner(2, 2), lambda choice: slowdown if choice.threads == 1 else 1.0
    chosen(tuner, FIRST_RETRIAL_PASSES + 2, cost)
    assert Counter(chosen(tuner, MAX_RETRIAL_PASSES - FIRST_RETRIAL_PASSES - 2, cost))[Parallelism(1, 1)] == trials
    assert Counter(chosen(tuner, 2, cost))[Parallelism(1, 1)] == 1


@pytest.mark.parametrize(("tokens", "trials"), [(20, 0), (100, 0), (200, 2)])
def test_candidate_dominated_at_a_similar_size_gets_no_initial_trials(tokens: int, trials: int) -> None:
    tuner = ParallelismTuner(2, 2)
    chosen(tuner, FIRST_RETRIAL_PASSES, faster, PassShape(50))
    assert Counter(chosen(tuner, FIRST_RETRIAL_PASSES, faster, PassShape(tokens)))[Parallelism(1, 1)] == trials
    assert chosen(tuner, 100, slower, PassShape(tokens))[-1] == Parallelism(1, 1)


@pytest.mark.parametrize("disturbed", [0, 1, 2, 9])
def test_one_disturbed_pass_does_not_change_the_choice(disturbed: int) -> None:
    tuner, runs = ParallelismTuner(2, 2), Counter[Parallelism]()

    def cost(choice: Parallelism) -> float:
        runs[choice] += 1
        return 100 if choice == Parallelism(1, 1) and runs[choice] == disturbed + 1 else choice.threads

    choices = chosen(tuner, FIRST_RETRIAL_PASSES, cost)
    assert set(choices[6:]) == {Parallelism(1, 1)}


def test_disturbed_initial_trials_are_corrected_by_the_first_retrial() -> None:
    tuner = ParallelismTuner(2, 2)
    chosen(tuner, 6, slower)
    assert Counter(chosen(tuner, 100, faster))[Parallelism(1, 2)] > 30


def test_durations_are_compared_per_token() -> None:
    tuner = ParallelismTuner(4, 4)
    # Four threads are faster, but always have the larger passes.
    for _ in range(3):
        for tokens, seconds in ((250, 0.2), (130, 0.15)):
            tuner.record(PassShape(tokens), tuner.choose(PassShape(tokens)), seconds)
    assert tuner.choose(PassShape(200)) == Parallelism(1, 4)


def test_durations_are_compared_per_attended_token() -> None:
    tuner = ParallelismTuner(2, 2)
    # A prompt's later chunks take longer, and all of them run as two micro-batches.
    for chunk in range(100):
        shape = PassShape(20, attention_tokens=chunk, splittable=True)
        choice = tuner.choose(shape)
        tuner.record(shape, choice, shape.cost / choice.num_micro_batches)
    assert {tuner.choose(PassShape(20, attention_tokens=1, splittable=True)) for _ in range(20)} == {Parallelism(2, 1)}


def test_tuner_adapts_when_another_candidate_becomes_faster() -> None:
    tuner = ParallelismTuner(8, 8)
    chosen(tuner, MAX_RETRIAL_PASSES, faster)
    later = Counter(chosen(tuner, 10 * MAX_RETRIAL_PASSES, slower))
    assert later.most_common(1)[0][0] == Parallelism(1, 1)


def test_retrials_are_less_than_five_percent_of_passes() -> None:
    choices = Counter(chosen(ParallelismTuner(8, 8), 100 * MAX_RETRIAL_PASSES, faster))
    assert choices[Parallelism(1, 8)] > 0.95 * 100 * MAX_RETRIAL_PASSES


def test_kinds_of_passes_are_tuned_separately() -> None:
    tuner = ParallelismTuner(8, 4)
    chosen(tuner, MAX_RETRIAL_PASSES - 1, slower)
    chosen(tuner, MAX_RETRIAL_PASSES - 2, faster, PassShape(128))
    chosen(tuner, MAX_RETRIAL_PASSES - 1, faster, PassShape(1, pipelined=True))
    assert [tuner.choose(PassShape(tokens)).threads for tokens in (1, 128, 200)] == [1, 8, 8]
    assert tuner.choose(PassShape(1, pipelined=True)).threads == 4


def test_splittable_passes_are_tuned_separately() -> None:
    tuner = ParallelismTuner(2, 2)
    chosen(tuner, MAX_RETRIAL_PASSES - 1, lambda choice: 1 / choice.num_micro_batches, PassShape(128, splittable=True))
    chosen(tuner, MAX_RETRIAL_PASSES - 1, slower, PassShape(128))
    assert tuner.choose(PassShape(128, splittable=True)) == Parallelism(2, 1)
    assert tuner.choose(PassShape(128)) == Parallelism(1, 1)


@pytest.mark.parametrize("splittable", [False, True])
def test_one_thread_leaves_one_candidate(splittable: bool) -> None:
    assert set(chosen(ParallelismTuner(1, 1), 200, slower, PassShape(64, splittable=splittable))) == {Parallelism(1, 1)}


def segment(length: int, position: int = 0, session: Session | None = None) -> Segment:
    session = session or Session("strong", (), Sampling(), [], 0)
    return Segment(session, LayerRange(0, 4), position, length, wants_token=True, blocks=())


class TestSplit:
    @pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 5])
    def test_every_row_is_in_one_micro_batch_of_balanced_size(self, num_micro_batches: int) -> None:
        draw = Random(num_micro_batches)
        for _ in range(50):
            segments = [segment(draw.choice([1, 1, 7, 60]), draw.randrange(9)) for _ in range(draw.randrange(5, 20))]
            micro_batches = split(segments, num_micro_batches)
            tokens = _tokens(segments)
            assert sorted(row for one in micro_batches for row in one.rows) == list(range(len(tokens)))
            for one in micro_batches:
                assert _tokens(one.segments) == [tokens[row] for row in one.rows]
                assert len(one.rows) < 1 + MAX_IMBALANCE * len(tokens) / num_micro_batches

    def test_sequences_stay_whole_if_the_sizes_are_balanced(self) -> None:
        segments = [segment(1), segment(60), segment(1), segment(40), segment(20)]
        assert [one.segments for one in split(segments, 2)] == [
            [segments[0], segments[1]],
            [segments[2], segments[3], segments[4]],
        ]
        assert [one.rows for one in split(segments, 2)] == [list(range(61)), list(range(61, 122))]

    def test_rows_of_a_micro_batch_need_not_be_adjacent(self) -> None:
        segments = [segment(2), segment(4), segment(2)]
        assert [one.rows for one in split(segments, 2)] == [[2, 3, 4, 5], [0, 1, 6, 7]]

    def test_prompt_is_cut_if_whole_sequences_are_unbalanced(self) -> None:
        segments = [segment(3), segment(1), segment(8, 2)]
        assert split_by_sequence(segments, 2) is None
        first, second = split(segments, 2)
        assert _tokens(first.segments) + _tokens(second.segments) == _tokens(segments)
        assert (first.rows, second.rows) == (list(range(6)), list(range(6, 12)))

    def test_chunks_of_one_sequence_share_a_micro_batch(self) -> None:
        first, other = segment(4), segment(8)
        later = segment(4, position=4, session=first.session)
        assert [one.segments for one in split([first, other, later], 2)] == [[first, later], [other]]

    def test_micro_batches_depend_on_each_other_only_by_a_shared_sequence(self) -> None:
        twice, other = segment(4), segment(4)
        assert not share_a_sequence(split([twice, other], 2))
        assert share_a_sequence(split([twice, segment(2)], 2))
        later = segment(4, position=4, session=twice.session)
        assert share_a_sequence(split([twice, other, later], 3))


def _tokens(segments: list[Segment]) -> list[tuple[int, int]]:
    return [(one.session.id, one.position + offset) for one in segments for offset in range(one.length)]


class TestLayerBarrier:
    @pytest.mark.parametrize("failed", [False, True])
    def test_layer_waits_for_the_predecessor(self, failed: bool) -> None:
        barrier, passed = LayerBarrier(), threading.Event()
        barrier.complete(2)
        barrier.wait_for(2)
        waiting = threading.Thread(target=lambda: (barrier.wait_for(4), passed.set()))
        waiting.start()
        barrier.complete(3)
        assert not passed.wait(0.05)
        barrier.release() if failed else barrier.complete(4)
        assert passed.wait(10)
        waiting.join()


class TestMicroBatchPool:
    def test_tasks_run_concurrently(self) -> None:
        meeting = threading.Barrier(3, timeout=10)
        assert sorted(MicroBatchPool().run_tasks([meeting.wait] * 3)) == [0, 1, 2]

    def test_results_are_in_the_order_of_the_tasks(self) -> None:
        pool = MicroBatchPool()
        for _ in range(20):
            assert pool.run_tasks([lambda: "first", lambda: "second", lambda: "third"]) == ["first", "second", "third"]

    @pytest.mark.parametrize("failing", [0, 1])
    def test_error_is_raised_once_all_tasks_have_ended(self, failing: int) -> None:
        ended: list[int] = []

        def task(number: int) -> None:
            if number == failing:
                raise ValueError(f"task {number}")
            threading.Event().wait(0.05)
            ended.append(number)

        with pytest.raises(ValueError, match=f"task {failing}"):
            MicroBatchPool().run_tasks([lambda: task(0), lambda: task(1)])
        assert ended == [1 - failing]


class AlwaysSplit:
    """A tuner that splits every splittable pass in two."""

    def choose(self, shape: PassShape) -> Parallelism:
        return Parallelism(2 if shape.splittable else 1, 1)

    def record(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Halves:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return load(write_tiny_pair(folder, request.param), folder)


@pytest.fixture(scope="module")
def loaded_compiled(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    folder = tmp_path_factory.mktemp("kernels")
    return load(write_tiny_pair(folder, "qwen2"), folder, weight_format=WeightFormat(kernels=True))


@pytest.fixture
def chain(loaded: Halves, monkeypatch: pytest.MonkeyPatch) -> Chain:
    return _splitting(loaded, monkeypatch)


@pytest.fixture
def compiled(loaded_compiled: Halves, monkeypatch: pytest.MonkeyPatch) -> Chain:
    return _splitting(loaded_compiled, monkeypatch)


def _splitting(halves: Halves, monkeypatch: pytest.MonkeyPatch) -> Chain:
    for runner in (halves.bottom, halves.top):
        monkeypatch.setattr(runner, "tuner", AlwaysSplit())
    return Chain(halves)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of the micro-batches of every split pass."""
    recorded: list[list[int]] = []

    def record(segments: Any, num_micro_batches: int) -> list[MicroBatch]:
        micro_batches = split(segments, num_micro_batches)
        recorded.append([sum(one.length for one in micro_batch.segments) for micro_batch in micro_batches])
        return micro_batches

    monkeypatch.setattr(parallelism, "split", record)
    return recorded


class TestSplitPasses:
    @pytest.mark.parametrize("route", ["weak", "strong"])
    def test_one_prompt_is_computed_in_two_micro_batches(
        self, chain: Chain, splits: list[list[int]], route: str
    ) -> None:
        for seed in range(10):
            session = chain.session(route, prompt(40, seed))
            assert chain.run(chain.segment(session)) == {session.id: chain.expected(session)}
            chain.free.extend(chain.blocks[session.id])
        assert splits == [[20, 20]] * 20

    def test_micro_batches_hold_segments_of_all_routes(self, chain: Chain, splits: list[list[int]]) -> None:
        sessions = [chain.session("weak" if seed % 2 else "strong", prompt(9 + seed, seed)) for seed in range(6)]
        answers = chain.run(*(chain.segment(one) for one in sessions))
        assert answers == {one.id: chain.expected(one) for one in sessions}
        assert splits == [[35, 34]] * 2

    def test_prefill_and_decode_share_a_split_pass(self, chain: Chain, splits: list[list[int]]) -> None:
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
        assert [sum(rows) for rows in splits] == [27, 27, 37, 37]

    def test_two_chunks_of_one_sequence_are_split_from_others(self, chain: Chain, splits: list[list[int]]) -> None:
        session, other = (chain.session("weak", prompt(tokens, tokens)) for tokens in (30, 12))
        first, between, last = chain.segment(session, 16), chain.segment(other), chain.segment(session)
        assert chain.run(first, between, last)[session.id] == chain.expected(session)
        assert splits == [[21, 21]] * 2

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
    def test_compiled_pass_is_split_if_balanced_and_long(
        self, compiled: Chain, splits: list[list[int]], lengths: tuple[int, ...], rows: list[int]
    ) -> None:
        for repetition in range(3):
            splits.clear()
            routes = ["weak", "strong", "weak"]
            sessions = [
                compiled.session(*one)
                for one in zip(routes, [prompt(n, repetition + n) for n in lengths], strict=False)
            ]
            answers = compiled.run(*(compiled.segment(one) for one in sessions))
            assert answers == {one.id: compiled.expected(one) for one in sessions}
            assert splits == [rows] * 2 * bool(rows)
            for one in sessions:
                compiled.free.extend(compiled.blocks[one.id])

    def test_decode_step_is_not_split(self, chain: Chain, splits: list[list[int]]) -> None:
        sessions = [chain.session("weak", prompt(1, seed)) for seed in range(7)]
        chain.run(*(chain.segment(one) for one in sessions))
        assert splits == []

    def test_failed_micro_batch_fails_its_pass_alone(self, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
        session = chain.session("weak", prompt(40))
        run_micro_batch = ModelRunner._run_micro_batch

        def failing(self: ModelRunner, segments: Any, hidden: Tensor, *barriers: Any) -> Tensor:
            if segments[0].position == 0:
                raise RuntimeError("no memory")
            return run_micro_batch(self, segments, hidden, *barriers)

        with monkeypatch.context() as broken:
            broken.setattr(ModelRunner, "_run_micro_batch", failing)
            with pytest.raises(RuntimeError, match="no memory"):
                chain.bottom(chain.segment(session))
        session.cached = 0
        assert chain.run(chain.segment(session)) == {session.id: chain.expected(session)}
