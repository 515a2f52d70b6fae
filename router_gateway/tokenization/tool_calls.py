"""How a model calls tools: finds calls in the text of an answer, and makes grammars of calls.

The syntax is read from the chat template, by rendering a call with it: JSON with the keys `name` and `arguments` or
`parameters`, alone or in a list, after an opening text such as `<tool_call>` and before a closing one, or as the whole
answer. Where the tokenizer has a response template (`transformers.utils.chat_parsing`), calls are found by that.
Invariant: what is no whole call of one of the request's tools is content, and no text is lost but white space beside
calls.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from router_gateway.tokenization.chat_template import ChatTemplate, TemplateRefusal, Tool, ToolCall, Turn
from stitch.grammar import json_value

ARGUMENT_KEYS = ("arguments", "parameters")
# Mistral's templates take ids of nine letters and digits alone.
ID_CHARACTERS = 9
_ALPHABET = string.ascii_letters + string.digits
_PROBE = Tool("stitch_probe", "stitch_shown", {"type": "object", "properties": {"stitch_key": {"type": "string"}}})
_CALL = ToolCall("a1b2c3d4e", _PROBE.name, '{"stitch_key": "stitch_value"}')
_USER = Turn("user", "x")
# Before it the template of a model that reasons writes the empty reasoning of a past answer.
_THOUGHT_END = "</think>"


class Mark(NamedTuple):
    """Where an opening or closing text is in an answer; `captures` are those of a response template's pattern."""

    start: int
    end: int
    captures: Mapping[str, str]


# Finds a mark in a text from an index on; `final`: no further text comes. Without a mark it returns the index before
# which no mark can start any more.
Find = Callable[[str, int, bool], Mark | int]


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """Where the calls of an answer are, and what they are."""

    find_open: Find
    find_close: Find
    # The names and arguments of the calls in the text between the marks. Raises ValueError where it is no call.
    parse: Callable[[str, Mapping[str, str]], list[tuple[str, Any]]]
    # How the chat template writes calls; None: it writes no JSON.
    written: WrittenCalls | None
    # The special tokens that are a part of it, and have no text otherwise.
    shown: frozenset[int]


@dataclass(frozen=True, slots=True)
class WrittenCalls:
    """Calls as the template writes them, white space included."""

    open: str
    close: str
    # The key of the arguments.
    key: str
    in_list: bool

    @property
    def is_whole_answer(self) -> bool:
        return not self.open.strip()


class ToolCallParser:
    """Finds the calls in one answer, as its text comes."""

    def __init__(self, syntax: ToolSyntax, tools: Collection[str], at_most_one: bool) -> None:
        self._syntax = syntax
        self._tools = tools
        self._at_most_one = at_most_one
        # Text from the start of an open call on, or that may be one.
        self._text = ""
        self._open: Mark | None = None
        # White space of content that has had nothing else since the last call.
        self._blank = ""
        self._has_content = False
        self.calls = 0

    @property
    def shown(self) -> frozenset[int]:
        """Special tokens whose text it needs."""
        return self._syntax.shown

    @property
    def done(self) -> bool:
        """Whether no further text is wanted."""
        return self._at_most_one and self.calls > 0

    def push(self, text: str, final: bool = False) -> list[str | ToolCall]:
        """The content and the calls that are certain now; `final`: no further text comes."""
        self._text += text
        found = list(self._take(final))
        if final and self._blank and not self.calls:
            found.append(self._blank)
        return found

    def _take(self, final: bool) -> Iterator[str | ToolCall]:
        while not self.done:
            if self._open is None:
                mark = self._find_open(final)
                end = mark if isinstance(mark, int) else mark.start
                if content := self._content(self._text[:end]):
                    yield content
                self._text = self._text[end:]
                if isinstance(mark, int):
                    return
                self._open = Mark(0, mark.end - mark.start, mark.captures)
            close = self._syntax.find_close(self._text, self._open.end, final)
            if isinstance(close, int) and not final:
                return
            yield from self._close(self._open, None if isinstance(close, int) else close)

    def _find_open(self, final: bool) -> Mark | int:
        """An opening mark, or the index before which all is content."""
        written = self._syntax.written
        if written is not None and written.is_whole_answer and self._has_content:
            return len(self._text)
        mark = self._syntax.find_open(self._text, 0, final)
        return len(self._text) if final and isinstance(mark, int) else mark

    def _close(self, opened: Mark, close: Mark | None) -> Iterator[str | ToolCall]:
        """The calls up to the closing mark; without one, or where they are none, content."""
        self._open = None
        end = len(self._text) if close is None else close.end
        whole, self._text = self._text[:end], self._text[end:]
        calls = (
            [] if close is None else self._calls(whole[opened.end : close.start], {**opened.captures, **close.captures})
        )
        if not calls:
            # Another call may open within.
            self._text = whole[opened.end :] + self._text if opened.end else self._text
            if content := self._content(whole[: opened.end] if opened.end else whole):
                yield content
            return
        for call in calls[: 1 if self._at_most_one else None]:
            self.calls += 1
            yield call
        self._blank, self._has_content = "", False

    def _calls(self, text: str, captures: Mapping[str, str]) -> list[ToolCall]:
        try:
            calls = self._syntax.parse(text, captures)
        # A parser of a response template raises whatever its content makes it raise.
        except Exception:
            return []
        if not all(name in self._tools and isinstance(arguments, dict) for name, arguments in calls):
            return []
        return [ToolCall(_new_id(), name, json.dumps(given, ensure_ascii=False)) for name, given in calls]

    def _content(self, text: str) -> str:
        if not self._has_content:
            text, self._blank = self._blank + text, ""
            if not text.strip():
                self._blank = text
                return ""
            self._has_content = True
        return text


