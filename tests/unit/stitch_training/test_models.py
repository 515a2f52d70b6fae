"""Frozen models compute what `transformers` computes, and load as a pair with one tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from stitch.cluster import load_cluster
from stitch.errors import Incompatible, InvalidRequest
from stitch_training.cost_ladder import parameters_of, whole_parameters
from stitch_training.data import Turn
from stitch_training.fit import check_cut
from stitch_training.folder_encoder import FolderEncoder
from stitch_training.least_squares import CutPoint
from stitch_training.models import CausalSequences, LoadedPair, banded_mask, load_pair
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.tiny_fit import BOTTOM_LAYERS, TOP_LAYERS, load_frozen, write_cluster
from tests.support.tiny_model import NATIVE_FAMILIES, TOKENS, write_tiny_model

LAYERS = 3


def tokens() -> Tensor:
    return torch.randint(TOKENS, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_frozen_model_logits_match_transformers(tmp_path: Path, family: str) -> None:
    folder = write_tiny_model(tmp_path / family, family, layers=LAYERS)
    model = load_frozen(folder, LAYERS)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        halfway = model.run(model.embed(tokens()), 0, 2)
        logits = model.logits(model.run(halfway, 2, LAYERS).flatten(0, 1))
        expected = reference(tokens()).logits.flatten(0, 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_frozen_model_gradients_match_transformers(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen2", layers=LAYERS)
    model, reference = load_frozen(folder, LAYERS), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = model.embed(tokens()).detach()
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    model.logits(model.run(ours, 0, LAYERS).flatten(0, 1)).square().mean().backward()
    reference(inputs_embeds=theirs).logits.square().mean().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_sequences_of_a_batch_are_independent(tmp_path: Path) -> None:
    model = load_frozen(write_tiny_model(tmp_path / "model", layers=LAYERS), LAYERS)
    hidden = model.embed(tokens())
    separate = torch.cat([model.run(hidden[row : row + 1], 0, LAYERS) for row in range(3)])
    torch.testing.assert_close(model.run(hidden, 0, LAYERS), separate, rtol=1e-4, atol=1e-5)


def test_banded_mask_excludes_tokens_outside_the_window() -> None:
    mask = banded_mask(5, 2, torch.device("cpu"))
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_attention_ignores_tokens_outside_the_window() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, 2, 4, generator=draw) for _ in range(3))
    attend = CausalSequences(1)
    changed = value.clone()
    changed[0] += 10
    near, moved = (attend(0, query, key, given, 0.5, 3) for given in (value, changed))
    assert torch.equal(near[3:], moved[3:])
    assert not torch.equal(near[2], moved[2])
    torch.testing.assert_close(attend(0, query, key, value, 0.5, 6), attend(0, query, key, value, 0.5, None))


def loaded(folder: Path) -> LoadedPair:
    return load_pair(load_cluster(str(write_cluster(folder))), torch.float32)


def rewritten(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_load_pair_loads_both_models(tmp_path: Path) -> None:
    pair = loaded(tmp_path)
    assert (pair.pair.bottom.depth, pair.pair.bottom.hidden_size) == (BOTTOM_LAYERS, 48)
    assert (pair.pair.top.depth, pair.pair.top.hidden_size) == (TOP_LAYERS, 32)
    assert not pair.is_one_model
    assert (pair.bottom.id, pair.top.id) == ("tiny/bottom", "tiny/top")


def test_padding_rows_are_not_in_the_vocabulary(tmp_path: Path) -> None:
    pair = loaded(tmp_path)
    assert pair.pair.vocabulary == pair.bottom.vocabulary_size == pair.top.vocabulary_size - 8


def test_one_folder_in_both_roles_is_loaded_once(tmp_path: Path) -> None:
    file = write_cluster(tmp_path)
    same = file.read_text().replace(str(tmp_path / "bottom"), str(tmp_path / "top"))
    file.write_text(same.replace("[0, 3]", "[0, 2]"))
    pair = load_pair(load_cluster(str(file)), torch.float32)
    assert pair.is_one_model
    assert pair.pair.bottom is pair.pair.top


def test_different_tokenizers_are_refused(tmp_path: Path) -> None:
    file = write_cluster(tmp_path)
    tokenizer = json.loads((tmp_path / "top" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (tmp_path / "top" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(Incompatible, match="the tokenizers of tiny/bottom and tiny/top differ"):
        load_pair(load_cluster(str(file)), torch.float32)


def test_parameters_of_a_cut_are_its_layers_stitch_and_head(tmp_path: Path) -> None:
    pair = loaded(tmp_path)
    bottom, top = pair.bottom_count, pair.top_count
    assert parameters_of(pair, CutPoint(2, 1)) == bottom.between(0, 2) + 32 * 49 + top.between(1, 2) + top.head
    assert parameters_of(pair, CutPoint(2, 1), 3) == parameters_of(pair, CutPoint(2, 1)) + 2 * 3 * 32
    assert whole_parameters(bottom) == sum(bottom.layers) + bottom.head


@pytest.mark.parametrize(("cut", "fits"), [((3, 1), True), ((0, 0), True), ((4, 1), False), ((2, 2), False)])
def test_cut_outside_of_a_model_is_refused(tmp_path: Path, cut: tuple[int, int], fits: bool) -> None:
    pair = loaded(tmp_path)
    if fits:
        check_cut(pair, CutPoint(*cut))
    else:
        with pytest.raises(InvalidRequest, match="it must be 0 to"):
            check_cut(pair, CutPoint(*cut))


def test_plain_text_is_encoded_without_special_tokens(tmp_path: Path) -> None:
    write_cluster(tmp_path)
    encoder = FolderEncoder(tmp_path / "top")
    assert encoder.encode("hello there") == byte_tokenizer().encode("hello there").ids
    assert encoder.separator == byte_tokenizer().token_to_id("<|endoftext|>")


def test_answers_end_at_the_tokens_of_the_configuration_and_of_the_tokenizer(tmp_path: Path) -> None:
    write_cluster(tmp_path)
    (tmp_path / "top" / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert FolderEncoder(tmp_path / "top").ends == {0, byte_tokenizer().token_to_id("<|im_end|>")}


def test_conversation_is_encoded_through_the_template(tmp_path: Path) -> None:
    write_cluster(tmp_path)
    tokens = FolderEncoder(tmp_path / "top").encode_chat([Turn("user", "hello"), Turn("assistant", "world")])
    text = byte_tokenizer().decode([token.token_id for token in tokens], skip_special_tokens=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n"


def test_conversation_without_a_template_is_refused(tmp_path: Path) -> None:
    write_cluster(tmp_path)
    rewritten(tmp_path / "top" / "tokenizer_config.json", chat_template=None)
    with pytest.raises(Incompatible, match="has no chat template"):
        FolderEncoder(tmp_path / "top").encode_chat([Turn("user", "hello")])
