"""Maps from sums alone agree with solvers that have every token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stitch_training.least_squares import RIDGES, AffineMap, Cross, FirstStates, Gram, Spread, fit_ridge, hold_state

INPUTS, OUTPUTS = 6, 4


def drawn(tokens: int, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Channels of unequal size and mean, as in a language model, and targets that nearly follow from them."""
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, INPUTS, generator=draw) * torch.logspace(-1, 2, INPUTS) + 5
    truth = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(99))
    targets = states @ truth.T + noise * torch.randn(tokens, OUTPUTS, generator=draw) - 3
    return states, targets


def summed(states: Tensor, targets: Tensor, batches: int = 1) -> tuple[Gram, Cross]:
    gram, cross = Gram(INPUTS), Cross(INPUTS, OUTPUTS)
    for x, y in zip(states.chunk(batches), targets.chunk(batches), strict=True):
        gram.add(x)
        cross.add(x, y)
    return gram, cross


def solved(ridge: float, states: Tensor | None = None, targets: Tensor | None = None) -> AffineMap:
    gram, cross = summed(*drawn(400), batches=7) if states is None or targets is None else summed(states, targets)
    spread = Spread(gram)
    mean = cross.total / gram.count
    covariance = cross.products / gram.count - torch.outer(mean, spread.mean)
    weight = covariance @ spread.vectors / spread.damped(ridge) @ spread.vectors.T
    return AffineMap(weight, mean - weight @ spread.mean)


def test_normal_equations_agree_with_lstsq() -> None:
    states, targets = drawn(400)
    design = torch.cat([states.double(), torch.ones(400, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, targets.double()).solution
    found = solved(0.0)
    torch.testing.assert_close(found.weight, expected[:-1].T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.bias, expected[-1], rtol=1e-7, atol=1e-7)


def test_sums_do_not_depend_on_the_batches() -> None:
    whole, batches = (summed(*drawn(100), batches=batches) for batches in (1, 9))
    for one, many in zip(whole, batches, strict=True):
        for name, value in one.state().items():
            torch.testing.assert_close(many.state()[name], value, rtol=1e-12, atol=1e-12)


def test_explained_share_is_that_of_the_held_out_tokens() -> None:
    training, (states, targets) = drawn(60, noise=8.0), drawn(200, noise=8.0, seed=1)
    gram, cross = summed(*training)
    found = fit_ridge(Spread(gram), cross, gram, *summed(states, targets))
    left = targets - (states.double() @ found.map.weight.T + found.map.bias)
    about = targets - cross.total / gram.count
    units = (training[0].double() @ solved(RIDGES[0], *training).weight.T).var(0, correction=0)
    share = float(((about.square() - left.square()).mean(0) / units).mean())
    assert found.explained[found.ridge] == pytest.approx(share, rel=1e-6)


def test_ridge_fit_does_not_depend_on_the_scale_of_channels() -> None:
    larger = torch.logspace(3, -3, INPUTS), torch.logspace(-2, 2, OUTPUTS)
    plain, scaled = [], []
    for found, (by_input, by_output) in ((plain, (torch.ones(INPUTS), torch.ones(OUTPUTS))), (scaled, larger)):
        training, held = drawn(30, noise=20.0), drawn(200, noise=20.0, seed=1)
        gram, cross = summed(training[0] * by_input, training[1] * by_output)
        fitted = fit_ridge(Spread(gram), cross, gram, *summed(held[0] * by_input, held[1] * by_output))
        found += [fitted.ridge, fitted.map.weight * by_input / by_output[:, None]]
    assert plain[0] == scaled[0]
    torch.testing.assert_close(plain[1], scaled[1], rtol=1e-4, atol=1e-4)


def test_ridge_that_explains_most_is_chosen() -> None:
    # Few tokens with much noise: hardly any damping would follow the noise.
    gram, cross = summed(*drawn(9, noise=60.0))
    found = fit_ridge(Spread(gram), cross, gram, *summed(*drawn(500, noise=0.0, seed=1)))
    assert set(found.explained) == set(RIDGES)
    assert found.explained[found.ridge] == max(found.explained.values())
    assert found.explained[found.ridge] > found.explained[RIDGES[0]]


def test_a_channel_that_never_varies_is_no_obstacle() -> None:
    states, targets = drawn(50)
    states[:, 2] = 1.0
    gram, cross = summed(states, targets)
    found = fit_ridge(Spread(gram), cross, gram, gram, cross)
    assert found.map.weight.isfinite().all()
    assert found.map.weight[:, 2].abs().max() < 1e-3


def test_whitening_gives_unit_variance() -> None:
    states, targets = drawn(300)
    spread = Spread(summed(states, targets)[0])
    white = (states.double() - spread.mean) @ spread.whitening(0.0).T
    torch.testing.assert_close(white.T @ white / 300, torch.eye(INPUTS, dtype=torch.float64), rtol=0, atol=1e-6)


def test_spread_variances_are_those_of_the_outputs() -> None:
    states, targets = drawn(300)
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = (states.double() @ weight.T).var(0, correction=0)
    torch.testing.assert_close(Spread(summed(states, targets)[0]).variances(weight), expected, rtol=1e-6, atol=1e-6)


def test_hold_state_maps_the_state_and_hardly_changes_others() -> None:
    states, targets = drawn(400)
    gram, _ = summed(states, targets)
    fitted, spread = solved(1e-6), Spread(gram)
    # As large as a first token's state is.
    state, target = 1e4 * torch.randn(INPUTS, dtype=torch.float64), torch.randn(OUTPUTS, dtype=torch.float64)
    held = hold_state(fitted, spread, state, target, 1e-6)
    torch.testing.assert_close(held.weight @ state + held.bias, target, rtol=0, atol=1e-6)
    before = states.double() @ fitted.weight.T + fitted.bias
    after = states.double() @ held.weight.T + held.bias
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=0, atol=1e-6)
    other = state @ fitted.weight.T + fitted.bias - target
    # A change of this size at the state itself leaves other tokens within a fraction of it.
    assert (after - before).norm(dim=1).mean() < 0.01 * other.norm()


def test_first_states_are_averaged() -> None:
    first = FirstStates(2)
    first.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    first.add(torch.tensor([[5.0, 9.0]]))
    torch.testing.assert_close(first.mean(), torch.tensor([3.0, 5.0], dtype=torch.float64))
