"""The loss and its gradient in closed form against autograd over the same definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_training import objective
from stitch_training.frozen_models import LOGIT_ROWS, teacher_of
from stitch_training.objective import Choice, Shortlist, head_loss, token_losses
from stitch_training.trace import TEACHER_TOKENS, Teacher
from tests.support.tiny_fit import tiny_pair

VOCABULARY, KEPT, TOKENS = 20, 5, 7


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, taught = (2 * torch.randn(TOKENS, VOCABULARY, generator=draw) for _ in range(2))
    return student, taught.log_softmax(1), torch.randint(VOCABULARY, (TOKENS,), generator=draw)


def kept_of(taught: Tensor) -> Teacher:
    logprobs, ids = taught.topk(KEPT)
    return Teacher(ids, logprobs)


def defined(logits: Tensor, taught: Tensor, following: Tensor, share: float) -> Tensor:
    """The definition, with everything beyond the kept tokens as one outcome."""
    kept, logprobs = kept_of(taught), logits.log_softmax(1)
    wanted = torch.cat([kept.logprobs.exp(), 1 - kept.logprobs.exp().sum(1, keepdim=True)], 1)
    of_kept = logprobs.gather(1, kept.ids)
    given = torch.cat([of_kept, (1 - of_kept.exp().sum(1, keepdim=True)).log()], 1)
    divergence = (wanted * (wanted.log() - given)).sum(1)
    return share * divergence + (1 - share) * F.cross_entropy(logits, following, reduction="none")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_loss_and_gradient_follow_the_definition(share: float) -> None:
    logits, taught, following = drawn()
    checked = logits.clone().requires_grad_()
    expected = defined(checked, taught, following, share)
    expected.sum().backward()
    losses, gradient = token_losses(logits.clone(), following, kept_of(taught), share)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, checked.grad, rtol=1e-4, atol=1e-5)


def test_a_student_that_says_the_same_has_nothing_to_learn() -> None:
    _, taught, following = drawn()
    losses, gradient = token_losses(taught.clone(), following, kept_of(taught), 1.0)
    assert losses.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-5


def test_the_head_loss_is_the_mean_over_tokens_that_have_a_follower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "LOGIT_ROWS", 8)
    pair = tiny_pair(tmp_path)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(pair.vocabulary, (2, 12), generator=draw)
    hidden = torch.randn(2, 12, pair.top.hidden_size, generator=draw).requires_grad_()
    teacher = teacher_of(pair.bottom, torch.randn(2, 12, pair.bottom.hidden_size, generator=draw), pair.vocabulary)
    loss = head_loss(pair.top, hidden, tokens, teacher, Choice(0.3, pair.vocabulary, 10**6, torch.Generator()))
    (3 * loss).backward()
    rows, following = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    known = Teacher(teacher.ids[:, :-1].flatten(0, 1), teacher.logprobs[:, :-1].flatten(0, 1))
    logits = pair.top.logits(rows)[:, : pair.vocabulary]
    losses, by_logits = token_losses(logits.detach().clone(), following, known, 0.3)
    expected = torch.autograd.grad(logits, hidden, 3 * by_logits / len(rows))[0]
    assert loss.item() == pytest.approx(float(losses.mean()), rel=1e-5)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-6)
    assert not hidden.grad[:, -1].any()


def test_the_teacher_keeps_the_likeliest_of_what_both_know(tmp_path: Path) -> None:
    model = tiny_pair(tmp_path).top
    hidden = torch.randn(1, LOGIT_ROWS + 3, model.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher = teacher_of(model, hidden, 50)
        logprobs = model.logits(hidden[0])[:, :50].log_softmax(1)
    assert teacher.ids.shape == (1, LOGIT_ROWS + 3, TEACHER_TOKENS)
    assert int(teacher.ids.max()) < 50
    torch.testing.assert_close(teacher.logprobs[0], logprobs.topk(TEACHER_TOKENS).values)


def test_a_shortlist_holds_all_named_tokens_and_a_sample_of_the_others() -> None:
    named = torch.tensor([[7, 3], [7, 19]])
    listed = Shortlist.drawn(named, VOCABULARY, 5, torch.Generator().manual_seed(0))
    assert len(listed.token_ids) == 3 + 5
    assert listed.token_ids.tolist() == sorted(set(listed.token_ids.tolist()))
    assert torch.equal(listed.token_ids[listed.places(named)], named)
    stands_for = listed.raised.exp().round(decimals=4).tolist()
    # 17 others, of which 5 stand for all.
    assert [round(share, 4) for share in stands_for].count(3.4) == 5
    assert not listed.raised[listed.places(named)].any()


def test_a_small_vocabulary_is_taken_whole() -> None:
    listed = Shortlist.drawn(torch.tensor([3]), VOCABULARY, VOCABULARY - 1, torch.Generator())
    assert listed.token_ids.tolist() == list(range(VOCABULARY))
    assert not listed.raised.any()


def test_a_sampled_normalizer_is_right_on_average() -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    draw, found = torch.Generator().manual_seed(1), []
    for _ in range(2000):
        listed = Shortlist.drawn(torch.tensor([5, 9]), 200, 20, draw)
        found.append((logits[listed.token_ids] + listed.raised).exp().sum())
    assert float(torch.stack(found).mean()) == pytest.approx(float(logits.exp().sum()), rel=0.02)


def test_the_loss_over_a_shortlist_is_close_to_that_over_all(tmp_path: Path) -> None:
    pair = tiny_pair(tmp_path)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(pair.vocabulary, (2, 12), generator=draw)
    hidden = torch.randn(2, 12, pair.top.hidden_size, generator=draw)
    teacher = teacher_of(pair.bottom, torch.randn(2, 12, pair.bottom.hidden_size, generator=draw), pair.vocabulary)

    def loss(sampled: int, seed: int) -> float:
        choice = Choice(0.0, pair.vocabulary, sampled, torch.Generator().manual_seed(seed))
        return float(head_loss(pair.top, hidden, tokens, teacher, choice))

    exact = loss(10**6, 0)
    estimates = [loss(8, seed) for seed in range(40)]
    assert len(set(estimates)) > 1
    assert sum(estimates) / 40 == pytest.approx(exact, rel=0.05)
