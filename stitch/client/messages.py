"""Keyword arguments to the requests of the Inference service.

A request is checked only as far as its fields must be encoded; the gateway checks their limits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypedDict

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage

from stitch.channels import MAX_REQUEST_BYTES
from stitch.client.answers import ToolCall
from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2

Message = Mapping[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "…"}`.

An assistant's turn may have `tool_calls`, a list of `ToolCall`s; that of a tool has the call's `tool_call_id`.
"""


class RouteFields(TypedDict, total=False):
    """The fields on which the choice of a route depends. A field that is absent or None takes the gateway's default."""

    # A conversation, in place of the prompt.
    messages: Sequence[Message] | None
    # Objectives; `Objectives` in inference.proto documents how each is met.
    max_ttft_seconds: float | None
    max_cost: float | None
    min_quality: float | None
    # Requests of one conversation stay on its route.
    conversation_id: str | None


class RequestFields(RouteFields, total=False):
    """The fields of a request besides its prompt."""

    # A prompt that is tokenized already, in place of the prompt.
    token_ids: Sequence[int] | None
    # Answers that share the prompt's computation.
    n: int | None
    # 0 is greedy.
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    max_tokens: int | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    # Added to the logits of token ids.
    logit_bias: Mapping[int, float] | None
    # Nothing but `max_tokens` ends the answer before it has this many.
    min_tokens: int | None
    # Alternatives to report for each token.
    logprobs: int | None
    # Report the prompt's tokens but the first one, too, before those of the answer.
    prompt_logprobs: bool | None
    # The answer ends before any of these strings.
    stop: str | Sequence[str] | None
    # A route's name, or `auto`; with `auto` the score from which on the most expensive route answers.
    route: str | None
    threshold: float | None
    # What the answer matches: one of json_schema, json_object (true), regex and lark.
    response_format: Mapping[str, Any] | None
    # Functions that the model may call, with `messages`: each has a name, a description, parameters, strict.
    tools: Sequence[Mapping[str, Any]] | None
    # `auto`, `none`, `required`, or a tool's name.
    tool_choice: str | None
    parallel_tool_calls: bool | None
    # The first tokens of the answer, and the text of the whole answer.
    forced_token_ids: Sequence[int] | None
    forced_answer: str | None
    request_id: str | None


_SAMPLING = frozenset(inference_pb2.Sampling.DESCRIPTOR.fields_by_name)
_OBJECTIVES = frozenset(inference_pb2.Objectives.DESCRIPTOR.fields_by_name)
_PLAIN = ("stop", "route", "request_id", "conversation_id", "forced_answer", "n", "threshold", "prompt_logprobs")
_ROUTE_FIELDS = frozenset((*_OBJECTIVES, "conversation_id"))
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_INPUT = ("prompt", "messages", "token_ids")

_CHOICES = {
    "auto": inference_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": inference_pb2.TOOL_CHOICE_MODE_NONE,
    "required": inference_pb2.TOOL_CHOICE_MODE_REQUIRED,
}
# Fields that hold JSON.
_JSON_VALUES = ("json_schema", "parameters", "arguments")
# gRPC's clock overflows at larger ones.
MAX_TIMEOUT_SECONDS = 1e9

_KINDS = {
    FieldDescriptor.CPPTYPE_STRING: "text in valid Unicode",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_INT32: "a whole number of 32 bits",
    FieldDescriptor.CPPTYPE_UINT32: "a whole number from 0 to 4294967295",
    FieldDescriptor.CPPTYPE_UINT64: "a whole number from 0 to 18446744073709551615",
}


