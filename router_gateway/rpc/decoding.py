"""Requests that can't be parsed get a reason instead of a transport error. Knows no field by name.

Protobuf refuses a whole message for one string that is no UTF-8, before any servicer sees it. So the interceptor
parses by itself, and on failure parses once more with descriptors in which every string is bytes, to find that string.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message

from router_gateway.requests.limits import Amount
from stitch.errors import InvalidRequest, translated_errors
from stitch.v1 import inference_pb2

_log = logging.getLogger(__name__)

# All that a client learns of a defect; the log has the rest.
FAILED = "the gateway failed on this request; its log says why"
# Bytes of a string that an error shows in front of the fault.
SHOWN_BYTES = 12

Behaviour = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]


class LenientDecoding(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Ends calls with INVALID_ARGUMENT, field, value and limit where the request of one of `methods` is malformed.

    `methods` maps a method's full path to its type of request; other methods are left alone. Their servicers are
    coroutines, those with many responses write them to the context.
    """

    def __init__(self, methods: dict[str, type[Message]]) -> None:
        self._methods = methods

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        request_type = self._methods.get(handler_call_details.method)
        if request_type is None:
            return handler
        # The stubs know the handlers of threaded servers only.
        behaviour: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        wrap: Any = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        wrapped: grpc.RpcMethodHandler[Any, Any] = wrap(
            _decoding(request_type, behaviour), None, handler.response_serializer
        )
        return wrapped


def methods_of_inference() -> dict[str, type[Message]]:
    """Every method of `stitch.v1.Inference` with its type of request."""
    service = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
    return {
        f"/{service.full_name}/{method.name}": message_factory.GetMessageClass(method.input_type)
        for method in service.methods
    }


def decode(request_type: type[Message], data: bytes) -> Message:
    """The message in `data`. Raises InvalidRequest for the field that is no UTF-8, or for bytes that are no message."""
    try:
        return request_type.FromString(data)
    except DecodeError as error:
        name = request_type.DESCRIPTOR.full_name
        try:
            shadow = _shadow(name).FromString(data)
        except DecodeError:
            limit = f"they are no {name}"
            raise InvalidRequest("request", Amount(f"{len(data):,} bytes"), limit) from error
        for path, value, fault in _broken_strings(shadow, ""):
            limit = f"it must be UTF-8, and byte {fault} is 0x{value[fault]:02x}"
            raise InvalidRequest(path, value[max(0, fault - SHOWN_BYTES) : fault + 1], limit) from error
        raise InvalidRequest("request", Amount(f"{len(data):,} bytes"), str(error)) from error


def _decoding(request_type: type[Message], behaviour: Behaviour) -> Behaviour:
    async def decoded(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            async with translated_errors(context):
                return await behaviour(decode(request_type, data), context)
        except grpc.aio.AbortError:
            raise
        except Exception:
            _log.exception("a call failed")
            await context.abort(grpc.StatusCode.INTERNAL, FAILED)

    return decoded


@functools.cache
def _shadow(full_name: str) -> type[Message]:
    """The message type of that name with bytes in place of every string: the same on the wire."""
    file = FileDescriptorProto()
    inference_pb2.DESCRIPTOR.CopyToProto(file)
    for message in file.message_type:
        for field in message.field:
            if field.type == FieldDescriptorProto.TYPE_STRING:
                field.type = FieldDescriptorProto.TYPE_BYTES
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(full_name))


def _broken_strings(message: Message, prefix: str) -> Iterator[tuple[str, bytes, int]]:
    """Path, bytes and first wrong byte of every string that is no UTF-8."""
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if field.is_repeated:
            for index, item in enumerate(value):
                yield from _broken(field, item, f"{path}[{index}]")
        else:
            yield from _broken(field, value, path)


def _broken(field: FieldDescriptor, value: Any, path: str) -> Iterator[tuple[str, bytes, int]]:
    if field.message_type is not None:
        yield from _broken_strings(value, f"{path}.")
    elif isinstance(value, bytes):
        try:
            value.decode()
        except UnicodeDecodeError as error:
            yield path, value, error.start
