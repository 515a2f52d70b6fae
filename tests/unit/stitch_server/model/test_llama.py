"""RoPE's rotations by position: computed for a batch, or looked up in a table that grows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stitch_server.model.description import read_config
from stitch_server.model.llama import MIN_TABLE_POSITIONS, RotaryAngles
from stitch_server.model.llama_config import LlamaConfig
from tests.support.tiny_model import write_tiny_model


def tiny_angles(folder: Path) -> RotaryAngles:
    config = read_config(write_tiny_model(folder, layers=1))
    assert isinstance(config, LlamaConfig)
    return RotaryAngles(config, torch.device("cpu"))


@pytest.mark.parametrize("positions", [1, MIN_TABLE_POSITIONS, MIN_TABLE_POSITIONS + 1])
def test_table_has_the_rotation_of_every_position(tmp_path: Path, positions: int) -> None:
    angles = tiny_angles(tmp_path)
    table = angles.table(positions)
    assert len(table) >= positions
    (expected,) = angles(torch.arange(positions))
    torch.testing.assert_close(torch.from_numpy(table[:positions]), expected.flatten(1))


def test_table_that_is_long_enough_is_not_computed_again(tmp_path: Path) -> None:
    angles = tiny_angles(tmp_path)
    table = angles.table(MIN_TABLE_POSITIONS + 1)
    assert angles.table(5) is angles.table(len(table)) is table
