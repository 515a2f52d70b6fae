"""When a generation ends, and what it keeps when it begins anew."""

from __future__ import annotations

import pytest

from stitch.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from stitch_server.engine.session import Request
from stitch_server.engine.types import Token
from tests.support.engine_fakes import new_session


def after(session: Request, token_id: int) -> int | None:
    """Why the session ends with this token."""
    session.token_ids.append(token_id)
    return session.finish_after(Token(token_id, len(session.token_ids) - 1))


def test_it_goes_on_below_every_limit() -> None:
    assert after(new_session(5, max_tokens=3), 50) is None


def test_a_stop_token_ends_it() -> None:
    session = new_session(5, stop_token_ids=(60, 61))
    assert after(session, 50) is None
    assert after(session, 61) == FINISH_REASON_STOP


def test_a_stop_token_in_the_prompt_does_not() -> None:
    assert after(new_session(5, stop_token_ids=(3,)), 50) is None


def test_enough_tokens_end_it() -> None:
    session = new_session(5, max_tokens=2)
    assert [after(session, 50), after(session, 50)] == [None, FINISH_REASON_LENGTH]


def test_a_stop_token_counts_more_than_the_length() -> None:
    assert after(new_session(5, max_tokens=1, stop_token_ids=(60,)), 60) == FINISH_REASON_STOP


def test_tokens_of_an_earlier_try_count() -> None:
    session = new_session(8, prompt_tokens=5, max_tokens=5)
    assert [after(session, 50), after(session, 50)] == [None, FINISH_REASON_LENGTH]


def test_the_end_of_the_context_ends_it() -> None:
    session = new_session(5, context_length=7)
    assert [after(session, 50), after(session, 50)] == [None, FINISH_REASON_LENGTH]


def test_beginning_anew_keeps_what_is_known() -> None:
    session = new_session(5)
    session.token_ids += [50, 51]
    session.cached, session.reused, session.open_downstream, session.answered = 6, 4, True, True
    session.reset_for_recompute()
    assert (session.epoch, session.cached, session.reused, session.open_downstream) == (1, 0, 0, False)
    assert (session.remaining, session.answered) == (7, True)


@pytest.mark.parametrize(("answered", "cached", "decoding"), [(False, 4, False), (True, 4, True), (True, 3, False)])
def test_it_decodes_once_answered_and_caught_up(answered: bool, cached: int, decoding: bool) -> None:
    session = new_session(5)
    session.answered, session.cached = answered, cached
    assert session.decoding is decoding


def test_numbers_are_never_given_twice() -> None:
    assert len({new_session().id for _ in range(50)}) == 50
