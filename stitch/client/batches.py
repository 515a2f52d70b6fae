"""The requests of a batch as GenerateBatch calls, and the outcome of each in the order of the caller's requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stitch.channels import MAX_BATCH_REQUESTS, MAX_REQUEST_BYTES
from stitch.client.answers import Answer, Collector
from stitch.client.messages import generate_request
from stitch.errors import InvalidRequest, Unavailable, from_code
from stitch.v1 import inference_pb2

Outcome = Answer | Exception
"""An answer, or the error in its place."""

# The tag and the length in front of each request of a message.
REQUEST_HEADER_BYTES = 6


class Batch:
    """One outcome per request, whether other requests or a call fail; `messages` has one message for each call."""

    def __init__(self, requests: Iterable[str | Mapping[str, Any]], max_bytes: int = MAX_REQUEST_BYTES) -> None:
        self.messages: list[inference_pb2.GenerateBatchRequest] = []
        self._max_bytes, self._bytes = max_bytes, max_bytes
        # The answers, and the indices among the caller's requests, some of which are invalid: both by the index of the
        # call and by the request's index in its message.
        self._collectors: list[list[Collector]] = []
        self._indices: list[list[int]] = []
        self._outcomes: list[Outcome | None] = []
        for request in requests:
            self._append(request)

    def _append(self, request: str | Mapping[str, Any]) -> None:
        try:
            message = generate_request(_fields(request))
        except InvalidRequest as error:
            self._outcomes.append(error)
            return
        self._bytes += message.ByteSize() + REQUEST_HEADER_BYTES
        if self._bytes > self._max_bytes or len(self.messages[-1].requests) == MAX_BATCH_REQUESTS:
            self.messages.append(inference_pb2.GenerateBatchRequest())
            self._collectors.append([])
            self._indices.append([])
            self._bytes = message.ByteSize() + REQUEST_HEADER_BYTES
        self.messages[-1].requests.append(message)
        self._collectors[-1].append(Collector())
        self._indices[-1].append(len(self._outcomes))
        self._outcomes.append(None)

    def add(self, response: inference_pb2.GenerateBatchResponse, call: int = 0) -> None:
        """Adds one event of a call to the request that it names."""
        if response.WhichOneof("outcome") == "error":
            error = from_code(response.error.code, response.error.message)
            self._outcomes[self._indices[call][response.index]] = error
        else:
            self._collectors[call][response.index].add(response.response)

    def fail(self, failure: Exception, call: int = 0) -> None:
        """Makes the error that ended a call the outcome of those of its requests that have no whole answer."""
        for index, collector in zip(self._indices[call], self._collectors[call], strict=True):
            if self._outcomes[index] is None and not collector.is_complete:
                self._outcomes[index] = failure

    def outcomes(self) -> list[Outcome]:
        """The outcome of every request, after all calls have ended."""
        for indices, collectors in zip(self._indices, self._collectors, strict=True):
            for index, collector in zip(indices, collectors, strict=True):
                if self._outcomes[index] is None:
                    self._outcomes[index] = _outcome(collector)
        return [outcome for outcome in self._outcomes if outcome is not None]


def _fields(request: object) -> Mapping[str, Any]:
    if isinstance(request, str):
        return {"prompt": request}
    if not isinstance(request, Mapping):
        raise InvalidRequest("request", request, "it must be a prompt or an object with named fields")
    return request


def _outcome(collector: Collector) -> Outcome:
    try:
        return collector.answer()
    except Unavailable as incomplete:
        return incomplete
