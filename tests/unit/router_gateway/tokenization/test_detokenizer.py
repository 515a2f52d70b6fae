"""Tests of the detokenizer: complete characters only, and together the text of all ids."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from router_gateway.tokenization.detokenizer import MAX_WINDOW_TOKENS, REPLACEMENT, Detokenizer
from tests.support.byte_tokenizer import byte_tokenizer, tokens

TEXTS = [
    "the quick brown fox",
    "é你好, 世界! ñandú",
    "👩‍👩‍👧‍👦 family and flag 🇫🇷",
    "e\u0301 combined, नमस्ते, สวัสดี",
    " leading and trailing ",
    "\n\n\ttabs and lines\r\n",
    "literal � replacement",
]


def pieces(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(pieces(Detokenizer(byte_tokenizer().decode), tokens(text))) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if REPLACEMENT not in text])
def test_pieces_are_complete_characters(text: str) -> None:
    shown = pieces(Detokenizer(byte_tokenizer().decode), tokens(text))
    assert all(REPLACEMENT not in piece for piece in shown)
    assert shown[-1] == ""


def test_text_comes_with_the_token_that_completes_it() -> None:
    detokenizer = Detokenizer(byte_tokenizer().decode)
    ids = tokens("a你b")
    assert [detokenizer.push(token_id) for token_id in ids] == ["a", "", "", "你", "b"]


@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_decode_as_at_once(seed: int) -> None:
    draw = random.Random(seed)
    # Mostly invalid bytes, as from a model with random weights.
    ids = [draw.randrange(3, 200 if seed % 2 else 350) for _ in range(400)]
    detokenizer = Detokenizer(byte_tokenizer().decode)
    assert "".join(pieces(detokenizer, ids)) == byte_tokenizer().decode(ids)


@pytest.mark.parametrize("broken", [b"\x80", b"\xf0\x9f\x98", b"\xff"])
def test_invalid_bytes_keep_the_window_bounded(broken: bytes) -> None:
    windows: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        windows.append(len(ids))
        return bytes(ids).decode(errors="replace")

    ids = broken * 200
    assert "".join(pieces(Detokenizer(decode), ids)) == ids.decode(errors="replace")
    assert max(windows) <= MAX_WINDOW_TOKENS + 1


def test_silent_tokens_have_no_text_within_a_character() -> None:
    first, second, third = tokens("你")
    detokenizer = Detokenizer(byte_tokenizer().decode, silent=frozenset({0, 1, 2}))
    assert "".join(pieces(detokenizer, [1, first, second, 0, third, 2])) == "你"


def test_finish_returns_an_incomplete_character() -> None:
    detokenizer = Detokenizer(byte_tokenizer().decode)
    ids = [*tokens("a"), tokens("你")[0]]
    assert [detokenizer.push(token_id) for token_id in ids] == ["a", ""]
    assert detokenizer.finish() == REPLACEMENT


def test_decoder_that_strips_the_first_space_keeps_the_others() -> None:
    detokenizer = Detokenizer(_byte_fallback().decode)
    ids = [_ID["▁hello"], _ID["▁world"], _ID["<0xE4>"], _ID["<0xBD>"], _ID["<0xA0>"], _ID["▁hello"]]
    assert pieces(detokenizer, ids) == ["hello", " world", "", "", "你", " hello", ""]


@given(st.lists(st.integers(0, byte_tokenizer().get_vocab_size() - 1), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_ids_decode_as_at_once(ids: list[int]) -> None:
    silent = frozenset({0, 1, 2})
    joined = "".join(pieces(Detokenizer(byte_tokenizer().decode, silent), ids))
    assert joined == byte_tokenizer().decode([token_id for token_id in ids if token_id not in silent])


_ID = {token: index for index, token in enumerate(["<unk>", "▁hello", "▁world", "<0xE4>", "<0xBD>", "<0xA0>"])}


@functools.cache
def _byte_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(_ID, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
