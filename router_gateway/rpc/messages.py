"""Reads the client's messages: bytes to messages, messages to the pipeline's requests.

Everything that is malformed or outside its limits raises InvalidRequest with the field. What a field means where it is
not set is decided here.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message

from router_gateway.requests import limits
from router_gateway.requests.limits import Amount
from router_gateway.requests.types import Prompt, Request, TokenIds, Tools
from router_gateway.routing.objectives import Objectives
from router_gateway.routing.selector import RoutingOptions
from router_gateway.rpc.wire_format import fields, has_more_fields
from router_gateway.tokenization.chat_template import Tool, ToolCall, Turn
from stitch.errors import InvalidRequest
from stitch.grammar import Grammar
from stitch.sampling import MAX_BIASED_TOKENS, Sampling
from stitch.v1 import inference_pb2

Decoded = TypeVar("Decoded", bound=Message)

# Leaves the route to the router, as an empty name does.
AUTO = "auto"
# Longer ones would block the event loop before they are compared with the context.
MAX_MESSAGES = 2_048
MAX_STOP_TOKENS = 1_024
MAX_FORCED_TOKENS = 32_768
# As at OpenAI.
MAX_TOOLS = 128
_TOOL_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}}
# Of a schema, or of the arguments of a call.
MAX_JSON_CHARACTERS = 1 << 18
MAX_PROMPT_TOKENS = 1_048_576
# An error shows this many bytes of a string before the invalid one.
SHOWN_BYTES = 12
# The field of an invalid string is looked for in messages up to this size.
NAMED_BYTES = 1 << 20
# The fields of larger messages are counted before they are parsed: an empty one of two bytes becomes an object.
UNCOUNTED_BYTES = 32_768
MAX_FIELDS = 4 * MAX_MESSAGES


def to_request(message: inference_pb2.GenerateRequest) -> Request:
    """Raises InvalidRequest for a message without input, or with a value outside its limits."""
    limits.check_id("request_id", message.request_id)
    limits.check_stop(message.stop)
    n = message.n if message.HasField("n") else 1
    limits.check_answers(n)
    return Request(
        request_id=message.request_id or uuid.uuid4().hex,
        prompt=to_prompt(message),
        sampling=_to_sampling(message.sampling),
        stop=tuple(message.stop),
        routing=_to_named_routing(message),
        forced_answer=message.forced_answer if message.HasField("forced_answer") else None,
        sets_max_tokens=message.sampling.HasField("max_tokens"),
        response_format=_to_response_format(message.response_format),
        tools=to_tools(message.chat),
        n=n,
        prompt_logprobs=message.prompt_logprobs,
    )


def to_route_query(message: inference_pb2.RouteRequest) -> Request:
    """A request of which only the route is decided; raises like `to_request`."""
    return Request(request_id="", prompt=to_prompt(message), sampling=Sampling(), routing=_to_routing(message))


def to_prompt(
    message: inference_pb2.GenerateRequest | inference_pb2.RouteRequest | inference_pb2.TokenizeRequest,
) -> Prompt:
    match message.WhichOneof("input"):
        case "prompt":
            return message.prompt
        case "chat":
            limits.check_count("chat.messages", message.chat.messages, MAX_MESSAGES, "messages")
            return tuple(_to_turn(turn, f"chat.messages[{i}]") for i, turn in enumerate(message.chat.messages))
        case "token_ids" if isinstance(message, inference_pb2.GenerateRequest):
            limits.check_count("token_ids.ids", message.token_ids.ids, MAX_PROMPT_TOKENS, "ids")
            return TokenIds(tuple(message.token_ids.ids))
        case _:
            raise InvalidRequest("input", Amount("not set"), "a request has a prompt, a chat or token ids")


def _to_turn(message: inference_pb2.ChatMessage, field: str) -> Turn:
    for index, call in enumerate(message.tool_calls):
        _json_object(f"{field}.tool_calls[{index}].arguments", call.arguments)
    calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls)
    return Turn(message.role, message.content, calls, message.tool_call_id, message.name)


def to_tools(chat: inference_pb2.Chat) -> Tools | None:
    """The tools that the model may call; None where there are none, or it may call none."""
    limits.check_count("chat.tools", chat.tools, MAX_TOOLS, "tools")
    offered = tuple(_to_tool(tool, f"chat.tools[{index}]") for index, tool in enumerate(chat.tools))
    names, choice = [tool.name for tool in offered], chat.tool_choice
    if len(set(names)) < len(names):
        raise InvalidRequest("chat.tools", ", ".join(names), "every tool has a name of its own")
    if choice.name and choice.name not in names:
        raise InvalidRequest("chat.tool_choice.name", choice.name, f"it is one of {', '.join(names) or 'no tools'}")
    required = bool(choice.name) or choice.mode == inference_pb2.TOOL_CHOICE_MODE_REQUIRED
    if required and not offered:
        raise InvalidRequest("chat.tool_choice.mode", Amount("required"), "there are no tools")
    if not offered or (choice.mode == inference_pb2.TOOL_CHOICE_MODE_NONE and not choice.name):
        return None
    parallel = chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else True
    return Tools(offered, required, choice.name, parallel)


def _to_tool(message: inference_pb2.Tool, field: str) -> Tool:
    if not _TOOL_NAME.fullmatch(message.name):
        raise InvalidRequest(f"{field}.name", message.name, "it has 1 to 64 letters, digits, underscores and dashes")
    schema = _json_object(f"{field}.parameters", message.parameters or "{}")
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"{field}.parameters", message.parameters, "it is the JSON schema of an object")
    return Tool(message.name, message.description, schema or dict(_NO_PARAMETERS), message.strict)


def _to_response_format(message: inference_pb2.ResponseFormat) -> Grammar | None:
    match message.WhichOneof("format"):
        case None:
            return None
        case "json_object":
            return Grammar("json_schema", '{"type": "object"}') if message.json_object else None
        case kind:
            source = getattr(message, kind)
            if kind == "json_schema":
                _json_object(f"response_format.{kind}", source)
            return Grammar(kind, source)


def _json_object(field: str, text: str) -> dict[str, Any]:
    limits.check_count(field, text, MAX_JSON_CHARACTERS, "characters")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, text, f"it must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(field, text, "it must be a JSON object")
    return value


def _to_routing(message: inference_pb2.GenerateRequest | inference_pb2.RouteRequest) -> RoutingOptions:
    """Everything but route and threshold, which a RouteRequest hasn't."""
    given = {field.name: value for field, value in message.objectives.ListFields()}
    objectives = Objectives(**given)
    limits.check_objectives(objectives)
    limits.check_id("conversation_id", message.conversation_id)
    return RoutingOptions(objectives=objectives, conversation_id=message.conversation_id)


