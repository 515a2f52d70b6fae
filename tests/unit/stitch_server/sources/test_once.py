"""A folder is filled once and whole, whoever asks for it meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from stitch_server.sources.once import filled_once


def test_fills_a_folder_that_is_not_there(tmp_path: Path) -> None:
    folder = filled_once(tmp_path / "deep" / "model", lambda unfinished: (unfinished / "a").touch())
    assert (folder, [file.name for file in folder.iterdir()]) == (tmp_path / "deep" / "model", ["a"])


def test_leaves_a_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    filled_once(tmp_path / "model", lambda unfinished: pytest.fail("filled again"))
    assert list((tmp_path / "model").iterdir()) == []


def test_a_failure_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path) -> None:
    def fail(unfinished: Path) -> None:
        (unfinished / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        filled_once(tmp_path / "model", fail)
    assert [file for file in tmp_path.iterdir() if file.is_dir()] == []
    assert filled_once(tmp_path / "model", lambda unfinished: None).is_dir()


def test_others_may_read_it(tmp_path: Path) -> None:
    assert filled_once(tmp_path / "model", lambda unfinished: None).stat().st_mode & 0o777 == 0o755


def test_one_fills_while_the_others_wait(tmp_path: Path) -> None:
    filled: list[int] = []
    first_is_inside, may_finish = threading.Event(), threading.Event()

    def fill(unfinished: Path) -> None:
        first_is_inside.set()
        may_finish.wait(timeout=30)
        filled.append(1)

    threads = [threading.Thread(target=filled_once, args=(tmp_path / "model", fill)) for _ in range(4)]
    threads[0].start()
    assert first_is_inside.wait(timeout=30)
    for thread in threads[1:]:
        thread.start()
    assert not (tmp_path / "model").exists()
    may_finish.set()
    for thread in threads:
        thread.join(timeout=30)
    assert filled == [1]
