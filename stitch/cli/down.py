"""`stitch down`: stops a cluster that runs on this machine. Doesn't know how a process is stopped."""

from __future__ import annotations

import argparse

from rich.console import Console

from stitch.cli.up import take_down
from stitch.cluster import load_cluster
from stitch.errors import Unavailable
from stitch.local.cluster import attached
from stitch.local.run_folder import RunFolder, run_folder, running_clusters, the_running_cluster


def run(parsed: argparse.Namespace) -> int:
    """Stops the named cluster, or the one that runs."""
    folder = _named(parsed.cluster) if parsed.cluster else the_running_cluster()
    take_down(Console(), attached(folder))
    return 0


def _named(name_or_path: str) -> RunFolder:
    running = {folder.name: folder for folder in running_clusters()}
    if name_or_path in running:
        return running[name_or_path]
    folder = run_folder(load_cluster(name_or_path).name)
    if folder.name not in running:
        raise Unavailable(f"{folder.name} doesn't run on this machine")
    return folder
