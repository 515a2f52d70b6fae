"""Work beside the requests lives exactly as long as its block."""

from __future__ import annotations

import asyncio

import pytest

from router_gateway.background import running


async def test_work_ends_with_its_block() -> None:
    began, ended = asyncio.Event(), []

    async def work() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async with running(work()):
        await began.wait()
        assert not ended
    assert ended


async def test_a_failure_is_logged_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    failed, finish = asyncio.Event(), asyncio.Event()
    done = asyncio.Event()

    async def fails() -> None:
        failed.set()
        raise ZeroDivisionError

    async def works() -> None:
        await finish.wait()
        done.set()

    async with running(fails(), works()):
        await failed.wait()
        finish.set()
        await done.wait()
    assert "failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text
