"""`stitch status`: what stands behind a gateway. Doesn't know how a table is drawn."""

from __future__ import annotations

import argparse
import json

from google.protobuf.json_format import MessageToDict
from rich.console import Console

from stitch.cli.connection import gateway
from stitch.cli.tables import models_table, routes_table, shards_table
from stitch.client import Client
from stitch.v1 import inference_pb2


def run(parsed: argparse.Namespace) -> int:
    """Prints the gateway's description."""
    address, authority = gateway(parsed)
    with Client(address, authority) as client:
        found = client.describe()
    if parsed.json:
        fields = MessageToDict(found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        print(json.dumps({"gateway": address, **fields}, ensure_ascii=False))
    else:
        console = Console()
        console.print(f"{found.cluster} at {address}", style="bold", highlight=False, markup=False)
        show_description(console, found)
    return 0


def show_description(console: Console, found: inference_pb2.DescribeResponse) -> None:
    """Models, routes and shards, one table each."""
    for drawn in (models_table(found), routes_table(found), shards_table(found)):
        console.print()
        console.print(drawn)
