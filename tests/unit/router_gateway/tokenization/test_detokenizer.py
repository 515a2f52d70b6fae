"""Pieces are whole characters, and together they are the whole text."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
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
def test_pieces_together_are_the_text(text: str) -> None:
    assert "".join(pieces(Detokenizer(byte_tokenizer().decode), tokens(text))) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if REPLACEMENT not in text])
def test_no_piece_holds_half_a_character(text: str) -> None:
    shown = pieces(Detokenizer(byte_tokenizer().decode), tokens(text))
    assert all(REPLACEMENT not in piece for piece in shown)
    assert shown[-1] == ""


def test_text_comes_with_the_token_that_completes_it() -> None:
    detokenizer = Detokenizer(byte_tokenizer().decode)
    ids = tokens("a你b")
    assert [detokenizer.push(token_id) for token_id in ids] == ["a", "", "", "你", "b"]


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_give_the_text_of_decoding_them_at_once(seed: int) -> None:
    draw = random.Random(seed)
    # Mostly bytes that are no characters, as a model with random weights says.
    ids = [draw.randrange(3, 200 if seed % 2 else 350) for _ in range(400)]
    detokenizer = Detokenizer(byte_tokenizer().decode)
    assert "".join(pieces(detokenizer, ids)) == byte_tokenizer().decode(ids)


@pytest.mark.parametrize("broken", [b"\x80", b"\xf0\x9f\x98", b"\xff"])
def test_bytes_that_never_become_characters_don_t_make_the_window_grow(broken: bytes) -> None:
    windows: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        windows.append(len(ids))
        return bytes(ids).decode(errors="replace")

    ids = broken * 200
    assert "".join(pieces(Detokenizer(decode), ids)) == ids.decode(errors="replace")
    assert max(windows) <= MAX_WINDOW_TOKENS + 1


def test_silent_tokens_have_no_text_even_inside_of_a_character() -> None:
    first, second, third = tokens("你")
    detokenizer = Detokenizer(byte_tokenizer().decode, silent=frozenset({0, 1, 2}))
    assert "".join(pieces(detokenizer, [1, first, second, 0, third, 2])) == "你"


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    detokenizer = Detokenizer(byte_tokenizer().decode)
    ids = [*tokens("a"), tokens("你")[0]]
    assert [detokenizer.push(token_id) for token_id in ids] == ["a", ""]
    assert detokenizer.finish() == REPLACEMENT


def test_a_decoder_that_strips_the_first_space_keeps_the_others() -> None:
    detokenizer = Detokenizer(_sentencepiece().decode)
    ids = [_ID["▁hello"], _ID["▁world"], _ID["<0xE4>"], _ID["<0xBD>"], _ID["<0xA0>"], _ID["▁hello"]]
    assert pieces(detokenizer, ids) == ["hello", " world", "", "", "你", " hello", ""]


_ID = {token: index for index, token in enumerate(["<unk>", "▁hello", "▁world", "<0xE4>", "<0xBD>", "<0xA0>"])}


def _sentencepiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(_ID, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
