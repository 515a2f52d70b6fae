"""Renders a conversation as the model was trained to read it. Knows no tokens.

The environment is the one of `transformers.PreTrainedTokenizer.apply_chat_template`, so templates behave the same:
sandboxed, with `raise_exception`, `strftime_now`, a `tojson` without HTML escapes, loop controls and `generation`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateRefusal(Exception):
    """The template does not accept the conversation; says why."""


class ChatTemplate:
    """One compiled template with the special tokens that it may name (`bos_token`, `eos_token`, …)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._template = _environment().from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The prompt for an answer to `messages`, pairs of role and content.

        Raises TemplateRefusal where the template does, or where it can't work with such messages.
        """
        turns = [{"role": role, "content": content} for role, content in messages]
        given = {**self._special_tokens, "messages": turns, "tools": None, "documents": None}
        try:
            return self._template.render(given, add_generation_prompt=True)
        # A template is a program of the model's author: whatever it raises is about this conversation.
        except Exception as error:
            raise TemplateRefusal(str(error)) from error


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the model writes; for rendering it is as if it were not there."""

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
