"""Losses, agreement and intervals of systems over a tiny pair."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_training.frozen_models import Pair
from stitch_training.least_squares import AffineMap
from stitch_training.scoring import alone, applied, bootstrapped, by_file, greedy_tokens, left_out, losses, stitched
from tests.support.tiny_fit import SEQUENCE_TOKENS, drawn_sequences, tiny_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair(tmp_path)


def tokens() -> Tensor:
    return torch.tensor([sequence.token_ids for sequence in drawn_sequences(6)])


def test_the_loss_is_the_cross_entropy_of_each_sequence(pair: Pair) -> None:
    model, given = pair.bottom, tokens()
    with torch.no_grad():
        logits = model.logits(alone(model).states(given).flatten(0, 1)).view(6, SEQUENCE_TOKENS, -1)
    expected = torch.stack([F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, given, strict=True)])
    torch.testing.assert_close(losses(alone(model), given), expected.double(), rtol=1e-5, atol=1e-5)


def test_an_identity_stitch_changes_nothing(pair: Pair) -> None:
    same = Pair(pair.top, pair.top, pair.vocabulary)
    width = pair.top.hidden_size
    identity = AffineMap(torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
    through, whole = stitched(same, (1, 1), identity), alone(pair.top)
    torch.testing.assert_close(through.states(tokens()), whole.states(tokens()), rtol=1e-5, atol=1e-5)


def test_a_stitch_is_applied_to_every_token(pair: Pair) -> None:
    draw = torch.Generator().manual_seed(0)
    stitch = AffineMap(torch.randn(32, 48, generator=draw).double(), torch.randn(32, generator=draw).double())
    states = pair.bottom.run(pair.bottom.embed(tokens()), 0, 2)
    expected = pair.top.run(states @ stitch.weight.float().T + stitch.bias.float(), 1, 2)
    torch.testing.assert_close(stitched(pair, (2, 1), stitch).states(tokens()), expected, rtol=1e-4, atol=1e-4)


def test_first_tokens_become_what_the_map_says(pair: Pair) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, bias, first = (torch.randn(*shape, generator=draw).double() for shape in ((32, 48), (32,), (32,)))
    states = torch.randn(3, 5, 48, generator=draw)
    mapped, as_set = (applied(AffineMap(weight, bias, one))(states) for one in (None, first))
    assert torch.equal(as_set[:, 1:], mapped[:, 1:])
    assert torch.equal(as_set[:, 0], first.float().expand(3, -1))


def test_leaving_no_layer_out_is_the_whole(pair: Pair) -> None:
    model = pair.bottom
    torch.testing.assert_close(left_out(model, (2, 2)).states(tokens()), alone(model).states(tokens()))
    assert not torch.equal(left_out(model, (1, 2)).states(tokens()), alone(model).states(tokens()))


def test_greedy_tokens_are_the_likeliest(pair: Pair) -> None:
    model = pair.bottom
    with torch.no_grad():
        expected = model.logits(alone(model).states(tokens()).flatten(0, 1)).argmax(1).view(6, -1)
    assert torch.equal(greedy_tokens(alone(model), tokens()), expected)


def test_an_interval_covers_the_mean_and_shrinks_with_more_sequences() -> None:
    draw = torch.Generator().manual_seed(0)
    few, many = (bootstrapped(3 + torch.randn(count, generator=draw).double()) for count in (10, 1000))
    for interval in (few, many):
        assert interval.low < interval.mean < interval.high
    # 2 x 1.96 standard errors of a thousand values of unit variance.
    assert many.high - many.low == pytest.approx(3.92 / 1000**0.5, rel=0.15)
    assert few.high - few.low > 5 * (many.high - many.low)


def test_equal_values_have_no_spread() -> None:
    interval = bootstrapped(torch.full((9,), 2.5, dtype=torch.float64))
    assert (interval.low, interval.mean, interval.high) == (2.5, 2.5, 2.5)


def test_files_are_told_apart() -> None:
    found = by_file(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 1, 0, 1]), ["a", "b", "absent"])
    assert {name: interval.mean for name, interval in found.items()} == {"all": 2.5, "a": 2.0, "b": 3.0}
