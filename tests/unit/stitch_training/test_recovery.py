"""PGR, APGR and CPT of a ranking, against cases that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from stitch.errors import InvalidRequest
from stitch_training.recovery import Float64Array, apgr, apgr_lead, cpt, curve, pgr_at, recovery


def labels(count: int = 1_000, gaining: float = 0.2) -> tuple[Float64Array, Float64Array]:
    """Returns qualities of which the first prompts need strong and the others don't."""
    strong = np.ones(count)
    weak = np.ones(count)
    weak[: int(gaining * count)] = 0
    return weak, strong


def test_oracle_recovers_all_with_the_share_that_gains() -> None:
    weak, strong = labels()
    order = np.arange(1_000, 0, -1, dtype=float)
    shares, pgr = curve(order, weak, strong)
    assert shares.tolist() == pytest.approx(np.linspace(0, 1, 11).tolist())
    assert pgr.tolist() == pytest.approx([0, 0.5, *([1.0] * 9)])
    assert apgr(shares, pgr) == pytest.approx(0.9)
    assert (cpt(shares, pgr, 0.5), cpt(shares, pgr, 0.8)) == pytest.approx((0.1, 0.16))


def test_pgr_at_a_share_is_on_the_straight_line_between_points() -> None:
    shares, pgr = np.array([0.0, 0.4, 1.0]), np.array([0.0, 0.8, 1.0])
    assert pgr_at(shares, pgr, 0.2) == pytest.approx(0.4)
    assert pgr_at(shares, pgr, 0.5) == pytest.approx(0.8 + 0.2 / 6)


def test_lead_is_the_difference_over_the_same_prompts() -> None:
    draw = np.random.default_rng(4)
    weak, strong = draw.random(300), draw.random(300) + 0.2
    good, bad = strong - weak + draw.normal(size=300), draw.random(300)
    found = apgr_lead(good, bad, weak, strong)
    values = [recovery(scores, weak, strong).apgr.value for scores in (good, bad)]
    assert found.value == pytest.approx(values[0] - values[1])
    assert 0 < found.low < found.value < found.high
    same = apgr_lead(good, good, weak, strong)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_worst_ranking_recovers_nothing_until_the_end() -> None:
    weak, strong = labels()
    shares, pgr = curve(np.arange(1_000, dtype=float), weak, strong)
    assert apgr(shares, pgr) == pytest.approx(0.1)
    assert cpt(shares, pgr, 0.5) == pytest.approx(0.9)


def test_random_ranking_is_the_diagonal() -> None:
    draw = np.random.default_rng(0)
    weak, strong = labels(20_000)
    found = recovery(draw.random(20_000), weak, strong)
    assert found.apgr.value == pytest.approx(0.5, abs=0.02)
    assert found.cpt_50.value == pytest.approx(0.5, abs=0.03)
    assert found.apgr.low < 0.5 < found.apgr.high


def test_curve_does_not_depend_on_the_scale_of_scores() -> None:
    draw = np.random.default_rng(1)
    weak, strong, scores = draw.random(300), draw.random(300) + 0.2, draw.random(300)
    for same in (3 * scores - 7, np.exp(scores)):
        assert np.allclose(curve(same, weak, strong)[1], curve(scores, weak, strong)[1], atol=0.02)


def test_equal_scores_count_at_their_true_share() -> None:
    weak, strong = labels()
    shares, pgr = curve(np.zeros(1_000), weak, strong)
    assert set(shares.tolist()) == {0.0, 1.0}
    assert apgr(shares, pgr) == pytest.approx(0.5)


def test_pgr_exceeds_1_where_strong_is_worse_on_some_prompts() -> None:
    strong = np.array([1.0] * 60 + [0.0] * 40)
    weak = np.array([0.0] * 60 + [1.0] * 40)
    _, pgr = curve(np.arange(100, 0, -1, dtype=float), weak, strong)
    assert pgr.max() == pytest.approx(3.0)
    assert pgr[-1] == pytest.approx(1.0)


def test_cpt_is_the_first_crossing() -> None:
    shares, pgr = np.linspace(0, 1, 5), np.array([0.0, 0.6, 0.4, 0.7, 1.0])
    assert cpt(shares, pgr, 0.5) == pytest.approx(0.25 * 0.5 / 0.6)


def test_interval_contains_the_value_and_narrows_with_rows() -> None:
    draw = np.random.default_rng(2)

    def width(count: int) -> float:
        gain = draw.random(count)
        weak, strong = (draw.random(count) > 0.5).astype(float), (draw.random(count) < 0.5 + gain / 2).astype(float)
        found = recovery(gain, weak, strong).apgr
        assert found.low <= found.value <= found.high
        return found.high - found.low

    assert width(10_000) < width(500)


def test_same_seed_gives_the_same_interval() -> None:
    weak, strong = labels(200)
    scores = np.random.default_rng(3).random(200)
    assert recovery(scores, weak, strong) == recovery(scores, weak, strong)


@pytest.mark.parametrize("lead", [0.0, -0.5])
def test_strong_without_a_lead_is_refused(lead: float) -> None:
    weak = np.full(10, 0.5)
    with pytest.raises(InvalidRequest, match="strong must be better"):
        recovery(np.arange(10.0), weak, weak + lead)
