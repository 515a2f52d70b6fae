"""What the answer to a request matches: the grammar of its response format and of its choice of tools.

In go a request and the vocabulary, out come the grammar that shards get, and the parser of the calls in the answer.
"""

from __future__ import annotations

import json
import time

from router_gateway.requests.limits import Amount
from router_gateway.requests.types import Request, Tools
from router_gateway.tokenization.chat_template import TemplateRefusal
from router_gateway.tokenization.tool_calls import ToolCallParser, ToolSyntax, calls_grammar, strict_grammar
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch.errors import InvalidRequest
from stitch.grammar import MAX_GRAMMAR_BYTES, Grammar, InvalidGrammar, json_value
from stitch.sampling import Sampling

MAX_COMPILE_SECONDS = 1.0


def answer_grammar(request: Request, vocabulary: Vocabulary) -> Grammar | None:
    """The compiled grammar of an answer; None: it may be any text. Takes milliseconds, the first one up to a second.

    Raises InvalidRequest for a grammar that is too long, doesn't compile in time, or doesn't fit the sampling.
    """
    grammar = _grammar(request, vocabulary)
    if grammar is None:
        return None
    field = "response_format" if request.tools is None else "chat.tools"
    size = Amount(f"{grammar.size_bytes:,} bytes")
    if grammar.size_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(field, size, f"a grammar has at most {MAX_GRAMMAR_BYTES:,}")
    _check_sampling(request.sampling, vocabulary)
    # Read before the clock starts: it is the tokenizer that takes a second.
    _ = vocabulary.grammars.tokenizer
    started = time.thread_time()
    try:
        matcher = vocabulary.grammars.compile(grammar)
        matcher.deep_copy().compute_bitmask()
    except InvalidGrammar as error:
        raise InvalidRequest(field, size, f"it must compile: {error}") from error
    if (seconds := time.thread_time() - started) > MAX_COMPILE_SECONDS:
        raise InvalidRequest(field, size, f"it must compile within {MAX_COMPILE_SECONDS:g} s, and took {seconds:.1f}")
    forced = request.sampling.forced_token_ids
    if (allowed := matcher.validate_tokens(list(forced))) < len(forced):
        token = f"sampling.forced_token_ids[{allowed}]"
        raise InvalidRequest(token, forced[allowed], f"{field} does not allow this token there")
    return grammar


def tool_call_parser(tools: Tools | None, vocabulary: Vocabulary) -> ToolCallParser | None:
    """The parser of one answer; None where there are no tools, or the model can't call them."""
    if tools is None:
        return None
    names = {tools.name} if tools.name else {tool.name for tool in tools.offered}
    return ToolCallParser(vocabulary.tool_syntax, names, at_most_one=not tools.parallel or bool(tools.name))


def tool_syntax(vocabulary: Vocabulary) -> ToolSyntax:
    """How the model calls tools. Raises InvalidRequest where its chat template shows none."""
    try:
        return vocabulary.tool_syntax
    except TemplateRefusal as error:
        raise InvalidRequest("chat.tools", Amount("tools"), f"the chat template can't show them: {error}") from error


def _check_sampling(sampling: Sampling, vocabulary: Vocabulary) -> None:
    limit = "an answer that matches a grammar ends where the grammar does"
    if sampling.ignore_eos:
        raise InvalidRequest("sampling.ignore_eos", True, limit)
    if sampling.min_tokens:
        raise InvalidRequest("sampling.min_tokens", sampling.min_tokens, limit)
    if not (vocabulary.end_tokens or sampling.stop_token_ids):
        raise InvalidRequest("sampling.stop_token_ids", Amount("empty"), f"the model has no end token, and {limit}")


def _grammar(request: Request, vocabulary: Vocabulary) -> Grammar | None:
    tools, instead = request.tools, request.response_format
    if tools is None:
        return instead
    written, added = tool_syntax(vocabulary).written, vocabulary.added_tokens
    is_constrained = tools.required or instead is not None or any(tool.strict for tool in tools.offered)
    if not is_constrained:
        return None
    if written is None:
        raise InvalidRequest("chat.tool_choice", Amount("a choice"), "the model's calls are no JSON, so it is auto")
    allowed = [tool for tool in tools.offered if tools.name in ("", tool.name)]
    if tools.required or instead is not None:
        other = None if tools.required or instead is None else _as_lark(instead)
        return Grammar("lark", calls_grammar(written, allowed, added, tools.parallel and not tools.name, other))
    return Grammar("lark", strict_grammar(written, allowed, added, tools.parallel))


def _as_lark(grammar: Grammar) -> str:
    """A grammar as a part of another one."""
    match grammar.kind:
        case "json_schema":
            return json_value(json.loads(grammar.source))
        case "regex":
            return f"/{grammar.source.replace('/', chr(92) + '/')}/"
        case _:
            raise InvalidRequest("response_format.lark", Amount("a grammar"), "with tools it is JSON or a regex")
