"""A file that a running program reads again when it changes; invalid content leaves the last valid one in force."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from stitch.errors import InvalidRequest

_log = logging.getLogger(__name__)

# The file's date and size are checked at most this often, so a change takes effect after this time at most.
RELOAD_INTERVAL_SECONDS = 1.0

Content = TypeVar("Content")


class ReloadingFile(Generic[Content]):
    """What `read` makes of a file; a file that is removed, or that `read` refuses, changes nothing."""

    def __init__(
        self, what: str, path: Path, read: Callable[[Path], Content], now: Callable[[], float] = time.monotonic
    ) -> None:
        """`what` names the content in the log. Raises the InvalidRequest of `read` where the file is invalid now."""
        self._what, self._path, self._read, self._now = what, path, read, now
        self._stamp = _stamp(path)
        self.content = read(path)
        self._check_at = now() + RELOAD_INTERVAL_SECONDS

    def current(self) -> Content:
        """The content of the last valid file."""
        if self._now() >= self._check_at:
            self._check_at = self._now() + RELOAD_INTERVAL_SECONDS
            self._reload_if_changed()
        return self.content

    def _reload_if_changed(self) -> None:
        stamp = _stamp(self._path)
        if stamp in (None, self._stamp):
            return
        self._stamp = stamp
        try:
            self.content = self._read(self._path)
        except InvalidRequest as error:
            _log.error("the %s stay as they are: %s", self._what, error)
        else:
            _log.info("new %s from %s", self._what, self._path.name)


def _stamp(path: Path) -> tuple[int, int] | None:
    """The file's date and size; None where it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
