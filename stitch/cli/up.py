"""`stitch up` and `stitch down`: start a cluster on this machine with its progress on the terminal, and stop it."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from rich.console import Console
from rich.text import Text

from stitch.cluster import load_cluster
from stitch.errors import Unavailable
from stitch.local.cluster import LocalCluster, attached, import_models, prepared
from stitch.local.run_folder import RunFolder, only_running_cluster, run_folder, running_clusters
from stitch.tls import GATEWAY

POLL_SECONDS = 0.5


def run(parsed: argparse.Namespace) -> int:
    """Starts the cluster; without --detach it runs until Ctrl-C, SIGTERM or the gateway's end."""
    console = Console()
    with _interrupted_by(signal.SIGTERM, signal.SIGHUP):
        cluster = bring_up(console, parsed.cluster)
        if parsed.detach:
            _announce(console, cluster, "[bold]stitch down[/] stops it")
            return 0
        try:
            _announce(console, cluster, "Ctrl-C stops it")
            report_ended(console, cluster)
        finally:
            take_down(console, cluster)
    return 0


def run_down(parsed: argparse.Namespace) -> int:
    """Stops the named cluster, or the only one that runs."""
    folder = _running_folder(parsed.cluster) if parsed.cluster else only_running_cluster()
    take_down(Console(), attached(folder))
    return 0


def _running_folder(name_or_path: str) -> RunFolder:
    running = {folder.name: folder for folder in running_clusters()}
    if name_or_path in running:
        return running[name_or_path]
    folder = run_folder(load_cluster(name_or_path).name)
    if folder.name not in running:
        raise Unavailable(f"{folder.name} doesn't run on this machine")
    return folder


def bring_up(console: Console, name_or_path: str) -> LocalCluster:
    """Imports the models, starts every process, and returns when all serve."""
    described = load_cluster(name_or_path)
    folder = run_folder(described.name)
    with folder.locked(), ExitStack() as bound:
        cluster = prepared(described, folder, bound)
        import_models(cluster.cluster, lambda name, model_folder: _show(console, name, model_folder))
        with console.status(f"starting {', '.join(cluster.names)}"):
            cluster.start_all(
                lambda name, seconds: _show_serving(console, cluster, name, seconds),
                on_waiting=lambda name, seconds, line: _show_waiting(console, cluster, name, seconds, line),
            )
    return cluster


def take_down(console: Console, cluster: LocalCluster) -> None:
    """Stops every process; a second Ctrl-C kills those that still drain."""
    with console.status("stopping"):
        try:
            cluster.stop()
        except KeyboardInterrupt:
            cluster.stop(grace_seconds=0)
    console.print(f"{cluster.cluster.name} has stopped", highlight=False)


def report_ended(console: Console, cluster: LocalCluster) -> None:
    """Prints when a shard has ended; raises Unavailable when the gateway has."""
    running = list(cluster.names)
    while True:
        for name in list(running):
            try:
                cluster.check_running(name)
            except Unavailable as error:
                if name == GATEWAY:
                    raise
                running.remove(name)
                console.print(str(error), style="red", highlight=False, markup=False)
        time.sleep(POLL_SECONDS)


def _announce(console: Console, cluster: LocalCluster, ending: str) -> None:
    console.print(f'{cluster.cluster.name} serves at {cluster.gateway}: try [bold]stitch ask[/] "…"', highlight=False)
    if cluster.cluster.openai_url is not None:
        console.print(f"OpenAI's API is at {cluster.cluster.openai_url}", highlight=False)
    console.print(ending, highlight=False)


def _show_serving(console: Console, cluster: LocalCluster, name: str, seconds: float) -> None:
    layers = ""
    if name != GATEWAY:
        shard = cluster.cluster.shard(name)
        layers = f"{shard.role} layers {shard.layers[0]}–{shard.layers[1] - 1}"
    _show(console, f"{name:<12} {layers:<22} {cluster.address(name):<22}", f"{seconds:5.1f} s")


def _show_waiting(console: Console, cluster: LocalCluster, name: str, seconds: float, line: str) -> None:
    waiting = f"… {name:<12} doesn't serve yet after {seconds:.0f} s at {cluster.address(name)}: "
    console.print(Text.assemble(waiting, (line or "its log is empty", "dim")), soft_wrap=True)


def _show(console: Console, what: str, detail: str) -> None:
    console.print(Text.assemble(("✓ ", "green"), what, " ", (detail, "dim")), soft_wrap=True)


@contextmanager
def _interrupted_by(*numbers: signal.Signals) -> Iterator[None]:
    """Makes these signals raise KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
