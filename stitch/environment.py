"""The environment variables of all programs; no other module reads them."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of imported models and of local clusters: `$STITCH_CACHE`, else `~/.cache/stitch`."""
    configured = os.environ.get("STITCH_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "stitch"


def compiled_folder() -> Path | None:
    """The folder of compiled functions inside the cache folder; None where it can't be written."""
    folder = cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def step_log_folder() -> Path | None:
    """The folder in which shards log every step that they compute: `$STITCH_STEP_LOG`; None: they log none."""
    configured = os.environ.get("STITCH_STEP_LOG")
    return Path(configured) if configured else None


def share_cores() -> None:
    """Makes waiting OpenMP threads sleep soon, unless the operator has set a policy; call it before importing torch.

    Threads that keep spinning take the cores from another shard: with both shards of a pair computing on two cores, a
    decode step of 30 ms took 300 ms. Threads that sleep at once must be woken for every matmul: all matmuls of one
    token of SmolLM2 took 22 ms on two threads, and 16 ms where they first spin 1,000 times, some microseconds.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
