"""A conversation's route is remembered, but neither for ever nor for everybody."""

from __future__ import annotations

import pytest

from router_gateway.routing.conversations import Conversations


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_is_kept_is_known(clock: Clock) -> None:
    conversations = Conversations(clock)
    conversations.keep("a", "strong")
    conversations.keep("b", "weak")
    assert [conversations.route_of(name) for name in "abc"] == ["strong", "weak", None]


def test_it_moves(clock: Clock) -> None:
    conversations = Conversations(clock)
    conversations.keep("a", "weak")
    conversations.keep("a", "strong")
    assert conversations.route_of("a") == "strong"


def test_it_is_forgotten_some_time_after_its_last_request(clock: Clock) -> None:
    conversations = Conversations(clock, kept_seconds=10.0)
    conversations.keep("a", "weak")
    clock.now = 9.0
    conversations.keep("a", "weak")
    clock.now = 18.9
    assert conversations.route_of("a") == "weak"
    clock.now = 19.1
    assert conversations.route_of("a") is None


def test_the_one_that_was_quiet_longest_makes_room(clock: Clock) -> None:
    conversations = Conversations(clock, most=2)
    for name in ("a", "b", "a", "c"):
        conversations.keep(name, "weak")
    assert [conversations.route_of(name) for name in "abc"] == ["weak", None, "weak"]
