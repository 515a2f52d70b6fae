"""The router that leaves the judgement to the first shard, which sees hidden states. Reads no artefact of its own."""

from __future__ import annotations

from router_gateway.routing.router import DeferredDecision, Query, RouteDecision
from stitch.cluster import ClusterConfig
from stitch.thresholds import ReloadingThresholds, Thresholds, ThresholdSource, decision_reason
from stitch.v1 import shard_pb2


class ProbeRouter:
    """Defers every query: the shards' probe decides while the prompt is being computed.

    `thresholds` are the file that the shards decide by, where the gateway has it, too.
    """

    def __init__(self, thresholds: ThresholdSource | None = None) -> None:
        self._thresholds = thresholds

    @property
    def calibration(self) -> Thresholds | None:
        """What the shards' probe is calibrated to now; None where the gateway doesn't know."""
        if self._thresholds is None:
            return None
        self._thresholds.current()
        return self._thresholds.calibration

    def decide(self, query: Query) -> DeferredDecision:
        return DeferredDecision(query.routes)


def open_probe_router(cluster: ClusterConfig) -> ProbeRouter:
    """The router of a cluster with a probe; InvalidRequest where its thresholds are not those of these routes."""
    file = cluster.probe_thresholds_file
    if file is None or not file.exists():
        return ProbeRouter()
    return ProbeRouter(ReloadingThresholds(file, None, len(cluster.routes)))


def decision_of(judged: shard_pb2.ProbeDecision) -> RouteDecision:
    """What a shard's probe takes of all routes, as every other judgement."""
    route = judged.preferred or judged.route
    if judged.failure or len(judged.thresholds) != len(judged.gains) - 1:
        return RouteDecision(route, 1.0, f"{judged.failure or 'no gains came'}, so the fallback", "fallback")
    # Of several routes the one that exceeds its threshold by most was taken.
    worth = [gain - threshold for gain, threshold in zip(judged.gains, (0.0, *judged.thresholds), strict=True)]
    why = decision_reason("probe", judged.gains, judged.thresholds, worth.index(max(worth)))
    return RouteDecision(route, judged.score, why, "probe")
