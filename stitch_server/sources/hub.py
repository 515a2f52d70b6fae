"""Models of the Hugging Face hub, such as `Qwen/Qwen2.5-7B-Instruct`. Doesn't look into what it downloads."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from stitch.errors import Unavailable
from stitch_server.sources.progress import Progress

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.json"]
# Formats of other runtimes that some repositories keep in subfolders.
LEFT_OUT = ["*/*", "consolidated*"]
_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def is_hub_id(source: str) -> bool:
    """Whether the source has the form of a hub id."""
    return _PATTERN.fullmatch(source) is not None


def download(hub_id: str, progress: Progress) -> Path:
    """The model's folder in the hub's own cache. Raises Unavailable where the hub doesn't give it."""
    progress(f"downloading {hub_id}", 0.0)
    try:
        folder = snapshot_download(hub_id, allow_patterns=FILES, ignore_patterns=LEFT_OUT)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(f"{hub_id} is no local folder, and the hub did not give it: {error}") from error
    progress(f"downloading {hub_id}", 1.0)
    return Path(folder)
