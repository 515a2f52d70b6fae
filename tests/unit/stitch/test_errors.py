"""Errors are sent as a status and raised as the same error on the other side."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2

from stitch.channels import open_channel, open_server
from stitch.errors import (
    Exhausted,
    Expired,
    Forbidden,
    Incompatible,
    InvalidRequest,
    ObjectivesUnmet,
    OutOfStep,
    StitchError,
    Unauthenticated,
    Unavailable,
    from_code,
    from_rpc_error,
    shown,
    to_status,
    translated_errors,
    translated_rpc_errors,
)
from tests.support.listening import listening

ERRORS = [
    InvalidRequest("sampling.top_p", 2.0, "it must be at most 1"),
    Incompatible("bottom-0 has 576 columns, top-0 has 896"),
    Exhausted("256 sessions wait already", retry_after_seconds=2.5),
    Unavailable("top-0 is gone", generated_tokens=17),
    Expired("the deadline passed after 3 tokens"),
    ObjectivesUnmet("no route keeps to cost ≤ 0.5: weak has cost 0.79"),
    Unauthenticated("the call has no key"),
    Forbidden("client laptop may not call Shard/Generate: it is no gateway"),
]


@asynccontextmanager
async def failing_call(raised: Exception) -> AsyncIterator[grpc.aio.UnaryUnaryCall[bytes, bytes]]:
    """A call to a method that raises `raised` under `translated_errors`."""

    async def method(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        async with translated_errors(context):
            raise raised

    handler = grpc.method_handlers_generic_handler("t.T", {"M": grpc.unary_unary_rpc_method_handler(method)})
    server = open_server()
    server.add_generic_rpc_handlers((handler,))
    async with listening(server) as address, open_channel(address) as channel:
        yield channel.unary_unary("/t.T/M")(b"")


async def received(raised: Exception) -> grpc.RpcError:
    async with failing_call(raised) as call:
        with pytest.raises(grpc.RpcError) as caught:
            await call
    return caught.value


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_error_is_raised_with_same_type_and_text_by_client(error: StitchError) -> None:
    failure = await received(error)
    translated = from_rpc_error(failure)
    assert failure.code() is error.code
    assert type(translated) is type(error)
    assert str(translated) == str(error)


async def test_error_details_are_restored() -> None:
    exhausted = from_rpc_error(await received(ERRORS[2]))
    unavailable = from_rpc_error(await received(ERRORS[3]))
    invalid = from_rpc_error(await received(ERRORS[0]))
    assert isinstance(exhausted, Exhausted)
    assert exhausted.retry_after_seconds == 2.5
    assert isinstance(unavailable, Unavailable)
    assert unavailable.generated_tokens == 17
    assert isinstance(invalid, InvalidRequest)
    assert invalid.field == "sampling.top_p"


async def test_out_of_step_is_failed_precondition() -> None:
    failure = await received(OutOfStep("position 7 is not 5"))
    assert failure.code() is grpc.StatusCode.FAILED_PRECONDITION
    translated = from_rpc_error(failure)
    assert (type(translated), str(translated)) == (OutOfStep, "position 7 is not 5")


async def test_server_of_another_kind_is_incompatible() -> None:
    expected = r"no such call \(Method not found!\): it is of another kind or version"
    async with listening(open_server()) as address, open_channel(address) as channel:
        with pytest.raises(Incompatible, match=expected), translated_rpc_errors():
            await channel.unary_unary("/t.T/M")(b"")


async def test_unknown_rpc_error_is_not_translated() -> None:
    failure = await received(ZeroDivisionError("secret"))
    assert failure.code() is grpc.StatusCode.UNKNOWN
    assert from_rpc_error(failure) is failure


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_from_code_restores_type(error: StitchError) -> None:
    status = to_status(error)
    rebuilt = from_code(status.code, status.message)
    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)


def test_from_code_restores_field_from_message() -> None:
    rebuilt = from_code(code_pb2.INVALID_ARGUMENT, "sampling.top_p is 2.0, but it must be at most 1")
    assert isinstance(rebuilt, InvalidRequest)
    assert rebuilt.field == "sampling.top_p"


def test_every_error_has_status_code() -> None:
    kinds = StitchError.__subclasses__()
    assert {type(error) for error in ERRORS} | {OutOfStep} == set(kinds)
    assert grpc.StatusCode.INTERNAL not in {kind.code for kind in kinds}


def test_invalid_request_names_field_value_and_limit() -> None:
    assert str(ERRORS[0]) == "sampling.top_p is 2.0, but it must be at most 1"


def test_invalid_request_shortens_long_value() -> None:
    assert shown("x" * 100) == "'" + "x" * 58 + "…"
    assert len(shown("x" * 100)) == 60
    assert shown("short") == "'short'"
