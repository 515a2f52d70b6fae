"""Closed-form maps by which the top's head gives the bottom's distribution as far as it can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_training.activations import Passes, PassResult, PassSettings, record
from stitch_training.least_squares import AffineMap, ClosedForm, CutPoint
from stitch_training.models import Pair
from stitch_training.readout import SCALE, readout, token_shares, translate_head
from tests.support.tiny_fit import BOTTOM_LAYERS, SEQUENCE_TOKENS, TOP_LAYERS, drawn_sequences, tiny_pair

CUTS = (CutPoint(2, 1), CutPoint(BOTTOM_LAYERS, 1))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair(tmp_path)


def recorded(pair: Pair, folder: Path, count: int, seed: int) -> PassResult:
    whole = PassSettings(folder.name, count, SEQUENCE_TOKENS, CUTS, "x")
    return record(pair, whole, folder, drawn_sequences(count, seed), lambda done, total: None)


@pytest.fixture
def passes(pair: Pair, tmp_path: Path) -> Passes:
    return Passes(recorded(pair, tmp_path / "training", 40, 0), recorded(pair, tmp_path / "held-out", 8, 1))


def closed(passes: Passes) -> ClosedForm:
    return ClosedForm(passes.training.sums, passes.held_out.sums)


def distance(pair: Pair, passes: Passes, k: int, stitch: AffineMap) -> float:
    """Returns the mean KL from the bottom's distribution to that of the top's last layer, over held-out tokens."""
    trace, rows = passes.held_out.trace, torch.arange(passes.held_out.sequences)
    states = trace.hidden(k, rows).float() @ stitch.weight.float().T + stitch.bias.float()
    with torch.no_grad():
        found = pair.top.logits(pair.top.run(states, TOP_LAYERS - 1, TOP_LAYERS)[:, 1:].flatten(0, 1))
        wanted = pair.bottom.logits(trace.hidden(BOTTOM_LAYERS, rows)[:, 1:].flatten(0, 1).float())
    found, wanted = (logits[:, : pair.vocabulary].log_softmax(1) for logits in (found, wanted))
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


def constant(pair: Pair) -> AffineMap:
    """Returns a stitch whose output does not depend on the token."""
    shape = pair.top.hidden_size, pair.bottom.hidden_size
    return AffineMap(torch.zeros(shape, dtype=torch.float64), torch.ones(shape[0], dtype=torch.float64))


@pytest.mark.parametrize("k", [2, BOTTOM_LAYERS])
def test_readout_is_closer_to_the_bottom_than_a_constant(pair: Pair, passes: Passes, k: int) -> None:
    stitch, _ = readout(pair, k, passes, closed(passes))
    assert distance(pair, passes, k, stitch) < 0.8 * distance(pair, passes, k, constant(pair))


def test_readout_states_have_the_size_of_the_scale(pair: Pair, passes: Passes) -> None:
    stitch, _ = readout(pair, BOTTOM_LAYERS, passes, closed(passes))
    states = passes.training.trace.hidden(BOTTOM_LAYERS, torch.arange(40))[:, 1:].double()
    size = (states @ stitch.weight.T + stitch.bias).square().mean().sqrt()
    assert float(size) >= SCALE * 0.99


def test_head_is_translated_to_itself(pair: Pair) -> None:
    same = Pair(pair.top, pair.top, pair.vocabulary)
    shares = torch.full((pair.vocabulary,), 1 / pair.vocabulary)
    found = translate_head(same, shares).map
    rows = centred(pair.top.head_weight()[: pair.vocabulary].float())
    torch.testing.assert_close(rows @ found.float(), rows, rtol=0, atol=0.02 * float(rows.abs().max()))


def test_unseen_direction_changes_the_logits_least(pair: Pair) -> None:
    shares = torch.full((pair.vocabulary,), 1 / pair.vocabulary)
    unseen = translate_head(pair, shares).unseen.float()
    rows = centred(pair.top.head_weight()[: pair.vocabulary].float())
    others = F.normalize(torch.randn(50, len(unseen), generator=torch.Generator().manual_seed(0)), dim=1)
    assert float((rows @ unseen).norm()) < float((rows @ others.T).norm(dim=0).min())


def test_token_shares_are_mean_teacher_probabilities(pair: Pair, passes: Passes) -> None:
    shares = token_shares(passes.training, pair.vocabulary)
    teacher = passes.training.trace.teacher(torch.arange(40))
    token = int(teacher.ids[..., 0].flatten().mode().values)
    expected = teacher.logprobs.exp()[teacher.ids == token].sum() / teacher.logprobs.exp().sum()
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(shares.min()) > 0
    assert float(shares[token]) == pytest.approx(float(expected), rel=0.02)


def centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)
