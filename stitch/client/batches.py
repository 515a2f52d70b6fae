"""Many requests in one call: what goes out, what comes back, in the order of asking. Knows no connection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stitch.client.answers import Answer, Collector
from stitch.client.requests import generate_request
from stitch.errors import InvalidRequest, Unavailable, from_code
from stitch.v1 import inference_pb2

Outcome = Answer | Exception
"""An answer, or why there is none."""


class Batch:
    """One outcome for every request, whatever becomes of the others and of the call."""

    def __init__(self, requests: Iterable[str | Mapping[str, Any]]) -> None:
        self.message = inference_pb2.GenerateBatchRequest()
        self._outcomes: list[Outcome | None] = []
        # Index in the message to index in what the caller gave.
        self._places: list[int] = []
        for request in requests:
            self._add(request)
        self._collectors = [Collector() for _ in self._places]

    def _add(self, request: str | Mapping[str, Any]) -> None:
        try:
            self.message.requests.append(generate_request(_fields(request)))
        except InvalidRequest as error:
            self._outcomes.append(error)
        else:
            self._places.append(len(self._outcomes))
            self._outcomes.append(None)

    def take(self, response: inference_pb2.GenerateBatchResponse) -> None:
        """Files one event with the request that it is about."""
        if response.WhichOneof("outcome") == "error":
            self._outcomes[self._places[response.index]] = from_code(response.error.code, response.error.message)
        else:
            self._collectors[response.index].take(response.response)

    def outcomes(self, failure: Exception | None = None) -> list[Outcome]:
        """What became of every request; `failure` ended the call, if anything did."""
        for place, collector in zip(self._places, self._collectors, strict=True):
            if self._outcomes[place] is None:
                self._outcomes[place] = _outcome(collector, failure)
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
    except Unavailable as cut_short:
        return failure or cut_short
