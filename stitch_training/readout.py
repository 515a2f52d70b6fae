"""A start that aims at the bottom model's answers instead of the top model's states. Knows no layer between the two.

The bottom's logits are those of x̂, its last state over that state's root mean square. With the rows a(v) of its head
and h(v) of the top's (final norm's gains multiplied in, both centred with the mean shares p(v) of the tokens in the
bottom's answers), the map that makes the top's head say the same is

    M = argmin Σ p(v) |Mᵀ h(v) - a(v)|² = (Σ p h hᵀ + ε I)⁻¹ Σ p h aᵀ

A stitch behind layer k is then s (M (V x + c) + β u), where V, c is the ridge regression of x̂ on the state x. The
top's final norm makes every state equally large, which would sharpen or blunt the answers, so β u, along the direction
u that its head sees least, fills up what is missing of a mean square of one. The factor s makes the state so large that
what the layers in between add to it drowns: a closed form for the shortest tail, one layer and the head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from stitch_training.activations import Collected
from stitch_training.frozen_models import Pair
from stitch_training.least_squares import AffineMap, RidgeFit, fit_ridge
from stitch_training.moments import Cross
from stitch_training.run_directory import Passes
from stitch_training.scoring import BATCH_SEQUENCES
from stitch_training.sums import ClosedForm

# s above. A layer adds about 1.5 to each channel of a state whose channels are about s.
SCALE = 64.0
# ε above, as a share of the mean eigenvalue.
HEAD_RIDGE = 1e-3
# The probability, over the whole vocabulary, of tokens that the teacher never named.
UNNAMED_SHARE = 1e-2
VOCABULARY_ROWS = 16384
_EPSILON = 1e-6


@dataclass(frozen=True)
class Translation:
    """From the bottom's head to the top's, float64."""

    # M `[top's width, bottom's width]`.
    map: Tensor
    # u `[top's width]`.
    unseen: Tensor


def readout(pair: Pair, k: int, passes: Passes, closed: ClosedForm) -> tuple[AffineMap, RidgeFit]:
    """The stitch behind `k` layers whose states the top's head reads as the bottom's answers; its ridge regression.

    Both traces must have depth `k` and the bottom's last.
    """
    last, training, held = pair.bottom.depth, passes.training, passes.held_out
    answers = fit_ridge(
        closed.spread(k), _cross(training, k, last), training.sums.grams[k], held.sums.grams[k], _cross(held, k, last)
    )
    if k == last:
        answers = replace(answers, map=_over_mean_size(closed, k))
    between = translation(pair, frequencies(training, pair.vocabulary))
    weight, bias = between.map @ answers.map.weight, between.map @ answers.map.bias
    mean = weight @ closed.spread(k).mean + bias
    bias = bias + _missing(closed.mean_square(k, weight, bias), mean, between.unseen) * between.unseen
    return AffineMap(SCALE * weight, SCALE * bias), answers


def _over_mean_size(closed: ClosedForm, k: int) -> AffineMap:
    """x over its root mean square on the whole: behind the last layer the direction is known and must not be bent."""
    width = len(closed.spread(k).mean)
    identity, none = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    return AffineMap(identity / sqrt(closed.mean_square(k, identity, none) / width), none)


def _cross(data: Collected, k: int, last: int) -> Cross:
    """The sums of states behind `k` layers with x̂, without first tokens, out of a trace."""
    width = data.trace.shape.hidden_size
    cross = Cross(width, width)
    for rows in torch.split(torch.arange(data.sequences), BATCH_SEQUENCES):
        normed = torch.nn.functional.rms_norm(data.trace.hidden(last, rows)[:, 1:].float(), (width,), None, _EPSILON)
        cross.add(data.trace.hidden(k, rows)[:, 1:].flatten(0, 1), normed.flatten(0, 1))
    return cross


def frequencies(data: Collected, vocabulary: int) -> Tensor:
    """The mean share `[vocabulary]` of each token in the bottom's answers, float32."""
    shares = torch.zeros(vocabulary)
    for rows in torch.split(torch.arange(data.sequences), BATCH_SEQUENCES):
        teacher = data.trace.teacher(rows)
        shares.index_add_(0, teacher.ids.flatten(), teacher.logprobs.exp().flatten())
    return (1 - UNNAMED_SHARE) * shares / shares.sum() + UNNAMED_SHARE / vocabulary


def translation(pair: Pair, shares: Tensor) -> Translation:
    """M and u for tokens of these `shares` `[vocabulary]`."""
    bottom, top = pair.bottom.head_rows(), pair.top.head_rows()
    means = _weighted(bottom, shares), _weighted(top, shares)
    products = torch.zeros(len(means[1]), len(means[0]), dtype=torch.float64)
    gram = torch.zeros(len(means[1]), len(means[1]), dtype=torch.float64)
    for ids in torch.split(torch.arange(len(shares)), VOCABULARY_ROWS):
        rows = top[ids].float() - means[1]
        heavy = (rows * shares[ids, None]).T
        gram += heavy @ rows
        products += heavy @ (bottom[ids].float() - means[0])
    values, vectors = torch.linalg.eigh(gram)
    damped = values + HEAD_RIDGE * values.mean()
    return Translation(vectors / damped @ vectors.T @ products, vectors[:, 0])


def _weighted(rows: Tensor, shares: Tensor) -> Tensor:
    parts = torch.split(torch.arange(len(shares)), VOCABULARY_ROWS)
    return torch.stack([shares[ids] @ rows[ids].float() for ids in parts]).sum(0)


def _missing(mean_square: float, mean: Tensor, unseen: Tensor) -> float:
    """β: added along `unseen`, it makes the mean square of states of that `mean` one; none where it is more."""
    along = float(mean @ unseen)
    lacking = len(mean) - mean_square
    return sqrt(along * along + lacking) - along if lacking > 0 else 0.0
