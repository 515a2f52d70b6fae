"""Labels in their three forms, invalid lines, and folds without leaks."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from stitch.errors import InvalidRequest
from stitch_training.labels import folds, prompt_key, read_json_lines, read_labels, read_prompts
from tests.support.labelled_prompts import write


@pytest.mark.parametrize(
    "quality",
    [{"strong": 1, "weak": 0}, {"scores": {"weak": 0, "strong": 1.0}}, {"routes": {"weak": 0.0, "strong": 1}}],
)
def test_every_form_of_a_label_is_read(tmp_path: Path, quality: dict[str, Any]) -> None:
    labelled = read_labels(write(tmp_path / "set.jsonl", [{"prompt": "why?", "task": "facts", **quality}]))
    assert (labelled.name, labelled.routes, labelled.prompts) == ("set", ("weak", "strong"), ["why?"])
    assert labelled.topics == ["set/facts"]
    assert labelled.qualities.tolist() == [[0.0, 1.0]]


def test_row_without_a_task_has_its_file_as_topic(tmp_path: Path) -> None:
    row = {"prompt": "x", "routes": {"weak": 0, "strong": 0.5}}
    assert read_labels(write(tmp_path / "set.jsonl", [row])).topics == ["set"]


def test_names_are_renamed_and_ordered_by_route(tmp_path: Path) -> None:
    row = {"prompt": "x", "scores": {"big": 0.9, "tiny": 0.1, "other": 0.5}}
    path = write(tmp_path / "set.jsonl", [row])
    assert read_labels(path, renamed={"big": "strong", "tiny": "weak"}).qualities.tolist() == [[0.1, 0.9]]
    assert read_labels(path, ("tiny", "other", "big")).qualities.tolist() == [[0.1, 0.5, 0.9]]


def test_rows_without_every_route_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "routes": {"weak": 0}}, {"prompt": "y", "routes": {"weak": 0, "strong": 1}}]
    labelled = read_labels(write(tmp_path / "set.jsonl", rows))
    assert (len(labelled), labelled.skipped) == (1, 1)


def test_gzip_labels_have_the_fingerprint_of_their_text(tmp_path: Path) -> None:
    text = json.dumps({"prompt": "x\u2028y", "strong": 1, "weak": 0}, ensure_ascii=False) + "\n\n"
    path = tmp_path / "set.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode()))
    labelled = read_labels(path)
    # A line separator within a string does not end the line.
    assert labelled.prompts == ["x\u2028y"]
    assert (labelled.name, labelled.fingerprint) == ("set", hashlib.sha256(text.encode()).hexdigest())


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "set.jsonl:2"),
        ("[]", "set.jsonl:2.prompt"),
        ('{"strong": 1, "weak": 0}', "set.jsonl:2.prompt"),
        ('{"prompt": 3, "strong": 1, "weak": 0}', "set.jsonl:2.prompt"),
        ('{"prompt": "x"}', "set.jsonl:2"),
        ('{"prompt": "x", "routes": []}', "set.jsonl:2.routes"),
        ('{"prompt": "x", "routes": {"weak": "high"}}', "set.jsonl:2.routes.weak"),
        ('{"prompt": "x", "strong": NaN, "weak": 0}', "set.jsonl:2.strong"),
        ('{"prompt": "x", "strong": null, "weak": 0}', "set.jsonl:2.strong"),
    ],
)
def test_invalid_label_is_refused_by_its_line(tmp_path: Path, line: str, field: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "x", "strong": 1, "weak": 0}\n' + line)
    with pytest.raises(InvalidRequest) as refused:
        read_labels(path)
    assert refused.value.field == field


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\x1f\x8bbroken", b"\xff\xfe"])
def test_file_without_labels_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match="data"):
        read_labels(path)


def test_file_without_a_row_of_all_routes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [{"prompt": "x", "routes": {"weak": 1}}])
    with pytest.raises(InvalidRequest, match="no row labels all of weak, strong"):
        read_labels(path)


def test_read_prompts_needs_no_labels_and_accepts_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [{"prompt": "a"}, {"question": "b", "answer": "#### 3"}])
    assert read_prompts(path) == ["a", "b"]
    assert [number for number, _ in read_json_lines(path)] == [1, 2]


def test_file_without_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.touch()
    with pytest.raises(InvalidRequest, match="at least one prompt"):
        read_prompts(path)


def test_prompt_key_ignores_case_spaces_and_signs() -> None:
    assert prompt_key(" What is  2+2?") == prompt_key("what is 2 2")
    assert prompt_key("what is 2+3") != prompt_key("what is 2+2")


def test_folds_have_equal_sizes() -> None:
    sizes = [folds([str(row) for row in range(103)], 5).tolist().count(fold) for fold in range(5)]
    assert sorted(sizes) == [20, 20, 21, 21, 21]


def test_rows_with_equal_keys_share_a_fold() -> None:
    keys = [str(row % 40) for row in range(120)]
    found = folds(keys, 5)
    assert all(len({found[row] for row in range(120) if keys[row] == key}) == 1 for key in keys)


def test_folds_depend_on_the_seed_alone() -> None:
    keys = [str(row) for row in range(50)]
    assert folds(keys, 5).tolist() == folds(keys, 5).tolist()
    assert folds(keys, 5, seed=1).tolist() != folds(keys, 5).tolist()
