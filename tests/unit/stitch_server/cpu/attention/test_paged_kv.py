"""Where tokens of sequences lie, in the order in which kernels go through them."""

from __future__ import annotations

import numpy as np

from stitch_server.cpu.attention.dispatch import slot_mapping


def test_sequences_lie_in_their_blocks_one_behind_the_other() -> None:
    spans = np.array([[5, 1], [2, 2], [4, 3]])
    blocks = np.array([7, 1, 0, 3])
    slots, begins, ends = slot_mapping(spans, blocks, 4)
    assert slots.tolist() == [28, 29, 30, 31, 4, 0, 1, 12, 13, 14, 15]
    assert begins.tolist() == [0, 5, 5, 7, 7, 7]
    assert ends.tolist() == [5, 6, 7, 9, 10, 11]


def test_nobody_lies_nowhere() -> None:
    assert [part.tolist() for part in slot_mapping(np.empty((0, 2), np.int64), np.empty(0, np.int64), 4)] == [
        [],
        [],
        [],
    ]
