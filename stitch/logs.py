"""The log of a server: one line on standard error for each record, and indented lines for a traceback.

Invariant: text of a caller or a peer in a record neither begins a line nor sends control characters to a terminal.
"""

from __future__ import annotations

import logging
from types import TracebackType

from stitch.errors import plain

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class LineFormatter(logging.Formatter):
    """Escapes control characters and line breaks of a message, and indents the lines of a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain(super().formatMessage(record))

    def formatException(self, ei: ExceptionInfo) -> str:
        return "\n".join(f"    {plain(line)}" for line in super().formatException(ei).splitlines())


def set_up_logging() -> None:
    """Logs records of level INFO and above."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
