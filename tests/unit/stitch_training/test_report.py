"""Tables, curves and JSON of a router's figures, with their baselines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stitch_training.recovery import Float64Array
from stitch_training.report import Rankings, as_json, curve_table, plot_curves, rank, rank_pairs, table


@pytest.fixture
def found() -> Rankings:
    generator = np.random.default_rng(0)
    gain = generator.random(300)
    weak, strong = (generator.random(300) > 0.5).astype(float), (generator.random(300) < 0.5 + gain / 2).astype(float)
    return rank(gain, ["x" * (row % 50) for row in range(300)], weak, strong)


def test_rank_has_every_baseline(found: Rankings) -> None:
    assert list(found) == ["router", "prompt length", "random", "oracle"]
    assert found.lead.value == pytest.approx(found["router"].apgr.value - found["prompt length"].apgr.value)
    assert found["random"].apgr.value == 0.5
    assert found["oracle"].apgr.value > found["router"].apgr.value > 0.5


def test_table_shows_intervals_and_percents(found: Rankings) -> None:
    title, headings, *rows = table("made:", found).splitlines()
    assert title == "made:"
    assert headings.split("  ")[0] == "router"
    router = found["router"].apgr
    assert f"{router.value:.3f} [{router.low:.3f}, {router.high:.3f}]" in rows[0]
    assert rows[2].split() == ["random", "0.500", "0.500", "50.0", "80.0"]
    assert rows[4].startswith(f"APGR of the router minus that of prompt length: {found.lead.value:.3f} [")


def test_curve_table_has_a_column_for_each_step(found: Rankings) -> None:
    shares, pgr = curve_table(found["router"]).splitlines()
    assert shares.count("%") == pgr.count("%") == 11
    assert pgr.endswith("100%")


def test_rank_pairs_compares_every_costlier_route_with_the_cheapest() -> None:
    qualities: Float64Array = np.stack([np.tile([0.0, 1.0], 50), np.tile([0.5, 1.0], 50), np.ones(100)], axis=1)
    gains = qualities - qualities[:, :1]
    found = rank_pairs(("a", "b", "c"), gains, ["x"] * 100, qualities)
    assert list(found) == ["a → b", "a → c"]
    assert found["a → c"]["router"].apgr.value == found["a → c"]["oracle"].apgr.value


def test_as_json_has_every_point(found: Rankings) -> None:
    plain = json.loads(json.dumps(as_json({"weak → strong": found})))
    assert len(plain["weak → strong"]["router"]["pgr"]) == 11
    assert set(plain["weak → strong"]["oracle"]["apgr"]) == {"value", "low", "high"}


def test_plot_curves_writes_a_png(found: Rankings, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_curves({"weak → strong": found, "weak → other": found}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
