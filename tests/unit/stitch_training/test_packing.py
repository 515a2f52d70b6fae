"""Sequences: their order, their share per file, and what is held out of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest

from stitch.errors import InvalidRequest
from stitch_training.data import Document, Turn
from stitch_training.packing import Corpus, DataSettings, is_held_out, packed, shuffled


class Characters:
    """One token a character; a conversation begins with 1000."""

    separator = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_chat(self, turns: Sequence[Turn]) -> list[int]:
        return [1000, *(ord(character) for turn in turns for character in turn.content)]


def corpus(folder: Path, *counts: int, seed: int = 0, sequence_tokens: int = 16) -> Corpus:
    """One file of `count` different texts for each count."""
    files = []
    for number, count in enumerate(counts):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{number}/{row} of it"}) + "\n" for row in range(count)))
        files.append(path)
    return Corpus(tuple(files), Characters(), sequence_tokens, held_out_percent=20, seed=seed)


def test_packing_keeps_every_token_in_order() -> None:
    assert list(packed([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]], 4)) == [(1, 2, 3, 4), (5, 6, 7, 8)]


def test_packing_cuts_a_long_document_into_many() -> None:
    assert list(packed([list(range(9))], 2)) == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_shuffling_loses_nothing_and_needs_few_at_a_time() -> None:
    documents = [Document(text=str(number)) for number in range(50)]
    drawn = list(shuffled(documents, seed=1, buffered=8))
    assert sorted(drawn, key=lambda document: int(document.text)) == documents
    assert drawn != documents
    # The first comes after 8 are read, so it is one of them.
    assert int(drawn[0].text) < 8


def test_the_same_seed_gives_the_same_sequences(tmp_path: Path) -> None:
    first, again, other = (list(corpus(tmp_path, 60, seed=seed).training()) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_files_take_turns_until_they_are_exhausted(tmp_path: Path) -> None:
    files = [sequence.file for sequence in corpus(tmp_path, 20, 90).training()]
    assert files[:6] == [0, 1, 0, 1, 0, 1]
    assert set(files[2 * files.count(0) :]) == {1}


def test_files_give_their_shares(tmp_path: Path) -> None:
    data = corpus(tmp_path, 90, 90, 20)
    shared = Corpus(data.files, data.encoder, data.sequence_tokens, 20, shares=(3, 1, 1))
    files = [sequence.file for sequence in shared.training()]
    assert files[:10] == [0, 0, 0, 1, 2, 0, 0, 0, 1, 2]
    assert sorted(shared.training(), key=str) == sorted(data.training(), key=str)
    assert shared.held_out(96) == data.held_out(96)


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    data = corpus(tmp_path, 200, sequence_tokens=1)
    trained = "".join(chr(sequence.token_ids[0]) for sequence in data.training()).split("\0")
    held = "".join(chr(sequence.token_ids[0]) for sequence in data.held_out(10**6)).split("\0")
    assert not set(trained) & set(held) - {""}
    assert len(trained) + len(held) - 2 == 200
    # A fifth of 200, give or take three standard deviations.
    assert 23 <= len(held) <= 57


def test_the_held_out_part_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    assert corpus(tmp_path, 60, seed=1).held_out(64) == corpus(tmp_path, 60, seed=2).held_out(64)


def test_being_held_out_depends_on_the_text_alone() -> None:
    text, chat = Document(text="user: a"), Document(turns=(Turn("user", "a"),))
    assert is_held_out(text, 50) == is_held_out(chat, 50)
    assert is_held_out(text, 100)
    assert not is_held_out(text, 0)


def test_conversations_go_through_the_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"question": "ab", "answer": "cd"}) + "\n")
    data = Corpus((path,), Characters(), 5, held_out_percent=0)
    assert [sequence.token_ids for sequence in data.training()] == [(1000, *map(ord, "abcd"))]


def test_as_many_held_out_sequences_as_asked_for(tmp_path: Path) -> None:
    data = corpus(tmp_path, 200)
    assert len(data.held_out(17)) == 2
    assert data.held_out(16) == list(islice(data.held_out(64), 1))


def test_too_little_held_out_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"0\.jsonl.* its held-out 20 % must fill a sequence of 4096 tokens"):
        corpus(tmp_path, 5, sequence_tokens=4096).held_out(1)


def test_the_description_names_what_decides_the_numbers() -> None:
    def described(seed: int = 0, dtype: str = "float32", name: str = "a.txt", shares: tuple[int, ...] = ()) -> str:
        data = DataSettings((Path("folder") / name,), 100, 10, seed=seed, shares=shares)
        return data.described(("r1", "r2"), dtype)

    assert described() == described()
    assert len({described(), described(seed=1), described(dtype="bfloat16"), described(name="b.txt")}) == 4
    assert described(shares=(2,)) != described()
    assert "folder" not in described()
