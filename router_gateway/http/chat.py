"""`POST /v1/chat/completions`: a conversation in, OpenAI's chat completion or its chunks out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from router_gateway.http.bodies import Body, Items
from router_gateway.http.calls import Call, Services
from router_gateway.http.generation import (
    DONE,
    FINISH_REASONS,
    MAX_METADATA,
    ChoicesBody,
    MaxTokens,
    Shape,
    compact,
    generated,
    message_of,
    respond,
)
from router_gateway.rpc.messages import MAX_MESSAGES, MAX_TOOLS
from stitch.errors import InvalidRequest
from stitch.sampling import MAX_LOGPROBS
from stitch.v1 import inference_pb2

# Between the text parts of a message.
PART_SEPARATOR = "\n"


class TextContent(Body):
    text: str


class TextPart(TextContent):
    type: Literal["text"]


Content = str | Annotated[Items[TextPart], Field(min_length=1)]


class CalledFunction(Body):
    name: str = Field(min_length=1)
    # A JSON object.
    arguments: str


class CalledTool(Body):
    id: str = Field(min_length=1)
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Items[CalledTool] | None = None
    # Clients send replies back as they are.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant has content or tool_calls")
        return self


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str = Field(min_length=1)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    # JSON schema of the arguments.
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str = Field(min_length=1)


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Body):
    type: Literal["text"]


class ObjectFormat(Body):
    type: Literal["json_object"]


class Schema(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: Schema


class ChatBody(ChoicesBody):
    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None

    def message(
        self, request_id: str, routes: Sequence[str], defaults: Mapping[str, float]
    ) -> inference_pb2.GenerateRequest:
        """The whole message. Raises InvalidRequest for fields that exclude or need each other, too."""
        message = super().message(request_id, routes, defaults)
        self._limit_tokens(message.sampling)
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs", self.top_logprobs, "it needs logprobs")
        if self.logprobs:
            message.sampling.logprobs = self.top_logprobs or 0
        given = self.response_format
        set_format(message, given.json_schema if isinstance(given, SchemaFormat) else given)
        message.chat.messages.extend(message_to_proto(one) for one in self.messages)
        choice = self.tool_choice.function if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        set_tools(message.chat, [one.function for one in self.tools or ()], choice, self.parallel_tool_calls)
        return message

    def _limit_tokens(self, sampling: inference_pb2.Sampling) -> None:
        if self.max_completion_tokens is None:
            return
        if self.max_tokens not in (None, self.max_completion_tokens):
            limit = f"max_completion_tokens is {self.max_completion_tokens}"
            raise InvalidRequest("max_tokens", self.max_tokens, limit)
        sampling.max_tokens = self.max_completion_tokens


def text_of(content: str | Sequence[TextContent] | None) -> str:
    """The text of a message."""
    if content is None or isinstance(content, str):
        return content or ""
    return PART_SEPARATOR.join(part.text for part in content)


def message_to_proto(given: SystemMessage | UserMessage | AssistantMessage | ToolMessage) -> inference_pb2.ChatMessage:
    """The turn of a conversation."""
    # Templates know `system` alone.
    role = "system" if given.role == "developer" else given.role
    message = inference_pb2.ChatMessage(role=role, content=text_of(given.content))
    if isinstance(given, ToolMessage):
        message.tool_call_id = given.tool_call_id
    else:
        message.name = given.name or ""
    if isinstance(given, AssistantMessage):
        for one in given.tool_calls or ():
            message.tool_calls.add(id=one.id, name=one.function.name, arguments=one.function.arguments)
    return message


def _tool(function: Function) -> inference_pb2.Tool:
    return inference_pb2.Tool(
        name=function.name,
        description=function.description or "",
        parameters="" if function.parameters is None else json.dumps(function.parameters),
        strict=bool(function.strict),
    )


def set_tools(
    chat: inference_pb2.Chat, functions: Iterable[Function], choice: str | NamedFunction | None, parallel: bool | None
) -> None:
    """Says which tools an answer may call, and how."""
    chat.tools.extend(map(_tool, functions))
    if choice is not None:
        mode, name = ("required", choice.name) if isinstance(choice, NamedFunction) else (choice, "")
        chat.tool_choice.CopyFrom(inference_pb2.ToolChoice(mode=f"TOOL_CHOICE_MODE_{mode.upper()}", name=name))
    if parallel is not None:
        chat.parallel_tool_calls = parallel


def set_format(message: inference_pb2.GenerateRequest, given: TextFormat | ObjectFormat | Schema | None) -> None:
    """Says what answers match: nothing for text."""
    if isinstance(given, ObjectFormat):
        message.response_format.json_object = True
    elif isinstance(given, Schema):
        message.response_format.json_schema = json.dumps(given.schema_)


class ChatShape(Shape):
    """Chat completions and their chunks."""

    def __init__(self, request_id: str, body: ChatBody) -> None:
        super().__init__(request_id)
        self.include_usage = body.include_usage
        self._with_logprobs = bool(body.logprobs)
        # What every chunk begins with, up to the choice's index.
        self._prefix = b""
        # Whether deltas have nothing but text.
        self._only_text = not body.logprobs and not body.tools
        # What every chunk ends with, after its choice.
        self._suffix = (b',"usage":null' if body.include_usage else b"") + b"}\n\n"
        self._answers = body.n or 1
        # Answers whose first chunk, which has the role, has been made.
        self._started: set[int] = set()
        self._texts: dict[int, list[str]] = defaultdict(list)
        self._calls: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
        self._logprobs: dict[int, list[dict[str, Any]]] = defaultdict(list)

    def start(self, started: inference_pb2.Started) -> None:
        super().start(started)
        self._prefix = b"data: " + compact(self._head("chat.completion.chunk"))[:-1] + b',"choices":[{"index":'

    def events(self, response: inference_pb2.GenerateResponse) -> bytes:
        answer, delta = response.answer, response.delta
        if self._only_text and answer in self._started and response.HasField("delta"):
            # Nearly all events, which need none of the checks below.
            choice = f'{answer},"delta":{{"content":{json.dumps(delta.text)}}},"logprobs":null,"finish_reason":null}}]'
            return self._prefix + choice.encode() + self._suffix if delta.text else b""
        if not (delta.text or delta.tool_calls or delta.logprobs or response.HasField("finished")):
            return b""
        fields = []
        if answer not in self._started:
            self._started.add(answer)
            fields.append('"role":"assistant"')
        if delta.text or (fields and not delta.tool_calls):
            # json.dumps with its defaults is the fast path.
            fields.append(f'"content":{json.dumps(delta.text)}')
        if delta.tool_calls:
            fields.append(f'"tool_calls":{json.dumps([_call_delta(one) for one in delta.tool_calls])}')
        logprobs = json.dumps({"content": logprobs_of(delta), "refusal": None}) if delta.logprobs else "null"
        finish = f'"{FINISH_REASONS[response.finished.reason]}"' if response.HasField("finished") else "null"
        choice = f'{answer},"delta":{{{",".join(fields)}}},"logprobs":{logprobs},"finish_reason":{finish}}}]'
        # A chunk without a choice, for which many clients aren't made, comes only where they ask for usage.
        is_last = not self.include_usage and len(self._finished) == self._answers and response.HasField("finished")
        stitch = b',"stitch":' + compact(self.stitch()) if is_last else b""
        return self._prefix + choice.encode() + stitch + self._suffix

    def last_events(self) -> bytes:
        if not self.include_usage:
            return DONE
        fields = {"choices": [], "usage": self.usage(), "stitch": self.stitch()}
        return b"data: " + compact({**self._head("chat.completion.chunk"), **fields}) + b"\n\n" + DONE

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        answer, delta = response.answer, response.delta
        self._texts[answer].append(delta.text)
        self._logprobs[answer] += logprobs_of(delta)
        for one in delta.tool_calls:
            _put_together(self._calls[answer], one)

    def whole(self) -> dict[str, Any]:
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(answer) for answer in sorted(self._finished)],
            "usage": self.usage(),
            "stitch": self.stitch(),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        route = self.started.decision.route
        return {"id": f"chatcmpl-{self.request_id}", "object": kind, "created": self.created, "model": route}

    def _choice(self, answer: int) -> dict[str, Any]:
        text, calls = "".join(self._texts[answer]), list(self._calls[answer].values())
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": answer,
            "message": message,
            "logprobs": {"content": self._logprobs[answer], "refusal": None} if self._with_logprobs else None,
            "finish_reason": FINISH_REASONS[self._finished[answer].reason],
        }


def _call_delta(given: inference_pb2.ToolCallDelta) -> dict[str, Any]:
    """A part of a tool call; the first one has id, type and name."""
    if not given.id:
        return {"index": given.index, "function": {"arguments": given.arguments}}
    function = {"name": given.name, "arguments": given.arguments}
    return {"index": given.index, "id": given.id, "type": "function", "function": function}


def _put_together(calls: dict[int, dict[str, Any]], given: inference_pb2.ToolCallDelta) -> None:
    first = {"id": given.id, "type": "function", "function": {"name": given.name, "arguments": ""}}
    calls.setdefault(given.index, first)["function"]["arguments"] += given.arguments


def logprobs_of(delta: inference_pb2.Delta) -> list[dict[str, Any]]:
    """The log-probabilities of a delta's tokens, and of the likeliest ones at their positions."""
    return [
        {**token_logprob(one), "top_logprobs": [token_logprob(other) for other in one.alternatives]}
        for one in delta.logprobs
    ]


def token_logprob(given: inference_pb2.TokenLogprobs | inference_pb2.Alternative) -> dict[str, Any]:
    """A token with its text, in which bytes of a part of a character are U+FFFD, and its bytes."""
    return {"token": given.token.decode(errors="replace"), "logprob": given.logprob, "bytes": list(given.token)}


async def chat(services: Services, call: Call, body: ChatBody) -> None:
    """Answers a conversation."""
    responses = generated(call, services, message_of(call, services, body))
    await respond(call, responses, bool(body.stream), ChatShape(call.request_id, body))
