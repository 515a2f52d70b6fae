"""Text of a peer stays within its line of the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from datetime import datetime

import pytest

from stitch.errors import plain
from stitch.logs import FORMAT, GRPC_LOGGER, JsonFormatter, LineFormatter, name_in_log, set_up_logging

FORGED = "gone\n2026-01-01 00:00:00 INFO stitch: all is well\r\x1b[31m"


def formatted(message: str, *arguments: object, error: BaseException | None = None) -> str:
    info = None if error is None else (type(error), error, None)
    record = logging.LogRecord("stitch_server.rpc", logging.WARNING, __file__, 1, message, arguments, info)
    return LineFormatter(FORMAT).format(record)


def test_line_breaks_and_control_characters_of_an_argument_are_escaped() -> None:
    line = formatted("link to %s: %s", "top-0", FORGED)
    assert line.endswith(r"link to top-0: gone\n2026-01-01 00:00:00 INFO stitch: all is well\r\x1b[31m")
    assert line.isprintable()


def test_lines_of_a_traceback_are_indented_and_escaped() -> None:
    first, *others = formatted("it broke", error=ValueError(FORGED)).splitlines()
    assert first.endswith("stitch_server.rpc: it broke")
    assert len(others) == 3
    assert all(line.startswith("    ") and line.isprintable() for line in others)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("世界", "世界"),
        ("a\tb", r"a\tb"),
        ("a\u2028b", r"a\u2028b"),
        ("a\ud800", r"a\ud800"),
        ("abcdefgh", "abcd…"),
    ],
)
def test_plain_text_is_printable_and_bounded(text: str, expected: str) -> None:
    assert plain(text, 5) == expected


def logged_as_json(message: str, *arguments: object, error: BaseException | None = None) -> dict[str, str]:
    info = None if error is None else (type(error), error, None)
    record = logging.LogRecord("stitch_server.rpc", logging.WARNING, __file__, 1, message, arguments, info)
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert line.isprintable()
    fields: dict[str, str] = json.loads(line)
    return fields


def test_json_line_has_time_level_logger_and_message() -> None:
    fields = logged_as_json("link to %s: %s", "top-0", FORGED)
    assert datetime.fromisoformat(fields.pop("time")).tzinfo is not None
    assert fields == {"level": "WARNING", "logger": "stitch_server.rpc", "message": f"link to top-0: {FORGED}"}


def test_json_line_has_a_traceback() -> None:
    assert logged_as_json("it broke", error=ValueError("世界\ud800"))["traceback"] == "ValueError: 世界\ud800"


async def test_json_line_has_the_ids_of_its_task_alone() -> None:
    async def ids(request_id: str, trace_id: str) -> dict[str, str]:
        name_in_log(request_id, trace_id)
        await asyncio.sleep(0)
        fields = logged_as_json("answered")
        return {name: fields[name] for name in ("request_id", "trace_id") if name in fields}

    first, second = await asyncio.gather(ids("a", "1"), ids("b", ""))
    assert first == {"request_id": "a", "trace_id": "1"}
    assert second == {"request_id": "b"}
    assert "request_id" not in logged_as_json("nobody's")


@pytest.fixture
def grpc_records() -> Iterator[list[logging.LogRecord]]:
    """What gRPC's servers log once logging is set up."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger(GRPC_LOGGER)
    handler.emit = records.append  # type: ignore[method-assign]
    before, root = list(logger.filters), logging.getLogger()
    set_up_logging()
    root.addHandler(handler)
    yield records
    root.removeHandler(handler)
    logger.filters[:] = before


def test_call_whose_caller_left_takes_one_line(grpc_records: list[logging.LogRecord]) -> None:
    try:
        raise type("ExecuteBatchError", (Exception,), {})('Failed "execute_batch"')
    except Exception:
        logging.getLogger(GRPC_LOGGER).exception("ExecuteBatchError raised by [%s]", b"/stitch.v1.Inference/Generate")
    [line] = [LineFormatter(FORMAT).format(record).splitlines() for record in grpc_records]
    assert len(line) == 1
    assert line[0].endswith(
        "INFO grpc._cython.cygrpc: ExecuteBatchError raised by [b'/stitch.v1.Inference/Generate']: its caller has left"
    )


def test_other_errors_of_grpc_keep_their_traceback(grpc_records: list[logging.LogRecord]) -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logging.getLogger(GRPC_LOGGER).exception("Unexpected error")
    [record] = grpc_records
    assert record.levelno == logging.ERROR
    assert "Traceback" in LineFormatter(FORMAT).format(record)
