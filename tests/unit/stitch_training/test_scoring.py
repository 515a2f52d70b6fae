"""Losses, agreement and intervals of pipelines over a tiny pair, from tokens and from a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_training import scoring
from stitch_training.activations import PassResult, PassSettings, record
from stitch_training.least_squares import AffineMap, CutPoint
from stitch_training.models import Pair
from stitch_training.scoring import (
    bootstrap,
    by_file,
    greedy_tokens,
    mapping_of,
    sequence_losses,
    stitched,
    tail_losses,
    whole,
    whole_losses,
    without_layers,
)
from tests.support.tiny_fit import BOTTOM_LAYERS, SEQUENCE_TOKENS, drawn_sequences, tiny_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair(tmp_path)


def tokens() -> Tensor:
    return torch.tensor([sequence.token_ids for sequence in drawn_sequences(6)])


def test_sequence_losses_are_mean_cross_entropies(pair: Pair) -> None:
    model, given = pair.bottom, tokens()
    with torch.no_grad():
        logits = model.logits(whole(model).states(given).flatten(0, 1)).view(6, SEQUENCE_TOKENS, -1)
    expected = torch.stack([F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, given, strict=True)])
    torch.testing.assert_close(sequence_losses(whole(model), given), expected.double(), rtol=1e-5, atol=1e-5)


def test_identity_stitch_gives_the_whole_model(pair: Pair) -> None:
    same = Pair(pair.top, pair.top, pair.vocabulary)
    width = pair.top.hidden_size
    identity = AffineMap(torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
    through, expected = stitched(same, CutPoint(1, 1), identity), whole(pair.top)
    torch.testing.assert_close(through.states(tokens()), expected.states(tokens()), rtol=1e-5, atol=1e-5)


def test_stitch_is_applied_to_every_token(pair: Pair) -> None:
    draw = torch.Generator().manual_seed(0)
    stitch = AffineMap(torch.randn(32, 48, generator=draw).double(), torch.randn(32, generator=draw).double())
    states = pair.bottom.run(pair.bottom.embed(tokens()), 0, 2)
    expected = pair.top.run(states @ stitch.weight.float().T + stitch.bias.float(), 1, 2)
    torch.testing.assert_close(stitched(pair, CutPoint(2, 1), stitch).states(tokens()), expected, rtol=1e-4, atol=1e-4)


def test_first_tokens_are_replaced_where_the_map_sets_them(pair: Pair) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, bias, first = (torch.randn(*shape, generator=draw).double() for shape in ((32, 48), (32,), (32,)))
    states = torch.randn(3, 5, 48, generator=draw)
    mapped, as_set = (mapping_of(AffineMap(weight, bias, one))(states) for one in (None, first))
    assert torch.equal(as_set[:, 1:], mapped[:, 1:])
    assert torch.equal(as_set[:, 0], first.float().expand(3, -1))


def test_without_layers_of_an_empty_range_is_the_whole_model(pair: Pair) -> None:
    model = pair.bottom
    torch.testing.assert_close(without_layers(model, CutPoint(2, 2)).states(tokens()), whole(model).states(tokens()))
    assert not torch.equal(without_layers(model, CutPoint(1, 2)).states(tokens()), whole(model).states(tokens()))


def test_greedy_tokens_are_the_likeliest(pair: Pair) -> None:
    model = pair.bottom
    with torch.no_grad():
        expected = model.logits(whole(model).states(tokens()).flatten(0, 1)).argmax(1).view(6, -1)
    assert torch.equal(greedy_tokens(whole(model), tokens()), expected)


def test_bootstrap_interval_covers_the_mean_and_narrows_with_sequences() -> None:
    draw = torch.Generator().manual_seed(0)
    few, many = (bootstrap(3 + torch.randn(count, generator=draw).double()) for count in (10, 1000))
    for interval in (few, many):
        assert interval.low < interval.mean < interval.high
    # 2 x 1.96 standard errors of a thousand values of unit variance.
    assert many.high - many.low == pytest.approx(3.92 / 1000**0.5, rel=0.15)
    assert few.high - few.low > 5 * (many.high - many.low)


def test_bootstrap_interval_of_equal_values_is_empty() -> None:
    interval = bootstrap(torch.full((9,), 2.5, dtype=torch.float64))
    assert (interval.low, interval.mean, interval.high) == (2.5, 2.5, 2.5)


def test_by_file_separates_files_and_omits_absent_ones() -> None:
    found = by_file(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 1, 0, 1]), ["a", "b", "absent"])
    assert {name: interval.mean for name, interval in found.items()} == {"all": 2.5, "a": 2.0, "b": 3.0}


SEQUENCES = 6


def recorded(pair: Pair, folder: Path, cuts: tuple[CutPoint, ...]) -> PassResult:
    settings = PassSettings("held-out", SEQUENCES, SEQUENCE_TOKENS, cuts, "x")
    return record(pair, settings, folder, drawn_sequences(SEQUENCES), lambda done, total: None)


def test_tail_losses_match_the_stitched_pipeline(pair: Pair, tmp_path: Path) -> None:
    held = recorded(pair, tmp_path / "held-out", (CutPoint(2, 1),))
    draw = torch.Generator().manual_seed(0)
    stitch = AffineMap(torch.randn(32, 48, generator=draw).double(), torch.randn(32, generator=draw).double())
    expected = sequence_losses(stitched(pair, CutPoint(2, 1), stitch), held.trace.tokens(torch.arange(SEQUENCES)))
    # The trace keeps bfloat16.
    found = tail_losses(pair.top, held, CutPoint(2, 1), mapping_of(stitch))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "cuts", [(CutPoint(2, 1),), (CutPoint(2, 1), CutPoint(BOTTOM_LAYERS, 1))], ids=["from tokens", "from the trace"]
)
def test_whole_losses_match_the_whole_models(pair: Pair, tmp_path: Path, cuts: tuple[CutPoint, ...]) -> None:
    held = recorded(pair, tmp_path / "held-out", cuts)
    tokens = held.trace.tokens(torch.arange(SEQUENCES))
    found = whole_losses(pair, held, tmp_path / "held-out")
    torch.testing.assert_close(found["bottom"], sequence_losses(whole(pair.bottom), tokens), rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(found["top"], sequence_losses(whole(pair.top), tokens))


def test_whole_losses_are_computed_once_for_the_same_tokens(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = recorded(pair, tmp_path / "held-out", (CutPoint(2, 1),))
    first = whole_losses(pair, held, tmp_path / "held-out")
    monkeypatch.setattr(scoring, "sequence_losses", None)
    again = whole_losses(pair, held, tmp_path / "held-out")
    assert all(torch.equal(first[name], again[name]) for name in ("bottom", "top"))
    other = PassResult(held.sums, held.trace, held.sequences, "another fingerprint")
    with pytest.raises(TypeError):
        whole_losses(pair, other, tmp_path / "held-out")
