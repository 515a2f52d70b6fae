"""The client for programs without an event loop; `messages.py` builds its requests and reads its responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from stitch.channels import open_sync_channel
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


class Stream:
    """The events of a request: a RouteDecision, then Deltas. A loop over it sends the request; leaving it cancels."""

    def __init__(self, start: Callable[[], grpc.CallIterator[inference_pb2.GenerateResponse]]) -> None:
        self._start = start
        self._collector = Collector()

    def __iter__(self) -> Iterator[RouteDecision | Delta]:
        self._collector = Collector()
        call = self._start()
        try:
            with translated_rpc_errors():
                for response in call:
                    event = self._collector.add(response)
                    if event is not None:
                        yield event
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def text(self) -> Iterator[str]:
        """The pieces of the first answer's text, without the route decision."""
        return (event.text for event in self if isinstance(event, Delta) and not event.answer)

    @property
    def answer(self) -> Answer:
        """The whole answer, after the stream was read to its end; raises Unavailable before that."""
        return self._collector.answer()


class Client:
    """One connection to a gateway at `host:port`, usable from several threads.

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
        self._channel = open_sync_channel(address, gateway_credentials(authority, certificate), proxy)
        self._stub = InferenceStub(self._channel)
        self._metadata = key_metadata(key)

    def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> Answer:
        """The answer to a prompt, to `messages` or to `token_ids`; with `n` the others are in it."""
        stream = self.stream(prompt, timeout=timeout, **fields)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> Stream:
        """The stream of one answer, which yields it while it is generated."""
        request, timeout = generate_request({"prompt": prompt, **fields}), deadline(timeout)
        return Stream(lambda: self._stub.Generate(request, timeout=timeout, metadata=self._metadata))

    def batch(self, requests: Iterable[str | Mapping[str, Any]], *, timeout: float | None = None) -> list[Outcome]:
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
                        for response in call:
                            batch.add(response, index)
                except Exception as error:
                    batch.fail(error, index)
        finally:
            for call in calls:
                call.cancel()  # type: ignore[no-untyped-call]
        return batch.outcomes()

    def route(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Unpack[RouteFields]
    ) -> RouteDecision:
        """The route decision of a query, without an answer."""
        request = route_request({"prompt": prompt, **fields})
        with translated_rpc_errors():
            return decision_of(self._stub.Route(request, timeout=deadline(timeout), metadata=self._metadata))

    def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[Message] | None = None, timeout: float | None = None
    ) -> list[int]:
        """The token ids of a prompt, or of `messages`, as an answer to it is generated from."""
        request = tokenize_request({"prompt": prompt, "messages": messages})
        with translated_rpc_errors():
            reply = self._stub.Tokenize(request, timeout=deadline(timeout), metadata=self._metadata)
            return list(reply.token_ids)

    def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of token ids; control tokens are written by their names."""
        request = detokenize_request(token_ids)
        with translated_rpc_errors():
            reply = self._stub.Detokenize(request, timeout=deadline(timeout), metadata=self._metadata)
            return reply.text

    def describe(self, *, addresses: bool = False, timeout: float | None = None) -> inference_pb2.DescribeResponse:
        """The models, routes and shards that the gateway serves; the shards' addresses where they are asked for."""
        with translated_rpc_errors():
            request = inference_pb2.DescribeRequest(addresses=addresses)
            return self._stub.Describe(request, timeout=deadline(timeout), metadata=self._metadata)

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
