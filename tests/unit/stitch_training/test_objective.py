"""The loss and its closed-form gradient against autograd over the same definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_training import objective
from stitch_training.models import LOGIT_TOKENS, teacher_of
from stitch_training.objective import LossSettings, Shortlist, divergence, head_loss, token_losses
from stitch_training.trace import TEACHER_TOKENS, Teacher
from tests.support.tiny_fit import tiny_pair

VOCABULARY, KEPT, TOKENS = 20, 5, 7


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, teacher_logprobs = (2 * torch.randn(TOKENS, VOCABULARY, generator=draw) for _ in range(2))
    return student, teacher_logprobs.log_softmax(1), torch.randint(VOCABULARY, (TOKENS,), generator=draw)


def kept_of(teacher_logprobs: Tensor) -> Teacher:
    logprobs, ids = teacher_logprobs.topk(KEPT)
    return Teacher(ids, logprobs)


def defined(logits: Tensor, teacher_logprobs: Tensor, following: Tensor, share: float) -> Tensor:
    """The definition, with everything beyond the kept tokens as one outcome."""
    kept, logprobs = kept_of(teacher_logprobs), logits.log_softmax(1)
    wanted = torch.cat([kept.logprobs.exp(), 1 - kept.logprobs.exp().sum(1, keepdim=True)], 1)
    of_kept = logprobs.gather(1, kept.ids)
    given = torch.cat([of_kept, (1 - of_kept.exp().sum(1, keepdim=True)).log()], 1)
    divergence = (wanted * (wanted.log() - given)).sum(1)
    return share * divergence + (1 - share) * F.cross_entropy(logits, following, reduction="none")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_token_losses_match_the_definition_and_autograd(share: float) -> None:
    logits, teacher_logprobs, following = drawn()
    checked = logits.clone().requires_grad_()
    expected = defined(checked, teacher_logprobs, following, share)
    expected.sum().backward()
    losses, gradient = token_losses(logits.clone(), following, kept_of(teacher_logprobs), share)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, checked.grad, rtol=1e-4, atol=1e-5)


def test_equal_distributions_have_no_loss_and_no_gradient() -> None:
    _, teacher_logprobs, following = drawn()
    losses, gradient = token_losses(teacher_logprobs.clone(), following, kept_of(teacher_logprobs), 1.0)
    assert losses.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("share_counted", [1.0, 0.4])
def test_head_loss_is_the_mean_over_next_tokens_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share_counted: float
) -> None:
    monkeypatch.setattr(objective, "LOGIT_TOKENS", 8)
    counted = torch.rand(2, 11, generator=torch.Generator().manual_seed(5)) < share_counted
    pair = tiny_pair(tmp_path)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(pair.vocabulary, (2, 12), generator=draw)
    hidden = torch.randn(2, 12, pair.top.hidden_size, generator=draw).requires_grad_()
    teacher = teacher_of(pair.bottom, torch.randn(2, 12, pair.bottom.hidden_size, generator=draw), pair.vocabulary)
    settings = LossSettings(0.3, pair.vocabulary, 10**6, torch.Generator())
    loss = head_loss(pair.top, hidden, tokens, teacher, counted, settings)
    (3 * loss).backward()
    rows, following = hidden[:, :-1][counted], tokens[:, 1:][counted]
    shifted = Teacher(teacher.ids[:, :-1][counted], teacher.logprobs[:, :-1][counted])
    logits = pair.top.logits(rows)[:, : pair.vocabulary]
    losses, by_logits = token_losses(logits.detach().clone(), following, shifted, 0.3)
    expected = torch.autograd.grad(logits, hidden, 3 * by_logits / len(rows))[0]
    assert loss.item() == pytest.approx(float(losses.mean()), rel=1e-5)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-6)
    assert not hidden.grad[:, -1].any()
    assert not hidden.grad[:, :-1][~counted].any()


def test_divergence_is_the_loss_of_the_teacher_alone() -> None:
    logits, teacher_logprobs, following = drawn()
    expected, _ = token_losses(logits.clone(), following, kept_of(teacher_logprobs), 1.0)
    found = divergence(logits, kept_of(teacher_logprobs))
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()


def test_teacher_keeps_the_likeliest_common_tokens(tmp_path: Path) -> None:
    model = tiny_pair(tmp_path).top
    hidden = torch.randn(1, LOGIT_TOKENS + 3, model.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher = teacher_of(model, hidden, 50)
        logprobs = model.logits(hidden[0])[:, :50].log_softmax(1)
    assert teacher.ids.shape == (1, LOGIT_TOKENS + 3, TEACHER_TOKENS)
    assert int(teacher.ids.max()) < 50
    torch.testing.assert_close(teacher.logprobs[0], logprobs.topk(TEACHER_TOKENS).values)


def test_shortlist_has_all_named_tokens_and_a_sample_of_the_others() -> None:
    named = torch.tensor([[7, 3], [7, 19]])
    shortlist = Shortlist.draw(named, VOCABULARY, 5, torch.Generator().manual_seed(0))
    assert len(shortlist.token_ids) == 3 + 5
    assert shortlist.token_ids.tolist() == sorted(set(shortlist.token_ids.tolist()))
    assert torch.equal(shortlist.token_ids[shortlist.indices(named)], named)
    weights = shortlist.offsets.exp().round(decimals=4).tolist()
    # 17 others, of which 5 represent all.
    assert [round(share, 4) for share in weights].count(3.4) == 5
    assert not shortlist.offsets[shortlist.indices(named)].any()


def test_shortlist_of_a_small_vocabulary_is_complete() -> None:
    shortlist = Shortlist.draw(torch.tensor([3]), VOCABULARY, VOCABULARY - 1, torch.Generator())
    assert shortlist.token_ids.tolist() == list(range(VOCABULARY))
    assert not shortlist.offsets.any()


def test_sampled_normalizer_is_unbiased() -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    draw, found = torch.Generator().manual_seed(1), []
    for _ in range(2000):
        shortlist = Shortlist.draw(torch.tensor([5, 9]), 200, 20, draw)
        found.append((logits[shortlist.token_ids] + shortlist.offsets).exp().sum())
    assert float(torch.stack(found).mean()) == pytest.approx(float(logits.exp().sum()), rel=0.02)


def test_loss_over_a_shortlist_approximates_the_full_loss(tmp_path: Path) -> None:
    pair = tiny_pair(tmp_path)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(pair.vocabulary, (2, 12), generator=draw)
    hidden = torch.randn(2, 12, pair.top.hidden_size, generator=draw)
    teacher = teacher_of(pair.bottom, torch.randn(2, 12, pair.bottom.hidden_size, generator=draw), pair.vocabulary)

    def loss(sampled: int, seed: int) -> float:
        choice = LossSettings(0.0, pair.vocabulary, sampled, torch.Generator().manual_seed(seed))
        return float(head_loss(pair.top, hidden, tokens, teacher, torch.ones(2, 11, dtype=torch.bool), choice))

    exact = loss(10**6, 0)
    estimates = [loss(8, seed) for seed in range(40)]
    assert len(set(estimates)) > 1
    assert sum(estimates) / 40 == pytest.approx(exact, rel=0.05)
