"""From keyword arguments to request messages. Checks only that a value can travel; its limits are the gateway's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage

from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2

Message = Mapping[str, str]
"""One turn of a conversation: `{"role": "user", "content": "…"}`."""


class RouteFields(TypedDict, total=False):
    """What the choice of a route goes by. A field that is absent or None takes the gateway's default."""

    # A conversation, in place of the prompt.
    messages: Sequence[Message] | None
    # Objectives; the comments of `Objectives` in inference.proto say how each is kept to.
    max_ttft_seconds: float | None
    max_cost: float | None
    min_quality: float | None
    # Requests that name one conversation stay on its route.
    conversation_id: str | None


class RequestFields(RouteFields, total=False):
    """What a request may carry beside its prompt."""

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
    # Alternatives reported beside each token.
    logprobs: int | None
    # The answer ends before any of these strings.
    stop: str | Sequence[str] | None
    # A route's name, or `auto`.
    route: str | None
    # What the answer begins with, and what it is as a whole.
    forced_token_ids: Sequence[int] | None
    forced_answer: str | None
    request_id: str | None


_SAMPLING = frozenset(inference_pb2.Sampling.DESCRIPTOR.fields_by_name)
_OBJECTIVES = frozenset(inference_pb2.Objectives.DESCRIPTOR.fields_by_name)
_PLAIN = ("stop", "route", "request_id", "conversation_id", "forced_answer")
_ROUTE_FIELDS = frozenset((*_OBJECTIVES, "conversation_id"))
_INPUT = ("prompt", "messages")

_KINDS = {
    FieldDescriptor.CPPTYPE_STRING: "text in valid Unicode",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_INT32: "a whole number of 32 bits",
    FieldDescriptor.CPPTYPE_UINT32: "a whole number from 0 to 4294967295",
    FieldDescriptor.CPPTYPE_UINT64: "a whole number from 0 to 18446744073709551615",
}


def generate_request(fields: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    """The message of a request with these fields: `prompt` or `messages`, and any of RequestFields.

    Raises InvalidRequest for a field that is unknown or can't be encoded.
    """
    request = inference_pb2.GenerateRequest()
    _set_input(request, fields)
    for name, value in fields.items():
        if name not in _INPUT and value is not None:
            _assign(_owner(request, name, value), name, value)
    return request


def route_request(fields: Mapping[str, Any]) -> inference_pb2.RouteRequest:
    """The message that asks for a judgement alone: `prompt` or `messages`, and any of RouteFields; errors likewise."""
    request = inference_pb2.RouteRequest()
    _set_input(request, fields)
    for name, value in fields.items():
        if name not in _INPUT and value is not None:
            if name not in _ROUTE_FIELDS:
                raise InvalidRequest(name, value, f"a judgement takes: {', '.join([*_INPUT, *sorted(_ROUTE_FIELDS)])}")
            _assign(request.objectives if name in _OBJECTIVES else request, name, value)
    return request


def _owner(request: inference_pb2.GenerateRequest, name: str, value: object) -> ProtoMessage:
    if name in _SAMPLING:
        return request.sampling
    if name in _OBJECTIVES:
        return request.objectives
    if name in _PLAIN:
        return request
    known = [*_INPUT, *_PLAIN, *sorted(_OBJECTIVES), *sorted(_SAMPLING)]
    raise InvalidRequest(name, value, f"a request has: {', '.join(known)}")


def _set_input(request: inference_pb2.GenerateRequest | inference_pb2.RouteRequest, fields: Mapping[str, Any]) -> None:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        raise InvalidRequest("prompt", prompt, "a request needs a prompt or messages, one of the two")
    if messages is None:
        _assign(request, "prompt", prompt)
        return
    request.chat.SetInParent()
    for index, message in enumerate(_listed("messages", messages)):
        _add_message(request.chat, index, message)


def _add_message(chat: inference_pb2.Chat, index: int, message: object) -> None:
    place = f"messages[{index}]"
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise InvalidRequest(place, message, "it must have a role and a content, nothing else")
    turn = chat.messages.add()
    for name in ("role", "content"):
        _assign(turn, name, message[name], place=f"{place}.{name}")


def _listed(name: str, value: object) -> Iterable[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidRequest(name, value, "it must be a list")
    return value


def _assign(message: ProtoMessage, name: str, value: Any, place: str | None = None) -> None:
    """Sets one field, or says what it must be."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if not field.is_repeated:
        _store(place or name, value, field.cpp_type, partial(setattr, message, name))
        return
    items = [value] if isinstance(value, str) else _listed(name, value)
    for index, item in enumerate(items):
        _store(f"{name}[{index}]", item, field.cpp_type, getattr(message, name).append)


def _store(place: str, value: object, kind: int, store: Callable[[Any], None]) -> None:
    # protobuf itself takes true for 1.0, 1 for true, and bytes for text.
    fits = isinstance(value, bool) == (kind == FieldDescriptor.CPPTYPE_BOOL) and not isinstance(value, bytes)
    try:
        if fits:
            store(value)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise InvalidRequest(place, value, f"it must be {_KINDS[kind]}")
