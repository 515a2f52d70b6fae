"""The handshake refuses shards that do not belong together, with a sentence that names both."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stitch.errors import Incompatible
from stitch.v1 import inference_pb2, shard_pb2
from stitch_server.rpc.handshake import PROTOCOL_VERSION, check_hello, check_welcome, routes_between

Identity = shard_pb2.ShardIdentity
Change = Callable[[Identity], object]


def model(name: str, width: int) -> inference_pb2.Model:
    return inference_pb2.Model(id=name, revision=f"{name}-1", hidden_size=width)


def identity(shard: str, role: str, layers: tuple[int, int]) -> Identity:
    made = Identity(
        shard=shard,
        role=role,
        first_layer=layers[0],
        end_layer=layers[1],
        tokenizer="abc",
        wire_dtype=shard_pb2.DTYPE_FLOAT32,
        kv_block_tokens=16,
        compute_dtype="float32",
        quantization="none",
    )
    (made.bottom if role == "bottom" else made.top).CopyFrom(model("big", 8) if role == "bottom" else model("small", 4))
    routes = {"weak": (3, 2), "strong": (4, 3)}
    for name, (bottom_layers, top_from) in routes.items():
        stitch = "fingerprint" if role == "top" else ""
        made.routes.add(name=name, bottom_layers=bottom_layers, top_from=top_from, stitch=stitch)
    return made


def bottom() -> Identity:
    return identity("bottom-0", "bottom", (0, 4))


def top() -> Identity:
    return identity("top-0", "top", (2, 4))


def no_check(route: str, bottom: inference_pb2.Model) -> None:
    """Accepts every stitch."""


def refused(caller: Identity, own: Identity, version: int = PROTOCOL_VERSION) -> str:
    """The sentence of the refusal, which names both sides."""
    with pytest.raises(Incompatible) as caught:
        check_hello(shard_pb2.Hello(protocol_version=version, identity=caller), own, no_check)
    assert f"shard {caller.shard}" in str(caught.value)
    assert f"shard {own.shard}" in str(caught.value)
    return str(caught.value)


def accepted(caller: Identity, own: Identity) -> None:
    check_hello(shard_pb2.Hello(protocol_version=PROTOCOL_VERSION, identity=caller), own, no_check)


def test_matching_shards_are_accepted() -> None:
    accepted(bottom(), top())


def test_consecutive_layers_of_one_model_are_accepted() -> None:
    accepted(identity("bottom-0", "bottom", (0, 2)), identity("bottom-1", "bottom", (2, 4)))
    accepted(identity("top-0", "top", (2, 3)), identity("top-1", "top", (3, 4)))


def test_other_protocol_version_is_refused() -> None:
    said = refused(bottom(), top(), version=PROTOCOL_VERSION + 1)
    versions = f"shard bottom-0 is {PROTOCOL_VERSION + 1}, that of shard top-0 is {PROTOCOL_VERSION}"
    assert said == f"the protocol version of {versions}"


def set_tokenizer(one: Identity) -> None:
    one.tokenizer = "xyz"


def set_dtype(one: Identity) -> None:
    one.wire_dtype = shard_pb2.DTYPE_INT8


def set_compute(one: Identity) -> None:
    one.compute_dtype = "bfloat16"


def set_quantization(one: Identity) -> None:
    one.quantization = "int8"


def set_block(one: Identity) -> None:
    one.kv_block_tokens = 32


COMPARED: list[tuple[Change, str]] = [
    (set_tokenizer, "the tokenizer of shard bottom-0 is xyz, that of shard top-0 is abc"),
    (set_dtype, "the wire dtype of shard bottom-0 is DTYPE_INT8, that of shard top-0 is DTYPE_FLOAT32"),
    (set_compute, "the compute dtype of shard bottom-0 is bfloat16, that of shard top-0 is float32"),
    (set_quantization, "the quantization of shard bottom-0 is int8, that of shard top-0 is none"),
    (set_block, "the tokens of a KV block of shard bottom-0 is 32, that of shard top-0 is 16"),
]


@pytest.mark.parametrize(("change", "said"), COMPARED)
def test_receiver_refuses_differing_field(change: Change, said: str) -> None:
    caller = bottom()
    change(caller)
    assert refused(caller, top()) == said


@pytest.mark.parametrize(("change", "said"), COMPARED)
def test_caller_refuses_differing_field(change: Change, said: str) -> None:
    receiver = top()
    change(receiver)
    with pytest.raises(Incompatible) as caught:
        check_welcome(shard_pb2.Welcome(identity=receiver), bottom())
    swapped = said.replace("bottom-0", "?").replace("top-0", "bottom-0").replace("?", "top-0")
    assert str(caught.value) == swapped


def test_matching_welcome_is_accepted() -> None:
    check_welcome(shard_pb2.Welcome(identity=top()), bottom())


def test_top_shard_upstream_of_bottom_shard_is_refused() -> None:
    said = refused(top(), bottom())
    assert said == "shard top-0 is a top shard and cannot be upstream of shard bottom-0, a bottom shard"


@pytest.mark.parametrize("layers", [(0, 3), (0, 1), (0, 4)])
def test_layers_with_gap_or_overlap_are_refused(layers: tuple[int, int]) -> None:
    said = refused(identity("bottom-0", "bottom", layers), identity("bottom-1", "bottom", (2, 4)))
    assert said == f"shard bottom-0 ends before layer {layers[1]}, but shard bottom-1 begins with layer 2"


def test_other_revision_of_model_is_refused() -> None:
    caller = identity("bottom-0", "bottom", (0, 2))
    caller.bottom.revision = "big-2"
    said = refused(caller, identity("bottom-1", "bottom", (2, 4)))
    assert "big revision big-2 of width 8" in said
    assert "big revision big-1 of width 8" in said


def test_other_hidden_size_of_model_is_refused() -> None:
    caller = identity("top-0", "top", (2, 3))
    caller.top.hidden_size = 5
    assert "of width 5" in refused(caller, identity("top-1", "top", (3, 4)))


def test_other_cut_point_of_route_is_refused() -> None:
    caller = bottom()
    caller.routes[1].bottom_layers = 2
    said = refused(caller, top())
    assert said == "the cut point of route strong of shard bottom-0 is (2, 3), that of shard top-0 is (4, 3)"


def test_route_of_one_side_alone_is_accepted() -> None:
    caller = bottom()
    caller.routes.add(name="other", bottom_layers=1, top_from=2)
    del caller.routes[0]
    accepted(caller, top())


def test_route_that_enters_top_on_another_shard_is_not_compared() -> None:
    caller = bottom()
    caller.routes[0].bottom_layers = 1
    accepted(caller, identity("top-1", "top", (3, 4)))


def test_every_stitch_is_checked_against_bottom() -> None:
    asked: list[tuple[str, str]] = []
    hello = shard_pb2.Hello(protocol_version=PROTOCOL_VERSION, identity=bottom())
    check_hello(hello, top(), lambda route, model: asked.append((route, model.revision)))
    assert asked == [("weak", "big-1"), ("strong", "big-1")]


def test_stitch_for_another_bottom_is_refused() -> None:
    def check(route: str, model: inference_pb2.Model) -> None:
        raise Incompatible(f"the stitch of {route} is not for {model.id}")

    with pytest.raises(Incompatible, match="the stitch of weak is not for big"):
        check_hello(shard_pb2.Hello(protocol_version=PROTOCOL_VERSION, identity=bottom()), top(), check)


def test_route_without_stitch_requires_one_model() -> None:
    own = top()
    own.routes[0].stitch = ""
    said = refused(bottom(), own)
    assert said.startswith("the model of shard bottom-0 is big revision big-1 of width 8")
    own.top.CopyFrom(bottom().bottom)
    accepted(bottom(), own)


def test_empty_identity_is_refused() -> None:
    with pytest.raises(Incompatible, match=rf"shard \? is 0, that of shard top-0 is {PROTOCOL_VERSION}"):
        check_hello(shard_pb2.Hello(), top(), no_check)


def test_routes_between_shards_are_those_whose_layers_follow() -> None:
    first, last = identity("top-0", "top", (2, 3)), identity("top-1", "top", (3, 4))
    del first.routes[1]
    both = frozenset({"weak", "strong"})
    assert routes_between(bottom(), top()) == both
    assert routes_between(bottom(), first) == {"weak"}
    assert routes_between(bottom(), last) == {"strong"}
    assert routes_between(first, last) == {"weak"}
    assert routes_between(identity("bottom-0", "bottom", (0, 3)), top()) == {"weak"}
    assert routes_between(identity("bottom-0", "bottom", (0, 2)), identity("bottom-1", "bottom", (2, 4))) == both
