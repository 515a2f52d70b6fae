"""The committed stubs have the same descriptors as the protos."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor

from stitch.v1 import inference_pb2, shard_pb2

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
COMMITTED: dict[str, FileDescriptor] = {
    "stitch/v1/inference.proto": inference_pb2.DESCRIPTOR,
    "stitch/v1/shard.proto": shard_pb2.DESCRIPTOR,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """Descriptors that protoc compiles from the protos, by path."""
    out = tmp_path_factory.mktemp("descriptors") / "set.bin"
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"--descriptor_set_out={out}", *COMMITTED]
    subprocess.run(protoc, check=True, timeout=60)
    files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    return {file.name: file for file in files}


def test_every_proto_has_stubs() -> None:
    protos = {path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto")}
    assert protos == set(COMMITTED)


@pytest.mark.parametrize("path", COMMITTED)
def test_stub_descriptors_equal_the_compiled_protos(
    path: str, compiled: dict[str, descriptor_pb2.FileDescriptorProto]
) -> None:
    committed = descriptor_pb2.FileDescriptorProto()
    COMMITTED[path].CopyToProto(committed)
    expected = compiled[path]
    # protoc writes json names into a descriptor set, but not into Python stubs.
    for message in _messages(expected):
        for field in message.field:
            field.ClearField("json_name")
    assert committed == expected, "run `make protos`"


@pytest.mark.parametrize("path", COMMITTED)
def test_typing_stubs_name_every_message_and_method(path: str) -> None:
    module = ROOT / path.replace(".proto", "_pb2.pyi")
    services = ROOT / path.replace(".proto", "_pb2_grpc.pyi")
    for message in COMMITTED[path].message_types_by_name:
        assert f"class {message}(" in module.read_text()
    for service in COMMITTED[path].services_by_name.values():
        assert f"class {service.name}Servicer(" in services.read_text()
        for method in service.methods:
            assert f"def {method.name}(" in services.read_text()


def _messages(file: descriptor_pb2.FileDescriptorProto) -> list[descriptor_pb2.DescriptorProto]:
    found = list(file.message_type)
    for message in found:
        found += message.nested_type
    return found
