"""A closed-form map that targets the bottom model's output distribution instead of the top model's hidden states.

The bottom's logits are those of x̂, its last state over that state's root mean square. With the rows a(v) of its head
and h(v) of the top's (final norm's gains multiplied in, both centred with the mean probabilities p(v) in the
bottom's distributions), the map by which the top's head produces the same logits is

    M = argmin Σ p(v) |Mᵀ h(v) - a(v)|² = (Σ p h hᵀ + ε I)⁻¹ Σ p h aᵀ

A stitch after layer k is then s (M (V x + c) + β u), where V, c is the ridge regression of x̂ on the state x. The top's
final norm makes every state equally large, which would sharpen or flatten the distribution, so β u, along the direction
u to which its head is least sensitive, completes the mean square to one. The factor s makes the state so large that
what the layers in between add to it is negligible: a closed form for the shortest tail, one layer and the head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from stitch_training.activations import Passes, PassResult
from stitch_training.device import CPU_BATCH_SEQUENCES, batch_sequences
from stitch_training.least_squares import AffineMap, ClosedForm, Cross, RidgeFit, fit_ridge, identity_map
from stitch_training.models import Pair

# s above. A layer adds about 1.5 to each channel of a state whose channels are about s.
SCALE = 64.0
# ε above, as a share of the mean eigenvalue.
HEAD_RIDGE = 1e-3
# The probability mass, spread over the whole vocabulary, for tokens outside of the teacher's likeliest ones.
UNNAMED_SHARE = 1e-2
# Vocabulary entries whose head rows are in memory in float32 at a time.
VOCABULARY_ROWS = 16384
_EPSILON = 1e-6


@dataclass(frozen=True)
class HeadTranslation:
    """Maps the input of the bottom's head to the input of the top's, float64."""

    # M `[top hidden, bottom hidden]`.
    map: Tensor
    # u `[top hidden]`.
    unseen: Tensor


def readout(pair: Pair, k: int, passes: Passes, closed: ClosedForm) -> tuple[AffineMap, RidgeFit]:
    """Returns the stitch after `k` layers by which the top's head produces the bottom's logits, and its regression.

    Both traces must have depth `k` and the bottom's last depth.
    """
    last, training, held = pair.bottom.depth, passes.training, passes.held_out
    regression = fit_ridge(
        closed.spread(k), _cross(training, k, last), training.sums.grams[k], held.sums.grams[k], _cross(held, k, last)
    )
    if k == last:
        regression = replace(regression, map=_normalized(closed, k))
    heads = translate_head(pair, token_shares(training, pair.vocabulary))
    weight, bias = heads.map @ regression.map.weight, heads.map @ regression.map.bias
    mean = weight @ closed.spread(k).mean + bias
    bias = bias + _missing(closed.mean_square(k, weight, bias), mean, heads.unseen) * heads.unseen
    return AffineMap(SCALE * weight, SCALE * bias), regression


def _normalized(closed: ClosedForm, k: int) -> AffineMap:
    """Returns x over its root mean square over all tokens; after the last layer, the state's direction is kept."""
    width = len(closed.spread(k).mean)
    identity, none = (whole := identity_map(width, closed.spread(k).mean.device)).weight, whole.bias
    return AffineMap(identity / sqrt(closed.mean_square(k, identity, none) / width), none)


def _cross(data: PassResult, k: int, last: int) -> Cross:
    """Sums, from a trace, the states after `k` layers with x̂, without first tokens."""
    width, device = data.trace.shape.hidden_size, data.sums.grams[k].total.device
    cross = Cross(width, width, device)
    for rows in torch.split(torch.arange(data.sequences), batch_sequences(device)):
        targets, states = (data.trace.hidden(depth, rows)[:, 1:].to(device) for depth in (last, k))
        normed = torch.nn.functional.rms_norm(targets.float(), (width,), None, _EPSILON)
        cross.add(states.flatten(0, 1), normed.flatten(0, 1))
    return cross


def token_shares(data: PassResult, vocabulary: int) -> Tensor:
    """Returns the mean probability `[vocabulary]` of each token in the bottom's distributions, float32 on the CPU."""
    shares = torch.zeros(vocabulary)
    for rows in torch.split(torch.arange(data.sequences), CPU_BATCH_SEQUENCES):
        teacher = data.trace.teacher(rows)
        shares.index_add_(0, teacher.ids.flatten(), teacher.logprobs.exp().flatten())
    return (1 - UNNAMED_SHARE) * shares / shares.sum() + UNNAMED_SHARE / vocabulary


def translate_head(pair: Pair, shares: Tensor) -> HeadTranslation:
    """Solves M and u for tokens of these mean probabilities `shares` `[vocabulary]`."""
    bottom, top, shares = pair.bottom.head_weight(), pair.top.head_weight(), shares.to(pair.device)
    means = _weighted_mean(bottom, shares), _weighted_mean(top, shares)
    products = torch.zeros(len(means[1]), len(means[0]), dtype=torch.float64, device=pair.device)
    gram = torch.zeros(len(means[1]), len(means[1]), dtype=torch.float64, device=pair.device)
    for ids in torch.split(torch.arange(len(shares), device=pair.device), VOCABULARY_ROWS):
        rows = top[ids].float() - means[1]
        weighted = (rows * shares[ids, None]).T
        gram += weighted @ rows
        products += weighted @ (bottom[ids].float() - means[0])
    values, vectors = torch.linalg.eigh(gram)
    damped = values + HEAD_RIDGE * values.mean()
    return HeadTranslation(vectors / damped @ vectors.T @ products, vectors[:, 0])


def _weighted_mean(rows: Tensor, shares: Tensor) -> Tensor:
    parts = torch.split(torch.arange(len(shares), device=shares.device), VOCABULARY_ROWS)
    return torch.stack([shares[ids] @ rows[ids].float() for ids in parts]).sum(0)


def _missing(mean_square: float, mean: Tensor, unseen: Tensor) -> float:
    """Returns β, which along `unseen` completes the mean square of states of that `mean` to one; 0 where it is more."""
    along = float(mean @ unseen)
    missing = len(mean) - mean_square
    return sqrt(along * along + missing) - along if missing > 0 else 0.0
