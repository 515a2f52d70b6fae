"""The client for programs with an event loop; `messages.py` builds its requests and reads its responses."""
# gRPC passes its deadline on to the gateway and the shards, which asyncio.timeout can't do.
# ruff: noqa: ASYNC109

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from grpc.aio import UnaryStreamCall

from stitch.channels import open_channel
from stitch.client.answers import (
    Answer,
    Collector,
    Delta,
    RouteDecision,
    decision_of,
)
from stitch.client.batches import Batch, Outcome
from stitch.client.messages import (
    Message,
    RequestFields,
    RouteFields,
    deadline,
    detokenize_request,
    generate_request,
    key_metadata,
    route_request,
    tokenize_request,
)
from stitch.errors import translated_rpc_errors
from stitch.tls import gateway_credentials
from stitch.v1 import inference_pb2
from stitch.v1.inference_pb2_grpc import InferenceStub

Call = UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class AsyncStream:
    """The events of a request: a RouteDecision, then Deltas. A loop over it sends the request; leaving it cancels."""

    def __init__(self, start: Callable[[], Call]) -> None:
        self._start = start
        self._collector = Collector()

    async def __aiter__(self) -> AsyncGenerator[RouteDecision | Delta, None]:
        self._collector = Collector()
        call = self._start()
        try:
            with translated_rpc_errors():
                async for response in call:
                    event = self._collector.add(response)
                    if event is not None:
                        yield event
        finally:
            call.cancel()

    async def text(self) -> AsyncGenerator[str, None]:
        """The pieces of the first answer's text, without the route decision."""
        async with aclosing(aiter(self)) as events:
            async for event in events:
                if isinstance(event, Delta) and not event.answer:
                    yield event.text

    @property
    def answer(self) -> Answer:
        """The whole answer, after the stream was read to its end; raises Unavailable before that."""
        return self._collector.answer()


class AsyncClient:
    """One connection to a gateway at `host:port`; to be created in a running event loop.

    `authority` is the PEM file of the authority that must have signed the gateway's certificate; None: no TLS. The
    connection is direct; with `proxy` it goes through the proxy that the environment names. `key` is one of the
    tenant's keys, `certificate` a PEM file with the client's own certificate and its key, where the gateway asks for
    one. Every call raises a StitchError where the gateway refuses or fails; `timeout` is in seconds.
    """

    def __init__(
        self,
        address: str,
        authority: Path | None = None,
        proxy: bool = False,
        key: str | None = None,
        certificate: Path | None = None,
    ) -> None:
        self._channel = open_channel(address, gateway_credentials(authority, certificate), proxy)
        self._stub = InferenceStub(self._channel)
        self._metadata = key_metadata(key)

    async def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> Answer:
        """The answer to a prompt, to `messages` or to `token_ids`; with `n` the others are in it."""
        stream = self.stream(prompt, timeout=timeout, **fields)
        async for _ in stream:
            pass
        return stream.answer

    def stream(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> AsyncStream:
        """The stream of one answer, which yields it while it is generated."""
        request, timeout = generate_request({"prompt": prompt, **fields}), deadline(timeout)
        return AsyncStream(lambda: self._stub.Generate(request, timeout=timeout, metadata=self._metadata))

    async def batch(
        self, requests: Iterable[str | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[Outcome]:
        """One outcome per request, in the order of the requests: an Answer, or the error of that request.

        A request is a prompt, or a mapping with `prompt` or `messages` and any of RequestFields.
        Requests that exceed the size of one message travel in several calls.
        """
        batch, timeout = Batch(requests), deadline(timeout)
        # All calls begin together, so that `timeout` holds for the whole.
        calls = [
            self._stub.GenerateBatch(message, timeout=timeout, metadata=self._metadata) for message in batch.messages
        ]
        try:
            for index, call in enumerate(calls):
                try:
                    with translated_rpc_errors():
                        async for response in call:
                            batch.add(response, index)
                except Exception as error:
                    batch.fail(error, index)
        finally:
            for call in calls:
                call.cancel()
        return batch.outcomes()

    async def route(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Unpack[RouteFields]
    ) -> RouteDecision:
        """The route decision of a query, without an answer."""
        request = route_request({"prompt": prompt, **fields})
        with translated_rpc_errors():
            return decision_of(await self._stub.Route(request, timeout=deadline(timeout), metadata=self._metadata))

    async def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[Message] | None = None, timeout: float | None = None
    ) -> list[int]:
        """The token ids of a prompt, or of `messages`, as an answer to it is generated from."""
        request = tokenize_request({"prompt": prompt, "messages": messages})
        with translated_rpc_errors():
            reply = await self._stub.Tokenize(request, timeout=deadline(timeout), metadata=self._metadata)
            return list(reply.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of token ids; control tokens are written by their names."""
        request = detokenize_request(token_ids)
        with translated_rpc_errors():
            reply = await self._stub.Detokenize(request, timeout=deadline(timeout), metadata=self._metadata)
            return reply.text

    async def describe(
        self, *, addresses: bool = False, timeout: float | None = None
    ) -> inference_pb2.DescribeResponse:
        """The models, routes and shards that the gateway serves; the shards' addresses where they are asked for."""
        with translated_rpc_errors():
            request = inference_pb2.DescribeRequest(addresses=addresses)
            return await self._stub.Describe(request, timeout=deadline(timeout), metadata=self._metadata)

    async def close(self) -> None:
        """Ends the connection and every call on it."""
        await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
