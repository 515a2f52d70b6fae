"""The line and the hull between systems, the gap that a route closes, and the tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stitch_training.cost_ladder import BOTTOM, TOP, Kind, Ladder, Rung, adapted_name, hull
from stitch_training.intervals import Sample

SEQUENCES = 40


def losses(mean: float, seed: int = 0, noise: float = 0.0) -> Sample:
    """Losses that vary between sequences in the same way for every system, but for a noise of its own."""
    level = torch.randn(SEQUENCES, generator=torch.Generator().manual_seed(99)).double()
    own = noise * torch.randn(SEQUENCES, generator=torch.Generator().manual_seed(seed)).double()
    both = level - level.mean() + own - own.mean()
    return Sample.of(mean + both)


def rung(name: str, parameters: int, loss: float, kind: Kind = "route", noise: float = 0.0) -> Rung:
    same = Sample.of(torch.full((SEQUENCES,), 0.5))
    sample = losses(loss, parameters, noise)
    return Rung(name, parameters, {"content": sample, "user": sample}, {"content": same}, {"agreement": same}, kind)


BOTTOM_RUNG, TOP_RUNG = rung(BOTTOM, 1000, 1.0, "end"), rung(TOP, 500, 2.0, "end")
GOOD, BAD = rung("24 → 17", 900, 1.1), rung("8 → 7", 600, 1.9)
LADDER = Ladder(BOTTOM_RUNG, TOP_RUNG, (GOOD, BAD))
ADAPTED = (rung(adapted_name(BOTTOM), 1100, 0.9, "adapted"), rung(adapted_name(TOP), 550, 1.5, "adapted"))


def test_over_line_is_the_distance_to_the_mix_of_both_ends() -> None:
    over = [LADDER.over_line(one) for one in (GOOD, BAD, BOTTOM_RUNG, TOP_RUNG)]
    assert [one and one.mean for one in over] == pytest.approx([0.1, -0.1, 0, 0])
    # Paired: the spread of the sequences does not count.
    assert over[0] is not None
    assert over[0].high - over[0].low < 1e-9


def test_over_mix_takes_the_best_two_others_at_the_cost() -> None:
    cheaper, costlier, gain = LADDER.over_mix(BAD) or pytest.fail("it has neighbours")
    # A mix of the top alone with 24 → 17 has 1.775 there.
    assert ((cheaper.name, costlier.name), gain.mean) == ((TOP, "24 → 17"), pytest.approx(-0.125))
    cheaper, costlier, gain = LADDER.over_mix(GOOD) or pytest.fail("it has neighbours")
    assert ((cheaper.name, costlier.name), gain.mean) == ((TOP, BOTTOM), pytest.approx(0.1))
    assert LADDER.over_mix(TOP_RUNG) is None


def test_quantized_systems_are_rows_and_no_part_of_a_mix() -> None:
    quantized = rung("24 → 17, int4", 900, 0.1, "quantized")
    ladder = Ladder(BOTTOM_RUNG, TOP_RUNG, (GOOD, quantized))
    assert _mean(ladder.over_mix(GOOD)) == pytest.approx(0.1)
    losses_of_all, _, places, *_, differences = ladder.markdown().split("\n\n")[1:]
    assert "| 24 → 17, int4 |" in losses_of_all
    assert "int4" not in places
    assert "24 → 17, int4" not in differences.splitlines()[0]
    assert "| 24 → 17, int4 |" in differences


def test_controls_are_no_part_of_a_mix_but_adapted_ends_are() -> None:
    control = rung("24 → 24", 880, 0.1, "control")
    assert _mean(Ladder(BOTTOM_RUNG, TOP_RUNG, (GOOD, control)).over_mix(GOOD)) == pytest.approx(0.1)
    adapted = Ladder(BOTTOM_RUNG, TOP_RUNG, (GOOD, *ADAPTED))
    found = adapted.over_mix(GOOD)
    assert found is not None
    assert [one.name for one in found[:2]] == [adapted_name(TOP), BOTTOM]


def _mean(mix: object) -> float:
    return float(mix[2].mean) if isinstance(mix, tuple) else float("nan")


def test_line_and_gap_are_between_adapted_ends_where_both_are_given() -> None:
    plain, adapted = LADDER, Ladder(BOTTOM_RUNG, TOP_RUNG, (GOOD, *ADAPTED))
    one, other = plain.gap_closed(GOOD), adapted.gap_closed(GOOD)
    assert one is not None
    assert other is not None
    assert (one.mean, other.mean) == pytest.approx((0.9, 0.4 / 0.6))
    half = Ladder(BOTTOM_RUNG, TOP_RUNG, (GOOD, ADAPTED[0]))
    assert half.ends() == (BOTTOM_RUNG, TOP_RUNG)


def test_one_model_has_no_line_and_no_gap() -> None:
    same = Ladder(BOTTOM_RUNG, BOTTOM_RUNG, (GOOD, ADAPTED[0]))
    assert (same.over_line(GOOD), same.gap_closed(GOOD), same.over_mix(GOOD)) == (None, None, None)
    assert [one.name for one in same.systems()] == ["24 → 17", BOTTOM, adapted_name(BOTTOM)]


def test_interval_of_a_gain_within_the_noise_includes_zero() -> None:
    noisy = rung("noisy", 750, 1.45, noise=1.0)
    found = Ladder(BOTTOM_RUNG, TOP_RUNG, (noisy,)).over_line(noisy)
    assert found is not None
    assert found.mean == pytest.approx(0.05)
    assert found.low < 0 < found.high


def test_hull_keeps_what_no_mix_reaches() -> None:
    points = [(1, 4.0), (2, 3.5), (3, 1.0), (4, 0.9), (5, 0.0)]
    assert hull(points) == [(1, 4.0), (3, 1.0), (5, 0.0)]


def test_json_has_every_system_cheapest_first_and_their_differences() -> None:
    found = json.loads(json.dumps(LADDER.as_json()))
    assert [row["name"] for row in found["systems"]] == [TOP, "8 → 7", "24 → 17", BOTTOM]
    row = found["systems"][1]
    assert row["losses"]["content"]["mean"] == pytest.approx(1.9)
    assert row["over_mix"]["of"] == [TOP, "24 → 17"]
    assert row["over_line"]["mean"] == pytest.approx(-0.1)
    assert found["differences"]["loss"]["8 → 7"]["24 → 17"]["mean"] == pytest.approx(0.8)
    assert set(found["differences"]) == {"loss", "text agreement", "agreement"}


def test_tables_say_of_every_route_whether_it_is_above_its_neighbours() -> None:
    text = LADDER.markdown()
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    assert {row[0]: row[4] for row in cells if len(row) == 6 and "→" in row[0]} == {"24 → 17": "yes", "8 → 7": "no"}
    assert "| 8 → 7 | 600 | 1.900 [" in text


def test_plot_writes_a_png(tmp_path: Path) -> None:
    Ladder(BOTTOM_RUNG, TOP_RUNG, (GOOD, BAD, *ADAPTED)).plot(tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
