"""The environment variables of all programs; no other module reads them."""

from __future__ import annotations

import io
import logging
import math
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder of imported models and of local clusters: `$STITCH_CACHE`, else `~/.cache/stitch`."""
    configured = os.environ.get("STITCH_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "stitch"


def compiled_folder() -> Path | None:
    """The folder of compiled functions inside the cache folder; None where it can't be a private one.

    A user who writes into it runs code in every shard of this one.
    """
    folder = cache_folder() / "compiled"
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owned(folder.parent)
        return private_folder(folder)
    except OSError as error:
        _log.warning("kernels are compiled at every start: %s", error)
        return None


def private_folder(path: Path) -> Path:
    """A folder that only this user reads and writes; it is made where it is missing.

    Raises OSError where it is a link, belongs to another user, or can't be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if (owner := os.fstat(opened).st_uid) != os.geteuid():
            raise PermissionError(f"{path} belongs to user {owner}, not to this one")
        os.fchmod(opened, 0o700)
    finally:
        os.close(opened)
    return path


def _check_owned(folder: Path) -> None:
    """Raises PermissionError for a folder in which another user could replace this one's folders."""
    found = folder.stat()
    if found.st_uid != os.geteuid() or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
        raise PermissionError(f"{folder} may be written by others")


def step_log_folder() -> Path | None:
    """The folder in which shards log every step that they compute: `$STITCH_STEP_LOG`; None: they log none."""
    configured = os.environ.get("STITCH_STEP_LOG")
    return Path(configured) if configured else None


def client_key() -> str | None:
    """The key that clients on the command line show to a gateway: `$STITCH_KEY`; None: none."""
    return os.environ.get("STITCH_KEY") or None


# In gRPC's order, which itself reads the first, second and fourth.
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def proxy_variable() -> tuple[str, str] | None:
    """The name and the value of the variable that names the proxy of clients; None where none does."""
    set_ones = ((name, os.environ[name]) for name in PROXY_VARIABLES if os.environ.get(name))
    return next(set_ones, None)


def available_cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The CPUs that this process may use: those of its affinity, or fewer by the quota of a container; at least 1."""
    quotas = (_cpu_quota(folder) for folder in _cgroup_folders(cgroups, own))
    return max(1, int(min(len(os.sched_getaffinity(0)), *quotas, math.inf)))


def _cgroup_folders(cgroups: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's groups and of all groups around them; a container may show the mount's root alone.

    A line of `own` is `0::/path` (version 2) or `4:cpu,cpuacct:/path` (version 1).
    """
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        mount = cgroups / "cpu" if "cpu" in controllers.split(",") else cgroups
        group = mount / path.lstrip("/")
        if not controllers or mount != cgroups:
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _cpu_quota(group: Path) -> float:
    """CPUs that the scheduler allows one group, such as 1.5; infinite where it has no limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota not in ("max", "-1") else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def prepare_program() -> None:
    """Adapts a program to its terminal and its CPU quota; call it first, before importing torch.

    Output escapes characters that the terminal's encoding lacks. Input from a file or a pipe is UTF-8, with or without
    a byte order mark, whatever the locale; bytes that are not become surrogates, which no request may have.
    """
    if available_cpus() < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(available_cpus()))
    if sys.stdin is None:
        # Closed by the caller, as `<&-` does.
        sys.stdin = open(os.devnull)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        encoding = None if sys.stdin.isatty() else "utf-8-sig"
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")


def share_cores() -> None:
    """Makes waiting OpenMP threads sleep soon, unless the operator has set a policy; call it before importing torch.

    Threads that keep spinning take the cores from another shard: with both shards of a pair computing on two cores, a
    decode step of 30 ms took 300 ms. Threads that sleep at once must be woken for every matmul: all matmuls of one
    token of SmolLM2 took 22 ms on two threads, and 16 ms where they first spin 1,000 times, some microseconds.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
