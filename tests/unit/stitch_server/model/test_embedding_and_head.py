"""The embedding returns its rows; the head returns logits, without padding tokens on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stitch.errors import Incompatible
from stitch_server.model.description import ParameterCount
from stitch_server.model.embedding_and_head import Embedding, Head
from stitch_server.model.weights import EMBEDDING, WeightFormat
from tests.support.tiny_model import TOKENS, write_tiny_model
from tests.support.whole_model import CPU, PROMPT, our_logits, their_logits


def without(folder: Path, name: str) -> Path:
    file = folder / "model.safetensors"
    kept = {stored: tensor for stored, tensor in load_file(file).items() if stored != name}
    save_file(kept, file)
    return folder


def test_embedding_returns_the_row_of_each_token(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, layers=1)
    rows = load_file(folder / "model.safetensors")[EMBEDDING]
    found = Embedding.load(folder, CPU, torch.float32)(torch.tensor([5, 0, 5]))
    assert torch.equal(found, rows[[5, 0, 5]])


@pytest.mark.parametrize("tied", [True, False])
def test_head_multiplies_by_its_own_matrix_or_the_tied_embedding(tmp_path: Path, tied: bool) -> None:
    folder = write_tiny_model(tmp_path, layers=1, tie_word_embeddings=tied)
    stored = load_file(folder / "model.safetensors")
    hidden = torch.randn(3, 32)
    normed = hidden / (hidden.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * stored["model.norm.weight"]
    logits = Head.load(folder, CPU, torch.float32)(hidden)
    assert ("lm_head.weight" in stored) is not tied
    torch.testing.assert_close(logits, normed @ stored[EMBEDDING if tied else "lm_head.weight"].T)


@pytest.mark.parametrize("stored", ["both", "embedding", "head"])
def test_tied_embeddings_are_those_that_transformers_reads(tmp_path: Path, stored: str) -> None:
    folder = write_tiny_model(tmp_path, layers=1, tie_word_embeddings=False)
    if stored != "both":
        without(folder, EMBEDDING if stored == "head" else "lm_head.weight")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    ours = our_logits(folder, (0, 1), (0, len(PROMPT)))
    torch.testing.assert_close(ours, their_logits(folder), rtol=1e-4, atol=1e-4)
    assert ParameterCount.read(folder).head == (TOKENS + 1) * 32


def test_head_leaves_out_padding_tokens_on_request(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, layers=1, padding_rows=8)
    hidden = torch.randn(3, 32)
    whole = Head.load(folder, CPU, torch.float32)(hidden)
    short = Head.load(folder, CPU, torch.float32, tokens=TOKENS)(hidden)
    assert whole.shape == (3, TOKENS + 8)
    torch.testing.assert_close(short, whole[:, :TOKENS])


def test_logits_are_float32_in_any_dtype(tmp_path: Path) -> None:
    head = Head.load(write_tiny_model(tmp_path, layers=1), CPU, torch.bfloat16)
    assert head(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kernels", [True, False])
def test_head_is_int8_when_layers_are_int4(tmp_path: Path, kernels: bool) -> None:
    folder, hidden = write_tiny_model(tmp_path, layers=1), torch.randn(3, 32)
    fours, to_int8, exact = (
        Head.load(folder, CPU, torch.float32, weight_format=WeightFormat(kind, kernels))(hidden)
        for kind in ("int4", "int8", "none")
    )
    assert torch.equal(fours, to_int8)
    assert not torch.equal(fours, exact)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_head_names_a_missing_tensor(tmp_path: Path, name: str) -> None:
    folder = without(write_tiny_model(tmp_path, layers=1), name)
    with pytest.raises(Incompatible, match=f"tensor {name} is not in "):
        Head.load(folder, CPU, torch.float32)


def test_embedding_names_the_missing_tensor(tmp_path: Path) -> None:
    folder = without(write_tiny_model(tmp_path, layers=1), EMBEDDING)
    with pytest.raises(Incompatible, match=f"tensor {EMBEDDING} is not in "):
        Embedding.load(folder, CPU, torch.float32)
