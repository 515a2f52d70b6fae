"""A channel that is replaced under its users: new calls take the newest one, running calls keep theirs to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

# A channel that was replaced closes with its last call, or after this.
RETIRED_SECONDS = 7 * 86_400.0


class RotatingChannel(grpc.aio.Channel):
    """Opens another channel for the first call after `version` has changed."""

    def __init__(self, open_channel: Callable[[], grpc.aio.Channel], version: Callable[[], object]) -> None:
        self._open = open_channel
        self._version = version
        self._opened_for = version()
        self._channel = open_channel()
        self._retiring: dict[asyncio.Task[None], grpc.aio.Channel] = {}

    def _present(self) -> grpc.aio.Channel:
        version = self._version()
        if version != self._opened_for:
            retired, self._channel, self._opened_for = self._channel, self._open(), version
            task = asyncio.create_task(retired.close(RETIRED_SECONDS))
            self._retiring[task] = retired
            task.add_done_callback(self._retiring.pop)
        return self._channel

    def _following(self, kind: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """A callable that starts a call on the present channel."""
        made_for = self._channel
        start = getattr(made_for, kind)(*arguments, **named)

        def call(*values: Any, **options: Any) -> Any:
            nonlocal made_for, start
            if (present := self._present()) is not made_for:
                made_for, start = present, getattr(present, kind)(*arguments, **named)
            return start(*values, **options)

        return call

    def unary_unary(self, *arguments: Any, **named: Any) -> Any:
        return self._following("unary_unary", *arguments, **named)

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        return self._following("unary_stream", *arguments, **named)

    def stream_unary(self, *arguments: Any, **named: Any) -> Any:
        return self._following("stream_unary", *arguments, **named)

    def stream_stream(self, *arguments: Any, **named: Any) -> Any:
        return self._following("stream_stream", *arguments, **named)

    async def close(self, grace: float | None = None) -> None:
        """Closes the present channel and those that still have calls."""
        retiring = dict(self._retiring)
        for task in retiring:
            task.cancel()
        await asyncio.gather(*retiring, return_exceptions=True)
        await asyncio.gather(*(channel.close(grace) for channel in (self._channel, *retiring.values())))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._present().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._present().channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
