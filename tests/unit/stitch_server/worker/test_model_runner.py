"""One pass over a mixed batch gives every segment what it would have got alone, and what the models say."""

from __future__ import annotations

import pytest
import torch

from stitch_server.engine.types import Batch
from stitch_server.engine.types import Session as Kept
from tests.support.runner_chain import ROUTES, Chain, prompt, rows_of
from tests.support.tiny_model import TOKENS


@pytest.mark.parametrize("route", ROUTES)
def test_a_prompt_is_answered_as_the_models_do(chain: Chain, route: str) -> None:
    kept = chain.session(route, prompt(21))
    assert chain.run(chain.segment(kept)) == {kept.id: chain.expected(kept)}


@pytest.mark.parametrize("chunk", [1, 7, 16, 20])
def test_chunks_change_nothing(chain: Chain, chunk: int) -> None:
    kept = chain.session("weak", prompt(40))
    while len(kept.token_ids) - kept.cached > chunk:
        assert chain.run(chain.segment(kept, chunk, wants_token=False)) == {}
    assert chain.run(chain.segment(kept)) == {kept.id: chain.expected(kept)}


def test_routes_of_all_depths_share_every_batch(chain: Chain) -> None:
    weak, strong = chain.session("weak", prompt(18, 1)), chain.session("strong", prompt(9, 2))
    chain.run(chain.segment(weak, 10, wants_token=False))
    for _ in range(4):
        answers = chain.run(chain.segment(weak), chain.segment(strong))
        for kept in (weak, strong):
            assert answers[kept.id] == chain.expected(kept)
            kept.token_ids.append(answers[kept.id])


def test_two_chunks_of_one_sequence_in_one_batch(chain: Chain) -> None:
    kept, other = chain.session("weak", prompt(30)), chain.session("strong", prompt(5, 1))
    segments = [chain.segment(kept, 12, wants_token=False), chain.segment(other), chain.segment(kept)]
    answers = chain.run(*segments)
    assert answers == {kept.id: chain.expected(kept), other.id: chain.expected(other)}


def test_who_leaves_early_leaves_with_what_its_layers_made(chain: Chain) -> None:
    weak, strong = chain.session("weak", prompt(6, 1)), chain.session("strong", prompt(7, 2))
    batch, output = chain.bottom(chain.segment(weak), chain.segment(strong))
    assert [one.session.route for one in batch.segments] == ["strong", "weak"]
    left = rows_of(batch, output)
    assert [rows.shape for rows in left] == [(7, 48), (6, 48)]
    for one, rows in zip(batch.segments, left, strict=True):
        alone = chain.session(one.session.route, one.session.token_ids)
        _, expected = chain.bottom(chain.segment(alone))
        torch.testing.assert_close(rows, expected.hidden, rtol=1e-4, atol=1e-4)


def test_only_those_that_want_a_token_get_one(chain: Chain) -> None:
    silent, asking = chain.session("weak", prompt(6, 1)), chain.session("weak", prompt(7, 2))
    answers = chain.run(chain.segment(silent, wants_token=False), chain.segment(asking))
    assert answers.keys() == {asking.id}


def test_a_token_says_its_position_and_its_logprobs(chain: Chain) -> None:
    kept = chain.session("strong", prompt(6), logprobs=2)
    batch, output = chain.bottom(chain.segment(kept))
    _, answer = chain.top(batch, rows_of(batch, output))
    token = answer.tokens[0]
    expected = chain.halves.references["strong"].logits(kept.token_ids)[-1, :TOKENS].log_softmax(0)
    assert (token.id, token.position) == (int(expected.argmax()), 6)
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(float(expected.max()), abs=1e-3)
    assert [one for one, _ in token.logprobs.alternatives] == expected.topk(2).indices.tolist()


def test_penalties_see_the_whole_sequence(chain: Chain) -> None:
    kept = chain.session("weak", prompt(6))
    favourite = chain.expected(kept)
    shy = chain.session("weak", [*prompt(5), favourite], repetition_penalty=10.0)
    logits = chain.halves.references["weak"].logits(shy.token_ids)[-1].clone()
    seen = torch.tensor(shy.token_ids)
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 10, logits[seen] * 10)
    assert chain.run(chain.segment(shy)) == {shy.id: int(logits.argmax())}


class TestSpoilt:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_it_is_found_and_spoils_no_other(self, chain: Chain, value: float) -> None:
        kept = [chain.session(route, prompt(5, seed)) for seed, route in enumerate(("weak", "strong", "weak"))]
        batch, output = chain.bottom(*(chain.segment(one) for one in kept))
        hidden = [rows.clone() for rows in rows_of(batch, output)]
        victim = batch.segments[1].session
        hidden[1][2, 3] = value
        arrived, answer = chain.top(batch, hidden)
        assert {arrived.segments[index].session.id for index in answer.non_finite} == {victim.id}
        for index, token in answer.tokens.items():
            assert token.id == chain.expected(self.of(arrived, index))
        assert len(answer.tokens) == 2

    @staticmethod
    def of(batch: Batch, index: int) -> Kept:
        return batch.segments[index].session

    def test_a_batch_may_be_spoilt_as_a_whole(self, chain: Chain) -> None:
        batch, output = chain.bottom(chain.segment(chain.session("weak", prompt(5))))
        _, answer = chain.top(batch, [rows * float("nan") for rows in rows_of(batch, output)])
        assert (answer.non_finite, answer.tokens) == (frozenset({0}), {})

    def test_its_blocks_may_be_used_again(self, chain: Chain) -> None:
        kept = chain.session("weak", prompt(5))
        batch, output = chain.bottom(chain.segment(kept))
        chain.top(batch, [rows * float("nan") for rows in rows_of(batch, output)])
        kept.cached = 0
        assert chain.run(chain.segment(kept)) == {kept.id: chain.expected(kept)}
