"""`stitch chat`: a conversation. Knows no tokens: the gateway applies the chat template to the whole of it."""

from __future__ import annotations

import argparse
import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from rich.console import Console

from stitch.cli.arguments import request_fields
from stitch.cli.connection import gateway
from stitch.cli.failures import sentence
from stitch.cli.screen import show_stream
from stitch.client import Client
from stitch.errors import StitchError

HELP = "/new begins anew · /route NAME goes on with a route, /route auto with the router's choice · /quit, Ctrl-D"


def run(parsed: argparse.Namespace) -> int:
    """Reads turns until the end of the input."""
    with contextlib.suppress(ImportError):
        # Editing and history of the line; not every Python has it.
        import readline  # noqa: F401

    console = Console()
    with Client(*gateway(parsed)) as client:
        conversation = Conversation(client, console, request_fields(parsed), parsed.system)
        console.print(HELP, style="dim", highlight=False)
        conversation.hold(input)
    return 0


def _new_name() -> str:
    return uuid.uuid4().hex


@dataclass(slots=True)
class Conversation:
    """The turns so far, and what every request carries beside them."""

    client: Client
    console: Console
    fields: dict[str, Any]
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    # Names it at the gateway, which keeps it on one route.
    name: str = field(default_factory=_new_name)

    def hold(self, read_line: Callable[[str], str]) -> None:
        """Goes on until `read_line` raises EOFError, or a line says /quit."""
        while True:
            try:
                line = read_line("> ").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            self.take(line)

    def take(self, line: str) -> None:
        """A command, or the next turn."""
        command, _, argument = line.partition(" ")
        match command:
            case "":
                pass
            case "/new":
                self.turns.clear()
                self.name = _new_name()
            case "/route":
                self.fields["route"] = argument.strip() or "auto"
                # Under its old name the conversation would stay where it is.
                self.name = _new_name()
            case "/help":
                self.console.print(HELP, style="dim", highlight=False)
            case _:
                self._ask(line)

    def _ask(self, question: str) -> None:
        """One question; a failure, and Ctrl-C, end this turn alone and leave no trace of it."""
        turn = {"role": "user", "content": question}
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            stream = self.client.stream(messages=[*system, *self.turns, turn], conversation_id=self.name, **self.fields)
            answer = show_stream(self.console, stream)
        except (StitchError, grpc.RpcError) as error:
            self.console.print(sentence(error), style="red", highlight=False, markup=False)
        except KeyboardInterrupt:
            self.console.print("\ncancelled", style="dim")
        else:
            self.turns += [turn, {"role": "assistant", "content": answer.text}]
