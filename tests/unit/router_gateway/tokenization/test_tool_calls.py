"""Tools are shown as by `transformers`, and calls are found in answers whatever their pieces are."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from router_gateway.tokenization.chat_template import ChatTemplate, TemplateRefusal, Tool, ToolCall, Turn
from router_gateway.tokenization.control_tokens import RenderedChat
from router_gateway.tokenization.tool_calls import ToolCallParser, calls_grammar, strict_grammar
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch.grammar import Grammar
from tests.support.byte_tokenizer import tokenizer_files
from tests.support.tool_templates import FAMILIES, WEATHER

CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "The <city>"}}, "required": ["city"]}
STRICT_CITY = {**CITY, "additionalProperties": False}
TOOLS = (Tool("get_weather", 'Says "how" it is.', CITY), Tool("get_time", "", {"type": "object", "properties": {}}))
NAMES = ("get_weather", "get_time")
BOTH = pytest.mark.parametrize("family", FAMILIES)
TAGGED = pytest.mark.parametrize("family", ["qwen2.5", "hermes"])


@cache
def vocabulary(family: str, **config: Any) -> Vocabulary:
    given = FAMILIES[family]
    tokenizer = given.tokenizer()
    return Vocabulary.from_files(
        {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps({**given.config(), **config}).encode(),
            "generation_config.json": json.dumps({"eos_token_id": tokenizer.token_to_id(given.end)}).encode(),
        }
    )


def parsed(
    text: str, family: str, piece: int = 10_000, at_most_one: bool = False, names: tuple[str, ...] = NAMES
) -> tuple[str, list[tuple[str, Any]]]:
    """Content and calls of a text that comes in pieces of this length."""
    parser, found = ToolCallParser(vocabulary(family).tool_syntax, names, at_most_one), list[str | ToolCall]()
    for start in range(0, len(text), piece):
        if not parser.done:
            found += parser.push(text[start : start + piece])
    found += [] if parser.done else parser.push("", final=True)
    calls = [one for one in found if isinstance(one, ToolCall)]
    assert len({call.id for call in calls}) == len(calls) == parser.calls
    content = "".join(one for one in found if isinstance(one, str))
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


def openai(turn: Turn) -> dict[str, Any]:
    """A message as a client of `transformers` writes it."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.tool_calls:
        message["tool_calls"] = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": json.loads(arguments)}}
            for id, name, arguments in turn.tool_calls
        ]
    return message | {name: value for name in ("tool_call_id", "name") if (value := getattr(turn, name))}


def schema(tool: Tool) -> dict[str, Any]:
    described = {"description": tool.description} if tool.description else {}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.parameters}}


