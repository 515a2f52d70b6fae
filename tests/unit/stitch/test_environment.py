"""What the environment decides. Knows no folder's content."""

from __future__ import annotations

from pathlib import Path

import pytest

from stitch.environment import cache_folder, compiled_folder, step_log_folder


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.mark.parametrize("value", [None, ""])
def test_the_cache_is_in_the_home_folder_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("STITCH_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("STITCH_CACHE", value)
    assert cache_folder() == tmp_path / ".cache" / "stitch"


@pytest.mark.parametrize(("value", "folder"), [(None, None), ("", None), ("steps", Path("steps"))])
def test_steps_are_noted_only_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, value: str | None, folder: Path | None
) -> None:
    monkeypatch.delenv("STITCH_STEP_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("STITCH_STEP_LOG", value)
    assert step_log_folder() == folder


def test_compiled_functions_are_kept_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path / "cache"))
    folder = compiled_folder()
    assert folder == tmp_path / "cache" / "compiled"
    assert folder.is_dir()


def test_compiled_functions_are_kept_nowhere_without_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path / "file"))
    assert compiled_folder() is None
