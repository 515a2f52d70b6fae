"""The handshake of a link: whether two shards compute the same models, routes and formats.

In: the identities of both sides. Out: nothing, or Incompatible with a sentence that names both sides.
"""

from __future__ import annotations

from collections.abc import Callable

from stitch.errors import Incompatible, plain
from stitch.v1 import inference_pb2, shard_pb2

PROTOCOL_VERSION = 3
# Characters of what a peer states that a refusal repeats.
MAX_SHOWN = 200

Identity = shard_pb2.ShardIdentity
# Raises Incompatible where a route's stitch was not made for this bottom model.
CheckStitch = Callable[[str, inference_pb2.Model], None]


def check_hello(hello: shard_pb2.Hello, own: Identity, check_stitch: CheckStitch) -> None:
    """The receiver's check of the caller. Raises Incompatible."""
    caller = hello.identity
    if hello.protocol_version != PROTOCOL_VERSION:
        raise _differ("protocol version", caller, hello.protocol_version, own, PROTOCOL_VERSION)
    for name, of in _COMPARED.items():
        if of(caller) != of(own):
            raise _differ(name, caller, of(caller), own, of(own))
    if (caller.role, own.role) == ("top", "bottom"):
        raise Incompatible(f"{_named(caller)} is a top shard and cannot be upstream of {_named(own)}, a bottom shard")
    _check_routes(caller, own, check_stitch)


def check_welcome(welcome: shard_pb2.Welcome, own: Identity) -> None:
    """The caller's check of the receiver; the receiver has checked the rest. Raises Incompatible."""
    for name, of in _COMPARED.items():
        if of(welcome.identity) != of(own):
            raise _differ(name, welcome.identity, of(welcome.identity), own, of(own))


def routes_between(caller: Identity, own: Identity) -> frozenset[str]:
    """The routes of which the caller has the layers just before this shard's."""

    def precedes(route: inference_pb2.RouteDescription) -> bool:
        enters = own.role == "top" and own.first_layer <= route.top_from
        if caller.role == own.role:
            return not enters
        return enters and caller.first_layer < route.bottom_layers <= caller.end_layer

    theirs = {route.name for route in caller.routes}
    return frozenset(route.name for route in own.routes if route.name in theirs and precedes(route))


_COMPARED: dict[str, Callable[[Identity], object]] = {
    "tokenizer": lambda identity: identity.tokenizer,
    "wire dtype": lambda identity: shard_pb2.Dtype.Name(identity.wire_dtype),
    "compute dtype": lambda identity: identity.compute_dtype,
    "quantization": lambda identity: identity.quantization,
    "tokens of a KV block": lambda identity: identity.kv_block_tokens,
}


def _check_routes(caller: Identity, own: Identity, check_stitch: CheckStitch) -> None:
    if caller.role == own.role:
        _check_same_model(caller, _model(caller), own, _model(own))
        if caller.end_layer != own.first_layer:
            raise Incompatible(
                f"{_named(caller)} ends before layer {caller.end_layer}, "
                f"but {_named(own)} begins with layer {own.first_layer}"
            )
        return
    theirs = {route.name: route for route in caller.routes}
    for route in own.routes:
        other = theirs.get(route.name)
        # A route that enters the top model on another shard does not come from this caller.
        if other is None or not own.first_layer <= route.top_from < own.end_layer:
            continue
        cut_points = (other.bottom_layers, other.top_from), (route.bottom_layers, route.top_from)
        if cut_points[0] != cut_points[1]:
            raise _differ(f"cut point of route {route.name}", caller, cut_points[0], own, cut_points[1])
        if route.stitch:
            check_stitch(route.name, caller.bottom)
        else:
            _check_same_model(caller, caller.bottom, own, own.top)


def _check_same_model(caller: Identity, theirs: inference_pb2.Model, own: Identity, ours: inference_pb2.Model) -> None:
    if (theirs.revision, theirs.hidden_size) != (ours.revision, ours.hidden_size):
        raise _differ("model", caller, _described(theirs), own, _described(ours))


def _model(identity: Identity) -> inference_pb2.Model:
    return identity.bottom if identity.role == "bottom" else identity.top


def _described(model: inference_pb2.Model) -> str:
    return f"{model.id} revision {model.revision} of width {model.hidden_size}"


def _named(identity: Identity) -> str:
    return f"shard {plain(identity.shard, MAX_SHOWN) or '?'}"


def _differ(what: str, caller: Identity, theirs: object, own: Identity, ours: object) -> Incompatible:
    stated = plain(str(theirs), MAX_SHOWN)
    return Incompatible(f"the {what} of {_named(caller)} is {stated}, that of {_named(own)} is {ours}")