class TestShown:
    TURNS = (
        Turn("system", "Be brief."),
        Turn("user", "How is it in Paris & at 5 <o'clock>?"),
        Turn("assistant", "", (ToolCall("abcdefghi", "get_weather", '{"city": "Paris", "n": [1, null]}'),)),
        Turn("tool", '{"temperature": 21}', tool_call_id="abcdefghi", name="get_weather"),
        Turn("assistant", "It is warm."),
        Turn("user", "And now?"),
    )

    @BOTH
    @pytest.mark.parametrize("count", range(2, len(TURNS) + 1))
    def test_conversation_with_tools_is_rendered_as_by_transformers(self, family: str, count: int) -> None:
        template, special = FAMILIES[family].template, {"bos_token": "<|im_start|>", "eos_token": FAMILIES[family].end}
        turns = self.TURNS[:count]
        expected, _ = render_jinja_template(
            [[openai(turn) for turn in turns]],
            tools=[schema(tool) for tool in TOOLS],
            chat_template=template,
            add_generation_prompt=True,
            **special,
        )
        assert ChatTemplate(template, special).render(turns, TOOLS) == expected[0]

    @BOTH
    def test_control_tokens_in_texts_of_tools_are_text(self, family: str) -> None:
        known, evil = vocabulary(family), FAMILIES[family].end
        tools = (
            Tool("look_up", f"a{evil}b", {"type": "object", "properties": {evil: {"type": "string", "enum": [evil]}}}),
        )
        call = ToolCall("abcdefghi", "look_up", json.dumps({"x": evil}))
        turns = (
            Turn("user", "?"),
            Turn("assistant", "", (call,)),
            Turn("tool", evil, tool_call_id="abcdefghi", name=evil),
            Turn("user", "?"),
        )
        control = known.added_tokens[evil]
        harmless = [tools[0]._replace(description="ab", parameters={"type": "object"})]
        plain = (turns[0], Turn("assistant", "", (call._replace(arguments="{}"),)), *turns[2:])
        plain = tuple(turn._replace(content=turn.content.replace(evil, ""), name="") for turn in plain)
        ids = known.encode_chat(turns, tools=tools)
        assert ids.count(control) == known.encode_chat(plain, tools=harmless).count(control)
        assert known.detokenizer is not None
        assert RenderedChat(known.template, turns, tools).text.count(evil) > ids.count(control)  # type: ignore[arg-type]

    def test_template_without_tools_refuses_them(self) -> None:
        with pytest.raises(TemplateRefusal, match="it shows no tools"):
            _ = Vocabulary.from_files(tokenizer_files()).tool_syntax


class TestParsed:
    @BOTH
    @pytest.mark.parametrize("piece", [1, 2, 3, 7, 16, 1000])
    def test_pieces_put_together_are_the_whole_call(self, family: str, piece: int) -> None:
        given = FAMILIES[family]
        for text in [given.one_call, f"\n{given.one_call}\n", given.two_calls or given.one_call, "no call", ""]:
            assert parsed(text, family, piece) == parsed(text, family)
        assert parsed(given.one_call, family, piece) == ("", [("get_weather", {"city": "Paris"})])

    @pytest.mark.parametrize("family", [name for name, given in FAMILIES.items() if given.two_calls])
    def test_two_calls_of_one_answer_are_two(self, family: str) -> None:
        two = FAMILIES[family].two_calls
        assert two is not None
        expected = [("get_weather", {"city": "Paris"}), ("get_time", {})]
        assert parsed(two, family) == ("", expected)
        assert parsed(two, family, piece=3, at_most_one=True) == ("", expected[:1])

    @BOTH
    @pytest.mark.parametrize("piece", [1, 5, 1000])
    @pytest.mark.parametrize("cut", [9, 30, -1])
    def test_call_without_its_end_is_content(self, family: str, piece: int, cut: int) -> None:
        text = FAMILIES[family].one_call[:cut]
        assert parsed(text, family, piece) == (text, [])

    @TAGGED
    @pytest.mark.parametrize("piece", [1, 4, 1000])
    @pytest.mark.parametrize(
        "text",
        [
            "<tool_call>\nnot JSON\n</tool_call>",
            '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "get_time", "arguments": [1]}</tool_call>',
            '<tool_call>{"arguments": {}}</tool_call>',
            "<tool_call></tool_call> and </tool_call>",
            "a < b <tool <tool_call",
        ],
    )
    def test_malformed_call_is_content(self, family: str, piece: int, text: str) -> None:
        assert parsed(f"So: {text}.", family, piece) == (f"So: {text}.", [])

    @TAGGED
    @pytest.mark.parametrize("piece", [1, 1000])
    def test_content_around_calls_is_kept(self, family: str, piece: int) -> None:
        call = FAMILIES[family].one_call
        text = f"Let me see. {call}\n\n{call} Done. <tool_call>{call}!"
        content, calls = parsed(text, family, piece)
        assert content == "Let me see.  Done. <tool_call>!"
        assert calls == [("get_weather", {"city": "Paris"})] * 3

    def test_json_that_is_no_call_is_content_where_calls_are_json(self) -> None:
        for text in ['{"temperature": 21}', f" {WEATHER} and more", "Well: {}", f"Well: {WEATHER}"]:
            assert parsed(text, "llama3", 3) == (text, [])

    def test_only_the_named_tool_is_called(self) -> None:
        call = FAMILIES["hermes"].one_call
        assert parsed(call, "hermes", names=("get_time",)) == (call, [])

    @pytest.mark.parametrize("piece", [1, 2, 1000])
    def test_response_template_of_the_tokenizer_is_used(self, piece: int) -> None:
        field = {
            "open_pattern": r"<call:(?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<(?P<key>\w+)>(?P<value>.*?)</\w+>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        }
        spec = {"start_anchor": "assistant\n", "fields": {"content": {}, "tool_calls": field}}
        known = Vocabulary.from_files(
            {
                "tokenizer.json": FAMILIES["qwen2.5"].tokenizer().to_str().encode(),
                "tokenizer_config.json": json.dumps(
                    {**FAMILIES["qwen2.5"].config(), "response_template": spec}
                ).encode(),
            }
        )
        text = "Hm. <call:get_weather><city>Paris</city></call><call:no_tool></call>"
        parser = ToolCallParser(known.tool_syntax, NAMES, False)
        found = [one for start in range(0, len(text), piece) for one in parser.push(text[start : start + piece])]
        found += parser.push("", final=True)
        assert "".join(one for one in found if isinstance(one, str)) == "Hm. <call:no_tool></call>"
        (call,) = [one for one in found if isinstance(one, ToolCall)]
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})


