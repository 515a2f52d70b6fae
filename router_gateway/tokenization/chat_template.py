"""Renders a conversation with the model's chat template: turns and tools in, the prompt's text out.

The Jinja environment is that of `transformers.PreTrainedTokenizer.apply_chat_template`, so templates behave the same:
sandboxed, with `raise_exception`, `strftime_now`, a `tojson` without HTML escapes, loop controls and `generation`.
It is built here since importing `transformers` for it would add more than a second to every start of the gateway.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# A template may write these as a part of a control token, as in `'<|' + message.role + '|>'`.
ROLES = frozenset(("system", "user", "assistant", "tool", "function", "developer"))


class ToolCall(NamedTuple):
    """One call of a tool by the model."""

    id: str
    name: str
    # A JSON object.
    arguments: str


class Tool(NamedTuple):
    """A function that the client can call for the model."""

    name: str
    description: str
    # The JSON schema of its arguments, which are an object.
    parameters: dict[str, Any]
    # Whether the arguments of every call validate against `parameters`.
    strict: bool = False


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str
    # Of an assistant.
    tool_calls: tuple[ToolCall, ...] = ()
    # Of a tool: the call whose result `content` is.
    tool_call_id: str = ""
    name: str = ""


# Takes a text and whether it is a part of a JSON value; returns the text to render in its place.
Hide = Callable[[str, bool], str]


class TemplateRefusal(Exception):
    """The template does not accept the conversation, for the reason in its message."""


class ChatTemplate:
    """A compiled template, with the special tokens that it may refer to (`bos_token`, `eos_token`, …)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._template = _environment().from_string(source)
        self._special_tokens = special_tokens

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Tool] = (),
        hide: Hide = lambda text, in_json: text,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for an answer to a conversation.

        Each of the client's texts is rendered as `hide` returns it.
        Raises TemplateRefusal where the template raises, on purpose or because it can't render such turns.
        """
        messages = [_message(turn, hide) for turn in turns]
        functions = [{"type": "function", "function": _hidden(_function(tool), hide)} for tool in tools]
        variables = {**self._special_tokens, "messages": messages, "tools": functions or None, "documents": None}
        try:
            return self._template.render(variables, add_generation_prompt=add_generation_prompt)
        # A template is the model author's program, so whatever it raises is about this conversation.
        except Exception as error:
            raise TemplateRefusal(str(error)) from error


def _message(turn: Turn, hide: Hide) -> dict[str, Any]:
    """A turn as templates know it, where the arguments of a call are an object."""
    role = turn.role if turn.role in ROLES else hide(turn.role, False)
    message: dict[str, Any] = {"role": role, "content": hide(turn.content, False)}
    if turn.tool_calls:
        calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in turn.tool_calls]
        message["tool_calls"] = [
            {"id": hide(call.id, True), "type": "function", "function": _hidden(function, hide)}
            for call, function in zip(turn.tool_calls, calls, strict=True)
        ]
    for name in ("tool_call_id", "name"):
        if text := getattr(turn, name):
            message[name] = hide(text, True)
    return message


def _function(tool: Tool) -> dict[str, Any]:
    described = {"description": tool.description} if tool.description else {}
    return {"name": tool.name, **described, "parameters": tool.parameters}


def _hidden(value: Any, hide: Hide) -> Any:
    """A JSON value, every text of which is as `hide` returns it."""
    if isinstance(value, str):
        return hide(value, True)
    if isinstance(value, list):
        return [_hidden(one, hide) for one in value]
    if isinstance(value, dict):
        return {hide(name, True): _hidden(one, hide) for name, one in value.items()}
    return value


class _GenerationBlock(Extension):
    """Ignores the tag `{% generation %}`, which marks the model's turns for training, and renders its content."""

    tags = {"generation"}  # noqa: RUF012 (a class attribute of Jinja's interface)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
