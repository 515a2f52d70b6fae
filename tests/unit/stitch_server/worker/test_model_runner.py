"""A pass over a mixed batch gives each segment what `transformers` gives it alone, eagerly and by CUDA graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stitch_server.engine.types import Batch, Session
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import ParallelismTuner
from tests.support.runner_chain import ROUTES, Chain, Halves, load, prompt, rows_of
from tests.support.tiny_model import TOKENS, write_tiny_pair

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("route", ROUTES)
def test_next_token_equals_that_of_transformers(chain: Chain, route: str) -> None:
    session = chain.session(route, prompt(21))
    assert chain.run(chain.segment(session)) == {session.id: chain.expected(session)}


@pytest.mark.parametrize("chunk", [1, 7, 16, 20])
def test_chunked_prefill_gives_the_same_token(chain: Chain, chunk: int) -> None:
    session = chain.session("weak", prompt(40))
    while len(session.token_ids) - session.cached > chunk:
        assert chain.run(chain.segment(session, chunk, wants_token=False)) == {}
    assert chain.run(chain.segment(session)) == {session.id: chain.expected(session)}


def test_routes_of_different_depths_share_batches(chain: Chain) -> None:
    weak, strong = chain.session("weak", prompt(18, 1)), chain.session("strong", prompt(9, 2))
    chain.run(chain.segment(weak, 10, wants_token=False))
    for _ in range(4):
        answers = chain.run(chain.segment(weak), chain.segment(strong))
        for session in (weak, strong):
            assert answers[session.id] == chain.expected(session)
            session.token_ids.append(answers[session.id])


def test_two_chunks_of_one_session_in_one_batch(chain: Chain) -> None:
    session, other = chain.session("weak", prompt(30)), chain.session("strong", prompt(5, 1))
    segments = [chain.segment(session, 12, wants_token=False), chain.segment(other), chain.segment(session)]
    answers = chain.run(*segments)
    assert answers == {session.id: chain.expected(session), other.id: chain.expected(other)}


def test_segment_of_a_shallow_route_keeps_the_output_of_its_last_layer(chain: Chain) -> None:
    weak, strong = chain.session("weak", prompt(6, 1)), chain.session("strong", prompt(7, 2))
    batch, output = chain.bottom(chain.segment(weak), chain.segment(strong))
    assert [one.session.route for one in batch.segments] == ["strong", "weak"]
    left = rows_of(batch, output)
    assert [rows.shape for rows in left] == [(7, 48), (6, 48)]
    for one, rows in zip(batch.segments, left, strict=True):
        alone = chain.session(one.session.route, one.session.token_ids)
        _, expected = chain.bottom(chain.segment(alone))
        torch.testing.assert_close(rows, expected.hidden, rtol=1e-4, atol=1e-4)


def test_only_segments_that_want_a_token_are_sampled(chain: Chain) -> None:
    silent, asking = chain.session("weak", prompt(6, 1)), chain.session("weak", prompt(7, 2))
    answers = chain.run(chain.segment(silent, wants_token=False), chain.segment(asking))
    assert answers.keys() == {asking.id}


def test_token_has_its_position_and_logprobs(chain: Chain) -> None:
    session = chain.session("strong", prompt(6), logprobs=2)
    batch, output = chain.bottom(chain.segment(session))
    _, answer = chain.top(batch, rows_of(batch, output))
    token = answer.tokens[0]
    expected = chain.halves.references["strong"].logits(session.token_ids)[-1, :TOKENS].log_softmax(0)
    assert (token.id, token.position) == (int(expected.argmax()), 6)
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(float(expected.max()), abs=1e-3)
    assert [one for one, _ in token.logprobs.alternatives] == expected.topk(2).indices.tolist()


def test_penalties_count_all_tokens_of_the_session(chain: Chain) -> None:
    session = chain.session("weak", prompt(6))
    favourite = chain.expected(session)
    shy = chain.session("weak", [*prompt(5), favourite], repetition_penalty=10.0)
    logits = chain.halves.references["weak"].logits(shy.token_ids)[-1].clone()
    seen = torch.tensor(shy.token_ids)
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 10, logits[seen] * 10)
    assert chain.run(chain.segment(shy)) == {shy.id: int(logits.argmax())}


class TestNonFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_only_the_segment_with_the_value_is_reported(self, chain: Chain, value: float) -> None:
        sessions = [chain.session(route, prompt(5, seed)) for seed, route in enumerate(("weak", "strong", "weak"))]
        batch, output = chain.bottom(*(chain.segment(one) for one in sessions))
        hidden = [rows.clone() for rows in rows_of(batch, output)]
        victim = batch.segments[1].session
        hidden[1][2, 3] = value
        arrived, answer = chain.top(batch, hidden)
        assert {arrived.segments[index].session.id for index in answer.non_finite} == {victim.id}
        for index, token in answer.tokens.items():
            assert token.id == chain.expected(self.of(arrived, index))
        assert len(answer.tokens) == 2

    @staticmethod
    def of(batch: Batch, index: int) -> Session:
        return batch.segments[index].session

    def test_all_segments_may_be_non_finite(self, chain: Chain) -> None:
        batch, output = chain.bottom(chain.segment(chain.session("weak", prompt(5))))
        _, answer = chain.top(batch, [rows * float("nan") for rows in rows_of(batch, output)])
        assert (answer.non_finite, answer.tokens) == ({0: "hidden states"}, {})

    def test_only_the_segment_without_finite_logits_is_reported(
        self, chain: Chain, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sessions = [chain.session("weak", prompt(5, seed), logprobs=2) for seed in range(3)]
        head = chain.halves.top.head
        assert head is not None

        def broken(hidden: Tensor) -> Tensor:
            logits = head(hidden)
            logits[1, 7] = float("nan")
            return logits

        monkeypatch.setattr(chain.halves.top, "head", broken)
        batch, output = chain.bottom(*(chain.segment(one) for one in sessions))
        arrived, answer = chain.top(batch, rows_of(batch, output))
        assert answer.non_finite == {1: "logits"}
        assert {index: token.id for index, token in answer.tokens.items()} == {
            index: chain.expected(self.of(arrived, index)) for index in (0, 2)
        }

    def test_pass_that_failed_is_computed_again_by_session(self, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
        sessions = [chain.session(route, prompt(9, seed)) for seed, route in enumerate(("weak", "strong", "weak"))]
        batch, output = chain.bottom(*(chain.segment(one) for one in sessions))
        hidden = rows_of(batch, output)
        top, head = chain.halves.top, chain.halves.top.head

        def broken(hidden: Tensor) -> Tensor:
            raise ZeroDivisionError("after all layers have written their KV")

        monkeypatch.setattr(top, "head", broken)
        with pytest.raises(ZeroDivisionError):
            chain.top(batch, hidden)
        monkeypatch.setattr(top, "head", head)
        for one, rows in zip(batch.segments, hidden, strict=True):
            _, answer = chain.top(Batch((one,)), [rows])
            assert answer.tokens[0].id == chain.expected(one.session)
            one.session.token_ids.append(answer.tokens[0].id)
        assert chain.run(*map(chain.segment, sessions)) == {one.id: chain.expected(one) for one in sessions}

    def test_its_blocks_are_usable_afterwards(self, chain: Chain) -> None:
        session = chain.session("weak", prompt(5))
        batch, output = chain.bottom(chain.segment(session))
        chain.top(batch, [rows * float("nan") for rows in rows_of(batch, output)])
        session.cached = 0
        assert chain.run(chain.segment(session)) == {session.id: chain.expected(session)}


class TestAsOnAGpu:
    """Decode steps replay one graph for each range of layers that the same segments pass."""

    @pytest.fixture(scope="class")
    @classmethod
    def captured(cls, tmp_path_factory: pytest.TempPathFactory) -> Halves:
        folder = tmp_path_factory.mktemp("captured")
        return load(write_tiny_pair(folder, "llama"), folder, as_on_a_gpu=True)

    @pytest.fixture
    def chain(self, captured: Halves) -> Chain:
        return Chain(captured)

    @staticmethod
    def replays(runner: ModelRunner) -> int:
        graphs: Any = runner.graphs
        return int(graphs._capture.replayed)

    def decode(self, chain: Chain, *routes: str, steps: int = 3) -> tuple[int, int]:
        """Replays of one step on the bottom and on the top, of sessions whose tokens are checked."""
        sessions = [chain.session(route, prompt(5 + seed, seed)) for seed, route in enumerate(routes)]
        halves = chain.halves.bottom, chain.halves.top
        for step in range(steps + 1):
            if step == 1:
                before = [self.replays(half) for half in halves]
            answers = chain.run(*(chain.segment(one) for one in sessions))
            for one in sessions:
                assert answers[one.id] == chain.expected(one)
                one.token_ids.append(answers[one.id])
        bottom, top = (self.replays(half) - count for half, count in zip(halves, before, strict=True))
        return bottom // steps, top // steps

    def test_step_of_one_route_replays_one_graph(self, chain: Chain) -> None:
        assert self.decode(chain, "weak") == (1, 1)
        assert self.decode(chain, "strong", "strong", "strong") == (1, 1)

    def test_step_of_two_routes_replays_a_graph_for_each_layer_range(self, chain: Chain) -> None:
        """A layer range in which only some segments have adapters runs eagerly."""
        assert self.decode(chain, "weak", "strong") == (2, 1)
        assert self.decode(chain, "strong", "weak", "weak") == (2, 1)

    def test_prefill_is_not_captured(self, chain: Chain) -> None:
        halves = chain.halves.bottom, chain.halves.top
        before = [self.replays(half) for half in halves]
        decoding = chain.session("strong", prompt(1, 3))
        chain.run(chain.segment(decoding), chain.segment(chain.session("strong", prompt(9))))
        assert [self.replays(half) for half in halves] == before

    @pytest.mark.parametrize(("tokens", "waits"), [(5, [1, 1]), (1, [1, 0])])
    def test_runner_synchronizes_prefill_and_hidden_states_but_not_sampled_tokens(
        self, chain: Chain, monkeypatch: pytest.MonkeyPatch, tokens: int, waits: list[int]
    ) -> None:
        waited: list[ModelRunner] = []
        for half in (chain.halves.bottom, chain.halves.top):
            monkeypatch.setattr(half, "synchronize", partial(waited.append, half))
        session = chain.session("weak", prompt(tokens))
        chain.run(chain.segment(session))
        assert [waited.count(half) for half in (chain.halves.bottom, chain.halves.top)] == waits


class TestMeasurements:
    def test_output_has_the_stages_of_its_shard(self, chain: Chain) -> None:
        batch, output = chain.bottom(chain.segment(chain.session("weak", prompt(5))))
        _, answer = chain.top(batch, rows_of(batch, output))
        assert output.stages.keys() == {"bottom_prefill"}
        assert answer.stages.keys() == {"top_prefill", "stitch", "sample"}
        assert all(seconds >= 0 for seconds in [*output.stages.values(), *answer.stages.values()])
        assert answer.hidden is None

    def test_batch_that_wants_no_token_is_not_sampled(self, chain: Chain) -> None:
        batch, output = chain.bottom(chain.segment(chain.session("weak", prompt(5)), wants_token=False))
        _, answer = chain.top(batch, rows_of(batch, output))
        assert (answer.tokens, "sample" in answer.stages) == ({}, False)

    def test_busy_seconds_accumulate(self, chain: Chain) -> None:
        before = chain.halves.bottom.busy_seconds
        chain.bottom(chain.segment(chain.session("weak", prompt(5))))
        assert chain.halves.bottom.busy_seconds > before

    def test_pipelined_pass_uses_its_own_number_of_threads(self, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = [torch.get_num_threads()]
        monkeypatch.setattr(torch, "get_num_threads", lambda: wanted[-1])
        monkeypatch.setattr(torch, "set_num_threads", wanted.append)
        monkeypatch.setattr(chain.halves.bottom, "tuner", ParallelismTuner(7, threads_while_pipelined=5))
        session = chain.session("weak", prompt(20))
        for pipelined in (False, True, False):
            chain.bottom(chain.segment(session, 5), pipelined=pipelined)
        # The third is the trial of one thread.
        assert wanted[1:] == [7, 5, 1]

    def test_segment_without_hidden_states_is_refused(self, chain: Chain) -> None:
        session = chain.session("weak", prompt(5))
        with pytest.raises(ValueError, match="without hidden states"):
            chain.halves.top.run(Batch((chain.segment(session),)))