def _to_named_routing(message: inference_pb2.GenerateRequest) -> RoutingOptions:
    route = "" if message.route == AUTO else message.route
    threshold = message.threshold if message.HasField("threshold") else None
    limits.check_threshold(threshold, route)
    return replace(_to_routing(message), route=route or None, threshold=threshold)


def _to_sampling(message: inference_pb2.Sampling) -> Sampling:
    limits.check_count("sampling.stop_token_ids", message.stop_token_ids, MAX_STOP_TOKENS, "ids")
    limits.check_count("sampling.forced_token_ids", message.forced_token_ids, MAX_FORCED_TOKENS, "ids")
    limits.check_count("sampling.logit_bias", message.logit_bias, MAX_BIASED_TOKENS, "entries")
    sampling = Sampling.from_proto(message)
    return sampling if message.HasField("seed") else replace(sampling, seed=secrets.randbits(64))


def decode(request_type: type[Decoded], data: bytes) -> Decoded:
    """The message in `data`. Raises InvalidRequest for a string that is not UTF-8, or bytes that are no message.

    Protobuf refuses the whole message for one such string and does not name it. So a refused message is parsed once
    more, with descriptors in which every string is bytes.
    """
    if len(data) > UNCOUNTED_BYTES and has_more_fields(data, request_type, MAX_FIELDS):
        raise InvalidRequest("request", _size(data), f"they have more than {MAX_FIELDS:,} fields")
    try:
        return request_type.FromString(data)
    except DecodeError as error:
        if len(data) > NAMED_BYTES:
            raise InvalidRequest(
                "request", _size(data), "a string in them is not UTF-8, or they are no message"
            ) from error
        name = request_type.DESCRIPTOR.full_name
        try:
            message = _type_with_bytes(name).FromString(data)
        except DecodeError:
            raise InvalidRequest("request", _size(data), f"they are no {name}") from error
        for path, value, index in _invalid_strings(message, ""):
            limit = f"it must be UTF-8, and byte {index} is 0x{value[index]:02x}"
            raise InvalidRequest(path, value[max(0, index - SHOWN_BYTES) : index + 1], limit) from error
        raise InvalidRequest("request", _size(data), str(error)) from error


def _size(data: bytes) -> Amount:
    return Amount(f"{len(data):,} bytes")


class BatchEntries:
    """The requests of a batch, each of which is decoded when its turn comes.

    Raises InvalidRequest where there are more than `max_requests`, or the bytes are no batch.
    """

    def __init__(self, data: bytes, max_requests: int) -> None:
        self._data = data
        self._ranges: list[tuple[int, int]] = []
        try:
            for count, field in enumerate(fields(data, 0, len(data)), 1):
                if count > max_requests:
                    amount = Amount(f"more than {max_requests:,} requests")
                    raise InvalidRequest("requests", amount, f"a batch has at most {max_requests:,}")
                if field.number == inference_pb2.GenerateBatchRequest.REQUESTS_FIELD_NUMBER and field.delimited:
                    self._ranges.append((field.start, field.end))
        except DecodeError as error:
            limit = "they are no stitch.v1.GenerateBatchRequest"
            raise InvalidRequest("request", _size(data), limit) from error

    def __len__(self) -> int:
        return len(self._ranges)

    def message(self, index: int) -> inference_pb2.GenerateRequest:
        """Raises InvalidRequest as `decode` does."""
        start, end = self._ranges[index]
        return decode(inference_pb2.GenerateRequest, self._data[start:end])


@functools.cache
def _type_with_bytes(full_name: str) -> type[Message]:
    """The message type of that name with bytes in place of strings, which are the same on the wire."""
    file = FileDescriptorProto()
    inference_pb2.DESCRIPTOR.CopyToProto(file)
    for message in file.message_type:
        for field in message.field:
            if field.type == FieldDescriptorProto.TYPE_STRING:
                field.type = FieldDescriptorProto.TYPE_BYTES
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(full_name))


def _invalid_strings(message: Message, prefix: str) -> Iterator[tuple[str, bytes, int]]:
    """Path, bytes and index of the first invalid byte, of every string that is not UTF-8."""
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            # Of numbers alone.
            continue
        if field.is_repeated:
            for index, item in enumerate(value):
                yield from _invalid_in_field(field, item, f"{path}[{index}]")
        else:
            yield from _invalid_in_field(field, value, path)


def _invalid_in_field(field: FieldDescriptor, value: Any, path: str) -> Iterator[tuple[str, bytes, int]]:
    if field.message_type is not None:
        yield from _invalid_strings(value, f"{path}.")
    elif isinstance(value, bytes):
        try:
            value.decode()
        except UnicodeDecodeError as error:
            yield path, value, error.start
