"""A request's finish reasons, and what it keeps over a preemption."""

from __future__ import annotations

import pytest

from stitch.sampling import Token
from stitch.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from stitch_server.engine.request import Request
from tests.support.engine_fakes import new_request


def reason_after(request: Request, token_id: int) -> int | None:
    """The finish reason once this token is appended."""
    request.token_ids.append(token_id)
    return request.finish_reason_at(Token(token_id, len(request.token_ids) - 1))


def test_request_below_every_limit_continues() -> None:
    assert reason_after(new_request(5, max_tokens=3), 50) is None


def test_stop_token_finishes_request() -> None:
    request = new_request(5, stop_token_ids=(60, 61))
    assert reason_after(request, 50) is None
    assert reason_after(request, 61) == FINISH_REASON_STOP


def test_stop_token_among_the_least_number_of_tokens_does_not_finish_request() -> None:
    request = new_request(5, stop_token_ids=(60,), min_tokens=2)
    assert [reason_after(request, token) for token in (60, 60, 60)] == [None, None, FINISH_REASON_STOP]


def test_stop_token_in_prompt_does_not_finish_request() -> None:
    assert reason_after(new_request(5, stop_token_ids=(3,)), 50) is None


def test_max_tokens_finishes_request() -> None:
    request = new_request(5, max_tokens=2)
    assert [reason_after(request, 50), reason_after(request, 50)] == [None, FINISH_REASON_LENGTH]


def test_stop_token_at_max_tokens_is_reported_as_stop() -> None:
    assert reason_after(new_request(5, max_tokens=1, stop_token_ids=(60,)), 60) == FINISH_REASON_STOP


def test_tokens_of_earlier_attempt_count_towards_max_tokens() -> None:
    request = new_request(8, prompt_tokens=5, max_tokens=5)
    assert [reason_after(request, 50), reason_after(request, 50)] == [None, FINISH_REASON_LENGTH]


def test_context_length_finishes_request() -> None:
    request = new_request(5, context_length=7)
    assert [reason_after(request, 50), reason_after(request, 50)] == [None, FINISH_REASON_LENGTH]


def test_reset_for_recompute_keeps_tokens_and_starts_epoch() -> None:
    request = new_request(5)
    request.token_ids += [50, 51]
    request.cached, request.reused, request.open_downstream, request.first_token_at = 6, 4, True, 1.0
    request.reset_for_recompute()
    assert (request.epoch, request.cached, request.reused, request.open_downstream) == (1, 0, 0, False)
    assert (request.remaining, request.first_token_at) == (7, 1.0)


@pytest.mark.parametrize(
    ("first_token_at", "cached", "is_decoding"), [(None, 4, False), (1.0, 4, True), (1.0, 3, False)]
)
def test_request_decodes_after_first_token_with_one_token_remaining(
    first_token_at: float | None, cached: int, is_decoding: bool
) -> None:
    request = new_request(5)
    request.first_token_at, request.cached = first_token_at, cached
    assert request.is_decoding is is_decoding


def test_request_ids_are_unique() -> None:
    assert len({new_request().id for _ in range(50)}) == 50
