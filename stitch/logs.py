"""The log of a server on standard error: a line for each record, as text with indented tracebacks, or as JSON.

Invariant: text of a caller or a peer in a record neither begins a line nor sends control characters to a terminal.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType

from stitch.errors import plain

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# Of gRPC's servers.
GRPC_LOGGER = "grpc._cython.cygrpc"

ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

# The request that the current task is about, and its trace.
_ids: ContextVar[dict[str, str]] = ContextVar("ids", default={})  # noqa: B039  # never changed in place


class LineFormatter(logging.Formatter):
    """Escapes control characters and line breaks of a message, and indents the lines of a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain(super().formatMessage(record))

    def formatException(self, ei: ExceptionInfo) -> str:
        return "\n".join(f"    {plain(line)}" for line in super().formatException(ei).splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII, with the ids of the request that its task is about."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_ids.get(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _EndedCalls(logging.Filter):
    """Makes one line of gRPC's traceback where a caller left at the moment in which its call was answered."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[0] if record.exc_info else None
        # gRPC's class is private.
        if error is not None and error.__name__ == "ExecuteBatchError":
            record.msg, record.args, record.exc_info = f"{record.getMessage()}: its caller has left", None, None
            record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
        return True


def name_in_log(request_id: str, trace_id: str = "") -> None:
    """Adds both ids, unless they are empty, to what the current task logs as JSON from now on."""
    _ids.set({name: value for name, value in (("request_id", request_id), ("trace_id", trace_id)) if value})


def set_up_logging(log_format: str = "text") -> None:
    """Logs records of level INFO and above, as `text` or as `json`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else LineFormatter(FORMAT))
    logging.getLogger(GRPC_LOGGER).addFilter(_EndedCalls())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
