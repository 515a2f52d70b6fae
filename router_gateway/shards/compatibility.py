"""What all shards of a cluster must have in common, so that a replay elsewhere says the same. Knows no address."""

from __future__ import annotations

from collections.abc import Iterator

from stitch.v1 import shard_pb2


class CompatibilityCheck:
    """The first shard that states a fact settles it, for as long as the gateway and its tokenizer live."""

    def __init__(self) -> None:
        self._settled: dict[str, str] = {}

    def objection(self, identity: shard_pb2.ShardIdentity) -> str | None:
        """Why this shard does not belong to the others, naming both sides; None where it does."""
        for fact, stated in _facts(identity):
            settled = self._settled.setdefault(fact, stated)
            if stated != settled:
                return f"its {fact} is {stated}, but the other shards have {settled}"
        return None


def _facts(identity: shard_pb2.ShardIdentity) -> Iterator[tuple[str, str]]:
    """Fingerprints that the shard knows; it may not know all."""
    facts = [
        ("tokenizer", identity.tokenizer),
        ("bottom model", identity.bottom.revision),
        ("top model", identity.top.revision),
        ("probe", identity.probe),
        *((f"stitch of route {route.name}", route.stitch) for route in identity.routes),
    ]
    return ((fact, stated) for fact, stated in facts if stated)
