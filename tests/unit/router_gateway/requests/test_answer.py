"""Tokens to pieces: no token lost, none twice, nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from router_gateway.requests.answer import Answer
from router_gateway.requests.types import Delta, Token
from router_gateway.tokenization.vocabulary import Vocabulary
from tests.support.byte_tokenizer import tokenizer_files, tokens

VOCABULARY = Vocabulary.from_files(tokenizer_files())


def answer(*stop: str) -> Answer:
    return Answer(VOCABULARY.detokenizer(), stop)


def run(answer: Answer, ids: Sequence[int]) -> list[Delta]:
    deltas = [answer.push([Token(token_id)]) for token_id in ids]
    return [delta for delta in (*deltas, answer.finish()) if delta is not None]


def ids_of(deltas: Sequence[Delta]) -> list[int]:
    return [token.id for delta in deltas for token in delta.tokens]


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_each_token_with_text_leaves_at_once() -> None:
    ids = tokens("hello world")
    assert [[token.id for token in delta.tokens] for delta in run(answer(), ids)] == [[token_id] for token_id in ids]


def test_the_tokens_of_a_character_leave_together() -> None:
    ids = tokens("你")
    assert run(answer(), ids) == [Delta("你", tuple(map(Token, ids)))]


def test_tokens_without_text_come_with_the_end() -> None:
    deltas = run(answer(), [*tokens("hello"), 2])
    assert deltas[-1] == Delta("", (Token(2),))


def test_a_stop_string_ends_the_text_before_it() -> None:
    stopped = answer(" jumps")
    ids = tokens("the quick brown fox jumps over")
    deltas = run(stopped, ids)
    assert stopped.stopped
    assert text_of(deltas) == "the quick brown fox"
    assert stopped.generated_tokens == len(ids_of(deltas))
    assert ids_of(deltas) == ids[: len(ids_of(deltas))]


def test_tokens_of_the_same_step_behind_a_stop_string_are_dropped() -> None:
    stopped = answer(" world")
    ids = tokens("hello world, hello there")
    delta = stopped.push([Token(token_id) for token_id in ids])
    assert delta is not None
    assert delta.text == "hello"
    assert stopped.generated_tokens == len(delta.tokens) < len(ids)


def test_a_beginning_that_becomes_no_stop_string_comes_out_in_the_end() -> None:
    held = answer("dog!")
    deltas = run(held, tokens("lazy dog"))
    assert text_of(deltas) == "lazy dog"
    assert ids_of(deltas) == tokens("lazy dog")
    assert not held.stopped


def test_an_answer_without_tokens_has_no_pieces() -> None:
    assert run(answer("x"), []) == []
