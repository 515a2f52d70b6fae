"""Answers gRPC reflection in both of its versions, v1alpha and v1, whose messages are the same on the wire."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

METHOD = "ServerReflectionInfo"


def _of_v1() -> FileDescriptorProto:
    """The file of v1, which grpcio-reflection hasn't: that of v1alpha but for its package."""
    file = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    return text_format.Parse(str(file).replace("v1alpha", "v1"), FileDescriptorProto())


FILES = (reflection_pb2.DESCRIPTOR, descriptor_pool.Default().AddSerializedFile(_of_v1().SerializeToString()))
SERVICES = tuple(service.full_name for file in FILES for service in file.services_by_name.values())


def enable(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Lets `server` describe these services, and reflection itself."""
    servicer = ReflectionServicer((*services, *SERVICES))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in SERVICES:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {METHOD: handler}),))
