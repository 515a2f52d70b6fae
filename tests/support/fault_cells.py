"""What can go wrong, when, and where: the faults, moments and roles of the fault matrix, and how each cell must end.

A fault comes from outside: a signal to a process, or a TCP gate on the connections to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import product

from tests.support.pairwise_cases import pairwise_cases


class Fault(Enum):
    KILL = "kill"
    STOP = "stop"
    TERM = "term"
    STALL = "stall"
    HALF_OPEN = "half-open"
    CUT = "cut"
    THROTTLE = "throttle"
    DELAY = "delay"
    GARBLE = "garble"


class Moment(Enum):
    BEFORE = "before-the-first-token"
    PREFILL = "in-prefill"
    DECODE = "in-decode"
    DRAINING = "while-draining"
    REPLAYING = "while-replaying"


class Role(Enum):
    GATEWAY = "gateway"
    FIRST = "first"
    MIDDLE = "middle"
    LAST = "last"


class End(Enum):
    """How a stream may end: with its whole text, or UNAVAILABLE with the number of tokens that came."""

    WHOLE = "whole"
    UNAVAILABLE = "unavailable"


WHOLE, UNAVAILABLE = frozenset({End.WHOLE}), frozenset({End.UNAVAILABLE})
EITHER = WHOLE | UNAVAILABLE
# They last until somebody ends them, and nothing tells the neighbours.
SILENT = (Fault.STOP, Fault.STALL, Fault.HALF_OPEN)
SLOW = (Fault.THROTTLE, Fault.DELAY)


@dataclass(frozen=True)
class Cell:
    fault: Fault
    moment: Moment
    role: Role
    # Whether another process of the same role serves.
    replica: bool

    def __str__(self) -> str:
        alone = "with-replica" if self.replica else "alone"
        return f"{self.fault.value}-{self.moment.value}-{self.role.value}-{alone}"

    @property
    def ends_process(self) -> bool:
        return self.fault in (Fault.KILL, Fault.TERM) or self.moment is Moment.DRAINING

    @property
    def is_silent(self) -> bool:
        """Whether a shard with a replica says nothing while the fault lasts."""
        return self.fault in SILENT and self.replica and self.role is not Role.GATEWAY

    @property
    def ends(self) -> frozenset[End]:
        """How the streams may end that run, or start, while the fault lasts."""
        if self.role is Role.GATEWAY:
            return self._ends_at_a_gateway()
        return WHOLE if self.replica else self._ends_without_replica()

    def _ends_at_a_gateway(self) -> frozenset[End]:
        """The client's own connection is at stake, and no replica can continue it."""
        if self.fault is Fault.KILL:
            return UNAVAILABLE
        if self.fault is Fault.TERM:
            return WHOLE if self.moment in (Moment.PREFILL, Moment.DECODE, Moment.REPLAYING) else EITHER
        # A connection that ends before the request is on its way is opened again.
        return EITHER if self.fault in (Fault.CUT, Fault.GARBLE) else WHOLE

    def _ends_without_replica(self) -> frozenset[End]:
        if self.fault is Fault.KILL or self.fault in SILENT:
            return UNAVAILABLE
        if self.moment is Moment.DRAINING:
            # The shard takes no session back whose link it has lost.
            return EITHER
        if self.fault is Fault.TERM:
            return WHOLE if self.moment is Moment.DECODE else EITHER
        return WHOLE


def all_cells() -> list[Cell]:
    """The whole matrix, first the cells with replicas: they start no process that the others would kill."""
    return [Cell(*axes, replica) for replica in (True, False) for axes in product(Fault, Moment, Role)]


def pairwise_cells() -> list[Cell]:
    """Cells in which every pair of fault, moment, role and replica occurs."""
    return [Cell(*axes) for axes in pairwise_cases(list(Fault), list(Moment), list(Role), [True, False])]


def few_cells() -> list[Cell]:
    """Every fault, moment and role, with a replica and alone, in an order in which few processes are started again."""
    with_replica = [
        (Fault.STOP, Moment.DECODE, Role.LAST),
        (Fault.STALL, Moment.DECODE, Role.MIDDLE),
        (Fault.STOP, Moment.PREFILL, Role.FIRST),
        (Fault.HALF_OPEN, Moment.PREFILL, Role.MIDDLE),
        (Fault.CUT, Moment.REPLAYING, Role.LAST),
        (Fault.GARBLE, Moment.DECODE, Role.FIRST),
        (Fault.DELAY, Moment.BEFORE, Role.MIDDLE),
        (Fault.THROTTLE, Moment.PREFILL, Role.LAST),
        (Fault.STALL, Moment.BEFORE, Role.GATEWAY),
        (Fault.KILL, Moment.PREFILL, Role.GATEWAY),
        (Fault.KILL, Moment.DECODE, Role.LAST),
        (Fault.KILL, Moment.REPLAYING, Role.FIRST),
        (Fault.STOP, Moment.DRAINING, Role.MIDDLE),
    ]
    alone = [
        (Fault.HALF_OPEN, Moment.DECODE, Role.LAST),
        (Fault.CUT, Moment.PREFILL, Role.MIDDLE),
        (Fault.KILL, Moment.DECODE, Role.FIRST),
        (Fault.TERM, Moment.DECODE, Role.FIRST),
    ]
    return [*(Cell(*axes, True) for axes in with_replica), *(Cell(*axes, False) for axes in alone)]
