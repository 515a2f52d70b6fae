"""The folders that environment variables set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stitch.environment import (
    available_cpus,
    cache_folder,
    compiled_folder,
    prepare_program,
    private_folder,
    step_log_folder,
)


def test_cache_folder_is_stitch_cache_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.mark.parametrize("value", [None, ""])
def test_cache_folder_defaults_to_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("STITCH_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("STITCH_CACHE", value)
    assert cache_folder() == tmp_path / ".cache" / "stitch"


@pytest.mark.parametrize(("value", "folder"), [(None, None), ("", None), ("steps", Path("steps"))])
def test_step_log_folder_is_none_without_variable(
    monkeypatch: pytest.MonkeyPatch, value: str | None, folder: Path | None
) -> None:
    monkeypatch.delenv("STITCH_STEP_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("STITCH_STEP_LOG", value)
    assert step_log_folder() == folder


def test_private_folder_is_the_users_alone(tmp_path: Path) -> None:
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True, mode=0o777)
    assert private_folder(folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder(tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_private_folder_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="link"):
        private_folder(tmp_path / "link")


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to user"):
        private_folder(tmp_path)
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path))
    assert compiled_folder() is None


def test_compiled_folder_is_none_where_others_may_write_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    assert compiled_folder() is None
    assert "may be written by others" in caplog.text
    # As /tmp is: nobody else can replace a folder in it.
    tmp_path.chmod(0o1777)
    assert compiled_folder() == tmp_path / "compiled"


def test_compiled_folder_is_in_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path / "cache"))
    folder = compiled_folder()
    assert folder == tmp_path / "cache" / "compiled"
    assert folder.is_dir()


def test_compiled_folder_is_none_without_writable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path / "file"))
    assert compiled_folder() is None


@pytest.fixture
def cgroups(tmp_path: Path) -> Path:
    (tmp_path / "cgroup" / "cpu").mkdir(parents=True)
    return tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("quota", "cpus"), [("max 100000", 64), ("400000 100000", 4), ("350000 100000", 3), ("5000 100000", 1), ("", 64)]
)
def test_available_cpus_are_quota_of_container(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cpus: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    (cgroups / "cpu.max").write_text(f"{quota}\n")
    (cgroups.parent / "own").write_text("0::/\n")
    assert available_cpus(cgroups, cgroups.parent / "own") == cpus


def test_available_cpus_are_least_quota_of_groups_around(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    (cgroups / "pod" / "shard").mkdir(parents=True)
    (cgroups / "pod" / "cpu.max").write_text("600000 100000\n")
    (cgroups / "pod" / "shard" / "cpu.max").write_text("max 100000\n")
    (cgroups.parent / "own").write_text("0::/pod/shard\n")
    assert available_cpus(cgroups, cgroups.parent / "own") == 6


@pytest.mark.parametrize(("quota", "cpus"), [(-1, 64), (250_000, 5)])
def test_available_cpus_are_quota_of_version_1(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch, quota: int, cpus: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    (cgroups / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (cgroups / "cpu" / "cpu.cfs_period_us").write_text("50000\n")
    # A container may see its own group as the root of the mount.
    (cgroups.parent / "own").write_text("5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/\n")
    assert available_cpus(cgroups, cgroups.parent / "own") == cpus


def test_available_cpus_are_affinity_without_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {2, 3, 5})
    assert available_cpus(tmp_path / "none", tmp_path / "none") == 3


@pytest.mark.parametrize(("quota", "variable"), [(1, "1"), (2, None)])
def test_programs_have_as_many_threads_as_quota(monkeypatch: pytest.MonkeyPatch, quota: int, variable: str) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr("stitch.environment.available_cpus", lambda: quota)
    monkeypatch.setattr("os.environ", {})
    prepare_program()
    assert os.environ.get("OMP_NUM_THREADS") == variable
