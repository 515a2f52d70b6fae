"""Renders a conversation with the model's chat template: turns in, the prompt's text out.

The Jinja environment is that of `transformers.PreTrainedTokenizer.apply_chat_template`, so templates behave the same:
sandboxed, with `raise_exception`, `strftime_now`, a `tojson` without HTML escapes, loop controls and `generation`.
It is built here since importing `transformers` for it would add more than a second to every start of the gateway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class TemplateRefusal(Exception):
    """The template does not accept the conversation, for the reason in its message."""


class ChatTemplate:
    """A compiled template, with the special tokens that it may refer to (`bos_token`, `eos_token`, …)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._template = _environment().from_string(source)
        self._special_tokens = special_tokens

    def render(self, turns: Sequence[Turn]) -> str:
        """The prompt for an answer to a conversation.

        Raises TemplateRefusal where the template raises, on purpose or because it can't render such turns.
        """
        messages = [turn._asdict() for turn in turns]
        variables = {**self._special_tokens, "messages": messages, "tools": None, "documents": None}
        try:
            return self._template.render(variables, add_generation_prompt=True)
        # A template is the model author's program, so whatever it raises is about this conversation.
        except Exception as error:
            raise TemplateRefusal(str(error)) from error


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