def generate_request(fields: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    """The message of a request with these fields: `prompt`, `messages` or `token_ids`, and any of RequestFields.

    Raises InvalidRequest for a field that is unknown or can't be encoded.
    """
    request = inference_pb2.GenerateRequest()
    if fields.get("token_ids") is None:
        _set_input(request, fields)
    else:
        if not all(fields.get(name) is None for name in ("prompt", "messages")):
            raise InvalidRequest("token_ids", fields["token_ids"], "a request has one of: " + ", ".join(_INPUT))
        request.token_ids.SetInParent()
        _assign(request.token_ids, "ids", fields["token_ids"], path="token_ids")
    for name, value in fields.items():
        if name in _TOOLS and value is not None:
            if fields.get("messages") is None:
                raise InvalidRequest(name, value, "a request with tools has messages")
        elif name == "response_format" and value is not None:
            _set_object(request.response_format, name, value)
        elif name not in _INPUT and value is not None:
            _assign(_owner(request, name, value), name, value)
    _check_size(request)
    return request


def deadline(timeout: float | None) -> float | None:
    """A caller's timeout in seconds as gRPC takes it: None for none, also where it is infinite or over 30 years.

    Raises InvalidRequest where it is no number above 0.
    """
    if timeout is None:
        return None
    if not timeout > 0:
        raise InvalidRequest("timeout", timeout, "it must be more than 0 seconds")
    return timeout if timeout < MAX_TIMEOUT_SECONDS else None


def key_metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call that shows a tenant's key; None: none.

    Raises InvalidRequest, which doesn't show it, for a key that can't be sent.
    """
    if key is None:
        return ()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidRequest("key", "not shown", "it must be printable ASCII without spaces")
    return (("authorization", f"Bearer {key}"),)


def route_request(fields: Mapping[str, Any]) -> inference_pb2.RouteRequest:
    """The message that asks for a route decision alone: `prompt` or `messages`, and any of RouteFields.

    Raises InvalidRequest as `generate_request` does.
    """
    request = inference_pb2.RouteRequest()
    _set_input(request, fields)
    for name, value in fields.items():
        if name not in _INPUT and value is not None:
            if name not in _ROUTE_FIELDS:
                known = ["prompt", "messages", *sorted(_ROUTE_FIELDS)]
                raise InvalidRequest(name, value, f"a route request has: {', '.join(known)}")
            _assign(request.objectives if name in _OBJECTIVES else request, name, value)
    _check_size(request)
    return request


def _check_size(request: ProtoMessage) -> None:
    # Room for what encloses the request in a message of a batch.
    if (size := request.ByteSize()) > MAX_REQUEST_BYTES - 16:
        raise InvalidRequest("the request's size", size, f"it must be at most {MAX_REQUEST_BYTES - 16} bytes")


def _owner(request: inference_pb2.GenerateRequest, name: str, value: object) -> ProtoMessage:
    if name in _SAMPLING:
        return request.sampling
    if name in _OBJECTIVES:
        return request.objectives
    if name in _PLAIN:
        return request
    known = [*_INPUT, *_TOOLS, "response_format", *_PLAIN, *sorted(_OBJECTIVES), *sorted(_SAMPLING)]
    raise InvalidRequest(name, value, f"a request has: {', '.join(known)}")


def tokenize_request(fields: Mapping[str, Any]) -> inference_pb2.TokenizeRequest:
    """The message that asks for the tokens of `prompt` or `messages`.

    Raises InvalidRequest as `generate_request` does.
    """
    request = inference_pb2.TokenizeRequest()
    _set_input(request, fields)
    _check_size(request)
    return request


def detokenize_request(token_ids: Sequence[int]) -> inference_pb2.DetokenizeRequest:
    """The message that asks for the text of token ids. Raises InvalidRequest as `generate_request` does."""
    request = inference_pb2.DetokenizeRequest()
    _assign(request, "token_ids", token_ids)
    _check_size(request)
    return request


def _set_input(
    request: inference_pb2.GenerateRequest | inference_pb2.RouteRequest | inference_pb2.TokenizeRequest,
    fields: Mapping[str, Any],
) -> None:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        raise InvalidRequest("prompt", prompt, "a request needs either a prompt or messages")
    if messages is None:
        _assign(request, "prompt", prompt)
        return
    request.chat.SetInParent()
    for index, message in enumerate(_listed("messages", messages)):
        _add_message(request.chat, index, message)
    _set_tools(request.chat, fields)


def _set_tools(chat: inference_pb2.Chat, fields: Mapping[str, Any]) -> None:
    for index, tool in enumerate(_listed("tools", fields.get("tools") or ())):
        _set_object(chat.tools.add(), f"tools[{index}]", tool)
    if (choice := fields.get("tool_choice")) is not None:
        if choice in _CHOICES:
            chat.tool_choice.mode = _CHOICES[choice]
        else:
            _assign(chat.tool_choice, "name", choice, path="tool_choice")
    if (parallel := fields.get("parallel_tool_calls")) is not None:
        _assign(chat, "parallel_tool_calls", parallel)


def _add_message(chat: inference_pb2.Chat, index: int, message: object) -> None:
    path = f"messages[{index}]"
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise InvalidRequest(path, message, "it must have a role and a content")
    turn = chat.messages.add()
    calls = message.get("tool_calls") or ()
    _set_object(turn, path, {name: value for name, value in message.items() if name != "tool_calls"})
    for number, call in enumerate(_listed(f"{path}.tool_calls", calls)):
        _set_object(turn.tool_calls.add(), f"{path}.tool_calls[{number}]", call)


def _set_object(message: ProtoMessage, path: str, given: object) -> None:
    """Sets the fields that an object names; what is JSON in the message may be a value."""
    given = asdict(given) if isinstance(given, ToolCall) else given
    if not isinstance(given, Mapping):
        raise InvalidRequest(path, given, "it must be an object")
    for name, value in given.items():
        if name not in message.DESCRIPTOR.fields_by_name or name == "tool_calls":
            raise InvalidRequest(path, given, f"it has: {', '.join(message.DESCRIPTOR.fields_by_name)}")
        if name in _JSON_VALUES and not isinstance(value, str):
            value = _json(f"{path}.{name}", value)
        _assign(message, name, value, path=f"{path}.{name}")


def _json(path: str, value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(path, value, f"it must be JSON: {error}") from error


def _listed(name: str, value: object) -> Iterable[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidRequest(name, value, "it must be a list")
    return value


def _assign(message: ProtoMessage, name: str, value: Any, path: str | None = None) -> None:
    """Sets one field; raises InvalidRequest with `path` and the type that the field needs."""
    field = message.DESCRIPTOR.fields_by_name[name]
    path = path or name
    if not field.is_repeated:
        _store(path, value, field.cpp_type, partial(setattr, message, name))
        return
    if field.message_type is not None:
        _assign_map(getattr(message, name), field.message_type, value, path)
        return
    items = [value] if isinstance(value, str) else _listed(path, value)
    for index, item in enumerate(items):
        _store(f"{path}[{index}]", item, field.cpp_type, getattr(message, name).append)


def _assign_map(stored: Any, entry: Any, value: object, path: str) -> None:
    """Sets a map from token ids; in JSON they are text."""
    if not isinstance(value, Mapping):
        raise InvalidRequest(path, value, "it must be an object")
    kinds = {name: entry.fields_by_name[name].cpp_type for name in ("key", "value")}
    for key, item in value.items():
        token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        _store(f"{path}[{key}]", item, kinds["value"], partial(stored.__setitem__, token_id))


def _store(path: str, value: object, kind: int, store: Callable[[Any], None]) -> None:
    # protobuf itself accepts true as 1.0, 1 as true, and bytes as text.
    fits = isinstance(value, bool) == (kind == FieldDescriptor.CPPTYPE_BOOL) and not isinstance(value, bytes)
    try:
        if fits:
            store(value)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise InvalidRequest(path, value, f"it must be {_KINDS[kind]}")
