"""A first shard with the real scheduler, and its next shard, in virtual time: only the passes are simulated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from stitch_server.engine.request import RequestOutput
from stitch_server.engine.types import OutgoingStep, Segment
from stitch_server.kv_cache.block_pool import BlockPool
from tests.support.engine_fakes import FakeDownstream, computed, new_request
from tests.support.first_stage_harness import new_first_stage

# A pass of either shard takes as long as one of SmolLM2 on a core with AMX: a constant, and so much for each decoding
# request and each token of a prompt.
PASS_SECONDS, SECONDS_PER_DECODE, SECONDS_PER_PROMPT_TOKEN = 0.008, 0.0018, 0.0005


def pass_seconds(segments: tuple[Segment, ...]) -> float:
    """How long a shard computes these segments."""
    decodes = sum(one.length == 1 for one in segments)
    tokens = sum(one.length for one in segments) - decodes
    return PASS_SECONDS + SECONDS_PER_DECODE * decodes + SECONDS_PER_PROMPT_TOKEN * tokens


class SimulatedFirstShard:
    """Two shards that share the cores of a machine; create it in a `VirtualTimeLoop`."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._downstream = FakeDownstream()
        self._stage = new_first_stage(
            BlockPool(4096),
            self._downstream,
            self._clock,  # type: ignore[arg-type]
            window_steps=4,
            num_micro_batches=1,
            max_num_batched_tokens=256,
            max_waiting_sessions=1000,
        )
        self._steps: asyncio.Queue[OutgoingStep] = asyncio.Queue()
        self._wake = asyncio.Event()
        self._prompts = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._compute())
            group.create_task(self._reply())

    async def _compute(self) -> None:
        while True:
            if (batch := self._stage.next_batch()) is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            await asyncio.sleep(pass_seconds(batch.segments))
            sent = len(self._downstream.sent)
            self._stage.deliver(batch, computed(batch))
            for _, step in self._downstream.sent[sent:]:
                self._steps.put_nowait(step)

    async def _reply(self) -> None:
        while True:
            step = await self._steps.get()
            await asyncio.sleep(pass_seconds(step.segments))
            self._stage.on_reply("top-0", self._downstream.answer(step))
            self._wake.set()

    async def answer(self, tenant: str, prompt_tokens: int, tokens: int, on_token: Callable[[], None]) -> None:
        """Returns once the request has its tokens."""
        ended = asyncio.Event()
        # Prompts have nothing in common.
        self._prompts += prompt_tokens
        request = new_request(prompt_tokens, first_token=self._prompts, tenant=tenant, max_tokens=tokens)
        request.vocabulary_size = self._prompts + prompt_tokens
        request.on_output = partial(_take, on_token, ended)
        self._stage.admit(request)
        self._wake.set()
        try:
            await ended.wait()
        finally:
            self._stage.abandon(request)


def _take(on_token: Callable[[], None], ended: asyncio.Event, output: RequestOutput) -> None:
    assert output.error is None
    on_token()
    if output.finish_reason is not None:
        ended.set()
