"""The errors that a caller of any program can meet, and the translation of each to a gRPC status and back.

StitchError
├── InvalidRequest       INVALID_ARGUMENT      a field, its value and its limit
├── Incompatible         FAILED_PRECONDITION   two sides that do not fit together
├── OutOfStep            FAILED_PRECONDITION   a frame whose position contradicts the KV cache
├── Unauthenticated      UNAUTHENTICATED       no key, or one that no tenant has
├── Forbidden            PERMISSION_DENIED     a caller whose certificate or key does not allow this call
├── Exhausted            RESOURCE_EXHAUSTED    no room now; carries when to retry
├── ObjectivesUnmet      OUT_OF_RANGE          no route is predicted to meet the request's objectives
├── Unavailable          UNAVAILABLE           a shard is gone; carries its name and the number of tokens generated
│   └── Draining         UNAVAILABLE           a process that shuts down takes no new call or session
└── Expired              DEADLINE_EXCEEDED     the deadline passed
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, ClassVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "stitch"


class StitchError(Exception):
    """The root of the tree; its text is written for the client."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def details(self) -> Iterable[Message]:
        """The google.rpc details that are sent with the message."""
        yield error_details_pb2.ErrorInfo(reason=type(self).__name__, domain=DOMAIN)


class InvalidRequest(StitchError):
    """A field of a request is outside its limits; the text names the field, the value and the limit."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(f"{field} is {shown(value)}, but {limit}")
        self.field = field
        self.value = value
        self.limit = limit

    def details(self) -> Iterable[Message]:
        yield from super().details()
        violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=str(self))
        yield error_details_pb2.BadRequest(field_violations=[violation])


class Incompatible(StitchError):
    """Two shards, models, tokenizers or stitches don't fit together; the text names both sides."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class OutOfStep(StitchError):
    """A frame's position, epoch or session contradicts the KV cache."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Unauthenticated(StitchError):
    """A call without a key, or with one that no tenant has."""

    code = grpc.StatusCode.UNAUTHENTICATED


class Forbidden(StitchError):
    """A caller whose certificate or key does not allow this call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Exhausted(StitchError):
    """There is no room for the request now."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds

    def details(self) -> Iterable[Message]:
        yield from super().details()
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(self.retry_after_seconds * 1e9))
        yield retry


class ObjectivesUnmet(StitchError):
    """No route is predicted to meet a request's objectives; the text has the prediction of each."""

    code = grpc.StatusCode.OUT_OF_RANGE


class Unavailable(StitchError):
    """A shard of the chain is gone, and no replica can replace it; `shard` is its name where it is known."""

    code = grpc.StatusCode.UNAVAILABLE

    def __init__(self, message: str, generated_tokens: int = 0, shard: str = "") -> None:
        super().__init__(message)
        self.generated_tokens = generated_tokens
        self.shard = shard

    def details(self) -> Iterable[Message]:
        metadata = {"generated_tokens": str(self.generated_tokens), "shard": self.shard}
        yield error_details_pb2.ErrorInfo(reason=type(self).__name__, domain=DOMAIN, metadata=metadata)


class Draining(Unavailable):
    """A process that shuts down refuses a new call or session; another one may take it."""

    code = grpc.StatusCode.UNAVAILABLE


