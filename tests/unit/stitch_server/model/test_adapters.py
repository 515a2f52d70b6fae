"""Adapters add their formula's result, layer by layer, and only to the tokens that they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stitch.errors import Incompatible
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers
from tests.support.reference_attention import ReferenceAttention
from tests.support.tiny_model import write_tiny_model
from tests.support.whole_model import CPU

LAYERS, RANK, HIDDEN = 3, 2, 32


def some_adapters(first: int = 1) -> Adapters:
    draw = torch.Generator().manual_seed(1)
    down, up = torch.randn(LAYERS, RANK, HIDDEN, generator=draw), torch.randn(LAYERS, HIDDEN, RANK, generator=draw)
    return Adapters(first, down, up)


def test_adapters_compute_their_formula() -> None:
    adapters, hidden = some_adapters(), 7 * torch.randn(5, HIDDEN)
    narrow = (hidden / hidden.square().mean(1, keepdim=True).sqrt()) @ adapters.down[2].T
    expected = (narrow / (1 + (-narrow).exp())) @ adapters.up[2].T
    torch.testing.assert_close(adapters(3, hidden), expected, rtol=1e-4, atol=1e-4)


def test_token_of_zeros_stays_finite() -> None:
    assert bool((some_adapters()(1, torch.zeros(1, HIDDEN)) == 0).all())


def test_adapters_have_sizes() -> None:
    adapters = some_adapters()
    assert (adapters.first, adapters.end, adapters.rank, adapters.width) == (1, 4, RANK, HIDDEN)
    assert adapters.parameters == 2 * LAYERS * RANK * HIDDEN


@pytest.mark.parametrize(
    ("wanted", "found"), [((0, 9), (1, 4)), ((2, 3), (2, 3)), ((3, 9), (3, 4)), ((0, 1), None), ((4, 9), None)]
)
def test_between_returns_the_adapters_of_a_range(wanted: tuple[int, int], found: tuple[int, int] | None) -> None:
    part, hidden = some_adapters().between(*wanted), torch.randn(2, HIDDEN)
    assert (None if part is None else (part.first, part.end)) == found
    for layer in range(*(found or (0, 0))):
        assert part is not None
        assert torch.equal(part(layer, hidden), some_adapters()(layer, hidden))


@pytest.mark.parametrize("up", [(LAYERS, RANK, HIDDEN), (LAYERS - 1, HIDDEN, RANK), (LAYERS, HIDDEN)])
def test_tensors_that_do_not_fit_together_are_refused(up: tuple[int, ...]) -> None:
    with pytest.raises(Incompatible, match=r"adapters with \(3, 2, 32\) down and .* up do not fit together"):
        Adapters(1, torch.zeros(LAYERS, RANK, HIDDEN), torch.zeros(up))


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_adapters_add_only_to_their_tokens(tmp_path: Path, family: str) -> None:
    layers = DecoderLayers.load(write_tiny_model(tmp_path, family), 1, 4, CPU, torch.float32)
    hidden, rotary = torch.randn(6, HIDDEN), layers.rotary(torch.arange(6))
    before, adapters = hidden.clone(), some_adapters()
    one = layers.run(hidden, rotary, ReferenceAttention(), 1, 2, [(slice(2, 4), adapters)])
    expected = layers.run(hidden, rotary, ReferenceAttention(), 1, 2)
    expected[2:4] += adapters(1, hidden[2:4])
    torch.testing.assert_close(one, expected)
    assert torch.equal(hidden, before)
