"""`stitch chat`: a conversation, which every request sends whole; the gateway applies the chat template."""

from __future__ import annotations

import argparse
import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from rich.console import Console

from stitch.cli.arguments import gateway_endpoint, request_fields
from stitch.cli.output import sentence, show_stream
from stitch.client import Client
from stitch.errors import StitchError

HELP = "/new starts a conversation · /route NAME switches the route, /route auto lets the router decide · /quit, Ctrl-D"


def run(parsed: argparse.Namespace) -> int:
    """Reads turns until the input ends."""
    with contextlib.suppress(ImportError):
        # Line editing and history; not every Python has it.
        import readline  # noqa: F401

    console = Console()
    with Client(*gateway_endpoint(parsed)) as client:
        conversation = Conversation(client, console, request_fields(parsed), parsed.system)
        console.print(HELP, style="dim", highlight=False)
        conversation.run(input)
    return 0


def _new_name() -> str:
    return uuid.uuid4().hex


@dataclass(slots=True)
class Conversation:
    """The turns so far, and the other fields of every request."""

    client: Client
    console: Console
    fields: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    # The gateway keeps requests with this name on one route.
    name: str = field(default_factory=_new_name)

    def run(self, read_line: Callable[[str], str]) -> None:
        """Handles lines until `read_line` raises EOFError or returns /quit."""
        while True:
            try:
                line = read_line("> ").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            self.handle(line)

    def handle(self, line: str) -> None:
        """Runs a command, or asks the next question."""
        command, _, argument = line.partition(" ")
        match command:
            case "":
                pass
            case "/new":
                self.messages.clear()
                self.name = _new_name()
            case "/route":
                self.fields["route"] = argument.strip() or "auto"
                # Under its old name the conversation would stay on its route.
                self.name = _new_name()
            case "/help":
                self.console.print(HELP, style="dim", highlight=False)
            case _:
                self._ask(line)

    def _ask(self, question: str) -> None:
        """Asks one question; a failure or Ctrl-C drops this turn and keeps the conversation."""
        turn = {"role": "user", "content": question}
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            stream = self.client.stream(
                messages=[*system, *self.messages, turn], conversation_id=self.name, **self.fields
            )
            answer = show_stream(self.console, stream)
        except (StitchError, grpc.RpcError) as error:
            self.console.print(sentence(error), style="red", highlight=False, markup=False)
        except KeyboardInterrupt:
            self.console.print("\ncancelled", style="dim")
        else:
            self.messages += [turn, {"role": "assistant", "content": answer.text}]
