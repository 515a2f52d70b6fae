"""The folders that environment variables set."""

from __future__ import annotations

from pathlib import Path

import pytest

from stitch.environment import cache_folder, compiled_folder, step_log_folder


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


def test_compiled_folder_is_in_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path / "cache"))
    folder = compiled_folder()
    assert folder == tmp_path / "cache" / "compiled"
    assert folder.is_dir()


def test_compiled_folder_is_none_without_writable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path / "file"))
    assert compiled_folder() is None
