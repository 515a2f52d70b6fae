"""A first, honest router: visible features, hand-set weights, a logistic score. Knows no labels and learns nothing.

score = 1 / (1 + exp(-(BIAS + sum of WEIGHTS[f] x f))), each feature f in [0, 1]

The weights are set by hand, not learned: a short question of fact comes out near 0.2, one clear sign of hard work
lifts it by 0.1 to 0.2, and a long text with several of them comes out near 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from router_gateway.routing.features import Feature, features
from router_gateway.routing.router import Ladder, Query, ReasonKind, RouteDecision

BIAS = -2.2
WEIGHTS: Mapping[str, float] = {
    "length": 2.4,
    "turns": 0.6,
    "code": 1.4,
    "numbers": 0.9,
    "maths": 1.0,
    "reasoning": 1.6,
    "choice": 0.8,
    "constraints": 1.0,
}

# A reason names the features that weigh most, and no more than these.
SHOWN_FEATURES = 3


class HeuristicRouter:
    """Scores a query by its features and looks the score up on the ladder."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder

    def decide(self, query: Query) -> RouteDecision:
        found = features(query.turns)
        score = logistic(BIAS + sum(_weight(feature) for feature in found))
        route, compared = self._ladder.pick(score, query.routes)
        return RouteDecision(route, score, f"{_shown(found)}: {compared}", _kind(found))


def logistic(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit))


def _weight(feature: Feature) -> float:
    return WEIGHTS[feature.name] * feature.value


def _shown(found: Sequence[Feature]) -> str:
    length, *content = found
    heaviest = sorted((feature for feature in content if feature.value), key=_weight, reverse=True)
    return ", ".join(feature.shown for feature in [length, *heaviest[: SHOWN_FEATURES - 1]])


def _kind(found: Sequence[Feature]) -> ReasonKind:
    """Whether the length or everything else weighs more."""
    length, *content = found
    return "length" if _weight(length) >= sum(map(_weight, content)) else "content"
