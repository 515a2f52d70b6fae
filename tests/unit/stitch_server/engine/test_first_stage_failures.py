"""Requests whose next shards have no free block, fail, or are lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stitch.errors import Exhausted, Incompatible, OutOfStep, Unavailable
from stitch.v1 import shard_pb2
from stitch.v1.shard_pb2 import FailureCause
from stitch_server.engine.types import SessionFailure
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import TOKEN_ID
from tests.support.first_stage_harness import FirstStageHarness, error_of, token_ids


@pytest.fixture
def harness() -> FirstStageHarness:
    return FirstStageHarness()


class TestFailures:
    def test_kv_exhausted_downstream_preempts_request(self, harness: FirstStageHarness) -> None:
        session, outputs = harness.admit()
        other, _ = harness.admit(first_token=100, max_tokens=1)
        harness.refuse(harness.compute(), session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        assert outputs == []
        assert (session.epoch, harness.stage.waiting_sessions) == (1, 1)
        assert harness.downstream.closed == [("top-0", session.id), ("top-0", other.id)]
        step = harness.compute()
        # Its first block is still remembered here.
        assert (step.segments[0].position, step.opens) == (BLOCK_TOKENS, (True,))
        harness.reply(step)
        assert token_ids(outputs) == [TOKEN_ID]

    def test_preempted_request_repeats_no_token(self, harness: FirstStageHarness) -> None:
        session, outputs = harness.admit()
        harness.admit(first_token=100, max_tokens=1)
        harness.reply(harness.compute(), 50)
        harness.admit(first_token=200)
        harness.refuse(harness.compute(), session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        step = harness.compute()
        assert [one.length for one in step.segments if one.session is session] == [21 - BLOCK_TOKENS]
        harness.reply(step, 51)
        assert token_ids(outputs) == [50, 51]

    def test_request_alone_is_preempted_for_sessions_of_another_first_shard(self, harness: FirstStageHarness) -> None:
        session, outputs = harness.admit()
        harness.refuse(harness.compute(), session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        assert (outputs, harness.stage.waiting_sessions) == ([], 1)

    def test_too_long_downstream_ends_request_as_exhausted(self, harness: FirstStageHarness) -> None:
        session, outputs = harness.admit()
        harness.refuse(harness.compute(), session, shard_pb2.FAILURE_CAUSE_TOO_LONG)
        error = error_of(outputs)
        assert isinstance(error, Exhausted)
        assert error.retry_after_seconds == 60.0
        assert harness.idle

    def test_missing_prefix_is_recomputed(self, harness: FirstStageHarness) -> None:
        harness.admit(40)
        harness.compute()
        session, outputs = harness.admit(40)
        step = harness.compute()
        assert session.reused == 32
        harness.refuse(step, session, shard_pb2.FAILURE_CAUSE_PREFIX_MISSING)
        step = harness.compute()
        assert (step.segments[0].session, step.segments[0].position) == (session, 0)
        harness.reply(step)
        assert token_ids(outputs) == [TOKEN_ID]

    def test_unavailable_reports_number_of_generated_tokens(self, harness: FirstStageHarness) -> None:
        session, outputs = harness.admit()
        harness.reply(harness.compute())
        harness.reply(harness.compute())
        harness.refuse(harness.compute(), session, shard_pb2.FAILURE_CAUSE_UNAVAILABLE)
        error = error_of(outputs)
        assert isinstance(error, Unavailable)
        assert (str(error), error.generated_tokens) == ("no more", 2)
        assert harness.idle

    @pytest.mark.parametrize("cause", [shard_pb2.FAILURE_CAUSE_PRECONDITION, shard_pb2.FAILURE_CAUSE_UNSPECIFIED])
    def test_precondition_failure_ends_request(self, harness: FirstStageHarness, cause: FailureCause) -> None:
        session, outputs = harness.admit()
        harness.refuse(harness.compute(), session, cause)
        assert isinstance(error_of(outputs), OutOfStep)
        assert harness.downstream.closed == [("top-0", session.id)]
        assert harness.idle

    def test_reply_of_earlier_epoch_is_discarded(self, harness: FirstStageHarness) -> None:
        session, outputs = harness.admit()
        harness.admit(first_token=100)
        step = harness.compute()
        answer = harness.downstream.answer(step)
        harness.refuse(step, session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        late = SessionFailure(session.id, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        harness.answer(replace(answer, failures=(late,)))
        assert outputs == []
        assert session.epoch == 1

    def test_failed_batch_ends_its_requests(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit()
        harness.stage.fail(harness.next_batch(), RuntimeError("out of paper"))
        error = error_of(outputs)
        assert isinstance(error, Unavailable)
        assert "out of paper" in str(error)
        assert harness.idle

    def test_token_without_embedding_ends_its_request(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit(vocabulary_size=400)
        _, stopped = harness.admit(vocabulary_size=400, first_token=100, stop_token_ids=(400,))
        harness.reply(harness.compute(), 400)
        assert isinstance(error_of(outputs), Incompatible)
        assert str(error_of(outputs)) == "the chain chose token 400, but the embedding has 400 rows"
        assert token_ids(stopped) == [400]
        assert harness.idle

    def test_failed_batch_spares_other_requests(self) -> None:
        harness = FirstStageHarness(max_prefill_chunk=20)
        harness.admit(20)
        _, outputs = harness.admit(20, first_token=100)
        harness.stage.fail(harness.next_batch(), RuntimeError("out of paper"))
        harness.reply(harness.compute())
        assert token_ids(outputs) == [TOKEN_ID]


class TestLinkLost:
    def test_requests_of_lost_link_end(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit(chain=("a",))
        _, other = harness.admit(chain=("b",), first_token=100)
        harness.compute()
        harness.stage.on_link_lost("a", Unavailable("a is gone"))
        error = error_of(outputs)
        assert isinstance(error, Unavailable)
        assert (str(error), error.generated_tokens) == ("a is gone", 0)
        harness.reply(harness.downstream.last)
        assert token_ids(other) == [TOKEN_ID]

    def test_refused_link_ends_requests_with_its_error(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit()
        harness.compute()
        harness.stage.on_link_lost("top-0", Incompatible("another tokenizer"))
        assert isinstance(error_of(outputs), Incompatible)

    def test_steps_of_lost_link_are_settled(self, harness: FirstStageHarness) -> None:
        for index in range(2):
            harness.admit(first_token=100 * index)
            harness.compute()
        assert harness.stage.next_batch() is None
        harness.stage.on_link_lost("top-0", Unavailable("gone"))
        harness.admit(first_token=500)
        assert harness.stage.next_batch() is not None

    def test_request_without_step_in_flight_ends_too(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit()
        harness.reply(harness.compute())
        harness.stage.on_link_lost("top-0", Unavailable("gone"))
        assert isinstance(error_of(outputs), Unavailable)
        assert harness.idle

    def test_request_not_yet_sent_continues(self) -> None:
        harness = FirstStageHarness(max_prefill_chunk=20)
        harness.admit(20)
        _, outputs = harness.admit(20, first_token=100)
        harness.compute()
        harness.stage.on_link_lost("top-0", Unavailable("gone"))
        harness.reply(harness.compute())
        assert token_ids(outputs) == [TOKEN_ID]

    def test_session_reopened_over_new_link_is_closed(self, harness: FirstStageHarness) -> None:
        session, _ = harness.admit()
        harness.compute()
        harness.stage.on_link_lost("top-0", Unavailable("gone"))
        assert harness.downstream.closed == [("top-0", session.id)]
