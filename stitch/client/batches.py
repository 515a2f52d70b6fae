"""The requests of one GenerateBatch call, and the outcome of each in the order in which the caller gave them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stitch.client.messages import Answer, Collector, generate_request
from stitch.errors import InvalidRequest, Unavailable, from_code
from stitch.v1 import inference_pb2

Outcome = Answer | Exception
"""An answer, or the error in its place."""


class Batch:
    """One outcome per request, whether other requests or the call itself fail."""

    def __init__(self, requests: Iterable[str | Mapping[str, Any]]) -> None:
        self.message = inference_pb2.GenerateBatchRequest()
        self._outcomes: list[Outcome | None] = []
        # By the request's index in the message: its index among the caller's requests, some of which are invalid.
        self._indices: list[int] = []
        for request in requests:
            self._append(request)
        self._collectors = [Collector() for _ in self._indices]

    def _append(self, request: str | Mapping[str, Any]) -> None:
        try:
            self.message.requests.append(generate_request(_fields(request)))
        except InvalidRequest as error:
            self._outcomes.append(error)
        else:
            self._indices.append(len(self._outcomes))
            self._outcomes.append(None)

    def add(self, response: inference_pb2.GenerateBatchResponse) -> None:
        """Adds one event to the request that it names."""
        if response.WhichOneof("outcome") == "error":
            self._outcomes[self._indices[response.index]] = from_code(response.error.code, response.error.message)
        else:
            self._collectors[response.index].add(response.response)

    def outcomes(self, failure: Exception | None = None) -> list[Outcome]:
        """The outcome of every request; `failure` is the error that ended the call, if one did."""
        for index, collector in zip(self._indices, self._collectors, strict=True):
            if self._outcomes[index] is None:
                self._outcomes[index] = _outcome(collector, failure)
        return [outcome for outcome in self._outcomes if outcome is not None]


def _fields(request: object) -> Mapping[str, Any]:
    if isinstance(request, str):
        return {"prompt": request}
    if not isinstance(request, Mapping):
        raise InvalidRequest("request", request, "it must be a prompt or an object with named fields")
    return request


def _outcome(collector: Collector, failure: Exception | None) -> Outcome:
    try:
        return collector.answer()
    except Unavailable as incomplete:
        return failure or incomplete
