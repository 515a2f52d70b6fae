"""Adapters in training begin with no effect, move in units of what they see, and hand their gradients through."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stitch_server.model.adapters import Adapters
from stitch_training.trainable_adapters import Sizes, TrainableAdapters, sizes_of
from tests.support.tiny_fit import TOP_LAYERS, tiny_pair
from tests.support.tiny_model import TOKENS

HIDDEN, RANK = 32, 3


def some_sizes() -> Sizes:
    draw = torch.Generator().manual_seed(0)
    return Sizes(*(torch.rand(TOP_LAYERS, HIDDEN, generator=draw) + 0.1 for _ in range(2)))


def tokens() -> Tensor:
    return torch.randint(TOKENS, (2, 8), generator=torch.Generator().manual_seed(0))


def test_fresh_ones_change_nothing(tmp_path: Path) -> None:
    top = tiny_pair(tmp_path).top
    fresh = TrainableAdapters.fresh(0, RANK, some_sizes(), seed=0).to_adapters()
    hidden = top.embed(tokens())
    assert fresh.down.abs().max() > 0
    assert torch.equal(top.run(hidden, 0, top.depth, fresh), top.run(hidden, 0, top.depth))


def test_sizes_are_those_of_the_states(tmp_path: Path) -> None:
    top = tiny_pair(tmp_path).top
    hidden = top.embed(tokens())
    # The first token's size must not count.
    hidden[:, 0] *= 1000
    sizes = sizes_of(top, hidden, 0)
    assert sizes.states.shape == sizes.reading.shape == (TOP_LAYERS, HIDDEN)
    rows = top.run(hidden, 0, 1)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(sizes.states[1], rows.square().mean(0).sqrt())
    normed = rows / rows.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(sizes.reading[1], normed.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)


def test_the_seed_decides() -> None:
    drawn = [TrainableAdapters.fresh(0, RANK, some_sizes(), seed).to_adapters().down for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_coordinates_are_shares_of_the_sizes() -> None:
    sizes, trained = some_sizes(), TrainableAdapters.fresh(1, RANK, some_sizes(), seed=0)
    down, up = trained.parameters()
    with torch.no_grad():
        up.fill_(1.0)
    made = trained.to_adapters()
    assert made.first == 1
    torch.testing.assert_close(made.down * sizes.reading[:, None, :], down)
    torch.testing.assert_close(made.up, sizes.states[:, :, None].expand(-1, -1, RANK))


def test_gradients_reach_both_tensors(tmp_path: Path) -> None:
    top = tiny_pair(tmp_path).top
    trained = TrainableAdapters.fresh(0, RANK, some_sizes(), seed=0)
    with torch.no_grad():
        trained.parameters()[1].normal_(std=0.1)

    def loss(adapters: Adapters) -> Tensor:
        return top.run(top.embed(tokens()), 0, top.depth, adapters).square().mean()

    loss(trained.to_adapters()).backward()
    for parameter in trained.parameters():
        gradient = parameter.grad
        assert gradient is not None
        at = tuple(int(place) for place in torch.nonzero(gradient.abs() == gradient.abs().max())[0])
        with torch.no_grad():
            parameter[at] += 1e-2
            above = loss(trained.to_adapters())
            parameter[at] -= 2e-2
            below = loss(trained.to_adapters())
            parameter[at] += 1e-2
        torch.testing.assert_close((above - below) / 2e-2, gradient[at], rtol=0.05, atol=1e-5)
