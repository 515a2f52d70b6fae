"""Tests of the limits: each refuses the first value beyond it, by its field, and accepts the last one within."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from router_gateway.requests import limits
from router_gateway.tokenization.chat_template import Turn
from stitch.errors import InvalidRequest


def refused(check: Callable[[], None]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        check()
    return str(caught.value)


def test_check_prompt_refuses_an_empty_prompt() -> None:
    assert refused(lambda: limits.check_prompt("")) == "prompt is '', but it must not be empty"
    assert refused(lambda: limits.check_prompt(())).startswith("chat.messages is empty, but")
    limits.check_prompt(" ")


def test_check_prompt_refuses_a_message_without_role() -> None:
    chat = (Turn("user", ""), Turn("", "who says this?"))
    assert refused(lambda: limits.check_prompt(chat)).startswith("chat.messages[1].role is ''")
    limits.check_prompt(chat[:1])


def test_check_stop_limits_count_and_length() -> None:
    assert refused(lambda: limits.check_stop(["x"] * 17)) == "stop is 17 strings, but it holds at most 16"
    assert refused(lambda: limits.check_stop(["a", ""])).startswith("stop[1] is ''")
    assert refused(lambda: limits.check_stop(["x" * 1_025])).startswith("stop[0] is 1,025 characters, but")
    limits.check_stop(["x" * 1_024] * 16)


def test_check_tokens_refuses_ids_beyond_the_vocabulary() -> None:
    message = refused(lambda: limits.check_tokens("sampling.stop_token_ids", [399, 400], 400))
    assert message == "sampling.stop_token_ids[1] is 400, but the vocabulary ends at 399"
    limits.check_tokens("sampling.forced_token_ids", [0, 399], 400)


def test_check_text_tokens_refuses_tokens_that_the_model_has_not() -> None:
    message = refused(lambda: limits.check_text_tokens("prompt", [1, 32_000], 32_000))
    assert message == "prompt is a text with token 32,000, but the model's vocabulary ends at 31,999"
    limits.check_text_tokens("prompt", [31_999], 32_000)
    limits.check_text_tokens("prompt", [], 32_000)


def test_check_answer_fits_needs_tokens_and_room() -> None:
    assert refused(lambda: limits.check_answer_fits(0, 5)).startswith("forced_answer is 0 tokens, but it must")
    assert refused(lambda: limits.check_answer_fits(6, 5)).endswith("after this prompt the context holds 5")
    limits.check_answer_fits(5, 5)


def test_check_forced_refuses_forced_tokens_and_long_answers() -> None:
    assert refused(lambda: limits.check_forced("x", [1], 9)).startswith("sampling.forced_token_ids is 1 ids, but a")
    assert refused(lambda: limits.check_forced("ä" * 5, [], 9)) == (
        "forced_answer is 10 bytes, but the context holds at most 9"
    )
    limits.check_forced("ä" * 4, [], 9)


def test_check_size_refuses_text_before_tokenizing() -> None:
    message = refused(lambda: limits.check_size("x" * 10_485_760, 1_024, 128))
    assert message == "prompt is 10,485,760 bytes, but the context of 1,024 tokens holds at most 131,072"
    chat = (Turn("user", "你" * 20),)
    assert refused(lambda: limits.check_size(chat, 6, 10)).startswith("chat is 64 bytes")
    limits.check_size("x" * 100, 10, 10)


def test_check_size_refuses_more_messages_than_context_tokens() -> None:
    chat = (Turn("u", ""),) * 11
    assert refused(lambda: limits.check_size(chat, 10, 10)).startswith("chat.messages is 11 messages, but")
    limits.check_size(chat[:10], 10, 10)


def test_check_fits_leaves_room_for_a_token() -> None:
    message = refused(lambda: limits.check_fits("x", 1_734, 1_024))
    assert message == "prompt is 1,734 tokens, but the context holds 1,024, the answer included"
    assert "1,024 tokens" in refused(lambda: limits.check_fits("x", 1_024, 1_024))
    assert refused(lambda: limits.check_fits((Turn("user", ""),), 0, 9)).startswith("chat is 0 tokens")
    limits.check_fits("x", 1_023, 1_024)
