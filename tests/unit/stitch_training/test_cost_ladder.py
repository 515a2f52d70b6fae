"""The line between two models, and the gain of stitched models under it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stitch_training.cost_ladder import BOTTOM, TOP, Ladder, Rung
from stitch_training.scoring import Interval


def rung(name: str, parameters: int, loss: float, agreement: float | None = None) -> Rung:
    interval = None if agreement is None else Interval(agreement, agreement, agreement)
    return Rung(name, parameters, {"all": Interval(loss, loss - 0.1, loss + 0.1)}, interval)


LADDER = Ladder(
    rung(BOTTOM, 1000, 1.0, 1.0), rung(TOP, 500, 2.0, 0.5), (rung("24 → 17", 900, 1.1), rung("8 → 7", 600, 1.9))
)


@pytest.mark.parametrize(("parameters", "loss"), [(500, 2.0), (1000, 1.0), (750, 1.5), (250, 2.5)])
def test_line_goes_through_both_models(parameters: int, loss: float) -> None:
    assert LADDER.line_at(parameters) == pytest.approx(loss)


def test_gain_is_the_distance_under_the_line() -> None:
    assert LADDER.gain(LADDER.rungs[0]) == pytest.approx(0.1)
    assert LADDER.gain(LADDER.rungs[1]) == pytest.approx(-0.1)


def test_line_of_one_model_is_its_own_loss() -> None:
    same = Ladder(rung(BOTTOM, 500, 1.0), rung(TOP, 500, 1.0), ())
    assert same.line_at(300) == 1.0


def test_rows_are_cheapest_first_and_complete() -> None:
    rows = LADDER.rows()
    assert [row["name"] for row in rows] == [TOP, "8 → 7", "24 → 17", BOTTOM]
    assert rows[1]["losses"]["all"] == {"mean": 1.9, "low": pytest.approx(1.8), "high": pytest.approx(2.0)}
    assert rows[1]["line"] == pytest.approx(1.8)


def test_table_has_a_line_for_every_model() -> None:
    lines = LADDER.lines()
    assert len(lines) == 5
    assert lines[2].split()[:6] == ["8", "→", "7", "600", "-0.100", "-"]
    assert lines[1].split()[-5:] == ["0.500", "[0.50,", "0.50]", "-", "2.000"]


def test_plot_writes_a_png(tmp_path: Path) -> None:
    LADDER.plot(tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
