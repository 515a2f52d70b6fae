"""Detokenizing equals `decode` wherever an answer ends, for four kinds of tokenizer."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from router_gateway.tokenization.detokenizer import Detokenizer
from router_gateway.tokenization.stop_strings import StopStrings
from router_gateway.tokenization.vocabulary import Vocabulary

# Of every kind of tokenizer; all together take about 15 s.
SEQUENCES, LONGEST = 25_000, 16
# Their ids are half of the likely ones, so that characters are complete in many sequences.
TEXT = "👋 é你好Hi the do.s"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    letters = [*pre_tokenizers.ByteLevel.alphabet(), "Ġthe", "ĠðŁ", "½", "ä½ł", "ł", "a\N{REPLACEMENT CHARACTER}"]
    tokenizer = Tokenizer(models.BPE({token: at for at, token in enumerate(dict.fromkeys(["<s>", *letters]))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral and Phi-3 have it."""
    tokens = ["<s>", *BYTES, "▁", "▁▁", "▁Hi", "lo", "▁你", "é", "\N{REPLACEMENT CHARACTER}", "<0xZZ>", "!"]
    model = models.BPE({token: at for at, token in enumerate(tokens)}, [], unk_token="<s>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5 and XLM-R have it."""
    tokens = ["<s>", "▁", "▁▁", "▁the", "s", "▁a▁b", "你", "é", "\N{REPLACEMENT CHARACTER}", "🇫", "▁."]
    tokenizer = Tokenizer(models.Unigram([(token, -float(at)) for at, token in enumerate(tokens)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT has it."""
    tokens = ["<s>", "the", "##s", "##", ".", "n't", "do", "'", "你", "##é", "##\N{REPLACEMENT CHARACTER}", ",", "?"]
    tokenizer = Tokenizer(models.WordPiece({token: at for at, token in enumerate(tokens)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


KINDS = [byte_level, byte_fallback, metaspace, word_piece]


@functools.cache
def parts(kind: Callable[[], Tokenizer]) -> tuple[Tokenizer, Vocabulary]:
    tokenizer = kind()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer, Vocabulary.from_files({"tokenizer.json": tokenizer.to_str().encode()})


def check_every_cut(tokenizer: Tokenizer, detokenizer: Detokenizer, ids: Sequence[int]) -> None:
    """After every token the text so far, and what `finish` would add, is the text of the ids so far."""
    text = ""
    for end, token_id in enumerate(ids, 1):
        text += detokenizer.push(token_id)
        assert text + copy.copy(detokenizer).finish() == tokenizer.decode(ids[:end]), ids[:end]


@pytest.mark.parametrize("kind", KINDS)
def test_random_ids_decode_as_at_once_at_every_cut(kind: Callable[[], Tokenizer]) -> None:
    (tokenizer, vocabulary), draw = parts(kind), random.Random(25)
    likely, size = tokenizer.encode(TEXT, add_special_tokens=False).ids, tokenizer.get_vocab_size()
    for _ in range(SEQUENCES):
        ids = draw.choices(range(size), k=draw.randrange(1, LONGEST))
        start = draw.randrange(len(likely))
        ids[1 : draw.randrange(1, LONGEST)] = likely[start : start + draw.randrange(LONGEST)]
        check_every_cut(tokenizer, vocabulary.detokenizer(), ids)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_long_sequences_decode_as_at_once_at_every_cut(kind: Callable[[], Tokenizer], data: st.DataObject) -> None:
    tokenizer, vocabulary = parts(kind)
    # A few ids, so that runs of the same token are drawn as well, which a window has to bound.
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), min_size=1, max_size=4))
    check_every_cut(tokenizer, vocabulary.detokenizer(), data.draw(st.lists(st.sampled_from(ids), max_size=120)))


TEXTS = ["Hi 👋👋", "日本語テスト", "👨\N{ZERO WIDTH JOINER}👩\N{ZERO WIDTH JOINER}👧", "é你é你", "a\n\nb"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_characters_outside_the_vocabulary_are_whole(kind: Callable[[], Tokenizer], text: str) -> None:
    tokenizer, vocabulary = parts(kind)
    ids, detokenizer = tokenizer.encode(text).ids, vocabulary.detokenizer()
    assert tokenizer.decode(ids) == text
    pieces = [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]
    assert "".join(pieces) == text
    assert all(piece in text for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_stop_string_outside_the_vocabulary_is_found(kind: Callable[[], Tokenizer], text: str) -> None:
    tokenizer, vocabulary = parts(kind)
    ids = tokenizer.encode(text).ids
    for start, end in itertools.combinations(range(len(text) + 1), 2):
        stop, detokenizer = StopStrings([text[start:end]]), vocabulary.detokenizer()
        shown = "".join(stop.push(detokenizer.push(token_id)) for token_id in ids)
        shown += stop.push(detokenizer.finish()) + stop.finish()
        assert (shown, stop.found) == (text[: text.index(text[start:end])], True)


@pytest.mark.parametrize("text", ["the do", *TEXTS])
@pytest.mark.parametrize("kind", [byte_level, byte_fallback, metaspace])
def test_bytes_of_tokens_are_those_of_the_text(kind: Callable[[], Tokenizer], text: str) -> None:
    tokenizer, vocabulary = parts(kind)
    # Tokens for what a vocabulary lacks have no bytes of the text.
    ids = [token_id for token_id in tokenizer.encode(text, add_special_tokens=False).ids if token_id]
    # The first word's space is no part of a text.
    joined = b"".join(map(vocabulary.token_bytes, ids)).decode().removeprefix("" if kind is byte_level else " ")
    assert joined == tokenizer.decode(ids)
    assert vocabulary.token_bytes(0) == b"<s>"
    assert vocabulary.token_bytes(10_000) == b""


def test_special_token_within_a_run_of_bytes_leaves_the_character_whole() -> None:
    tokenizer, vocabulary = parts(byte_fallback)
    ids = [tokenizer.token_to_id(token) for token in ("▁Hi", "<0xE4>", "<s>", "<0xBD>", "<0xA0>", "!")]
    check_every_cut(tokenizer, vocabulary.detokenizer(), ids)


def test_long_run_of_bytes_is_decoded_once() -> None:
    tokenizer, _ = parts(byte_fallback)
    decoded: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return str(tokenizer.decode(ids))

    detokenizer = Detokenizer(decode, byte_tokens=frozenset(range(1, 257)))
    text = "👋" * 1_000
    ids = [1 + byte for byte in text.encode()]
    assert "".join(map(detokenizer.push, ids)) == ""
    assert detokenizer.push(tokenizer.token_to_id("!")) + detokenizer.finish() == f"{text}!"
    assert sum(decoded) < 5 * len(ids)


def test_bytes_of_another_decoder_are_plain_tokens() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<0x41>": 0, "b": 1}, unk_token="b"))
    tokenizer.decoder = decoders.Fuse()
    vocabulary = Vocabulary.from_files({"tokenizer.json": tokenizer.to_str().encode()})
    assert vocabulary.detokenizer().push(0) == "<0x41>"
