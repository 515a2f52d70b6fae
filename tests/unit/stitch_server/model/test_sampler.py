"""Tokens are sampled as by `transformers`, and a draw depends on seed and position alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stitch.sampling import Sampling
from stitch_server.model import sampler
from stitch_server.model.sampler import SampleRequest, apply_bias, apply_penalties, sample, top_candidates

VOCABULARY = 50
HISTORY = (3, 7, 7, 1, 12, 7, 12)


def logits(rows: int = 1, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def request(position: int = 7, prompt_tokens: int = 3, **sampling: object) -> SampleRequest:
    return SampleRequest(replace(Sampling(), **sampling), position, HISTORY, prompt_tokens)  # type: ignore[arg-type]


def dense(row: Tensor, sampling: Sampling) -> Tensor:
    """The distribution `[vocabulary]` that is drawn from."""
    probabilities, ids = top_candidates(row, sampling)
    spread = torch.zeros(len(row), dtype=torch.float64)
    spread[ids] = probabilities
    return spread / spread.sum()


def warped(row: Tensor, *processors: LogitsProcessor) -> Tensor:
    scores = row[None]
    for processor in processors:
        scores = processor(torch.tensor([HISTORY]), scores)
    return scores[0].double().softmax(0)


class TestForced:
    def test_tokens_are_forced_by_position_then_sampled(self) -> None:
        rows = logits(3)
        forced = {"forced_token_ids": (9, 4), "temperature": 1.0, "top_k": 1}
        drawn = sample(rows, [request(position=position, prompt_tokens=3, **forced) for position in (3, 4, 5)])
        assert [token.id for token in drawn] == [9, 4, int(rows[2].argmax())]

    def test_forced_token_has_the_log_probability_of_the_model(self) -> None:
        row = logits()
        (token,) = sample(row, [request(position=3, forced_token_ids=(9,), logprobs=0)])
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(float(row.log_softmax(1)[0, 9]))

    def test_other_rows_are_sampled_as_without(self) -> None:
        rows = logits(2)
        drawn = sample(rows, [request(position=3, forced_token_ids=(9,)), request(position=3)])
        assert [token.id for token in drawn] == [9, int(rows[1].argmax())]


class TestBias:
    def test_adds_to_the_logit_before_penalties(self) -> None:
        row = logits()
        likeliest, other = int(row.argmax()), int(row.argmin())
        assert sample(row, [request(logit_bias=((likeliest, -100.0),))])[0].id == int(row[0].topk(2).indices[1])
        assert sample(row, [request(logit_bias=((other, 100.0),))])[0].id == other
        # 3 is in the history: with its bias its logit is positive, and the penalty divides it.
        biased = apply_bias(row[0], request(logit_bias=((3, 20.0),)))
        penalized = apply_penalties(biased, request(repetition_penalty=2.0))
        assert float(penalized[3]) == pytest.approx((float(row[0, 3]) + 20) / 2)

    def test_draws_by_the_biased_distribution(self) -> None:
        row, draws = logits(), 2000
        share = float((row[0] + 2 * (torch.arange(VOCABULARY) == 5)).softmax(0)[5])
        wanted = request(temperature=1.0, logit_bias=((5, 2.0),))
        count = sum(sample(row, [replace(wanted, position=at)])[0].id == 5 for at in range(draws))
        assert abs(count - share * draws) < 4 * (share * (1 - share) * draws) ** 0.5

    def test_leaves_the_logits_the_log_probabilities_and_the_other_rows(self) -> None:
        rows = logits(2)
        before = rows.clone()
        biased, other = sample(rows, [request(logit_bias=((9, 100.0),), logprobs=1), request()])
        assert torch.equal(rows, before)
        assert (biased.id, other.id) == (9, int(rows[1].argmax()))
        assert biased.logprobs is not None
        assert biased.logprobs.logprob == pytest.approx(float(rows[0].log_softmax(0)[9]))

    def test_alone_as_in_a_batch(self) -> None:
        rows = logits(4)
        asked = [
            request(logit_bias=((1, 3.0), (2, -3.0)), temperature=0.8),
            request(),
            request(min_tokens=9, stop_token_ids=(int(rows[2].argmax()),)),
            request(temperature=1.0, top_p=0.9, min_tokens=9, stop_token_ids=(1, 2), frequency_penalty=0.5),
        ]
        alone = [sample(rows[index][None], [one])[0] for index, one in enumerate(asked)]
        assert sample(rows, asked) == alone


class TestMinTokens:
    def test_end_token_is_not_chosen_before_the_least_number_of_tokens(self) -> None:
        row = logits()
        first, second = row[0].topk(2).indices.tolist()
        asked = [request(position=at, prompt_tokens=3, min_tokens=2, stop_token_ids=(first,)) for at in (3, 4, 5)]
        assert [sample(row, [one])[0].id for one in asked] == [second, second, first]

    def test_end_token_is_never_drawn_too_early(self) -> None:
        row = logits()
        ends = tuple(row[0].topk(45).indices.tolist())
        for filters in ({}, {"top_k": 10}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 10.0}):
            wanted = request(temperature=5.0, prompt_tokens=3, min_tokens=1_000, stop_token_ids=ends, **filters)
            drawn = {sample(row, [replace(wanted, position=at)])[0].id for at in range(3, 103)}
            assert drawn.isdisjoint(ends)

    @pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0])
    def test_end_tokens_that_are_the_whole_vocabulary_still_give_a_token(self, temperature: float) -> None:
        # One of them only pads the vocabulary.
        ends = tuple(range(VOCABULARY + 1))
        wanted = request(min_tokens=100, stop_token_ids=ends, temperature=temperature, repetition_penalty=10.0)
        assert 0 <= sample(logits(), [wanted])[0].id < VOCABULARY


class TestGreedy:
    def test_takes_the_likeliest_token_of_every_row(self) -> None:
        rows = logits(4)
        drawn = sample(rows, [request(), request(seed=9), request(position=1), request()])
        assert [token.id for token in drawn] == rows.argmax(1).tolist()

    def test_takes_the_likeliest_token_beside_a_sampled_row(self) -> None:
        rows = logits(3)
        drawn = sample(rows, [request(), request(temperature=1.0, top_k=1), request()])
        assert [token.id for token in drawn] == rows.argmax(1).tolist()

    def test_takes_the_likeliest_token_after_penalties(self) -> None:
        row = torch.zeros(1, VOCABULARY)
        row[0, 7], row[0, 20] = 2.0, 1.5
        assert sample(row, [request(presence_penalty=1.0)])[0].id == 20


class TestDistribution:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
    def test_temperature_matches_transformers(self, temperature: float) -> None:
        row = logits()[0]
        expected = warped(row, TemperatureLogitsWarper(temperature))
        torch.testing.assert_close(dense(row, Sampling(temperature=temperature)), expected)

    @pytest.mark.parametrize("top_k", [1, 2, 10, 50, 60])
    def test_top_k_matches_transformers(self, top_k: int) -> None:
        row = logits()[0]
        expected = warped(row, TemperatureLogitsWarper(0.8), TopKLogitsWarper(top_k))
        torch.testing.assert_close(dense(row, Sampling(temperature=0.8, top_k=top_k)), expected)

    @pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
    def test_top_p_matches_transformers(self, top_p: float) -> None:
        row = logits()[0]
        expected = warped(row, TemperatureLogitsWarper(0.8), TopPLogitsWarper(top_p))
        torch.testing.assert_close(dense(row, Sampling(temperature=0.8, top_p=top_p)), expected)

    @pytest.mark.parametrize("likely", [1, 5, 49])
    def test_top_p_sorts_all_tokens_if_needed(self, monkeypatch: pytest.MonkeyPatch, likely: int) -> None:
        monkeypatch.setattr(sampler, "TOP_P_CANDIDATES", likely)
        row = logits()[0]
        expected = warped(row, TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.95))
        torch.testing.assert_close(dense(row, Sampling(temperature=2.0, top_p=0.95)), expected)

    @pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 1.0])
    def test_min_p_matches_transformers(self, min_p: float) -> None:
        row = logits()[0]
        expected = warped(row, TemperatureLogitsWarper(0.8), MinPLogitsWarper(min_p))
        torch.testing.assert_close(dense(row, Sampling(temperature=0.8, min_p=min_p)), expected)

    @pytest.mark.parametrize("seed", range(10))
    def test_all_filters_match_transformers_in_order(self, seed: int) -> None:
        row = logits(seed=seed)[0]
        order = (TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1))
        sampling = Sampling(temperature=1.7, top_k=20, top_p=0.8, min_p=0.1)
        torch.testing.assert_close(dense(row, sampling), warped(row, *order))

    @pytest.mark.parametrize("temperature", [1e-30, 1e-6])
    def test_temperature_near_zero_leaves_the_likeliest(self, temperature: float) -> None:
        row = logits()[0]
        assert dense(row, Sampling(temperature=temperature)).argmax() == row.argmax()
        assert dense(row, Sampling(temperature=temperature)).max() == 1.0


class TestPenalties:
    @pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
    def test_repetition_counts_prompt_and_answer(self, penalty: float) -> None:
        row = logits()[0]
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([HISTORY]), row[None].clone())[0]
        torch.testing.assert_close(apply_penalties(row, request(repetition_penalty=penalty)).float(), expected)

    def test_presence_counts_the_answer_once(self) -> None:
        change = apply_penalties(torch.zeros(VOCABULARY), request(presence_penalty=0.5))
        assert {at: value for at, value in enumerate(change.tolist()) if value} == {1: -0.5, 7: -0.5, 12: -0.5}

    def test_frequency_counts_the_answer_every_time(self) -> None:
        change = apply_penalties(torch.zeros(VOCABULARY), request(frequency_penalty=0.5))
        assert {at: value for at, value in enumerate(change.tolist()) if value} == {1: -0.5, 7: -0.5, 12: -1.0}

    def test_first_token_has_no_penalty(self) -> None:
        row = logits()[0]
        first = request(presence_penalty=1.0, frequency_penalty=1.0, prompt_tokens=len(HISTORY))
        assert torch.equal(apply_penalties(row, first), row)

    def test_leave_the_logits_unchanged(self) -> None:
        row = logits()[0]
        before = row.clone()
        apply_penalties(row, request(repetition_penalty=2.0, presence_penalty=1.0))
        assert torch.equal(row, before)


class TestDraw:
    def test_depends_on_seed_and_position_alone(self) -> None:
        rows = logits(3)
        wanted = request(temperature=1.0, seed=5, position=100)
        alone = sample(rows[:1], [wanted])[0]
        others = [request(temperature=2.0, seed=1), request()]
        assert sample(rows, [wanted, *others])[0] == alone
        assert sample(rows.flip(0), [*others, wanted])[2] == alone

    def test_other_seed_or_position_draws_another_token(self) -> None:
        row = torch.zeros(1, VOCABULARY)
        draws = {sample(row, [request(temperature=1.0, seed=seed)])[0].id for seed in range(40)}
        moves = {sample(row, [request(temperature=1.0, position=at)])[0].id for at in range(40)}
        assert min(len(draws), len(moves)) > 20

    def test_largest_seed_is_accepted(self) -> None:
        assert 0 <= sample(logits(), [request(temperature=1.0, seed=2**64 - 1)])[0].id < VOCABULARY

    def test_follows_the_distribution(self) -> None:
        row = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
        draws = 4000
        counts = Counter(sample(row, [request(temperature=1.0, position=at)])[0].id for at in range(draws))
        for token, probability in enumerate((0.5, 0.3, 0.15, 0.05)):
            # Four standard deviations.
            tolerance = 4 * (probability * (1 - probability) * draws) ** 0.5
            assert abs(counts[token] - probability * draws) < tolerance

    def test_follows_the_distribution_in_its_tail(self) -> None:
        # A quarter of the probability is in a thousand tokens, each of which is drawn once in 4,000 times.
        row = torch.cat([torch.tensor([0.75]), torch.full((1000,), 0.25 / 1000)]).log()[None]
        draws = 4000
        drawn = [sample(row, [request(temperature=1.0, position=at)])[0].id for at in range(draws)]
        tail = [token for token in drawn if token]
        assert abs(len(tail) - draws / 4) < 4 * (draws * 3 / 16) ** 0.5
        # A thousand draws of a thousand tokens leave out a share of 1/e.
        assert 560 < len(set(tail)) < 700
        assert abs(sum(tail) / len(tail) - 500.5) < 40

    def test_noise_in_the_last_digits_of_the_logits_moves_no_draw(self) -> None:
        # In a running sum the draws of a hundred of these tokens would move.
        row = 3 * torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1))
        noisy = row * (1 + 1e-6 * torch.randn(row.shape, generator=torch.Generator().manual_seed(2)))
        moved = [
            at
            for at in range(1000)
            if sample(row, [request(temperature=1.0, position=at)])
            != sample(noisy, [request(temperature=1.0, position=at)])
        ]
        assert len(moved) <= 1

    @pytest.mark.parametrize("filters", [{"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}])
    def test_filter_that_leaves_the_token_does_not_change_it(self, filters: dict[str, float]) -> None:
        row = logits()
        left = set(top_candidates(row[0], request(temperature=1.0, **filters).sampling)[1].tolist())
        for at in range(100):
            token = sample(row, [request(temperature=1.0, position=at)])
            if token[0].id in left:
                assert sample(row, [request(temperature=1.0, position=at, **filters)]) == token

    def test_never_draws_a_filtered_token(self) -> None:
        row = logits()
        wanted = request(temperature=3.0, top_k=8, top_p=0.9, min_p=0.05)
        allowed = set(top_candidates(row[0], wanted.sampling)[1].tolist())
        drawn = {sample(row, [replace(wanted, position=at)])[0].id for at in range(200)}
        assert drawn <= allowed
        assert len(drawn) > 1


class TestLogprobs:
    def test_none_unless_requested(self) -> None:
        plain, asked = sample(logits(2), [request(), request(logprobs=0)])
        assert plain.logprobs is None
        assert asked.logprobs is not None
        assert asked.logprobs.alternatives == ()

    def test_are_those_of_the_unchanged_logits(self) -> None:
        rows = logits()
        token = sample(rows, [request(temperature=0.5, repetition_penalty=5.0, top_k=2, logprobs=3)])[0]
        expected = rows[0].log_softmax(0)
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(float(expected[token.id]))
        values, ids = expected.topk(3)
        assert [at for at, _ in token.logprobs.alternatives] == ids.tolist()
        assert [value for _, value in token.logprobs.alternatives] == pytest.approx(values.tolist())


def test_padding_id_in_the_history_is_ignored() -> None:
    padded = replace(request(repetition_penalty=2.0), history=[1, VOCABULARY + 5], prompt_tokens=2)
    changed = apply_penalties(torch.ones(VOCABULARY), padded)
    assert changed.shape == (VOCABULARY,)
    assert changed[1] == 0.5
    assert bool((changed[2:] == 1.0).all())


# Sampling of any kind within the limits of `stitch.sampling`.
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0, 100) | st.sampled_from([1e-300, 1e-45, 1e-7, 1e-5]),
    top_k=st.integers(0, 2**32 - 1) | st.integers(0, 12),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 10, exclude_min=True) | st.sampled_from([1e-39, 1e-300]),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.none() | st.integers(0, 20),
)
LARGEST = torch.finfo(torch.float32).max
LOGITS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, LARGEST, -LARGEST, 1e-45])
HISTORIES = st.lists(st.integers(0, 14) | st.just(2**32 - 1), max_size=8)


class TestEveryInput:
    @settings(max_examples=500, deadline=None)
    @given(st.lists(LOGITS, min_size=1, max_size=12), SAMPLINGS, HISTORIES, st.integers(0, 9), st.integers(0, 2**31))
    def test_valid_sampling_of_finite_logits_chooses_one_of_them(
        self, row: list[float], sampling: Sampling, history: list[int], prompt_tokens: int, position: int
    ) -> None:
        (token,) = sample(torch.tensor([row]), [SampleRequest(sampling, position, history, prompt_tokens)])
        assert 0 <= token.id < len(row)
        if sampling.greedy and not sampling.penalizes:
            assert row[token.id] == max(row)
        assert (token.logprobs is None) == (sampling.logprobs is None)
        if token.logprobs is not None and sampling.logprobs is not None:
            reported = [logprob for _, logprob in token.logprobs.alternatives]
            assert reported == sorted(reported, reverse=True)
            assert len(reported) == min(sampling.logprobs, len(row))
            assert all(math.isfinite(value) and value <= 0 for value in [token.logprobs.logprob, *reported])

    @settings(max_examples=500, deadline=None)
    @given(st.lists(LOGITS, min_size=1, max_size=12), SAMPLINGS, HISTORIES)
    def test_candidates_of_penalized_logits_have_shares(
        self, row: list[float], sampling: Sampling, history: list[int]
    ) -> None:
        penalized = apply_penalties(torch.tensor(row), SampleRequest(sampling, 0, history, 2))
        assert bool(penalized.isfinite().all())
        if not sampling.greedy:
            probabilities, ids = top_candidates(penalized, sampling)
            assert len(probabilities) == len(ids) > 0
            assert float(probabilities.max()) > 0
            assert float(probabilities.sum()) <= 1 + 1e-9

    @pytest.mark.parametrize("temperature", [1e-300, 1e-45, 5e-324])
    def test_tiny_temperature_is_greedy(self, temperature: float) -> None:
        rows = logits()
        (token,) = sample(rows, [request(temperature=temperature, min_p=0.1, top_p=0.9)])
        assert token.id == int(rows[0].argmax())

    @pytest.mark.parametrize("penalty", [1e-39, 1e-300, 5e-324])
    def test_tiny_repetition_penalty_repeats(self, penalty: float) -> None:
        row = torch.tensor([[-1.0, 2.0, 5.0, 1.0]])
        repeating = SampleRequest(Sampling(temperature=1.0, repetition_penalty=penalty), 2, (0, 3), 1)
        assert sample(row, [repeating])[0].id == 3

    def test_history_without_logits_is_not_counted(self) -> None:
        wide = SampleRequest(Sampling(frequency_penalty=2.0), 2, (2**32 - 1, 1), 0)
        assert apply_penalties(torch.ones(3), wide).tolist() == [1.0, -1.0, 1.0]
        assert apply_penalties(torch.ones(3), replace(wide, history=())).tolist() == [1.0] * 3
