"""The tokens of answers to deltas of whole characters, and the messages of several answers to one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing

from router_gateway.tokenization.chat_template import ToolCall
from router_gateway.tokenization.stop_strings import StopStrings
from router_gateway.tokenization.tool_calls import ToolCallParser
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch.v1 import inference_pb2, shard_pb2

Response = inference_pb2.GenerateResponse

# Messages of several answers, or of a batch, that wait for a slow client; beyond these, generating waits too.
QUEUED_MESSAGES = 64


class DeltaBuilder:
    """Turns the tokens of one answer into deltas.

    A token without final text waits for the next delta, so that every token is in exactly one. No stop string ends
    with the first `min_tokens`. Before the answer come `scored` tokens of the prompt, whose deltas have no text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: Sequence[str],
        parser: ToolCallParser | None = None,
        min_tokens: int = 0,
        scored: int = 0,
    ) -> None:
        self._vocabulary = vocabulary
        self._detokenizer = vocabulary.detokenizer(() if parser is None else parser.shown)
        self._parser = parser
        self._stop = StopStrings(stop)
        self._min_tokens = min_tokens
        self._scored = scored
        self._waiting: list[shard_pb2.GeneratedToken] = []
        self._calls = 0
        self.generated_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, or the only call that may be made, which completes the answer."""
        return self._stop.found or (self._parser is not None and self._parser.done)

    @property
    def calls_tools(self) -> bool:
        return self._parser is not None and self._parser.calls > 0

    def push(self, tokens: Iterable[shard_pb2.GeneratedToken]) -> inference_pb2.Delta | None:
        """The next delta; None while no further text is final. Tokens after a stop string are dropped."""
        text, scored = "", self._scored
        for token in tokens:
            if self.stopped:
                break
            self._waiting.append(token)
            if self._scored:
                self._scored -= 1
                continue
            self.generated_tokens += 1
            text += self._stop.push(self._detokenizer.push(token.id), self.generated_tokens > self._min_tokens)
        return self._delta(text) if text or scored else None

    def finish(self) -> inference_pb2.Delta | None:
        """The delta of the remaining text and tokens; None where there are neither."""
        text = "" if self.stopped else self._stop.push(self._detokenizer.finish()) + self._stop.finish()
        return self._delta(text, final=True) if text or self._waiting or self._parser is not None else None

    def _delta(self, text: str, final: bool = False) -> inference_pb2.Delta | None:
        found = [text] if self._parser is None else self._parser.push(text, final)
        if not (found or (final and self._waiting)):
            return None
        tokens, self._waiting = self._waiting, []
        return inference_pb2.Delta(
            text="".join(one for one in found if isinstance(one, str)),
            tool_calls=[self._call(one) for one in found if not isinstance(one, str)],
            token_ids=[token.id for token in tokens],
            logprobs=[self._spelled(token.logprobs) for token in tokens if token.HasField("logprobs")],
        )

    def _call(self, call: ToolCall) -> inference_pb2.ToolCallDelta:
        """A call, which is sent whole: only a whole one is known to be a call."""
        index, self._calls = self._calls, self._calls + 1
        return inference_pb2.ToolCallDelta(index=index, id=call.id, name=call.name, arguments=call.arguments)

    def _spelled(self, logprobs: inference_pb2.TokenLogprobs) -> inference_pb2.TokenLogprobs:
        """With the bytes of each token, which shards don't know."""
        logprobs.token = self._vocabulary.token_bytes(logprobs.token_id)
        for one in logprobs.alternatives:
            one.token = self._vocabulary.token_bytes(one.token_id)
        return logprobs


async def interleaved(answers: Sequence[AsyncGenerator[Response, None]]) -> AsyncGenerator[Response, None]:
    """The messages of all answers as they come. One that fails ends the others, as closing the iterator does."""
    queue: asyncio.Queue[Response | None] = asyncio.Queue(QUEUED_MESSAGES)

    async def forward(answer: AsyncGenerator[Response, None]) -> None:
        async with aclosing(answer):
            async for response in answer:
                await queue.put(response)

    async def run() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for answer in answers:
                    group.create_task(forward(answer))
        except BaseExceptionGroup as failures:
            await queue.put(None)
            raise failures.exceptions[0] from None
        await queue.put(None)

    work = asyncio.create_task(run())
    try:
        while (response := await queue.get()) is not None:
            yield response
        await work
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
