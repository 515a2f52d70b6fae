"""Loading two models for fitting, their tokenizer, and what does not fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stitch.cluster import load_cluster
from stitch.errors import Incompatible, InvalidRequest
from stitch_training.cost_ladder import parameters_of, whole_parameters
from stitch_training.data import Turn
from stitch_training.encoding import FolderEncoder
from stitch_training.fit import check_cut
from stitch_training.pairs import LoadedPair, load_pair
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.tiny_fit import BOTTOM_LAYERS, TOP_LAYERS, write_cluster


def loaded(folder: Path) -> LoadedPair:
    return load_pair(load_cluster(str(write_cluster(folder))), torch.float32)


def rewritten(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_both_models_come_whole(tmp_path: Path) -> None:
    pair = loaded(tmp_path)
    assert (pair.pair.bottom.depth, pair.pair.bottom.hidden_size) == (BOTTOM_LAYERS, 48)
    assert (pair.pair.top.depth, pair.pair.top.hidden_size) == (TOP_LAYERS, 32)
    assert not pair.is_one_model
    assert (pair.bottom.id, pair.top.id) == ("tiny/bottom", "tiny/top")


def test_padding_rows_are_no_vocabulary(tmp_path: Path) -> None:
    pair = loaded(tmp_path)
    assert pair.pair.vocabulary == pair.bottom.vocabulary_size == pair.top.vocabulary_size - 8


def test_one_folder_twice_is_one_model(tmp_path: Path) -> None:
    file = write_cluster(tmp_path)
    same = file.read_text().replace(str(tmp_path / "bottom"), str(tmp_path / "top"))
    file.write_text(same.replace("[0, 3]", "[0, 2]"))
    pair = load_pair(load_cluster(str(file)), torch.float32)
    assert pair.is_one_model
    assert pair.pair.bottom is pair.pair.top


def test_two_tokenizers_are_refused(tmp_path: Path) -> None:
    file = write_cluster(tmp_path)
    tokenizer = json.loads((tmp_path / "top" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (tmp_path / "top" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(Incompatible, match="the tokenizers of tiny/bottom and tiny/top differ"):
        load_pair(load_cluster(str(file)), torch.float32)


def test_a_cut_costs_its_layers_its_stitch_and_the_head(tmp_path: Path) -> None:
    pair = loaded(tmp_path)
    bottom, top = pair.bottom_count, pair.top_count
    assert parameters_of(pair, (2, 1)) == bottom.between(0, 2) + 32 * 49 + top.between(1, 2) + top.head
    assert parameters_of(pair, (2, 1), has_stitch=False) == parameters_of(pair, (2, 1)) - 32 * 49
    assert whole_parameters(pair)["bottom alone"] == sum(bottom.layers) + bottom.head


@pytest.mark.parametrize(("cut", "fits"), [((3, 1), True), ((0, 0), True), ((4, 1), False), ((2, 2), False)])
def test_a_cut_lies_inside_both_models(tmp_path: Path, cut: tuple[int, int], fits: bool) -> None:
    pair = loaded(tmp_path)
    if fits:
        check_cut(pair, cut)
    else:
        with pytest.raises(InvalidRequest, match="it must be 0 to"):
            check_cut(pair, cut)


def test_text_is_encoded_as_it_is(tmp_path: Path) -> None:
    write_cluster(tmp_path)
    encoder = FolderEncoder(tmp_path / "top")
    assert encoder.encode("hello there") == byte_tokenizer().encode("hello there").ids
    assert encoder.separator == byte_tokenizer().token_to_id("<|endoftext|>")


def test_a_conversation_goes_through_the_template(tmp_path: Path) -> None:
    write_cluster(tmp_path)
    ids = FolderEncoder(tmp_path / "top").encode_chat([Turn("user", "hello"), Turn("assistant", "world")])
    text = byte_tokenizer().decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n"


def test_without_a_template_there_are_no_conversations(tmp_path: Path) -> None:
    write_cluster(tmp_path)
    rewritten(tmp_path / "top" / "tokenizer_config.json", chat_template=None)
    with pytest.raises(Incompatible, match="has no chat template"):
        FolderEncoder(tmp_path / "top").encode_chat([Turn("user", "hello")])
