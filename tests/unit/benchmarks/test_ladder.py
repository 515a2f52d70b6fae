"""A ladder from reports of fits on the same text."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import ladder
from stitch_training.cost_ladder import BOTTOM, TOP
from tests.support.tiny_fit import write_cluster


def report(k: int, j: int, stitched: float, top: float = 2.0, **training: int) -> dict[str, Any]:
    losses = {"bottom": 1.0, "top": top, "stitched": stitched}
    return {
        "cut": {"bottom_layers": k, "top_from": j},
        "training": training,
        "losses": {name: {"all": {"mean": one, "low": one, "high": one}} for name, one in losses.items()},
    }


def test_ladder_has_a_rung_for_every_report(tmp_path: Path) -> None:
    found = ladder.ladder_of(str(write_cluster(tmp_path)), [report(2, 1, 1.5), report(1, 1, 1.75)])
    assert [rung.name for rung in found.rungs] == ["2 → 1", "1 → 1"]
    assert [rung.losses["all"].mean for rung in (found.bottom, found.top, *found.rungs)] == [1.0, 2.0, 1.5, 1.75]
    assert found.rungs[0].parameters > found.rungs[1].parameters
    with pytest.raises(SystemExit, match="other models or held-out sequences"):
        ladder.ladder_of(str(tmp_path / "cluster.toml"), [report(2, 1, 1.5), report(1, 1, 1.5, top=2.5)])


def test_ladder_of_some_files_averages_these(tmp_path: Path) -> None:
    of_files = {"a": (1.0, 0.7, 1.4), "b": (3.0, 2.6, 3.3), "c": (9.0, 9.0, 9.0), "all": (4.3, 4.0, 5.0)}
    losses = {name: dict(zip(("mean", "low", "high"), one, strict=True)) for name, one in of_files.items()}
    given = report(2, 1, 1.5) | {"losses": {"bottom": losses, "top": losses, "stitched": losses}}
    cluster = str(write_cluster(tmp_path))
    found = ladder.ladder_of(cluster, [given], ["a", "b"])
    for rung in (found.bottom, found.top, *found.rungs):
        assert asdict(rung.losses["all"]) == pytest.approx({"mean": 2.0, "low": 1.75, "high": 2.25})
        assert set(rung.losses) == {"all", "a", "b"}
    for other in ("d", "all"):
        with pytest.raises(SystemExit, match=f"the reports have no file {other}, only a, b, c"):
            ladder.ladder_of(cluster, [given], ["a", other])


def test_rung_with_adapters_has_their_rank_and_parameters(tmp_path: Path) -> None:
    reports = [report(2, 1, 1.5), report(2, 1, 1.4, adapter_rank=3)]
    plain, adapted = ladder.ladder_of(str(write_cluster(tmp_path)), reports).rungs
    assert adapted.name == "2 → 1, rank 3"
    # The top has one layer after the cut.
    assert adapted.parameters - plain.parameters == 2 * 3 * 32


def test_main_writes_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "one.json", tmp_path / "ladder.json"
    file.write_text(json.dumps(report(2, 1, 1.5)))
    monkeypatch.setattr(sys, "argv", ["ladder.py", str(write_cluster(tmp_path)), str(file), "--out", str(out)])
    ladder.main()
    assert {row["name"] for row in json.loads(out.read_text())["systems"]} == {BOTTOM, TOP, "2 → 1"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
