"""Models, routes, shards and times as tables. Doesn't know where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from stitch.cli.output import millions, seconds
from stitch.cli.ttft_samples import Sample, medians, regression
from stitch.v1 import inference_pb2

Rows = Iterable[Sequence[str]]


def table(title: str, columns: Sequence[str], rows: Rows, right: Sequence[str] = ()) -> Group:
    """A table of plain text under its title; the columns named in `right` hold numbers."""
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return Group(Text(title, style="bold"), drawn)


def models_table(found: inference_pb2.DescribeResponse) -> Group:
    """Both models with their widths."""
    columns = ("half", "model", "family", "layers", "width", "context")
    rows = [
        (half, one.id, one.architecture, str(one.layers), f"{one.hidden_size:,}", f"{one.context_length:,}")
        for half, one in (("bottom", found.bottom), ("top", found.top))
    ]
    return table("models", columns, rows, right=columns[3:])


def routes_table(found: inference_pb2.DescribeResponse) -> Group:
    """Every route's cut, the stitch there with its widths, and what one token costs."""
    widths = f"{found.bottom.hidden_size} → {found.top.hidden_size}"
    rows = [
        (
            route.name,
            f"0–{route.bottom_layers - 1}",
            f"{widths}  {route.stitch[:12]}" if route.stitch else "none: one model",
            f"{route.top_from}–{found.top.layers - 1}",
            millions(route.parameters),
        )
        for route in found.routes
    ]
    columns = ("route", "bottom", "stitch", "top", "read per token")
    return table("routes", columns, rows, right=columns[4:])


def shards_table(found: inference_pb2.DescribeResponse) -> Group:
    """Every shard's part, place and state."""
    rows = [
        (
            shard.name,
            f"{shard.role} {shard.first_layer}–{shard.end_layer - 1}",
            shard.address,
            f"{shard.device} {shard.dtype}".strip(),
            f"{shard.kv_capacity_tokens:,}" if shard.kv_capacity_tokens else "–",
            "serving" if shard.serving else "away",
        )
        for shard in found.shards
    ]
    columns = ("shard", "layers", "address", "computes", "KV tokens", "state")
    return table("shards", columns, rows, right=("KV tokens",))


def ttft_table(samples: Sequence[Sample], routes: Sequence[str]) -> Group:
    """The median time to the first token at every length, one column a route."""
    by_route = {route: medians(samples, route) for route in routes}
    lengths = sorted({sample.length for sample in samples})
    rows = [
        (f"{by_route[routes[0]][index][0]:g}", *(seconds(by_route[route][index][1]) for route in routes))
        for index in range(len(lengths))
    ]
    columns = ("prompt tokens", *routes)
    return table("time to first token (median)", columns, rows, right=columns)


def lines_table(samples: Sequence[Sample], routes: Sequence[str]) -> Group:
    """The regression line of every route."""
    columns = ("route", "ms per token", "intercept", "R²")
    rows = []
    for route in routes:
        line = regression(medians(samples, route))
        rows.append(
            (route, f"{line.slope_seconds * 1000:.3f}", seconds(line.intercept_seconds), f"{line.r_squared:.4f}")
        )
    return table("regression: time = intercept + slope × prompt tokens", columns, rows, right=columns[1:])
