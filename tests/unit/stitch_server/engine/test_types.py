"""The order of a batch's segments, and the number of its tokens."""

from __future__ import annotations

from stitch_server.engine.types import Batch, LayerRange, Segment, in_layer_order
from tests.support.engine_fakes import new_request


def segment(enter: int, leave: int, route: str = "weak", position: int = 0, length: int = 1) -> Segment:
    return Segment(new_request(route=route), LayerRange(enter, leave), position, length, wants_token=True, blocks=[])


def cuts(segments: tuple[Segment, ...]) -> list[tuple[int, int]]:
    return [(one.layers.first, one.layers.end) for one in segments]


def test_segments_with_later_end_come_first() -> None:
    assert cuts(in_layer_order([segment(0, 3), segment(0, 5), segment(0, 4)])) == [(0, 5), (0, 4), (0, 3)]


def test_segments_with_earlier_first_layer_come_first() -> None:
    assert cuts(in_layer_order([segment(4, 8), segment(2, 8), segment(3, 8)])) == [(2, 8), (3, 8), (4, 8)]


def test_segments_of_one_route_are_adjacent() -> None:
    routes = [one.session.route for one in in_layer_order([segment(0, 3, route) for route in ("b", "a", "b", "a")])]
    assert routes == ["a", "a", "b", "b"]


def test_chunks_of_session_keep_their_order() -> None:
    mixed = [segment(0, 3, position=0), segment(0, 5), segment(0, 3, position=16), segment(0, 3, position=32)]
    assert [one.position for one in in_layer_order(mixed) if one.layers.end == 3] == [0, 16, 32]


def test_num_tokens_counts_all_segments() -> None:
    assert Batch((segment(0, 3, length=4), segment(0, 3, length=1))).num_tokens == 5
