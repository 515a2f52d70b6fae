"""Reads environment variables, and sets one: the one module that does. Doesn't know what its folders hold."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where imported models and the state of local clusters lie: `$STITCH_CACHE`, else `~/.cache/stitch`."""
    configured = os.environ.get("STITCH_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "stitch"


def compiled_folder() -> Path | None:
    """Where compiled functions are kept, in the cache folder; None where nothing can be written there."""
    folder = cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def step_log_folder() -> Path | None:
    """Where shards note every step that they compute: `$STITCH_STEP_LOG`, else nowhere."""
    configured = os.environ.get("STITCH_STEP_LOG")
    return Path(configured) if configured else None


def share_cores() -> None:
    """Lets threads that wait for others soon sleep, unless the operator has said otherwise; call it before torch.

    Threads that spin on take the cores from a neighbouring shard: with both shards of a pair computing on two cores,
    a decode step of 30 ms took 300 ms. Those that sleep at once must be woken for every product: all products of one
    token of SmolLM2 took 22 ms on two threads, and 16 ms where they spin for a thousand turns, some microseconds.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
