"""How a client of HTTP sees an error: its status, OpenAI's body, and its headers.

In: an error of `stitch.errors`. Out: what OpenAI's clients raise their own errors from. Invariant: every class of the
tree has a row, its own or its parent's; `docs/http.md` shows the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from stitch import errors
from stitch.errors import InvalidRequest, StitchError

# Clients may come back after this, where an error says nothing else.
RETRY_SECONDS = 1.0


class Row(NamedTuple):
    """What a class of errors is over HTTP; `kind` and `code` are the fields `type` and `code` of the body."""

    status: int
    kind: str
    code: str


class Refusal(Exception):
    """The refusal of a request that HTTP alone can carry: a path, a type or a parameter that this gateway hasn't."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.row = Row(status, "invalid_request_error", code)
        self.param = param


TABLE: Mapping[type[StitchError], Row] = {
    StitchError: Row(500, "server_error", "internal_error"),
    errors.InvalidRequest: Row(400, "invalid_request_error", "invalid_value"),
    errors.Incompatible: Row(500, "server_error", "incompatible"),
    errors.OutOfStep: Row(500, "server_error", "out_of_step"),
    errors.Unauthenticated: Row(401, "authentication_error", "invalid_api_key"),
    errors.Forbidden: Row(403, "permission_error", "permission_denied"),
    errors.Exhausted: Row(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.ObjectivesUnmet: Row(422, "invalid_request_error", "objectives_unmet"),
    errors.Unavailable: Row(503, "server_error", "unavailable"),
    errors.Draining: Row(503, "server_error", "shutting_down"),
    errors.Expired: Row(504, "timeout_error", "deadline_exceeded"),
}

# The names that the pipeline gives to fields which OpenAI's API calls otherwise.
_PARAMS = {
    "route": "model",
    "threshold": "model",
    "chat": "messages",
    "token_ids": "prompt",
    "prompt_logprobs": "echo",
    "request_id": "x-request-id",
}
_PARAMS_OF_SAMPLING = {"logprobs": "top_logprobs"}


def row_of(error: StitchError | Refusal) -> Row:
    """The row of an error's class, or of the nearest class above it that has one."""
    if isinstance(error, Refusal):
        return error.row
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def fields_of(error: StitchError | Refusal) -> dict[str, Any]:
    """OpenAI's description of an error."""
    row, message, param = row_of(error), str(error), None
    if isinstance(error, InvalidRequest):
        param = param_of(error.field)
        message = param + message.removeprefix(error.field) if message.startswith(error.field) else message
    elif isinstance(error, Refusal):
        param = error.param
    return {"message": message, "type": row.kind, "param": param, "code": row.code}


def body_of(error: StitchError | Refusal) -> bytes:
    """OpenAI's JSON for an error."""
    return json.dumps({"error": fields_of(error)}).encode()


def event_of(error: StitchError | Refusal) -> bytes:
    """The event that ends a stream of chunks."""
    return b"data: " + body_of(error) + b"\n\n"


def headers_of(error: StitchError | Refusal) -> dict[str, str]:
    """What the head of the reply says beside the status."""
    if isinstance(error, errors.Unauthenticated):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, (errors.Exhausted, errors.Unavailable)):
        seconds = error.retry_after_seconds if isinstance(error, errors.Exhausted) else RETRY_SECONDS
        # OpenAI's clients know the second one, too.
        return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(math.ceil(1000 * seconds))}
    return {}


def param_of(field: str) -> str:
    """The name of a request's field in OpenAI's API."""
    name = field.removeprefix("chat.")
    if name.startswith("sampling."):
        name = name.removeprefix("sampling.")
        return _PARAMS_OF_SAMPLING.get(name, name)
    if name.startswith("token_ids.ids"):
        return "prompt" + name.removeprefix("token_ids.ids")
    return _PARAMS.get(name, name)
