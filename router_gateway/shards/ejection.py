"""Ejects a replica from placement whose sessions fail, and tries it again with one session.

In: how sessions end, and suspicions. Out: whether placement avoids the replica now. The time of an ejection doubles
with each one that follows soon. When it is over, the next session is a trial: until it gets a token, others avoid the
replica still. Placement prefers replicas that are not avoided, so the last one of a stage is never left out.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from pydantic import Field

from stitch.settings import Settings

_log = logging.getLogger(__name__)


class EjectionPolicy(Settings):
    """When a replica is ejected, and for how long."""

    # Failed sessions in a row that eject a replica.
    max_failures: int = Field(default=3, ge=1)
    # The share of the latest sessions whose failure ejects a replica, and the number of sessions.
    max_failed_share: float = Field(default=0.5, gt=0, le=1)
    window_sessions: int = Field(default=20, ge=1)
    # The first ejection; each further one within `max_seconds` takes twice as long.
    first_seconds: float = Field(default=1.0, gt=0)
    max_seconds: float = Field(default=60.0, gt=0)
    # A replica is slow when its sessions take this many times as long for a token as those of its peers.
    slow_factor: float = Field(default=5.0, gt=1)
    # Below this time for a token no replica is slow.
    slow_token_seconds: float = Field(default=0.05, ge=0)
    # A replica is ejected after it was slow for this long.
    slow_seconds: float = Field(default=5.0, ge=0)


class Ejection:
    """The record of one replica. `on_change` is called with the cause when it is ejected, with None at its return."""

    def __init__(
        self,
        name: str,
        policy: EjectionPolicy,
        clock: Callable[[], float],
        on_change: Callable[[str | None], object],
    ) -> None:
        self._name = name
        self._policy = policy
        self._clock = clock
        self._on_change = on_change
        # None: not ejected.
        self._until: float | None = None
        self._seconds = 0.0
        self._returned_at = float("-inf")
        # The session that tries the replica after an ejection.
        self._trial: object = None
        # Whether each of the latest sessions failed.
        self._failed: deque[bool] = deque(maxlen=policy.window_sessions)

    @property
    def avoided(self) -> bool:
        """Whether placement prefers other replicas."""
        return self._until is not None and (self._clock() < self._until or self._trial is not None)

    def eject(self, cause: str, reason: str) -> None:
        """Ejects the replica; no effect while it is ejected. `cause` is one of metrics.EJECTION_CAUSES."""
        now = self._clock()
        if self._until is not None and now < self._until:
            return
        again = self._until is not None or now < self._returned_at + self._policy.max_seconds
        self._seconds = min(2 * self._seconds, self._policy.max_seconds) if again else self._policy.first_seconds
        self._until = now + self._seconds
        self._trial = None
        self._failed.clear()
        _log.warning("shard %s gets no new sessions for %g s: %s", self._name, self._seconds, reason)
        self._on_change(cause)

    def placed(self, session: object) -> None:
        """A session was placed; the first one after the ejection is the trial."""
        if self._until is not None and self._trial is None and self._clock() >= self._until:
            self._trial = session

    def progressed(self, session: object) -> None:
        """A session got its first token, with which a trial succeeds."""
        if session is self._trial:
            self._until, self._trial, self._returned_at = None, None, self._clock()
            self._on_change(None)

    def left(self, session: object) -> None:
        """A session ended; if it was a trial without a token, the next session is the trial."""
        if session is self._trial:
            self._trial = None

    def succeeded(self) -> None:
        """A session came to its end."""
        self._failed.append(False)

    def failed(self, reason: str) -> None:
        """A session was lost, and this replica may be why; after an ejection the first such session renews it."""
        self._failed.append(True)
        if self._until is not None or self._fails_too_often():
            self.eject("failures", reason)

    def _fails_too_often(self) -> bool:
        latest, most = list(self._failed), self._policy.max_failures
        in_a_row = len(latest) >= most and all(latest[-most:])
        return in_a_row or sum(latest) > self._policy.max_failed_share * self._policy.window_sessions
