"""`stitch status`: the models, routes and shards of a gateway, as tables or as JSON."""

from __future__ import annotations

import argparse
from datetime import timedelta

from google.protobuf.json_format import MessageToDict
from rich.console import Console, Group

from stitch.cli.arguments import gateway_endpoint
from stitch.cli.output import millions, print_json, table
from stitch.client import Client
from stitch.v1 import inference_pb2


def run(parsed: argparse.Namespace) -> int:
    """Prints the gateway's description."""
    endpoint = gateway_endpoint(parsed)
    with Client(*endpoint) as client:
        found = client.describe(addresses=True)
    if parsed.json:
        fields = MessageToDict(found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        print_json({"gateway": endpoint[0], **fields})
    else:
        console = Console()
        console.print(f"{found.cluster} at {endpoint[0]}", style="bold", highlight=False, markup=False)
        show_description(console, found)
    return 0


def show_description(console: Console, found: inference_pb2.DescribeResponse) -> None:
    """Prints one table each of models, routes and shards, and where the shards come from."""
    for drawn in (models_table(found), routes_table(found), shards_table(found)):
        console.print()
        console.print(drawn)
    for line in membership_lines(found.membership):
        console.print(line, highlight=False, markup=False)


def models_table(found: inference_pb2.DescribeResponse) -> Group:
    """Both models with their layers, hidden size and context length."""
    columns = ("role", "model", "architecture", "layers", "hidden size", "context")
    rows = [
        (role, one.id, one.architecture, str(one.layers), f"{one.hidden_size:,}", f"{one.context_length:,}")
        for role, one in (("bottom", found.bottom), ("top", found.top))
    ]
    return table("models", columns, rows, right=columns[3:])


def routes_table(found: inference_pb2.DescribeResponse) -> Group:
    """Every route's cut, its stitch, and the parameters that it reads for one token."""
    hidden_sizes = f"{found.bottom.hidden_size} → {found.top.hidden_size}"
    rows = [
        (
            route.name,
            f"0–{route.bottom_layers - 1}" if route.bottom_layers else "–",
            f"{hidden_sizes}  {route.stitch[:12]}" if route.stitch else "none: one model",
            f"{route.top_from}–{found.top.layers - 1}" if route.HasField("top_from") else "–",
            millions(route.parameters),
        )
        for route in found.routes
    ]
    columns = ("route", "bottom", "stitch", "top", "parameters per token")
    return table("routes", columns, rows, right=columns[4:])


def shards_table(found: inference_pb2.DescribeResponse) -> Group:
    """Every shard's layers, address, device, KV capacity and state."""
    rows = [
        (
            shard.name,
            f"{shard.role} {shard.first_layer}–{shard.end_layer - 1}",
            shard.address,
            f"{shard.device} {shard.dtype}".strip(),
            f"{shard.kv_capacity_tokens:,}" if shard.kv_capacity_tokens else "–",
            shard.state,
        )
        for shard in found.shards
    ]
    columns = ("shard", "layers", "address", "device", "KV tokens", "state")
    return table("shards", columns, rows, right=("KV tokens",))


def membership_lines(membership: inference_pb2.Membership) -> list[str]:
    """The source of the shards, its last change, and what is wrong with it."""
    since = timedelta(seconds=round(membership.seconds_since_change))
    changed = f"{membership.last_change}, {since} ago" if membership.last_change else f"no change for {since}"
    return [f"shards from {membership.source}: {changed}", *(f"refused: {one}" for one in membership.problems)]
