"""The loss of a stitch in training: divergence from the bottom model's distribution, and next-token cross-entropy.

For a token with the student's distribution s, the teacher's p and the next token t the loss is

    share * KL(p || s) + (1 - share) * -log s(t)

where p is known for its likeliest tokens K alone; all others count as one outcome, for p as for s. The gradient with
respect to the logits is s - share q - (1 - share) e_t, with q = p on K and q = s p(rest) / s(rest) elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stitch_training.models import LOGIT_TOKENS, FrozenModel
from stitch_training.trace import Teacher

_MIN_PROBABILITY = 1e-6


@dataclass(frozen=True)
class LossSettings:
    """The weight of the teacher against the text, and the tokens among which a step normalizes."""

    teacher_share: float
    vocabulary: int
    # Number of tokens drawn from those that neither the step's teacher nor its text contains.
    sampled: int
    generator: torch.Generator


def token_losses(logits: Tensor, following: Tensor, teacher: Teacher, teacher_share: float) -> tuple[Tensor, Tensor]:
    """Returns the loss `[tokens]` in nats and its gradient by the float32 logits `[tokens, vocabulary]`, in place.

    `following` `[tokens]` are the next tokens; the teacher's entries are `[tokens, kept]`.
    """
    logprobs = logits.sub_(logits.logsumexp(-1, keepdim=True))
    following_logprobs = logprobs.gather(1, following[:, None])
    kept_logprobs, target = logprobs.gather(1, teacher.ids), teacher.logprobs.exp()
    kept, (target_rest, rest) = kept_logprobs.exp(), _rests(kept_logprobs, teacher)
    divergence = _divergence(kept_logprobs, teacher)
    gradient = logprobs.exp_().mul_(1 - teacher_share * target_rest / rest)
    gradient.scatter_add_(1, teacher.ids, teacher_share * (target_rest / rest * kept - target))
    gradient.scatter_add_(1, following[:, None], torch.full_like(following_logprobs, teacher_share - 1))
    return teacher_share * divergence - (1 - teacher_share) * following_logprobs[:, 0], gradient


def _rests(kept_logprobs: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Returns what the teacher and the student give to all other tokens, both `[tokens, 1]`."""
    parts = ((1 - logprobs.exp().sum(1, keepdim=True)) for logprobs in (teacher.logprobs, kept_logprobs))
    target_rest, rest = (part.clamp(min=_MIN_PROBABILITY) for part in parts)
    return target_rest, rest


def _divergence(kept_logprobs: Tensor, teacher: Teacher) -> Tensor:
    """Returns KL(p || s) `[tokens]` from the student's logprobs of the teacher's tokens, `[tokens, kept]`."""
    target_rest, rest = _rests(kept_logprobs, teacher)
    named = (teacher.logprobs.exp() * (teacher.logprobs - kept_logprobs)).sum(1)
    return named + (target_rest * (target_rest / rest).log())[:, 0]


def divergence(logits: Tensor, teacher: Teacher) -> Tensor:
    """Returns KL(p || s) `[tokens]` in nats of float32 logits `[tokens, vocabulary]`."""
    return _divergence(logits.gather(1, teacher.ids) - logits.logsumexp(-1, keepdim=True), teacher)


@dataclass(frozen=True)
class Shortlist:
    """The tokens among which a step normalizes, and the offset of each token's logit.

    A head over 152 k tokens would take most of a step. All tokens that a step's teacher or text contains are in the
    list, and of the n others a sample of m, each representing n / m: exp(logit + log(n / m)) makes the normalizer's
    expectation exact (importance sampling; Bengio and Senécal 2003).
    """

    token_ids: Tensor
    offsets: Tensor

    @classmethod
    def draw(cls, named: Tensor, vocabulary: int, sampled: int, generator: torch.Generator) -> Shortlist:
        """Lists the `named` token ids, of any shape, and `sampled` others; the whole vocabulary where it is small."""
        is_named = torch.zeros(vocabulary, dtype=torch.bool)
        is_named[named.flatten()] = True
        others = (~is_named).nonzero()[:, 0]
        if sampled >= len(others):
            return cls(torch.arange(vocabulary), torch.zeros(vocabulary))
        is_listed = is_named.clone()
        is_listed[others[torch.randperm(len(others), generator=generator)[:sampled]]] = True
        token_ids = is_listed.nonzero()[:, 0]
        offset = torch.tensor(len(others) / sampled).log()
        return cls(token_ids, torch.where(is_named[token_ids], torch.zeros(()), offset))

    def to(self, device: torch.device) -> Shortlist:
        """Returns the same list on a device."""
        return Shortlist(self.token_ids.to(device), self.offsets.to(device))

    def indices(self, token_ids: Tensor) -> Tensor:
        """Returns the positions of named tokens in the list."""
        return torch.searchsorted(self.token_ids, token_ids)


@dataclass(frozen=True)
class Targets:
    """The next tokens and the teacher of a step's tokens, over a shortlist."""

    shortlist: Shortlist
    following: Tensor
    teacher: Teacher
    teacher_share: float


class _HeadLoss(torch.autograd.Function):
    """The mean loss after the head, chunk by chunk, so that the logits of only LOGIT_TOKENS tokens exist at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, model: FrozenModel, targets: Targets) -> Tensor:
        gradients, total, shortlist = [], torch.zeros((), device=states.device), targets.shortlist
        for start in range(0, len(states), LOGIT_TOKENS):
            chunk = slice(start, start + LOGIT_TOKENS)
            teacher = Teacher(shortlist.indices(targets.teacher.ids[chunk]), targets.teacher.logprobs[chunk])
            with torch.enable_grad():
                inputs = states[chunk].detach().requires_grad_()
                logits = model.logits(inputs, shortlist.token_ids)
            following = shortlist.indices(targets.following[chunk])
            shifted = logits.detach() + shortlist.offsets
            losses, gradient = token_losses(shifted, following, teacher, targets.teacher_share)
            gradients.append(torch.autograd.grad(logits, inputs, gradient)[0])
            total += losses.sum()
        ctx.save_for_backward(torch.cat(gradients) / len(states))
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None


def head_loss(
    model: FrozenModel, hidden: Tensor, tokens: Tensor, teacher: Teacher, counted: Tensor, settings: LossSettings
) -> Tensor:
    """Returns the mean loss over the next tokens that are `counted`, bool `[sequences, tokens - 1]`, of which one is.

    `hidden` are the last-layer states of `tokens` `[sequences, tokens]`, whose last one has no next token, on the
    model's device. All others are on the CPU: there the shortlist is drawn, so that every device trains on the same.
    """
    device, at = hidden.device, counted.nonzero(as_tuple=True)
    following = tokens[:, 1:][at]
    teacher = Teacher(teacher.ids[:, :-1][at], teacher.logprobs[:, :-1][at])
    named = torch.cat([following, teacher.ids.flatten()])
    shortlist = Shortlist.draw(named, settings.vocabulary, settings.sampled, settings.generator)
    targets = Targets(shortlist.to(device), following.to(device), teacher.to(device), settings.teacher_share)
    states = hidden[:, :-1][tuple(index.to(device) for index in at)]
    loss: Tensor = _HeadLoss.apply(states, model, targets)  # type: ignore[no-untyped-call]
    return loss
