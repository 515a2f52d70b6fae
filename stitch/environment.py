"""Reads environment variables, and sets one: the one module that does. Doesn't know what its folders hold."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where imported models and the state of local clusters lie: `$STITCH_CACHE`, else `~/.cache/stitch`."""
    configured = os.environ.get("STITCH_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "stitch"


def step_log_folder() -> Path | None:
    """Where shards note every step that they compute: `$STITCH_STEP_LOG`, else nowhere."""
    configured = os.environ.get("STITCH_STEP_LOG")
    return Path(configured) if configured else None


def share_cores() -> None:
    """Lets threads that wait for others sleep, unless the operator has said otherwise; call it before importing torch.

    Threads that spin instead take the cores from a neighbouring shard: with both shards of a pair computing on two
    cores, a decode step of 30 ms took 300 ms.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
