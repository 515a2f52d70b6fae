"""The blocking client against a fake gateway."""

from __future__ import annotations

import math

import grpc
import pytest

from stitch.channels import MAX_REQUEST_BYTES
from stitch.client import Answer, Client, Delta, RouteDecision
from stitch.client.batches import Batch
from stitch.errors import Exhausted, Expired, Incompatible, InvalidRequest, StitchError, Unavailable
from tests.support.fake_gateway import STAGES, WAIT_SECONDS, FakeGateway

# The gateway's answer to `a b`.
DELTAS = (Delta("echo:", (5,), ()), Delta(" a", (1,), ()), Delta(" b", (1,), ()))


def test_answer_has_every_field_of_response(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        answer = client.generate("to be or not")
    assert answer == Answer(
        text="echo: to be or not",
        token_ids=(5, 2, 2, 2, 3),
        route="weak",
        score=0.25,
        reason="4 words",
        prompt_tokens=4,
        generated_tokens=5,
        finish_reason="stop",
        ttft_seconds=0.25,
        total_seconds=0.5,
        stages=STAGES,
    )


def test_generate_sends_fields(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        answer = client.generate(
            messages=[{"role": "user", "content": "a b c"}], max_tokens=2, route="strong", stop="z"
        )
    (request,) = gateway.requests
    assert (request.chat.messages[0].role, request.sampling.max_tokens, list(request.stop)) == ("user", 2, ["z"])
    assert (answer.route, answer.finish_reason, answer.text) == ("strong", "length", "echo: a")


def test_stream_begins_with_route_decision(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        stream = client.stream("a b")
        events = list(stream)
    assert events == [RouteDecision("weak", 0.125, "2 words", 2), *DELTAS]
    assert stream.answer.text == "echo: a b"


def test_stream_text_yields_pieces(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        assert list(client.stream("a b").text()) == ["echo:", " a", " b"]


def test_answer_has_logprobs_of_every_token(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        answer = client.generate("a b", logprobs=2)
    assert [len(token.alternatives) for token in answer.logprobs] == [2, 2, 2]


def test_stream_sends_nothing_before_iteration(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        client.stream("a b")
        client.describe()
    assert gateway.requests == []


def test_leaving_stream_cancels_call(gateway: FakeGateway) -> None:
    gateway.stall_before_word = 1
    with Client(gateway.address) as client:
        for event in client.stream("a b c"):
            if isinstance(event, Delta):
                break
        assert gateway.cancelled.wait(WAIT_SECONDS)


def test_answer_before_end_of_stream_is_unavailable(gateway: FakeGateway) -> None:
    gateway.stall_before_word = 1
    with Client(gateway.address) as client:
        stream = client.stream("a b c")
        for event in stream:
            if isinstance(event, Delta):
                break
        with pytest.raises(Unavailable, match="broke off after 1 tokens"):
            _ = stream.answer


def test_stream_without_finished_event_is_unavailable(gateway: FakeGateway) -> None:
    gateway.omits_finished = True
    with Client(gateway.address) as client, pytest.raises(Unavailable, match="broke off after 2 tokens"):
        client.generate("a")


def test_deadline_ends_call(gateway: FakeGateway) -> None:
    gateway.stall_before_word = 1
    with Client(gateway.address) as client, pytest.raises(Expired):
        client.generate("a b c", timeout=0.2)
    assert gateway.cancelled.wait(WAIT_SECONDS)


@pytest.mark.parametrize("timeout", [0, -1, -0.5, math.nan, -math.inf])
def test_timeout_that_is_not_above_0_is_refused(gateway: FakeGateway, timeout: float) -> None:
    with Client(gateway.address) as client:
        for call in (client.generate, client.stream, client.route):
            with pytest.raises(InvalidRequest, match=f"timeout is {timeout}, but it must be more than 0 seconds"):
                call("a", timeout=timeout)
        with pytest.raises(InvalidRequest, match=f"timeout is {timeout}"):
            client.batch(["a"], timeout=timeout)
        with pytest.raises(InvalidRequest, match=f"timeout is {timeout}"):
            client.describe(timeout=timeout)
    assert gateway.requests == []


@pytest.mark.parametrize("timeout", [math.inf, 1e300, 1e18, 10**400, 1e9, 1e8])
def test_very_long_timeout_is_none(gateway: FakeGateway, timeout: float) -> None:
    with Client(gateway.address) as client:
        assert client.generate("a", timeout=timeout).text == "echo: a"
        assert client.describe(timeout=timeout).cluster == "fake"


def test_request_over_size_of_message_is_refused_by_its_size() -> None:
    with Client("127.0.0.1:1") as client:
        prompt = "a" * MAX_REQUEST_BYTES
        for call in (client.generate, client.route):
            with pytest.raises(
                InvalidRequest, match=r"the request's size is 20971\d\d, but it must be at most 2097136"
            ):
                call(prompt)
        (outcome,) = client.batch([prompt])
        assert isinstance(outcome, InvalidRequest)


def test_batch_over_size_of_message_is_answered(gateway: FakeGateway) -> None:
    # The fake gateway has gRPC's own limit of 4 MiB for what it receives.
    def calls(requests: list[str], max_bytes: int = 1 << 20) -> Batch:
        return Batch(requests, max_bytes)

    with pytest.MonkeyPatch.context() as patch, Client(gateway.address) as client:
        patch.setattr("stitch.client.blocking.Batch", calls)
        outcomes = client.batch([f"{number} {'x' * 300_000}" for number in range(20)], timeout=60)
    assert [outcome.token_ids[1:] for outcome in outcomes if isinstance(outcome, Answer)] == [
        (len(str(number)), 300_000) for number in range(20)
    ]
    assert len(gateway.requests) == 7


@pytest.mark.parametrize(
    "error",
    [InvalidRequest("prompt", "", "no"), Incompatible("two sides"), Exhausted("full", 2.5), Unavailable("gone", 7)],
)
def test_client_raises_error_of_gateway(gateway: FakeGateway, error: StitchError) -> None:
    gateway.failure = lambda request: error
    with Client(gateway.address) as client, pytest.raises(type(error)) as caught:
        client.generate("a")
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "retry_after_seconds", None) == getattr(error, "retry_after_seconds", None)
    assert getattr(caught.value, "generated_tokens", None) == getattr(error, "generated_tokens", None)


def test_client_raises_unknown_rpc_error_unchanged(gateway: FakeGateway) -> None:
    gateway.failure = lambda request: 1 / 0  # type: ignore[return-value, assignment]
    with Client(gateway.address) as client, pytest.raises(grpc.RpcError) as caught:
        client.generate("a")
    assert caught.value.code() is grpc.StatusCode.UNKNOWN


def test_limits_are_checked_by_gateway(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client, pytest.raises(InvalidRequest, match=r"^sampling.temperature is -1\.0, but"):
        client.generate("a", temperature=-1)


def test_batch_returns_one_outcome_per_request_in_order(gateway: FakeGateway) -> None:
    requests: list[str | dict[str, object]] = ["a", {"prompt": ""}, {"prompt": 3}, {"prompt": "b c", "max_tokens": 1}]
    with Client(gateway.address) as client:
        answered, empty, malformed, limited = client.batch(requests)
    assert isinstance(answered, Answer)
    assert answered.text == "echo: a"
    assert str(empty) == "prompt is '', but it must not be empty"
    assert isinstance(malformed, InvalidRequest)
    assert isinstance(limited, Answer)
    assert limited.finish_reason == "length"


def test_batch_without_gateway_returns_errors() -> None:
    with Client("127.0.0.1:1") as client:
        outcomes = client.batch(["a", {"prompt": 3}])
    assert [type(outcome) for outcome in outcomes] == [Unavailable, InvalidRequest]


def test_route_returns_decision_without_answer(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        assert client.route("a " * 12) == RouteDecision("strong", 0.75, "12 words", 12)
        assert client.route(messages=[{"role": "user", "content": "a"}]).route == "weak"


def test_describe_returns_models_routes_and_shards(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        found = client.describe()
    assert (found.bottom.hidden_size, found.top.hidden_size) == (1536, 896)
    assert [route.name for route in found.routes] == ["weak", "strong"]
    assert [shard.serving for shard in found.shards] == [True, True, False]


def test_missing_gateway_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable):
        client.describe()


def test_tokenize_and_detokenize_return_ids_and_text(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        assert client.tokenize("to be or not") == [2, 2, 2, 3]
        assert client.tokenize(messages=[{"role": "user", "content": "hi"}]) == [2]
        assert client.detokenize([1, 3]) == "x xxx"