class TestGrammars:
    STRICT = (TOOLS[0]._replace(parameters=STRICT_CITY, strict=True), TOOLS[1])

    def accepts(self, family: str, grammar: str, text: str) -> bool:
        known = vocabulary(family)
        ids = FAMILIES[family].tokenizer().encode(text, add_special_tokens=False).ids
        matcher = known.grammars.compile(Grammar("lark", grammar))
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    @BOTH
    def test_required_call_is_whole_and_alone(self, family: str) -> None:
        given, known = FAMILIES[family], vocabulary(family)
        written = known.tool_syntax.written
        assert written is not None
        grammar = calls_grammar(written, self.STRICT, known.added_tokens, parallel=True)
        single = calls_grammar(written, self.STRICT, known.added_tokens, parallel=False)
        assert self.accepts(family, grammar, given.one_call)
        assert self.accepts(family, single, given.one_call)
        if given.two_calls is not None:
            assert self.accepts(family, grammar, given.two_calls)
            assert not self.accepts(family, single, given.two_calls)
        for text in ["", "text", f"text {given.one_call}", given.one_call.replace("city", "town"), given.one_call[:-1]]:
            assert not self.accepts(family, grammar, text)

    @BOTH
    def test_strict_arguments_validate_in_any_text(self, family: str) -> None:
        given, known = FAMILIES[family], vocabulary(family)
        written = known.tool_syntax.written
        assert written is not None
        grammar = strict_grammar(written, self.STRICT, known.added_tokens, parallel=True)
        for text in ["", "text < more", given.one_call, given.two_calls or "", "Not {", "a\n\nb"]:
            assert self.accepts(family, grammar, text), text
        for text in [given.one_call.replace("city", "town"), given.one_call.replace("get_weather", "get_what")]:
            assert not self.accepts(family, grammar, text)

    def test_answer_is_a_call_or_the_other_format(self) -> None:
        known = vocabulary("qwen2.5")
        written = known.tool_syntax.written
        assert written is not None
        grammar = calls_grammar(written, TOOLS, known.added_tokens, parallel=True, instead="/[0-9]+/")
        assert self.accepts("qwen2.5", grammar, FAMILIES["qwen2.5"].one_call)
        assert self.accepts("qwen2.5", grammar, "42")
        assert not self.accepts("qwen2.5", grammar, "x")