def _new_id() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(ID_CHARACTERS))


def tool_syntax(
    template: ChatTemplate,
    ends: Sequence[str],
    added: Mapping[str, int],
    response_template: dict[str, Any] | None = None,
) -> ToolSyntax:
    """The syntax of a chat template; `ends` are the tokens that end an answer, `added` the ids of all added tokens.

    Raises TemplateRefusal where it shows no tools.
    """
    asked = template.render([_USER], [_PROBE])
    if _PROBE.name not in asked:
        raise TemplateRefusal("it shows no tools")
    answered = template.render([_USER, Turn("assistant", "", (_CALL,))], [_PROBE], add_generation_prompt=False)
    same = next((at for at, (one, other) in enumerate(zip(asked, answered, strict=False)) if one != other), len(asked))
    answer = answered[same:]
    if _THOUGHT_END in answer:
        answer = answer.partition(_THOUGHT_END)[2].lstrip()
    cut = min((answer.index(end) for end in ends if end in answer), default=len(answer))
    written = _written(answer[:cut])
    if response_template is not None and (own := _of_response_template(response_template, written)) is not None:
        return own
    if written is None:
        raise TemplateRefusal("it writes calls of tools in a form that is not known")
    shown = frozenset(id for token, id in added.items() if token and token in written.open + written.close)
    opening, closing = written.open.strip(), written.close.strip()
    find_open = _literal(opening) if opening else _whole_answer
    find_close = _literal(closing) if closing else _end_of_answer
    return ToolSyntax(find_open, find_close, _json_calls, written, shown)


def _written(answer: str) -> WrittenCalls | None:
    """How a template has written the call of the probe."""
    name = answer.find(_CALL.name)
    for start in [index for index, character in enumerate(answer[: max(name, 0)]) if character in "[{"]:
        try:
            value, end = json.JSONDecoder().raw_decode(answer, start)
        except ValueError:
            continue
        call = value[0] if isinstance(value, list) and value else value
        if isinstance(call, dict) and call.get("name") == _CALL.name:
            for key in ARGUMENT_KEYS:
                if isinstance(call.get(key), dict):
                    return WrittenCalls(answer[:start], answer[end:].rstrip(), key, isinstance(value, list))
    return None


def _literal(mark: str) -> Find:
    beginnings = [mark[:end] for end in range(len(mark) - 1, 0, -1)]

    def find(text: str, start: int, final: bool) -> Mark | int:
        if (index := text.find(mark, start)) >= 0:
            return Mark(index, index + len(mark), {})
        return len(text) - max((len(one) for one in beginnings if text.endswith(one, start)), default=0)

    return find


def _whole_answer(text: str, start: int, final: bool) -> Mark | int:
    """Opens an answer of JSON alone."""
    stripped = text.lstrip()
    if stripped.startswith("{"):
        return Mark(len(text) - len(stripped), len(text) - len(stripped), {})
    return len(text) if stripped else 0


def _end_of_answer(text: str, start: int, final: bool) -> Mark | int:
    return Mark(len(text), len(text), {}) if final else len(text)


