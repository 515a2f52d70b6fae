"""`stitch ask`: one question, one answer, printed while it is generated or as JSON at its end."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from stitch.cli.arguments import gateway_endpoint, request_fields
from stitch.cli.output import print_json, show_stream
from stitch.client import Client, Stream
from stitch.errors import InvalidRequest


def run(parsed: argparse.Namespace) -> int:
    """Sends the question and prints the answer."""
    with Client(*gateway_endpoint(parsed)) as client:
        stream = client.stream(**_input(parsed), timeout=parsed.timeout, **request_fields(parsed))
        if parsed.json:
            _print_json(stream)
        else:
            _show(stream)
    return 0


def _input(parsed: argparse.Namespace) -> dict[str, Any]:
    question = sys.stdin.read() if parsed.prompt == "-" else parsed.prompt
    if parsed.plain:
        if parsed.system:
            raise InvalidRequest("--system", parsed.system, "--plain sends no conversation")
        return {"prompt": question}
    if not question.strip():
        raise InvalidRequest("prompt", question, "it must not be empty")
    system = [{"role": "system", "content": parsed.system}] if parsed.system else []
    return {"messages": [*system, {"role": "user", "content": question}]}


def _print_json(stream: Stream) -> None:
    for _ in stream:
        pass
    print_json(stream.answer.as_json())


def _show(stream: Stream) -> None:
    from rich.console import Console

    show_stream(Console(), stream)
