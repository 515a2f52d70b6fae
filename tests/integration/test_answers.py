"""A route's answers become training text, through a real cluster."""

from __future__ import annotations

import json
from pathlib import Path

from stitch_training.cli import main
from stitch_training.data import read_documents
from tests.support.processes import Cluster


def test_answers_of_a_route_are_the_same_whether_interrupted_or_not(tiny_cluster: Cluster, tmp_path: Path) -> None:
    data, whole, resumed = (tmp_path / name for name in ("data.jsonl", "whole.jsonl", "resumed.jsonl"))
    data.write_text("".join(json.dumps({"prompt": f"tell me {number}"}) + "\n" for number in range(8)))
    given = ["answers", "--gateway", tiny_cluster.gateway, "--data", str(data), "--route", "weak", "--max-tokens", "6"]
    assert main([*given, "--out", str(whole)]) == 0
    assert main([*given, "--out", str(resumed), "--prompts", "3", "--concurrency", "1"]) == 0
    assert main([*given, "--out", str(resumed)]) == 0
    found = [sorted(read_documents(path), key=str) for path in (whole, resumed)]
    assert found[0] == found[1]
    assert len({document.turns[-1].content for document in found[0]}) > 1
    assert len(found[0]) > 3