def _json_calls(text: str, captures: Mapping[str, str]) -> list[tuple[str, Any]]:
    """JSON objects one after another or in lists."""
    calls: list[tuple[str, Any]] = []
    rest = text.strip()
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        for call in value if isinstance(value, list) else [value]:
            calls.append((call["name"], call["arguments"] if "arguments" in call else call.get("parameters", {})))
        rest = rest[end:].lstrip(" \t\r\n;,")
    return calls


def _of_response_template(spec: dict[str, Any], written: WrittenCalls | None) -> ToolSyntax | None:
    """The syntax of the field `tool_calls`; None where there is none."""
    # It takes a second to import.
    from transformers.utils.chat_parsing.content_parsers import process_field
    from transformers.utils.chat_parsing.response_templates import load_response_template

    try:
        field = load_response_template(spec).fields.get("tool_calls")
    except ValueError as error:
        raise TemplateRefusal(f"its response template can't be read: {error}") from error
    if field is None or field.open_re is None:
        return None

    def parse(text: str, captures: Mapping[str, str]) -> list[tuple[str, Any]]:
        value = process_field(text, field, dict(captures))
        functions = [one.get("function", one) for one in (value if isinstance(value, list) else [value])]
        return [(one["name"], one["arguments"]) for one in functions]

    find_close = _end_of_answer if field.close_re is None else _pattern(field.close_re)
    return ToolSyntax(_pattern(field.open_re), find_close, parse, written, frozenset())


def _pattern(pattern: Any) -> Find:
    """`pattern` is one of the package `regex`, which finds partial matches."""

    def find(text: str, start: int, final: bool) -> Mark | int:
        match = pattern.search(text, start) if final else pattern.search(text, start, partial=True)
        if match is None:
            return len(text)
        # At the end of the text it may become longer.
        if not final and (match.partial or match.end() == len(text)):
            return int(match.start())
        return Mark(match.start(), match.end(), {name: text for name, text in match.groupdict().items() if text})

    return find


def calls_grammar(
    written: WrittenCalls, tools: Sequence[Tool], added: Mapping[str, int], parallel: bool, instead: str | None = None
) -> str:
    """A Lark grammar of calls of these tools: at least one, unless the answer matches `instead`, a part of Lark."""
    rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        before = json.dumps(f'{{"name": {json.dumps(tool.name)}, "{written.key}": ')
        rules.append(f'call_{index}: {before} {json_value(tool.parameters)} "}}"')
    opening, closing = _lark_text(written.open, added), _lark_text(written.close, added)
    if written.in_list:
        more = '(", " call)*' if parallel else ""
        rules.append(f'calls: {opening} "[" call {more} "]" {closing}')
    else:
        rules.append(f"one: {opening} call {closing}")
        more = r'("\n" one)*' if parallel and not written.is_whole_answer else ""
        rules.append(f"calls: one {more}")
    if instead is None:
        return "\n".join(["start: calls", *rules])
    return "\n".join([f"start: calls | other\nother: {instead}", *rules])


def strict_grammar(written: WrittenCalls, tools: Sequence[Tool], added: Mapping[str, int], parallel: bool) -> str:
    """A Lark grammar of any text, in which the arguments of calls validate where their tools are strict."""
    loose = [tool if tool.strict else tool._replace(parameters={"type": "object"}) for tool in tools]
    calls = calls_grammar(written, loose, added, parallel)
    if written.is_whole_answer:
        return calls.replace("start: calls", "start: calls | PROSE\nPROSE: /\\s*([^{\\s](.|\\n)*)?/")
    opening = written.open.strip()
    text = f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{re.escape(opening).replace('/', chr(92) + '/')}(.|\\n)*/"
    rest = "" if written.in_list or not parallel else " rest"
    if opening in added:
        return calls.replace("start: calls", f"start: rest\nrest: TEXT | TEXT calls{rest}\n{text}")
    head, after = json.dumps(opening), written.open[written.open.index(opening) + len(opening) :]
    calls = calls.replace(_lark_text(written.open, added), f"head {_lark_text(after, added)}", 1)
    any_text = "ANY: /(.|\\n)*/"
    return calls.replace(
        "start: calls", f"start: rest\nrest: TEXT | calls{rest}\nhead[lazy]: ANY {head}\n{any_text}\n{text}"
    )


def _lark_text(text: str, added: Mapping[str, int]) -> str:
    """A text as a part of a Lark grammar, in which added tokens are tokens."""
    if not text:
        return ""
    names = sorted((name for name in added if name and name in text), key=len, reverse=True)
    if not names:
        return json.dumps(text)
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
    return " ".join(f"<[{added[one]}]>" if one in added else json.dumps(one) for one in pieces if one)
