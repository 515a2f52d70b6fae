"""Tests of reading client messages: defaults, limits, and bytes that are no message."""

from __future__ import annotations

import math

import pytest
from google.protobuf.message import Message

from router_gateway.requests.types import TokenIds
from router_gateway.routing.objectives import Objectives
from router_gateway.routing.selector import RoutingOptions
from router_gateway.rpc.messages import BatchEntries, decode, to_prompt, to_request, to_route_query
from router_gateway.tokenization.chat_template import Turn
from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2

EMPTY = inference_pb2.ChatMessage()


def message(**fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**({"prompt": "hello"} | fields))  # type: ignore[arg-type]


def test_unset_fields_take_defaults() -> None:
    request = to_request(message())
    assert request.prompt == "hello"
    assert (request.routing.route, request.stop) == (None, ())
    assert request.sampling.greedy
    assert len(request.request_id) == 32


def test_ids_and_seeds_are_drawn_for_every_request() -> None:
    first, second = to_request(message()), to_request(message())
    assert first.request_id != second.request_id
    assert first.sampling.seed != second.sampling.seed


def test_set_fields_are_kept() -> None:
    sampling = inference_pb2.Sampling(seed=0, temperature=0.5, max_tokens=7)
    request = to_request(message(request_id="mine", route="strong", stop=["a", "b"], sampling=sampling))
    assert (request.request_id, request.routing.route, request.stop) == ("mine", "strong", ("a", "b"))
    assert (request.sampling.seed, request.sampling.temperature, request.sampling.max_tokens) == (0, 0.5, 7)


def test_answers_and_threshold_are_one_and_none_unless_set() -> None:
    request = to_request(message())
    assert (request.n, request.routing.threshold) == (1, None)
    request = to_request(message(n=16, route="auto", threshold=0.0))
    assert (request.n, request.routing.threshold) == (16, 0.0)


def test_token_ids_become_a_prompt() -> None:
    ids = inference_pb2.TokenIds(ids=[5, 6])
    assert to_request(inference_pb2.GenerateRequest(token_ids=ids)).prompt == TokenIds((5, 6))


def test_auto_is_no_route() -> None:
    assert to_request(message(route="auto")).routing.route is None


def test_unset_objectives_are_no_objectives() -> None:
    assert not to_request(message()).routing.objectives.given
    given = inference_pb2.Objectives(max_cost=1.0, min_quality=0.0)
    assert to_request(message(objectives=given)).routing.objectives == Objectives(max_cost=1.0, min_quality=0.0)


def test_route_query_has_prompt_and_routing() -> None:
    objectives = inference_pb2.Objectives(max_ttft_seconds=2.0)
    query = to_route_query(inference_pb2.RouteRequest(prompt="hi", objectives=objectives, conversation_id="mine"))
    assert query.prompt == "hi"
    assert query.routing == RoutingOptions(None, Objectives(max_ttft_seconds=2.0), "mine")
    with pytest.raises(InvalidRequest, match=r"objectives\.max_cost"):
        to_route_query(inference_pb2.RouteRequest(prompt="hi", objectives=inference_pb2.Objectives(max_cost=2)))


