"""Documents read from files, and the sequences they are packed into, of which a part is held out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest

from stitch.errors import InvalidRequest
from stitch_training.data import (
    Corpus,
    DataSettings,
    Document,
    PairRevisions,
    Role,
    RoledToken,
    Turn,
    is_held_out,
    pack,
    read_documents,
    recallable,
    shuffle,
    to_document,
)


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"text": "plain"}, Document(text="plain")),
        ({"prompt": "Why?"}, Document(turns=(Turn("user", "Why?"),))),
        ({"question": "1 + 1", "answer": "2"}, Document(turns=(Turn("user", "1 + 1"), Turn("assistant", "2")))),
        ({"question": "1 + 1", "task": "sums"}, Document(turns=(Turn("user", "1 + 1"),))),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            Document(turns=(Turn("user", "a"), Turn("assistant", "b"))),
        ),
        ({"messages": [{"role": "user", "content": "a"}], "text": "unread"}, Document(turns=(Turn("user", "a"),))),
    ],
)
def test_row_with_known_fields_is_a_document(row: dict[str, object], document: Document) -> None:
    assert to_document(row) == document


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "must be an object"),
        ({"task": "sums"}, "and has task"),
        ({}, "and has nothing"),
        ({"text": 3}, "`text` must be a string, not 3"),
        ({"question": "a", "answer": None}, "`answer` must be a string, not None"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": ["hi"]}, "must hold objects, not 'hi'"),
        ({"messages": [{"role": "user"}]}, "without `content`"),
    ],
)
def test_row_without_a_document_is_refused_with_its_reason(row: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        to_document(row)


def test_json_lines_file_gives_a_document_per_line(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"text": "a"}, {"prompt": "b"})
    path.write_text(path.read_text() + "\n")
    assert [document.content() for document in read_documents(path)] == ["a", "user: b"]


def test_gzip_file_is_decompressed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    assert list(read_documents(path)) == [Document(text="packed")]


def test_other_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("a = 1\nb = 2\n")
    assert list(read_documents(path)) == [Document(text="a = 1\nb = 2\n")]


def test_invalid_line_is_refused_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl:2"):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("absent.txt", None, "can't be read"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], "can't be read"),
        ("none.jsonl.gz", b"no gzip at all", "can't be read"),
        ("latin.txt", "größer".encode("latin-1"), "not UTF-8"),
    ],
)
def test_unreadable_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        list(read_documents(path))
    assert name in str(caught.value)
    assert caught.value.field == "data"


class Characters:
    """One token a character; a conversation begins with 1000."""

    separator = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_chat(self, turns: Sequence[Turn]) -> list[RoledToken]:
        of = {"user": Role.USER, "assistant": Role.ASSISTANT}
        contents = [RoledToken(ord(one), of[turn.role]) for turn in turns for one in turn.content]
        return [RoledToken(1000, Role.TEMPLATE), *contents]


def corpus(folder: Path, *counts: int, seed: int = 0, sequence_tokens: int = 16) -> Corpus:
    """One file of `count` different texts for each count."""
    files = []
    for number, count in enumerate(counts):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{number}/{row} of it"}) + "\n" for row in range(count)))
        files.append(path)
    return Corpus(tuple(files), Characters(), sequence_tokens, held_out_percent=20, seed=seed)


def test_pack_keeps_tokens_in_order_and_drops_an_incomplete_sequence() -> None:
    assert list(pack([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]], 4)) == [(1, 2, 3, 4), (5, 6, 7, 8)]


def test_pack_splits_a_long_document() -> None:
    assert list(pack([list(range(9))], 2)) == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_shuffle_keeps_every_document_and_buffers_few() -> None:
    documents = [Document(text=str(number)) for number in range(50)]
    drawn = list(shuffle(documents, seed=1, buffered=8))
    assert sorted(drawn, key=lambda document: int(document.text)) == documents
    assert drawn != documents
    # The first document is drawn from the first 8.
    assert int(drawn[0].text) < 8


def test_same_seed_gives_the_same_sequences(tmp_path: Path) -> None:
    first, again, other = (list(corpus(tmp_path, 60, seed=seed).training()) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_files_alternate_until_exhausted(tmp_path: Path) -> None:
    files = [sequence.file for sequence in corpus(tmp_path, 20, 90).training()]
    assert files[:6] == [0, 1, 0, 1, 0, 1]
    assert set(files[2 * files.count(0) :]) == {1}


def test_files_contribute_their_shares(tmp_path: Path) -> None:
    data = corpus(tmp_path, 90, 90, 20)
    shared = Corpus(data.files, data.encoder, data.sequence_tokens, 20, shares=(3, 1, 1))
    files = [sequence.file for sequence in shared.training()]
    assert files[:10] == [0, 0, 0, 1, 2, 0, 0, 0, 1, 2]
    assert sorted(shared.training(), key=str) == sorted(data.training(), key=str)
    assert shared.held_out(96) == data.held_out(96)


def test_training_and_held_out_documents_are_disjoint(tmp_path: Path) -> None:
    data = corpus(tmp_path, 200, sequence_tokens=1)
    trained = "".join(chr(sequence.token_ids[0]) for sequence in data.training()).split("\0")
    held = "".join(chr(sequence.token_ids[0]) for sequence in data.held_out(10**6)).split("\0")
    assert not set(trained) & set(held) - {""}
    assert len(trained) + len(held) - 2 == 200
    # A fifth of 200, give or take three standard deviations.
    assert 23 <= len(held) <= 57


def test_held_out_part_is_the_same_for_every_seed(tmp_path: Path) -> None:
    assert corpus(tmp_path, 60, seed=1).held_out(64) == corpus(tmp_path, 60, seed=2).held_out(64)


def test_document_is_held_out_by_its_text_alone() -> None:
    text, chat = Document(text="user: a"), Document(turns=(Turn("user", "a"),))
    assert is_held_out(text, 50) == is_held_out(chat, 50)
    assert is_held_out(text, 100)
    assert not is_held_out(text, 0)


def test_conversation_is_encoded_through_the_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"question": "ab", "answer": "cd"}) + "\n")
    data = Corpus((path,), Characters(), 5, held_out_percent=0)
    (sequence,) = data.training()
    assert sequence.token_ids == (1000, *map(ord, "abcd"))
    assert sequence.roles == (Role.TEMPLATE, Role.USER, Role.USER, Role.ASSISTANT, Role.ASSISTANT)


def test_tokens_of_plain_text_and_its_separator_have_their_roles(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    data = Corpus((tmp_path / "a.txt",), Characters(), 4, held_out_percent=0)
    assert [sequence.roles for sequence in data.training()] == [(Role.PLAIN,) * 3 + (Role.SEPARATOR,)]


def test_prompt_is_held_out_with_whatever_answer() -> None:
    prompts = [(Turn("system", "s"), Turn("user", f"question {number}")) for number in range(200)]
    for prompt in prompts:
        alone = Document(turns=prompt)
        answered = [Document(turns=(*prompt, Turn("assistant", text), Turn("user", "more"))) for text in ("a", "b")]
        assert {is_held_out(one, 50) for one in answered} == {is_held_out(alone, 50)}
        assert answered[0].prompt() == prompt
    assert 60 < sum(is_held_out(Document(turns=prompt), 50) for prompt in prompts) < 140
    # Nothing before the first answer: the answer decides.
    first = [Document(turns=(Turn("assistant", f"answer {number}"),)) for number in range(50)]
    assert len({is_held_out(one, 50) for one in first}) == 2


def test_answer_that_was_cut_off_is_known_by_its_finish_reason() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    row["messages"][1]["finish_reason"] = "length"
    assert to_document(row).turns == (Turn("user", "a"), Turn("assistant", "b", is_cut=True))


def test_held_out_returns_the_requested_number_of_tokens(tmp_path: Path) -> None:
    data = corpus(tmp_path, 200)
    assert len(data.held_out(17)) == 2
    assert data.held_out(16) == list(islice(data.held_out(64), 1))


def test_too_little_held_out_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"0\.jsonl.* its held-out 20 % must fill a sequence of 4096 tokens"):
        corpus(tmp_path, 5, sequence_tokens=4096).held_out(1)


def test_data_description_differs_with_every_setting() -> None:
    def described(seed: int = 0, dtype: str = "float32", name: str = "a.txt", shares: tuple[int, ...] = ()) -> str:
        data = DataSettings((Path("folder") / name,), 100, 10, seed=seed, shares=shares)
        return data.describe(PairRevisions("r1", "r2", "r1"), dtype)

    assert described() == described()
    assert len({described(), described(seed=1), described(dtype="bfloat16"), described(name="b.txt")}) == 4
    assert described(shares=(2,)) != described()
    assert "folder" not in described()


@pytest.mark.parametrize(
    ("models", "dtype", "expected"),
    [
        (("b", "t", "b"), "float32", (True, True)),
        (("b", "other", "b"), "float32", (True, True)),
        (("t", "t", "b"), "float32", (False, True)),
        (("b", "t", "t"), "float32", (True, False)),
        (("b", "t", "b"), "bfloat16", (False, False)),
    ],
)
def test_recallable_are_states_of_the_same_bottom_and_the_same_teacher(
    models: tuple[str, str, str], dtype: str, expected: tuple[bool, bool]
) -> None:
    data = DataSettings((Path("a.txt"),), 100, 10)
    own = data.describe(PairRevisions("b", "t", "b"), "float32")
    assert recallable(data.describe(PairRevisions(*models), dtype), own) == expected
