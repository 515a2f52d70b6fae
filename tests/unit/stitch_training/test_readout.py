"""Starts that aim at the bottom's answers: they say what the bottom says as far as a head can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_training.activations import Collected, Pass, collect
from stitch_training.frozen_models import Pair
from stitch_training.least_squares import AffineMap
from stitch_training.readout import SCALE, frequencies, readout, translation
from stitch_training.run_directory import Passes
from stitch_training.sums import ClosedForm
from tests.support.tiny_fit import BOTTOM_LAYERS, SEQUENCE_TOKENS, TOP_LAYERS, drawn_sequences, tiny_pair

CUTS = ((2, 1), (BOTTOM_LAYERS, 1))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair(tmp_path)


def collected(pair: Pair, folder: Path, count: int, seed: int) -> Collected:
    whole = Pass(folder.name, count, SEQUENCE_TOKENS, CUTS, "x")
    return collect(pair, whole, folder, drawn_sequences(count, seed), lambda done, of: None)


@pytest.fixture
def passes(pair: Pair, tmp_path: Path) -> Passes:
    return Passes(collected(pair, tmp_path / "training", 40, 0), collected(pair, tmp_path / "held-out", 8, 1))


def closed(passes: Passes) -> ClosedForm:
    return ClosedForm(passes.training.sums, passes.held_out.sums)


def distance(pair: Pair, passes: Passes, k: int, stitch: AffineMap) -> float:
    """Mean KL from the bottom's answers to those of the head behind the top's last layer, over held-out tokens."""
    trace, rows = passes.held_out.trace, torch.arange(passes.held_out.sequences)
    states = trace.hidden(k, rows).float() @ stitch.weight.float().T + stitch.bias.float()
    with torch.no_grad():
        found = pair.top.logits(pair.top.run(states, TOP_LAYERS - 1, TOP_LAYERS)[:, 1:].flatten(0, 1))
        wanted = pair.bottom.logits(trace.hidden(BOTTOM_LAYERS, rows)[:, 1:].flatten(0, 1).float())
    found, wanted = (logits[:, : pair.vocabulary].log_softmax(1) for logits in (found, wanted))
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


def silent(pair: Pair) -> AffineMap:
    """A stitch that says nothing of the token."""
    shape = pair.top.hidden_size, pair.bottom.hidden_size
    return AffineMap(torch.zeros(shape, dtype=torch.float64), torch.ones(shape[0], dtype=torch.float64))


@pytest.mark.parametrize("k", [2, BOTTOM_LAYERS])
def test_the_head_says_more_of_the_answers(pair: Pair, passes: Passes, k: int) -> None:
    stitch, _ = readout(pair, k, passes, closed(passes))
    assert distance(pair, passes, k, stitch) < 0.8 * distance(pair, passes, k, silent(pair))


def test_states_are_about_as_large_as_the_scale(pair: Pair, passes: Passes) -> None:
    stitch, _ = readout(pair, BOTTOM_LAYERS, passes, closed(passes))
    states = passes.training.trace.hidden(BOTTOM_LAYERS, torch.arange(40))[:, 1:].double()
    size = (states @ stitch.weight.T + stitch.bias).square().mean().sqrt()
    assert float(size) >= SCALE * 0.99


def test_a_head_is_translated_to_itself(pair: Pair) -> None:
    same = Pair(pair.top, pair.top, pair.vocabulary)
    shares = torch.full((pair.vocabulary,), 1 / pair.vocabulary)
    found = translation(same, shares).map
    rows = centred(pair.top.head_rows()[: pair.vocabulary].float())
    torch.testing.assert_close(rows @ found.float(), rows, rtol=0, atol=0.02 * float(rows.abs().max()))


def test_the_unseen_direction_moves_the_logits_least(pair: Pair) -> None:
    shares = torch.full((pair.vocabulary,), 1 / pair.vocabulary)
    unseen = translation(pair, shares).unseen.float()
    rows = centred(pair.top.head_rows()[: pair.vocabulary].float())
    others = F.normalize(torch.randn(50, len(unseen), generator=torch.Generator().manual_seed(0)), dim=1)
    assert float((rows @ unseen).norm()) < float((rows @ others.T).norm(dim=0).min())


def test_shares_are_those_of_the_answers(pair: Pair, passes: Passes) -> None:
    shares = frequencies(passes.training, pair.vocabulary)
    teacher = passes.training.trace.teacher(torch.arange(40))
    token = int(teacher.ids[..., 0].flatten().mode().values)
    expected = teacher.logprobs.exp()[teacher.ids == token].sum() / teacher.logprobs.exp().sum()
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(shares.min()) > 0
    assert float(shares[token]) == pytest.approx(float(expected), rel=0.02)


def centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)
