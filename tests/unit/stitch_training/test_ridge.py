"""The regression finds what is there, and shrinks what is not."""

from __future__ import annotations

import numpy as np
import pytest

from stitch_training.ridge import PENALTIES, fit


def test_a_linear_relation_is_found() -> None:
    drawn = np.random.default_rng(0)
    features = drawn.standard_normal((200, 5)) * [1.0, 10.0, 0.1, 1.0, 1.0] + 3
    targets = features @ drawn.standard_normal((5, 2)) + [1.0, -2.0]
    fitted = fit(features, targets)
    assert fitted.penalty == min(PENALTIES)
    assert np.abs(fitted.predict(features) - targets).max() < 0.01 * targets.std()


def test_noise_is_shrunk() -> None:
    drawn = np.random.default_rng(1)
    features, targets = drawn.standard_normal((60, 40)), drawn.standard_normal((60, 1))
    fitted = fit(features, targets)
    assert fitted.penalty > 1
    assert fitted.predict(features).std() < 0.5 * targets.std()


def test_a_feature_that_never_varies_gets_no_weight() -> None:
    drawn = np.random.default_rng(2)
    features = np.hstack([drawn.standard_normal((50, 2)), np.full((50, 1), 7.0)])
    fitted = fit(features, features[:, :1])
    assert fitted.weights[2, 0] == 0
    assert np.isfinite(fitted.weights).all()


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_leave_one_out_error_is_that_of_leaving_one_out(penalty: float) -> None:
    from stitch_training import ridge

    drawn = np.random.default_rng(3)
    features = drawn.standard_normal((12, 3))
    # The short cut keeps the means of all rows; rows in pairs of opposites have means of zero.
    features = np.vstack([features, -features])
    targets = np.vstack([drawn.standard_normal((12, 1)), drawn.standard_normal((12, 1))])
    targets -= targets.mean()
    scale = features.std(axis=0)
    standard = features / scale
    gram = standard.T @ standard
    errors = []
    for row in range(24):
        kept = np.arange(24) != row
        # Unpenalized mean, penalized weights, without this row.
        design = np.hstack([np.ones((23, 1)), standard[kept]])
        penalties = np.diag([0.0, *([penalty * 24] * 3)])
        solved = np.linalg.solve(design.T @ design + penalties, design.T @ targets[kept])
        errors.append(float((targets[row] - [1.0, *standard[row]] @ solved)[0]) ** 2)
    variances, axes = np.linalg.eigh(gram)
    turned = standard @ axes
    found = ridge._error(turned, variances, turned.T @ targets, targets, penalty)
    assert found == pytest.approx(np.mean(errors))
