"""Tests of the queues of texts: order, short texts beside long ones, bounded waits, callers that leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from router_gateway.tokenization.text_queues import INLINE_BYTES, SHORT_BYTES, TextQueues
from stitch.errors import Exhausted

LONG = SHORT_BYTES + 1
SHORT = INLINE_BYTES + 1


@pytest.fixture
def queues() -> Iterator[TextQueues]:
    with TextQueues(max_wait_seconds=5.0) as queues:
        yield queues


@pytest.fixture
def hold(queues: TextQueues) -> Iterator[threading.Event]:
    """Long texts take until this event is set; it is before the queues end."""
    held = threading.Event()
    yield held
    held.set()


async def test_shortest_text_is_tokenized_in_place(queues: TextQueues) -> None:
    assert await queues.run(INLINE_BYTES, threading.current_thread) is threading.main_thread()
    assert await queues.run(SHORT, threading.current_thread) is not threading.main_thread()


async def test_short_text_does_not_wait_for_a_long_one(queues: TextQueues, hold: threading.Event) -> None:
    long = asyncio.create_task(queues.run(LONG, hold.wait))
    await asyncio.sleep(0)
    assert await queues.run(SHORT, lambda: "short") == "short"
    assert not long.done()
    hold.set()
    assert await long


async def test_texts_are_tokenized_in_the_order_of_their_arrival(queues: TextQueues) -> None:
    order: list[int] = []
    await asyncio.gather(*(queues.run(LONG, lambda n=n: order.append(n)) for n in range(5)))  # type: ignore[misc]
    assert order == list(range(5))


async def test_caller_that_leaves_is_not_tokenized(queues: TextQueues, hold: threading.Event) -> None:
    done: list[str] = []
    first = asyncio.create_task(queues.run(LONG, hold.wait))
    leaving = asyncio.create_task(queues.run(LONG, lambda: done.append("left")))
    staying = asyncio.create_task(queues.run(LONG, lambda: done.append("stayed")))
    await asyncio.sleep(0)
    leaving.cancel()
    hold.set()
    await asyncio.gather(first, staying)
    assert done == ["stayed"]


async def test_text_that_would_wait_for_too_long_is_refused_with_the_wait(
    queues: TextQueues, hold: threading.Event
) -> None:
    # 18 MB take 6 s at the rate before the first text.
    first = asyncio.create_task(queues.run(18_000_000, hold.wait))
    await asyncio.sleep(0)
    with pytest.raises(Exhausted, match=r"already wait for 6\.0 s") as caught:
        await queues.run(LONG, lambda: None)
    assert caught.value.retry_after_seconds == pytest.approx(6.0)
    assert await queues.run(SHORT, lambda: "short") == "short"
    hold.set()
    await first
    assert await queues.run(LONG, lambda: "long") == "long"


async def test_failed_text_releases_its_place(queues: TextQueues) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await queues.run(18_000_000, fail)
    assert await queues.run(LONG, lambda: "next") == "next"
