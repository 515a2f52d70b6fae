"""A whole model in parts computes what `transformers` computes, and lets gradients through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from stitch_training.whole_model import CausalSequences, banded
from tests.support.tiny_fit import load_whole
from tests.support.tiny_model import NATIVE_FAMILIES, TOKENS, write_tiny_model

LAYERS = 3


def tokens() -> Tensor:
    return torch.randint(TOKENS, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = write_tiny_model(tmp_path / family, family, layers=LAYERS)
    whole = load_whole(folder, LAYERS)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        halfway = whole.run(whole.embed(tokens()), 0, 2)
        logits = whole.logits(whole.run(halfway, 2, LAYERS).flatten(0, 1))
        expected = reference(tokens()).logits.flatten(0, 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen2", layers=LAYERS)
    whole, reference = load_whole(folder, LAYERS), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = whole.embed(tokens()).detach()
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    whole.logits(whole.run(ours, 0, LAYERS).flatten(0, 1)).square().mean().backward()
    reference(inputs_embeds=theirs).logits.square().mean().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    whole = load_whole(write_tiny_model(tmp_path / "model", layers=LAYERS), LAYERS)
    hidden = whole.embed(tokens())
    apart = torch.cat([whole.run(hidden[row : row + 1], 0, LAYERS) for row in range(3)])
    torch.testing.assert_close(whole.run(hidden, 0, LAYERS), apart, rtol=1e-4, atol=1e-5)


def test_a_window_hides_what_is_older() -> None:
    seen = banded(5, 2, torch.device("cpu"))
    assert seen.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_attention_with_a_window_forgets() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, 2, 4, generator=draw) for _ in range(3))
    attend = CausalSequences(1)
    changed = value.clone()
    changed[0] += 10
    near, moved = (attend(0, query, key, given, 0.5, 3) for given in (value, changed))
    assert torch.equal(near[3:], moved[3:])
    assert not torch.equal(near[2], moved[2])
    torch.testing.assert_close(attend(0, query, key, value, 0.5, 6), attend(0, query, key, value, 0.5, None))
