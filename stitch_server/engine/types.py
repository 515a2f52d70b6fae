"""What one pass of a shard takes and gives, frozen. Knows neither who composed it nor who computes it."""

from __future__ import annotations

from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stitch_server.engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """The layers of this shard that a route passes: `[enter, leave)`."""

    enter: int
    leave: int


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive tokens of one sequence."""

    sequence: Sequence
    cut: Cut
    position: int
    length: int
    # Whether the chain's last shard samples behind the last of these tokens.
    wants_token: bool
    # The KV blocks of the whole sequence so far.
    blocks: Sequenced[int]
    # What the upstream shard sent, [length, hidden]; None on the first shard, which embeds token ids.
    hidden: Tensor | None = None
    # Whose step this is part of; only the composer of the batch looks at it.
    origin: Any = None
    # The routes, cheapest first, of which the sequence gets one in this very pass; none where it has its route. The
    # segment then holds what the probe reads, and its cut is the earliest one.
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """Segments in the order in which the runner wants them: see `ordered`."""

    segments: tuple[Segment, ...]
    # Whether a neighbour on this machine computes at the same time.
    pipelined: bool = False

    @property
    def tokens(self) -> int:
        return sum(segment.length for segment in self.segments)


def ordered(segments: Sequenced[Segment]) -> tuple[Segment, ...]:
    """Those first that enter early and leave late, so that each layer's tokens are the batch's leading rows."""
    key = lambda segment: (segment.cut.enter, -segment.cut.leave, segment.sequence.route)  # noqa: E731
    return tuple(sorted(segments, key=key))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a sampled token, and the likeliest `(id, logprob)` beside it."""

    logprob: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Token:
    id: int
    # In the sequence; the prompt's first token has 0.
    position: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """The route that a sequence takes from here on, and why."""

    route: str
    # How much the prompt asks for the dearest route, 0 to 1.
    score: float = 1.0
    # Expected gain over the cheapest route, by route; what it must exceed, for each but the cheapest.
    gains: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    # Why there is no proper judgement, where the route is the fallback.
    failure: str = ""
    # What it would take if that were a candidate.
    preferred: str = ""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of a batch: hidden states to send on, or tokens."""

    # [tokens, hidden], the segments' rows in the batch's order; None on the chain's last shard.
    hidden: Tensor | None = None
    # By the index of the segment that wanted it.
    tokens: dict[int, Token] = field(default_factory=dict)
    # Segments whose hidden states hold a value that is not finite.
    non_finite: frozenset[int] = frozenset()
    # Seconds by stage.
    stages: dict[str, float] = field(default_factory=dict)
    # By the index of the segment that had candidates.
    decisions: dict[int, RouteDecision] = field(default_factory=dict)
