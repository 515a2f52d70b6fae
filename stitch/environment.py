"""Reads environment variables: the one module that does. Doesn't know what lies in the folders it names."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where imported models and the state of local clusters lie: `$STITCH_CACHE`, else `~/.cache/stitch`."""
    configured = os.environ.get("STITCH_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "stitch"
