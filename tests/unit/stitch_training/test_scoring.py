"""Losses, divergences and greedy tokens of pipelines over a tiny pair, from tokens and from a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_training import scoring
from stitch_training.activations import PassResult, PassSettings, record
from stitch_training.data import LossOn, Role
from stitch_training.least_squares import AffineMap, CutPoint
from stitch_training.models import Pair
from stitch_training.objective import divergence
from stitch_training.scoring import (
    Slices,
    counted,
    mapping_of,
    stitched,
    tail_scores,
    text_scores,
    whole,
    whole_losses,
)
from stitch_training.trace import Teacher
from tests.support.tiny_fit import BOTTOM_LAYERS, SEQUENCE_TOKENS, drawn_sequences, tiny_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair(tmp_path)


def tokens() -> Tensor:
    return torch.tensor([sequence.token_ids for sequence in drawn_sequences(6)])


def test_losses_are_the_cross_entropies_of_next_tokens(pair: Pair) -> None:
    model, given = pair.bottom, tokens()
    with torch.no_grad():
        logits = model.logits(whole(model).states(given).flatten(0, 1)).view(6, SEQUENCE_TOKENS, -1)
    parts = [F.cross_entropy(row[:-1], ids[1:], reduction="none") for row, ids in zip(logits, given, strict=True)]
    expected = torch.stack(parts)
    torch.testing.assert_close(text_scores(whole(model), given).losses, expected, rtol=1e-5, atol=1e-5)


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


def test_likeliest_tokens_are_those_of_the_logits(pair: Pair) -> None:
    model = pair.bottom
    with torch.no_grad():
        expected = model.logits(whole(model).states(tokens()).flatten(0, 1)).argmax(1).view(6, -1)
    assert torch.equal(text_scores(whole(model), tokens()).likeliest, expected[:, :-1])


def test_slices_are_of_content_its_files_and_every_role() -> None:
    roles = torch.tensor([[Role.TEMPLATE, Role.USER, Role.ASSISTANT, Role.END], [Role.PLAIN] * 3 + [Role.SEPARATOR]])
    slices = Slices.of(roles, torch.tensor([1, 0]), ["a", "b", "absent"])
    found = {name: sample.mean() for name, sample in slices.samples(torch.tensor([[1.0, 2, 3], [4, 5, 6]])).items()}
    # The first token of a sequence follows none.
    assert found == {
        "content": 3,
        "a": 4.5,
        "b": 1.5,
        "separator": 6,
        "plain": 4.5,
        "user": 1,
        "assistant": 2,
        "end": 3,
    }


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("all", [True] * 5),
        ("content", [True, True, True, False, True]),
        ("assistant", [False, True, True, False, False]),
    ],
)
def test_counted_tokens_are_those_of_the_roles_in_training(loss_on: LossOn, expected: list[bool]) -> None:
    roles = torch.tensor([[Role.TEMPLATE, Role.USER, Role.ASSISTANT, Role.END, Role.SEPARATOR, Role.PLAIN]])
    assert counted(roles, loss_on).tolist() == [expected]


SEQUENCES = 6


def recorded(pair: Pair, folder: Path, cuts: tuple[CutPoint, ...]) -> PassResult:
    settings = PassSettings("held-out", SEQUENCES, SEQUENCE_TOKENS, cuts, "x")
    return record(pair, settings, folder, drawn_sequences(SEQUENCES), lambda done, total: None)


def test_tail_scores_match_the_stitched_pipeline(pair: Pair, tmp_path: Path) -> None:
    held = recorded(pair, tmp_path / "held-out", (CutPoint(2, 1),))
    draw = torch.Generator().manual_seed(0)
    stitch = AffineMap(torch.randn(32, 48, generator=draw).double(), torch.randn(32, generator=draw).double())
    tokens = held.trace.tokens(torch.arange(SEQUENCES))
    pipeline = stitched(pair, CutPoint(2, 1), stitch)
    # The trace keeps bfloat16.
    found = tail_scores(pair, held, CutPoint(2, 1), mapping_of(stitch))
    torch.testing.assert_close(found.losses, text_scores(pipeline, tokens).losses, rtol=0.03, atol=0.05)
    with torch.no_grad():
        logits = pair.top.logits(pipeline.states(tokens)[:, :-1].flatten(0, 1))[:, : pair.vocabulary]
    kept = held.trace.teacher(torch.arange(SEQUENCES))
    teacher = Teacher(kept.ids[:, :-1].flatten(0, 1), kept.logprobs[:, :-1].flatten(0, 1))
    expected = divergence(logits, teacher).view(SEQUENCES, -1)
    torch.testing.assert_close(found.divergences, expected, rtol=0.03, atol=0.05)
    torch.testing.assert_close(found.objective(0.25), 0.25 * found.divergences + 0.75 * found.losses)


@pytest.mark.parametrize(
    "cuts", [(CutPoint(2, 1),), (CutPoint(2, 1), CutPoint(BOTTOM_LAYERS, 1))], ids=["from tokens", "from the trace"]
)
def test_whole_losses_match_the_whole_models(pair: Pair, tmp_path: Path, cuts: tuple[CutPoint, ...]) -> None:
    held = recorded(pair, tmp_path / "held-out", cuts)
    tokens = held.trace.tokens(torch.arange(SEQUENCES))
    found = whole_losses(pair, held, tmp_path / "held-out")
    torch.testing.assert_close(found["bottom"], text_scores(whole(pair.bottom), tokens).losses, rtol=0.03, atol=0.05)
    torch.testing.assert_close(found["top"], text_scores(whole(pair.top), tokens).losses)


def test_whole_losses_are_computed_once_for_the_same_tokens(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = recorded(pair, tmp_path / "held-out", (CutPoint(2, 1),))
    first = whole_losses(pair, held, tmp_path / "held-out")
    monkeypatch.setattr(scoring, "text_scores", None)
    again = whole_losses(pair, held, tmp_path / "held-out")
    assert all(torch.equal(first[name], again[name]) for name in ("bottom", "top"))
    other = PassResult(held.sums, held.trace, held.sequences, "another fingerprint")
    with pytest.raises(TypeError):
        whole_losses(pair, other, tmp_path / "held-out")
