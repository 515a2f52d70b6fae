"""What a stitch is trained for: the bottom model's distribution and the next token. Knows no optimizer.

For a token with the student's distribution s, the teacher's p and the following token t the loss is

    share * KL(p || s) + (1 - share) * -log s(t)

where p is known for its likeliest tokens K alone; all others count as one outcome, for p as for s. The gradient by
the logits is s - share q - (1 - share) e_t, with q = p on K and q = s p(rest) / s(rest) elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stitch_training.frozen_models import LOGIT_ROWS, FrozenModel
from stitch_training.trace import Teacher

_LEAST = 1e-6


@dataclass(frozen=True)
class Choice:
    """How a step weighs teacher against text, and among which tokens it normalizes."""

    teacher_share: float
    vocabulary: int
    # Of the tokens that neither teacher nor text of the step names.
    sampled: int
    draw: torch.Generator


def token_losses(logits: Tensor, following: Tensor, teacher: Teacher, teacher_share: float) -> tuple[Tensor, Tensor]:
    """Loss `[tokens]` in nats and its gradient by float32 logits `[tokens, vocabulary]`, which it is written over.

    `following` `[tokens]` are the tokens that came next; the teacher's entries are `[tokens, kept]`.
    """
    logprobs = logits.sub_(logits.logsumexp(-1, keepdim=True))
    of_following = logprobs.gather(1, following[:, None])
    of_kept, wanted = logprobs.gather(1, teacher.ids), teacher.logprobs.exp()
    kept = of_kept.exp()
    wanted_rest = (1 - wanted.sum(1, keepdim=True)).clamp(min=_LEAST)
    rest = (1 - kept.sum(1, keepdim=True)).clamp(min=_LEAST)
    divergence = (wanted * (teacher.logprobs - of_kept)).sum(1) + (wanted_rest * (wanted_rest / rest).log())[:, 0]
    gradient = logprobs.exp_().mul_(1 - teacher_share * wanted_rest / rest)
    gradient.scatter_add_(1, teacher.ids, teacher_share * (wanted_rest / rest * kept - wanted))
    gradient.scatter_add_(1, following[:, None], torch.full_like(of_following, teacher_share - 1))
    return teacher_share * divergence - (1 - teacher_share) * of_following[:, 0], gradient


@dataclass(frozen=True)
class Shortlist:
    """The tokens among which a step normalizes, and what the logit of each is raised by.

    A head over 152 k tokens would take most of a step. All tokens that a step's teacher or text names are in the
    list, and of the n others a sample of m, each standing for n / m: exp(logit + log(n / m)) makes the normalizer's
    expectation exact (importance sampling; Bengio and Senécal 2003).
    """

    token_ids: Tensor
    raised: Tensor

    @classmethod
    def drawn(cls, named: Tensor, vocabulary: int, sampled: int, draw: torch.Generator) -> Shortlist:
        """`named` tokens of any shape, and `sampled` of the others; the whole vocabulary where that is no more."""
        is_named = torch.zeros(vocabulary, dtype=torch.bool)
        is_named[named.flatten()] = True
        others = (~is_named).nonzero()[:, 0]
        if sampled >= len(others):
            return cls(torch.arange(vocabulary), torch.zeros(vocabulary))
        is_listed = is_named.clone()
        is_listed[others[torch.randperm(len(others), generator=draw)[:sampled]]] = True
        token_ids = is_listed.nonzero()[:, 0]
        stands_for = torch.tensor(len(others) / sampled).log()
        return cls(token_ids, torch.where(is_named[token_ids], torch.zeros(()), stands_for))

    def places(self, token_ids: Tensor) -> Tensor:
        """Where in the list named tokens stand."""
        return torch.searchsorted(self.token_ids, token_ids)


@dataclass(frozen=True)
class Wanted:
    """What the rows of a step are to say, over a shortlist."""

    shortlist: Shortlist
    following: Tensor
    teacher: Teacher
    teacher_share: float


class _HeadLoss(torch.autograd.Function):
    """Mean loss behind the head, in parts, so that only LOGIT_ROWS rows of logits exist at a time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, model: FrozenModel, wanted: Wanted) -> Tensor:
        gradients, total, listed = [], torch.zeros(()), wanted.shortlist
        for start in range(0, len(rows), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            teacher = Teacher(listed.places(wanted.teacher.ids[part]), wanted.teacher.logprobs[part])
            with torch.enable_grad():
                inputs = rows[part].detach().requires_grad_()
                logits = model.logits(inputs, listed.token_ids)
            following = listed.places(wanted.following[part])
            losses, gradient = token_losses(logits.detach() + listed.raised, following, teacher, wanted.teacher_share)
            gradients.append(torch.autograd.grad(logits, inputs, gradient)[0])
            total += losses.sum()
        ctx.save_for_backward(torch.cat(gradients) / len(rows))
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None


def head_loss(model: FrozenModel, hidden: Tensor, tokens: Tensor, teacher: Teacher, choice: Choice) -> Tensor:
    """Mean loss over sequences of `tokens` `[sequences, tokens]`, whose last layer gave `hidden`.

    A sequence's last token has none that follows, so it does not count.
    """
    rows, following = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    known = Teacher(teacher.ids[:, :-1].flatten(0, 1), teacher.logprobs[:, :-1].flatten(0, 1))
    named = torch.cat([following, known.ids.flatten()])
    shortlist = Shortlist.drawn(named, choice.vocabulary, choice.sampled, choice.draw)
    loss: Tensor = _HeadLoss.apply(rows, model, Wanted(shortlist, following, known, choice.teacher_share))  # type: ignore[no-untyped-call]
    return loss
