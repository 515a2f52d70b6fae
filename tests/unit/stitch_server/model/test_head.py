"""The two ends of a model: rows of the embedding, and logits with neither padding nor a missing tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stitch.errors import Incompatible
from stitch_server.model.embedding import EMBEDDING, Embedding
from stitch_server.model.head import Head
from stitch_server.model.linear import WeightFormat
from tests.support.tiny_model import TOKENS, write_tiny_model
from tests.support.whole_model import CPU


def without(folder: Path, name: str) -> Path:
    file = folder / "model.safetensors"
    kept = {stored: tensor for stored, tensor in load_file(file).items() if stored != name}
    save_file(kept, file)
    return folder


def test_an_embedding_gives_a_row_a_token(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, layers=1)
    rows = load_file(folder / "model.safetensors")[EMBEDDING]
    found = Embedding.load(folder, CPU, torch.float32)(torch.tensor([5, 0, 5]))
    assert torch.equal(found, rows[[5, 0, 5]])


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_its_own_or_the_embedding(tmp_path: Path, tied: bool) -> None:
    folder = write_tiny_model(tmp_path, layers=1, tie_word_embeddings=tied)
    stored = load_file(folder / "model.safetensors")
    hidden = torch.randn(3, 32)
    normed = hidden / (hidden.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * stored["model.norm.weight"]
    logits = Head.load(folder, CPU, torch.float32)(hidden)
    assert ("lm_head.weight" in stored) is not tied
    torch.testing.assert_close(logits, normed @ stored[EMBEDDING if tied else "lm_head.weight"].T)


def test_rows_that_only_pad_can_be_left_out(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, layers=1, padding_rows=8)
    hidden = torch.randn(3, 32)
    whole = Head.load(folder, CPU, torch.float32)(hidden)
    short = Head.load(folder, CPU, torch.float32, tokens=TOKENS)(hidden)
    assert whole.shape == (3, TOKENS + 8)
    torch.testing.assert_close(short, whole[:, :TOKENS])


def test_logits_are_float32_whatever_it_computes_in(tmp_path: Path) -> None:
    head = Head.load(write_tiny_model(tmp_path, layers=1), CPU, torch.bfloat16)
    assert head(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kernels", [True, False])
def test_where_layers_are_in_four_bits_it_is_in_bytes(tmp_path: Path, kernels: bool) -> None:
    folder, hidden = write_tiny_model(tmp_path, layers=1), torch.randn(3, 32)
    fours, to_int8, exact = (
        Head.load(folder, CPU, torch.float32, weight_format=WeightFormat(kind, kernels))(hidden)
        for kind in ("int4", "int8", "none")
    )
    assert torch.equal(fours, to_int8)
    assert not torch.equal(fours, exact)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    folder = without(write_tiny_model(tmp_path, layers=1), name)
    with pytest.raises(Incompatible, match=f"tensor {name} is not in "):
        Head.load(folder, CPU, torch.float32)


def test_a_missing_embedding_is_named(tmp_path: Path) -> None:
    folder = without(write_tiny_model(tmp_path, layers=1), EMBEDDING)
    with pytest.raises(Incompatible, match=f"tensor {EMBEDDING} is not in "):
        Embedding.load(folder, CPU, torch.float32)
