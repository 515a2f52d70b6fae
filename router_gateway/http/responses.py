"""`POST /v1/responses`: items of a conversation in, OpenAI's response or its events out.

Nothing is stored: a client sends the items of earlier turns again. A message or a call of a function is an item, and
those of a response come one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from router_gateway.http.bodies import Body, Items
from router_gateway.http.calls import Call, Services
from router_gateway.http.chat import (
    Function,
    NamedFunction,
    ObjectFormat,
    Schema,
    TextContent,
    TextFormat,
    logprobs_of,
    set_format,
    set_tools,
    text_of,
)
from router_gateway.http.errors import Refusal, fields_of
from router_gateway.http.generation import (
    MAX_METADATA,
    GenerationBody,
    MaxTokens,
    Shape,
    compact,
    generated,
    message_of,
    respond,
)
from router_gateway.rpc.messages import MAX_MESSAGES, MAX_TOOLS
from stitch.errors import InvalidRequest, StitchError
from stitch.sampling import MAX_LOGPROBS
from stitch.v1 import inference_pb2

LOGPROBS = "message.output_text.logprobs"
# What `error.code` may be, by `type`; for others it is `server_error`.
_CODES = {"rate_limit_error": "rate_limit_exceeded", "invalid_request_error": "invalid_prompt"}
# Fields of this body, by those of the message that come from them.
_SOURCES = {
    "chat.messages": "input",
    "response_format.json_schema": "text.format.schema",
    "response_format": "text.format",
    "sampling.max_tokens": "max_output_tokens",
}


class ItemPart(TextContent):
    type: Literal["input_text", "output_text"]
    # Clients send output back as it is.
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


Content = str | Annotated[Items[ItemPart], Field(min_length=1)]


class Item(Body):
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(Item):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    # A JSON object.
    arguments: str


class OutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: Content


def _kind(item: object) -> object:
    return item.get("type") or "message" if isinstance(item, dict) else "message"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="type_of_item",
        custom_error_message="Its type is message, function_call or function_call_output",
    ),
]


class FunctionTool(Function):
    type: Literal["function"]


class FunctionChoice(NamedFunction):
    type: Literal["function"]


class SchemaText(Schema):
    type: Literal["json_schema"]


class TextConfig(Body):
    format: Annotated[TextFormat | ObjectFormat | SchemaText, Field(discriminator="type")] | None = None


class ResponseBody(GenerationBody):
    input: str | Annotated[Items[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    text: TextConfig | None = None
    tools: Annotated[Items[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    include: Items[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    # What this gateway does anyway.
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None

    @property
    def format(self) -> TextFormat | ObjectFormat | SchemaText:
        given = None if self.text is None else self.text.format
        return given or TextFormat(type="text")

    def message(
        self, request_id: str, routes: Sequence[str], defaults: Mapping[str, float]
    ) -> inference_pb2.GenerateRequest:
        """The whole message. Raises InvalidRequest for fields that need each other, too."""
        message = super().message(request_id, routes, defaults)
        if self.max_output_tokens is not None:
            message.sampling.max_tokens = self.max_output_tokens
        if self.top_logprobs is not None and not self.include:
            raise InvalidRequest("top_logprobs", self.top_logprobs, f"it needs {LOGPROBS} in include")
        if self.include:
            message.sampling.logprobs = self.top_logprobs or 0
        set_format(message, self.format)
        message.chat.messages.extend(self._turns()[0])
        set_tools(message.chat, self.tools or (), self.tool_choice, self.parallel_tool_calls)
        return message

    def _turns(self) -> tuple[list[inference_pb2.ChatMessage], dict[str, str]]:
        """The turns of the conversation, and the fields of this body from which those of the message come."""
        turns: list[inference_pb2.ChatMessage] = []
        sources: dict[str, str] = {}

        def add(source: str, role: str, content: str, call_id: str = "") -> None:
            sources[f"chat.messages[{len(turns)}].content"] = source
            turns.append(inference_pb2.ChatMessage(role=role, content=content, tool_call_id=call_id))

        if self.instructions:
            add("instructions", "system", self.instructions)
        if isinstance(self.input, str):
            add("input", "user", self.input)
            return turns, sources
        for index, item in enumerate(self.input):
            source = f"input[{index}]"
            if isinstance(item, MessageItem):
                # Templates know `system` alone.
                role = "system" if item.role == "developer" else item.role
                add(f"{source}.content", role, text_of(item.content))
            elif isinstance(item, OutputItem):
                add(f"{source}.output", "tool", text_of(item.output), item.call_id)
            else:
                # An assistant's text and its calls are one turn.
                if not turns or turns[-1].role != "assistant":
                    add(source, "assistant", "")
                calls = turns[-1].tool_calls
                sources[f"chat.messages[{len(turns) - 1}].tool_calls[{len(calls)}]"] = source
                calls.add(id=item.call_id, name=item.name, arguments=item.arguments)
        return turns, sources

    def param_of(self, field: str) -> str:
        """The name that a field of the message has in this body."""
        sources = {**self._turns()[1], **_SOURCES}
        field = "chat.messages" if field == "chat" else field
        found = next((one for one in sources if field == one or field.startswith((f"{one}.", f"{one}["))), None)
        return field if found is None else sources[found] + field.removeprefix(found)


class ResponseShape(Shape):
    """A response and its events. Both come from the same walk over its items, of which the last one may be open."""

    def __init__(self, request_id: str, body: ResponseBody, sampling: inference_pb2.Sampling) -> None:
        """`sampling` is that of the body, with the defaults."""
        super().__init__(request_id)
        self._model, choice = body.model, body.tool_choice
        # What every response object says of its request.
        self._given: dict[str, Any] = {
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "temperature": sampling.temperature,
            "text": {"format": body.format.model_dump(by_alias=True)},
            "tool_choice": choice.model_dump() if isinstance(choice, Body) else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": body.user,
        }
        self._is_streamed = bool(body.stream)
        # Events so far.
        self._number = 0
        # The items that have ended, and the one that hasn't: each ends where another one or the end comes.
        self._output: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None
        # Of the open item: its text or its arguments.
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        self.events(response)

    def events(self, response: inference_pb2.GenerateResponse) -> bytes:
        delta = response.delta
        # Log-probabilities of the tokens of a call have no place in its item.
        is_call = bool(delta.tool_calls) or (self._item is not None and not self._in_message)
        events = self._add_text(delta) if delta.text or (delta.logprobs and not is_call) else b""
        for call in delta.tool_calls:
            events += self._add_call(call)
        return events

    def last_events(self) -> bytes:
        return self._end()[0]

    def whole(self) -> dict[str, Any]:
        return self._end()[1]

    def error_events(self, error: StitchError | Refusal) -> bytes:
        fields = fields_of(error)
        code = _CODES.get(fields["type"], "server_error")
        events = self._start() + self._close("incomplete")
        return events + self._event(
            "response.failed", response=self._response("failed", error={**fields, "code": code})
        )

    def usage(self) -> dict[str, Any]:
        """Tokens by this API's names; those written to the cache, or for reasoning, aren't counted."""
        usage = super().usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    @property
    def _in_message(self) -> bool:
        return self._item is not None and self._item["type"] == "message"

    @property
    def _place(self) -> dict[str, Any]:
        """Where events of the open item belong."""
        return {"item_id": self._item and self._item["id"], "output_index": len(self._output)}

    def _start(self) -> bytes:
        if self._number:
            return b""
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _open(self, prefix: str, **fields: Any) -> bytes:
        """Begins an item, which ends the one before."""
        events = self._start() + self._close("completed")
        name = f"{prefix}_{self.request_id}_{len(self._output)}"
        self._item, self._texts, self._logprobs = {"id": name, "status": "in_progress", **fields}, [], []
        return events + self._event("response.output_item.added", output_index=len(self._output), item=self._item)

    def _open_message(self) -> bytes:
        events = self._open("msg", type="message", role="assistant", content=[])
        return events + self._event(
            "response.content_part.added", **self._place, content_index=0, part=_output_text("", [])
        )

    def _add_text(self, delta: inference_pb2.Delta) -> bytes:
        events = b"" if self._in_message else self._open_message()
        logprobs = logprobs_of(delta)
        self._texts.append(delta.text)
        self._logprobs += logprobs
        fields = {"content_index": 0, "delta": delta.text, "logprobs": _without_bytes(logprobs)}
        return events + self._event("response.output_text.delta", **self._place, **fields)

    def _add_call(self, call: inference_pb2.ToolCallDelta) -> bytes:
        """Takes a part of a call; the first one has its id."""
        events = b""
        if call.id:
            events = self._open("fc", type="function_call", call_id=call.id, name=call.name, arguments="")
        self._texts.append(call.arguments)
        if call.arguments:
            events += self._event("response.function_call_arguments.delta", **self._place, delta=call.arguments)
        return events

    def _close(self, status: str) -> bytes:
        """Ends the open item, if there is one. A call is whole: of no other text is it known to be a call."""
        if self._item is None:
            return b""
        text, place = "".join(self._texts), self._place
        if self._in_message:
            part = _output_text(text, self._logprobs)
            done = {"content_index": 0, "text": text, "logprobs": _without_bytes(self._logprobs)}
            events = self._event("response.output_text.done", **place, **done)
            events += self._event("response.content_part.done", **place, content_index=0, part=part)
            item = {**self._item, "status": status, "content": [part]}
        else:
            events = self._event("response.function_call_arguments.done", **place, arguments=text)
            item = {**self._item, "status": "completed", "arguments": text}
        events += self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._item = None
        return events

    def _end(self) -> tuple[bytes, dict[str, Any]]:
        """The last events, and the whole response."""
        # An answer without any text is a message, too.
        events = self._open_message() if self._item is None else b""
        is_cut = self._first.reason == inference_pb2.FINISH_REASON_LENGTH
        status, details = ("incomplete", {"reason": "max_output_tokens"}) if is_cut else ("completed", None)
        events += self._close(status)
        response = self._response(status, incomplete_details=details, usage=self.usage(), stitch=self.stitch())
        return events + self._event(f"response.{status}", response=response), response

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        """The response object as it is now."""
        return {
            "id": f"resp_{self.request_id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.started.decision.route or self._model,
            "output": self._output,
            "usage": None,
            **self._given,
            **fields,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        content = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        if not self._is_streamed:
            return b""
        return b"event: " + kind.encode() + b"\ndata: " + compact(content) + b"\n\n"


def _output_text(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _without_bytes(logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log-probabilities as events have them."""
    names = ("token", "logprob")
    return [
        {
            **{name: one[name] for name in names},
            "top_logprobs": [{name: other[name] for name in names} for other in one["top_logprobs"]],
        }
        for one in logprobs
    ]


async def responses(services: Services, call: Call, body: ResponseBody) -> None:
    """Answers the items of a conversation."""
    try:
        message = message_of(call, services, body)
        shape = ResponseShape(call.request_id, body, message.sampling)
        await respond(call, generated(call, services, message), bool(body.stream), shape)
    except InvalidRequest as error:
        raise InvalidRequest(body.param_of(error.field), error.value, error.limit) from error
