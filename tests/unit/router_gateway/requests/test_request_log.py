"""Tests of the log of requests: a line each, and summaries of refusals."""

from __future__ import annotations

import logging

import pytest

from router_gateway.requests.request_log import MAX_CLIENTS, SUMMARY_SECONDS, RequestLog, client_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _lines_are_captured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_answers_are_logged_each(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    write = RequestLog(clock).of("ipv4:192.0.2.1")
    write("stop", "one")
    write("length", "two")
    assert caplog.messages == ["one", "two"]


def test_refusals_of_a_client_are_summed_up(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(clock)
    write = log.of("ipv4:192.0.2.1")
    for outcome in ("invalid", "invalid", "exhausted", "invalid"):
        write(outcome, "refused")
    assert caplog.messages == ["refused"]
    clock.now += SUMMARY_SECONDS
    log.of("ipv4:192.0.2.2")("stop", "answered")
    assert caplog.messages == ["refused", "client ipv4:192.0.2.1: 2 invalid, 1 exhausted more in 10 s", "answered"]
    write("invalid", "refused again")
    assert caplog.messages[-1] == "refused again"


def test_refusals_of_other_clients_are_logged(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(clock)
    log.of("a")("invalid", "one")
    log.of("b")("invalid", "two")
    assert caplog.messages == ["one", "two"]


def test_single_refusal_has_no_summary(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(clock)
    log.of("a")("invalid", "one")
    clock.now += SUMMARY_SECONDS
    log.of("a")("invalid", "two")
    assert caplog.messages == ["one", "two"]


def test_clients_that_are_counted_are_bounded(clock: Clock) -> None:
    log = RequestLog(clock)
    for number in range(2 * MAX_CLIENTS):
        log.of(str(number))("invalid", "refused")
    assert len(log._refused) <= MAX_CLIENTS + 1


def test_client_is_the_peer_without_its_port() -> None:
    assert client_of("ipv4:192.0.2.1:50000") == "ipv4:192.0.2.1"
    assert client_of("ipv6:%5B::1%5D:50000") == "ipv6:%5B::1%5D"
    assert client_of("unix") == "unix"
