"""What all shards of a cluster must have in common, so that a replay on another chain gives the same tokens.

In: the identities of the shards that serve. Out: for each fact the value that counts now, and the shards that differ
from it. Where shards contradict each other, those values count with which most routes have a shard for every stage,
then those that most shards state, then those that counted before. Nothing is settled for good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import NamedTuple

from stitch.cluster import ClusterConfig
from stitch.v1 import inference_pb2, shard_pb2

# Combinations of values that are compared at most; two shards that differ in everything have fewer.
MAX_COMBINATIONS = 4096
# A shard whose sessions fail counts less than one that answers.
WEIGHT, EJECTED_WEIGHT = 2, 1


class Fact(NamedTuple):
    """Something that shards state of themselves; `route` is empty where it holds for all routes."""

    name: str
    route: str = ""

    def __str__(self) -> str:
        return f"{self.name} of route {self.route}" if self.route else self.name


Facts = Mapping[Fact, str]
TOKENIZER = Fact("tokenizer")


@dataclass(frozen=True, slots=True)
class Voter:
    """A shard that serves."""

    name: str
    facts: Facts
    # Whether new sessions may be placed on it.
    accepts_requests: bool
    ejected: bool


@dataclass(slots=True)
class CompatibilityCheck:
    """The facts that count, by `update`."""

    cluster: ClusterConfig
    # Kept for a fact that no shard states at the moment.
    facts: Facts = field(default_factory=dict)
    _supporters: dict[Fact, list[str]] = field(default_factory=dict)

    def facts_of(self, identity: shard_pb2.ShardIdentity) -> Facts:
        """The facts that a shard states; what it does not know is empty and left out."""
        one_model = any(route.joins_models and route.stitch is None for route in self.cluster.routes)
        stated = {
            TOKENIZER: identity.tokenizer,
            Fact("wire dtype"): shard_pb2.Dtype.Name(identity.wire_dtype) if identity.wire_dtype else "",
            Fact("compute dtype"): identity.compute_dtype,
            Fact("quantization"): identity.quantization,
            Fact("KV block size"): str(identity.kv_block_tokens or ""),
            Fact("model" if one_model else "bottom model"): _model(identity.bottom),
            Fact("probe"): identity.probe,
        }
        if not one_model:
            stated[Fact("top model")] = _model(identity.top)
        elif identity.top.revision:
            stated[Fact("model")] = _model(identity.top)
        for route in identity.routes:
            stated[Fact("stitch", route.name)] = route.stitch
            stated[Fact("FFN skip", route.name)] = route.ffn_skip
            has_top = route.HasField("top_from")
            cut = f"{route.bottom_layers} to {route.top_from if has_top else 'the end'}"
            stated[Fact("cut point", route.name)] = cut if route.bottom_layers or has_top else ""
        return {fact: value for fact, value in stated.items() if value}

    def update(self, voters: Sequence[Voter]) -> None:
        """Chooses the facts that count by the shards that serve now."""
        values = self._values(voters)
        # `max` takes the first of equals, and the values that count so far are the first ones.
        combinations = islice(product(*values.values()), MAX_COMBINATIONS)
        chosen = max(
            (dict(zip(values, combination, strict=True)) for combination in combinations),
            key=lambda facts: self._score(facts, voters),
        )
        self.facts = {**self.facts, **chosen}
        self._supporters = {
            fact: [one.name for one in voters if one.facts.get(fact) == value] for fact, value in chosen.items()
        }

    def mismatch(self, facts: Facts) -> str | None:
        """In what a shard of these facts differs from the others, naming both sides; None where it fits."""
        for fact, value in facts.items():
            if self.facts.get(fact, value) != value:
                others = ", ".join(self._supporters.get(fact, ())) or "earlier shards"
                return f"its {fact} is {value}, but that of {others} is {self.facts[fact]}"
        return None

    def continues(self, facts: Facts, routes: Sequence[str]) -> bool:
        """Whether an answer of one of `routes` that began with `facts` continues with the same tokens now."""
        return all(self.facts.get(fact, value) == value for fact, value in facts.items() if fact.route in ("", *routes))

    def _values(self, voters: Sequence[Voter]) -> dict[Fact, list[str]]:
        """The values that shards state for each fact: the one that counts so far, then in the shards' order."""
        values: dict[Fact, list[str]] = {}
        for voter in voters:
            for fact, value in voter.facts.items():
                known = values.setdefault(fact, [])
                if value not in known:
                    known.append(value)
        for fact, known in values.items():
            known.sort(key=lambda value: value != self.facts.get(fact))
        return values

    def _score(self, facts: Facts, voters: Sequence[Voter]) -> tuple[int, int]:
        """The routes that shards of these facts can serve, and the weight of these shards."""
        fitting = [one for one in voters if all(facts[fact] == value for fact, value in one.facts.items())]
        accepting = {one.name for one in fitting if one.accepts_requests}
        covered = sum(
            all(any(shard.name in accepting for shard in stage) for stage in self.cluster.stages(route))
            for route in self.cluster.routes
        )
        return covered, sum(EJECTED_WEIGHT if one.ejected else WEIGHT for one in fitting)


def _model(model: inference_pb2.Model) -> str:
    return f"{model.revision} of width {model.hidden_size}" if model.revision else ""