def test_chat_becomes_turns() -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    assert to_prompt(inference_pb2.RouteRequest(chat=chat)) == (Turn("user", "hi"),)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (inference_pb2.GenerateRequest(), "input"),
        (message(request_id="x" * 129), "request_id"),
        (message(request_id="mine\nnext line"), "request_id"),
        (message(conversation_id="x" * 129), "conversation_id"),
        (message(conversation_id="mine\x00"), "conversation_id"),
        (message(objectives=inference_pb2.Objectives(max_ttft_seconds=0)), "objectives.max_ttft_seconds"),
        (message(objectives=inference_pb2.Objectives(max_ttft_seconds=math.inf)), "objectives.max_ttft_seconds"),
        (message(objectives=inference_pb2.Objectives(max_ttft_seconds=math.nan)), "objectives.max_ttft_seconds"),
        (message(objectives=inference_pb2.Objectives(max_cost=0)), "objectives.max_cost"),
        (message(objectives=inference_pb2.Objectives(max_cost=1.01)), "objectives.max_cost"),
        (message(objectives=inference_pb2.Objectives(min_quality=math.nan)), "objectives.min_quality"),
        (message(stop=["a", ""]), "stop[1]"),
        (message(stop=["a"] * 1_000_000), "stop"),
        (message(sampling=inference_pb2.Sampling(stop_token_ids=[1] * 1_025)), "sampling.stop_token_ids"),
        (message(chat=inference_pb2.Chat(messages=[EMPTY] * 2_049)), "chat.messages"),
        (message(sampling=inference_pb2.Sampling(max_tokens=0)), "sampling.max_tokens"),
        (message(sampling=inference_pb2.Sampling(temperature=-1)), "sampling.temperature"),
        (message(sampling=inference_pb2.Sampling(top_p=2)), "sampling.top_p"),
        (message(sampling=inference_pb2.Sampling(min_p=float("nan"))), "sampling.min_p"),
        (message(sampling=inference_pb2.Sampling(logit_bias=dict.fromkeys(range(1_025), 1.0))), "sampling.logit_bias"),
        (message(sampling=inference_pb2.Sampling(max_tokens=3, min_tokens=4)), "sampling.min_tokens"),
        (message(n=0), "n"),
        (message(n=17), "n"),
        (message(threshold=1.01), "threshold"),
        (message(threshold=math.nan), "threshold"),
        (message(threshold=0.5, route="weak"), "threshold"),
    ],
)
def test_value_outside_its_limits_is_refused_by_field(bad: inference_pb2.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_request(bad)
    assert caught.value.field == field


BAD = b"caf\xe9!"


def broken(message: Message) -> bytes:
    """The message on the wire, with bytes that are not UTF-8 in place of `caf??`."""
    return message.SerializeToString().replace(b"caf??", BAD)


def chat(content: str) -> inference_pb2.Chat:
    good = inference_pb2.ChatMessage(role="user", content="fine")
    return inference_pb2.Chat(messages=[good, inference_pb2.ChatMessage(role="user", content=content)])


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (inference_pb2.GenerateRequest(prompt="caf??"), "prompt"),
        (inference_pb2.GenerateRequest(prompt="fine", stop=["a", "caf??"]), "stop[1]"),
        (inference_pb2.GenerateRequest(chat=chat("caf??")), "chat.messages[1].content"),
        (inference_pb2.GenerateRequest(prompt="caf??", sampling=inference_pb2.Sampling(logit_bias={1: 2.0})), "prompt"),
        (inference_pb2.RouteRequest(prompt="caf??"), "prompt"),
        (
            inference_pb2.GenerateBatchRequest(requests=[inference_pb2.GenerateRequest(route="caf??")]),
            "requests[0].route",
        ),
    ],
)
def test_decode_names_the_field_that_is_not_utf8(message: Message, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(type(message), broken(message))
    assert caught.value.field == field
    assert str(caught.value) == f"{field} is b'caf\\xe9', but it must be UTF-8, and byte 3 is 0xe9"


def test_decode_shows_a_long_string_around_the_invalid_byte() -> None:
    message = inference_pb2.GenerateRequest(prompt="x" * 1_000_000 + "caf??")
    with pytest.raises(InvalidRequest, match=r"is b'xxxxxxxxxcaf\\xe9', but .* byte 1000003 is 0xe9"):
        decode(inference_pb2.GenerateRequest, broken(message))


def test_decode_refuses_bytes_that_are_no_message() -> None:
    with pytest.raises(InvalidRequest, match=r"request is 2 bytes, but they are no stitch\.v1\.GenerateRequest"):
        decode(inference_pb2.GenerateRequest, b"\xff\xff")


def test_decode_reads_a_valid_message() -> None:
    message = inference_pb2.GenerateRequest(chat=chat("é你"), stop=["a"])
    assert decode(inference_pb2.GenerateRequest, message.SerializeToString()) == message


def test_decode_refuses_a_message_of_too_many_fields() -> None:
    many = inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=[EMPTY] * 20_000))
    with pytest.raises(InvalidRequest, match="request is 40,004 bytes, but they have more than 8,192 fields"):
        decode(inference_pb2.GenerateRequest, many.SerializeToString())


def test_decode_does_not_name_the_field_in_a_large_message() -> None:
    large = inference_pb2.GenerateRequest(prompt="x" * (1 << 20) + "caf??")
    with pytest.raises(InvalidRequest, match="a string in them is not UTF-8"):
        decode(inference_pb2.GenerateRequest, broken(large))


def test_batch_entries_are_decoded_one_by_one() -> None:
    requests = [inference_pb2.GenerateRequest(prompt="one"), inference_pb2.GenerateRequest(prompt="caf??")]
    entries = BatchEntries(broken(inference_pb2.GenerateBatchRequest(requests=requests)), max_requests=2)
    assert len(entries) == 2
    assert entries.message(0) == requests[0]
    with pytest.raises(InvalidRequest, match="prompt is b'caf"):
        entries.message(1)


def test_batch_entries_beyond_their_number_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="requests is more than 3 requests, but a batch has at most 3"):
        BatchEntries(b"\x0a\x00" * 4, max_requests=3)
    # Unknown fields count, too.
    with pytest.raises(InvalidRequest, match="at most 3"):
        BatchEntries(b"\x12\x00" * 1_000_000, max_requests=3)
    assert len(BatchEntries(b"", max_requests=3)) == 0


def test_bytes_that_are_no_batch_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"they are no stitch\.v1\.GenerateBatchRequest"):
        BatchEntries(b"\xff\xff", max_requests=3)
