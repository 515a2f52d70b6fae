"""The router of a cluster with a probe: it defers every query to the first shard, which sees hidden states.

The shard's `ProbeDecision` comes back with its first reply and becomes a `RouteDecision` here.
"""

from __future__ import annotations

from router_gateway.routing.router import DeferredDecision, Query, RouteDecision
from stitch.cluster import ClusterConfig
from stitch.thresholds import ReloadingThresholds, Thresholds, ThresholdSource, decision_reason
from stitch.v1 import shard_pb2


class ProbeRouter:
    """Defers every query: the probe decides while the first shard computes the prompt.

    `thresholds` are read from the file that the shards decide by, where the gateway has it too.
    """

    def __init__(self, thresholds: ThresholdSource | None = None) -> None:
        self._thresholds = thresholds

    @property
    def calibration(self) -> Thresholds | None:
        """The calibration of the shards' probe; None where the gateway does not have it."""
        if self._thresholds is None:
            return None
        self._thresholds.current()
        return self._thresholds.calibration

    def decide(self, query: Query) -> DeferredDecision:
        return DeferredDecision(query.routes)


def open_probe_router(cluster: ClusterConfig) -> ProbeRouter:
    """The router of a cluster with a probe. Raises InvalidRequest where its thresholds are for other routes."""
    file = cluster.probe_thresholds_file
    if file is None or not file.exists():
        return ProbeRouter()
    return ProbeRouter(ReloadingThresholds(file, None, len(cluster.routes)))


def from_probe(message: shard_pb2.ProbeDecision) -> RouteDecision:
    """The probe's choice among all routes, also where the request's objectives exclude it."""
    route = message.preferred or message.route
    if message.failure or len(message.thresholds) != len(message.gains) - 1:
        reason = f"{message.failure or 'the shard sent no gains'}, so the fallback"
        return RouteDecision(route, 1.0, reason, "fallback")
    # The probe chose the route whose gain exceeds its threshold by most.
    excess = [gain - threshold for gain, threshold in zip(message.gains, (0.0, *message.thresholds), strict=True)]
    reason = decision_reason("probe", message.gains, message.thresholds, excess.index(max(excess)))
    return RouteDecision(route, message.score, reason, "probe")
