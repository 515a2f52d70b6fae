"""Words to buckets: the same word everywhere, and stable from one machine to the next."""

from __future__ import annotations

import pytest

from router_gateway.routing.learned.excerpt import EXCERPT_CHARACTERS, HEAD_CHARACTERS, code_points, excerpt
from router_gateway.routing.learned.hashing import BUCKETS, bucket_counts


def buckets(text: str) -> dict[int, int]:
    found, counts = bucket_counts(text)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def test_a_word_has_its_bucket_wherever_it_stands() -> None:
    [alone] = buckets("stitch")
    assert alone in buckets("we stitch models")
    assert alone in buckets("x" * 900 + " (stitch)")


def test_buckets_are_the_same_on_every_machine() -> None:
    assert buckets("a b") == {56166: 1, 149541: 1, 250822: 1}


def test_words_and_pairs_are_counted() -> None:
    [word] = buckets("so")
    assert buckets("so so so")[word] == 3
    # One bucket for the word, one for the pair that occurs twice.
    assert sorted(buckets("so so so").values()) == [2, 3]


def test_case_does_not_count_and_order_does() -> None:
    assert buckets("Even ODD") == buckets("even odd")
    assert buckets("even odd") != buckets("odd even")


def test_signs_are_words_of_their_own_and_spaces_are_none() -> None:
    assert buckets("2+2") == buckets("2 + 2") == buckets("2\n+\t2")
    assert buckets("2+2") != buckets("2-2")
    assert buckets(" \n\t\u00a0") == {}


@pytest.mark.parametrize("text", ["", "a", "😀", "中文没有空格", "İstanbul ǅ", "\x00\x01", "\ud800 lone", "é" * 5])
def test_any_text_has_buckets_in_range(text: str) -> None:
    assert all(0 <= bucket < BUCKETS and count > 0 for bucket, count in buckets(text).items())


def test_other_scripts_are_told_apart() -> None:
    assert buckets("привет") != buckets("спасибо")


def test_a_long_text_is_seen_at_both_ends_and_no_further() -> None:
    text = "begin " + "x " * 60_000 + "end"
    assert len(excerpt(text)) == EXCERPT_CHARACTERS
    assert set(buckets("begin")) | set(buckets("end")) <= set(buckets(text))
    hidden = "x " * HEAD_CHARACTERS + "hidden " + "x " * HEAD_CHARACTERS
    assert not set(buckets("hidden")) & set(buckets(hidden))


def test_a_short_text_is_seen_whole() -> None:
    assert excerpt("y" * EXCERPT_CHARACTERS) == "y" * EXCERPT_CHARACTERS


def test_letters_that_grow_when_lowered_stay_in_bounds() -> None:
    grown = "İ" * EXCERPT_CHARACTERS
    assert len(grown.lower()) > EXCERPT_CHARACTERS
    assert len(code_points(grown.lower())) == EXCERPT_CHARACTERS
    assert len(buckets(grown)) == 1
