"""The router that leaves the judgement to the first shard, which sees hidden states. Reads no artefact of its own."""

from __future__ import annotations

from router_gateway.routing.interface import Deferred, Judgement, Query
from stitch.routing.choice import reason
from stitch.v1 import shard_pb2


class ProbeRouter:
    """Defers every query: the shards' probe decides while the prompt is being computed."""

    def judge(self, query: Query) -> Deferred:
        return Deferred(query.routes)


def judgement_of(judged: shard_pb2.Judged) -> Judgement:
    """What a shard says of its probe, as every other judgement."""
    if judged.failure or len(judged.thresholds) != len(judged.gains) - 1:
        return Judgement(judged.route, 1.0, f"{judged.failure or 'no gains came'}, so the fallback", "fallback")
    # Of several routes the one that exceeds its threshold by most was taken.
    worth = [gain - threshold for gain, threshold in zip(judged.gains, (0.0, *judged.thresholds), strict=True)]
    why = reason("probe", judged.gains, judged.thresholds, worth.index(max(worth)))
    return Judgement(judged.route, judged.score, why, "probe")
