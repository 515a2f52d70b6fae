"""Every error class has a gRPC status, and keeps its class and fields over an RPC."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from grpc_status import rpc_status

from stitch import errors
from stitch.errors import StitchError, from_rpc_error, to_status

EXAMPLES: dict[type[StitchError], StitchError] = {
    errors.InvalidRequest: errors.InvalidRequest("sampling.top_p", 2.0, "it must be at most 1"),
    errors.Incompatible: errors.Incompatible("bottom-0 has tokenizer ab12, top-0 has cd34"),
    errors.OutOfStep: errors.OutOfStep("session 7 is at position 12, not 40"),
    errors.Unauthenticated: errors.Unauthenticated("the call has no key"),
    errors.Forbidden: errors.Forbidden("client laptop may not call Shard/Generate: it is no gateway"),
    errors.Exhausted: errors.Exhausted("256 sessions wait already", retry_after_seconds=2.5),
    errors.ObjectivesUnmet: errors.ObjectivesUnmet("no route keeps to ttft ≤ 0.5 s: weak has ttft 0.82 s"),
    errors.Unavailable: errors.Unavailable("top-0 is gone", generated_tokens=17, shard="top-0"),
    errors.Draining: errors.Draining("shard top-0 is shutting down"),
    errors.Expired: errors.Expired("the deadline passed after 31 tokens"),
}


def test_every_error_class_has_an_example() -> None:
    assert set(_subclasses(StitchError)) == set(EXAMPLES)


@pytest.mark.parametrize("error", EXAMPLES.values(), ids=lambda error: type(error).__name__)
def test_error_class_has_a_specific_status(error: StitchError) -> None:
    assert "code" in vars(type(error))
    assert error.code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


@pytest.mark.parametrize("error", EXAMPLES.values(), ids=lambda error: type(error).__name__)
def test_error_keeps_class_status_and_message_over_rpc(error: StitchError) -> None:
    received = from_rpc_error(_rpc_error_of(error))
    assert isinstance(received, StitchError)
    assert type(received) is type(error)
    assert received.code is error.code
    assert str(received) == str(error)


def test_invalid_request_keeps_its_field_over_rpc() -> None:
    received = from_rpc_error(_rpc_error_of(EXAMPLES[errors.InvalidRequest]))
    assert isinstance(received, errors.InvalidRequest)
    assert received.field == "sampling.top_p"
    assert str(received) == "sampling.top_p is 2.0, but it must be at most 1"


def test_exhausted_keeps_its_retry_after_over_rpc() -> None:
    received = from_rpc_error(_rpc_error_of(EXAMPLES[errors.Exhausted]))
    assert isinstance(received, errors.Exhausted)
    assert received.retry_after_seconds == 2.5


def test_unavailable_keeps_its_tokens_and_shard_over_rpc() -> None:
    received = from_rpc_error(_rpc_error_of(EXAMPLES[errors.Unavailable]))
    assert isinstance(received, errors.Unavailable)
    assert (received.generated_tokens, received.shard) == (17, "top-0")


def test_rpc_error_without_details_is_returned_unchanged() -> None:
    foreign = AioRpcError(grpc.StatusCode.UNIMPLEMENTED, Metadata(), Metadata(), "no such method", None)
    assert from_rpc_error(foreign) is foreign


def _rpc_error_of(error: StitchError) -> AioRpcError:
    """The error as a client of grpc.aio receives it."""
    status = rpc_status.to_status(to_status(error))
    return AioRpcError(status.code, Metadata(), Metadata(*status.trailing_metadata), status.details, None)


def _subclasses(root: type[StitchError]) -> Iterator[type[StitchError]]:
    for child in root.__subclasses__():
        yield child
        yield from _subclasses(child)