class Expired(StitchError):
    """The request's deadline has passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


def shown(value: object, limit: int = 60) -> str:
    """`value` as an error message shows it: quoted, and never longer than `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def plain(text: str, limit: int | None = None) -> str:
    """`text` without control characters or line breaks, which are escaped, and no longer than `limit` characters."""
    if limit is not None and len(text) > limit:
        text = f"{text[: limit - 1]}…"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def to_status(error: StitchError) -> status_pb2.Status:
    """The google.rpc.Status of an error, with its details packed."""
    status = status_pb2.Status(code=getattr(code_pb2, error.code.name), message=str(error))
    for detail in error.details():
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


@asynccontextmanager
async def translated_errors(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Ends the call with the status of a StitchError raised inside."""
    try:
        yield
    except StitchError as error:
        status = rpc_status.to_status(to_status(error))
        # It can't be sent to a caller whose deadline passes at this moment.
        with suppress(grpc.aio.InternalError):
            await context.abort(error.code, str(error), tuple(status.trailing_metadata or ()))


@contextmanager
def translated_rpc_errors() -> Iterator[None]:
    """Raises the StitchError that the other side raised, and Incompatible where it has no such call.

    Any other RpcError passes unchanged.
    """
    try:
        yield
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            message = f"the server there has no such call ({error.details()}): it is of another kind or version"
            raise Incompatible(message) from error
        translated = from_rpc_error(error)
        if translated is error:
            raise
        raise translated from error


def from_rpc_error(error: grpc.RpcError) -> Exception:
    """The StitchError that the other side raised, or the RpcError itself where its status has no StitchError."""
    code, message = error.code(), error.details() or ""
    details = _details(error)
    if code is grpc.StatusCode.INVALID_ARGUMENT and "BadRequest" in details:
        return _invalid_request(details["BadRequest"].field_violations[0].field, message)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "RetryInfo" in details:
        return Exhausted(message, details["RetryInfo"].retry_delay.ToNanoseconds() / 1e9)
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(message, details.get("ErrorInfo", error_details_pb2.ErrorInfo()))
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        reason = details["ErrorInfo"].reason if "ErrorInfo" in details else ""
        return OutOfStep(message) if reason == OutOfStep.__name__ else Incompatible(message)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Expired(message)
    if code is grpc.StatusCode.OUT_OF_RANGE:
        return ObjectivesUnmet(message)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated(message)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return Forbidden(message)
    return error


def has_details(error: grpc.RpcError) -> bool:
    """Whether the other side raised a StitchError; without, its status is of gRPC's own making."""
    return bool(_details(error))


def _unavailable(message: str, info: error_details_pb2.ErrorInfo) -> Unavailable:
    kind = Draining if info.reason == Draining.__name__ else Unavailable
    return kind(message, int(info.metadata.get("generated_tokens", "0")), info.metadata.get("shard", ""))


def from_code(code: int, message: str) -> StitchError:
    """The error of a google.rpc.Code and its message, where the details are not known."""
    match code:
        case code_pb2.INVALID_ARGUMENT:
            return _invalid_request(message.partition(" is ")[0], message)
        case code_pb2.RESOURCE_EXHAUSTED:
            return Exhausted(message)
        case code_pb2.UNAVAILABLE:
            return Unavailable(message)
        case code_pb2.FAILED_PRECONDITION:
            return Incompatible(message)
        case code_pb2.DEADLINE_EXCEEDED:
            return Expired(message)
        case code_pb2.OUT_OF_RANGE:
            return ObjectivesUnmet(message)
        case code_pb2.UNAUTHENTICATED:
            return Unauthenticated(message)
        case code_pb2.PERMISSION_DENIED:
            return Forbidden(message)
    return StitchError(message)


def _details(error: grpc.RpcError) -> dict[str, Any]:
    """The known details of a failed call, by the name of their type."""
    # grpc and grpc.aio both return pairs, unlike what the type stubs declare.
    metadata: Any = error.trailing_metadata() or ()
    packed = dict(metadata).get("grpc-status-details-bin")
    if not isinstance(packed, bytes):
        return {}
    found: dict[str, Any] = {}
    for detail in status_pb2.Status.FromString(packed).details:
        kind = getattr(error_details_pb2, detail.TypeName().rpartition(".")[2], None)
        if kind is not None:
            message = kind()
            detail.Unpack(message)
            found[kind.DESCRIPTOR.name] = message
    return found


def _invalid_request(field: str, message: str) -> InvalidRequest:
    error = InvalidRequest(field, "", "")
    error.args = (message,)
    return error
