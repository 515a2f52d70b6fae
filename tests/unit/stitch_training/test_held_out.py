"""Losses from a held-out trace are those of the models themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stitch_training import held_out
from stitch_training.activations import Collected, Pass, collect
from stitch_training.frozen_models import Pair
from stitch_training.held_out import alone_losses, tail_losses
from stitch_training.least_squares import AffineMap
from stitch_training.scoring import alone, applied, losses, stitched
from stitch_training.sums import Cut
from tests.support.tiny_fit import BOTTOM_LAYERS, SEQUENCE_TOKENS, drawn_sequences, tiny_pair

SEQUENCES = 6


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair(tmp_path)


def collected(pair: Pair, folder: Path, cuts: tuple[Cut, ...]) -> Collected:
    whole = Pass("held-out", SEQUENCES, SEQUENCE_TOKENS, cuts, "x")
    return collect(pair, whole, folder, drawn_sequences(SEQUENCES), lambda done, of: None)


def test_a_tail_loses_what_the_stitched_pair_loses(pair: Pair, tmp_path: Path) -> None:
    held = collected(pair, tmp_path / "held-out", ((2, 1),))
    draw = torch.Generator().manual_seed(0)
    stitch = AffineMap(torch.randn(32, 48, generator=draw).double(), torch.randn(32, generator=draw).double())
    expected = losses(stitched(pair, (2, 1), stitch), held.trace.tokens(torch.arange(SEQUENCES)))
    # The trace keeps bfloat16.
    found = tail_losses(pair.top, held, (2, 1), applied(stitch))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("cuts", [((2, 1),), ((2, 1), (BOTTOM_LAYERS, 1))], ids=["run again", "from the trace"])
def test_both_models_alone(pair: Pair, tmp_path: Path, cuts: tuple[Cut, ...]) -> None:
    held = collected(pair, tmp_path / "held-out", cuts)
    tokens = held.trace.tokens(torch.arange(SEQUENCES))
    found = alone_losses(pair, held, tmp_path / "held-out")
    torch.testing.assert_close(found["bottom"], losses(alone(pair.bottom), tokens), rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(found["top"], losses(alone(pair.top), tokens))


def test_they_are_computed_once_for_the_same_tokens(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = collected(pair, tmp_path / "held-out", ((2, 1),))
    first = alone_losses(pair, held, tmp_path / "held-out")
    monkeypatch.setattr(held_out, "losses", None)
    again = alone_losses(pair, held, tmp_path / "held-out")
    assert all(torch.equal(first[name], again[name]) for name in ("bottom", "top"))
    other = Collected(held.sums, held.trace, held.sequences, "another fingerprint")
    with pytest.raises(TypeError):
        alone_losses(pair, other, tmp_path / "held-out")
