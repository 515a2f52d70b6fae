"""Training files → packed token sequences.

A `.jsonl` file has one object a line, and the first of these fields that an object has makes the document:

    messages            a conversation, [{"role": ..., "content": ...}, ...]; an answer whose message has the
                        `finish_reason` "length" does not end where its text does
    text                plain text
    question, answer    a conversation of two turns, or of one where there is no answer
    prompt              a conversation of one turn

Any other file is one document of plain text. Either kind may be compressed (`.gz`).

Documents are concatenated, each closed by the separator token, and split into sequences of one length; every token has
the role of the text that it is a part of. Files alternate until each is exhausted, and a fixed share of the documents
is held out. The same files and seed give the same sequences in the same order. Plain text is held out by itself and a
conversation by its turns before the first answer, so a prompt is held out in every run, with whatever answer.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice, takewhile
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TextIO, TypeAlias, TypeVar

from stitch.errors import InvalidRequest, shown

# The share of documents that fits don't train on.
HELD_OUT_PERCENT = 10
# Documents among which the order is drawn; it bounds the memory of the shuffle.
SHUFFLE_DOCUMENTS = 8192
_FIELDS = "its line needs `messages`, `text`, `question` or `prompt`"


# The next tokens whose loss counts in training.
LossOn: TypeAlias = Literal["all", "content", "assistant"]
Item = TypeVar("Item")


class Role(IntEnum):
    """The text that a token is a part of."""

    # What the chat template writes around messages.
    TEMPLATE = 0
    # Between documents.
    SEPARATOR = 1
    PLAIN = 2
    # A message that is not the assistant's.
    USER = 3
    ASSISTANT = 4
    # The token of the template by which an answer ends: it is learnt with answers, and no content.
    END = 5


CONTENT = (Role.PLAIN, Role.USER, Role.ASSISTANT)
# The name of the slice of all content in reports; systems are compared by it.
CONTENT_SLICE = "content"
COUNTED_ROLES: dict[LossOn, tuple[Role, ...]] = {
    "all": tuple(Role),
    "content": (*CONTENT, Role.END),
    "assistant": (Role.ASSISTANT, Role.END),
}


class RoledToken(NamedTuple):
    """A token id and the role of its text."""

    token_id: int
    role: Role


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str
    # Whether it is an answer that was cut off: nothing ends where its text does.
    is_cut: bool = False


@dataclass(frozen=True)
class Document:
    """Plain text, or a conversation for the tokenizer's chat template."""

    text: str = ""
    turns: tuple[Turn, ...] = ()

    def content(self) -> str:
        """Returns the whole document as one string, whatever its form."""
        return self.text or _as_text(self.turns)

    def prompt(self) -> tuple[Turn, ...]:
        """Returns the turns before the first answer; none of plain text."""
        return tuple(takewhile(lambda turn: turn.role != "assistant", self.turns))

    def key(self) -> str:
        """Returns what decides whether it is held out: plain text, or the turns before the first answer."""
        return self.text or _as_text(self.prompt()) or self.content()


def _as_text(turns: Iterable[Turn]) -> str:
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def read_documents(path: Path) -> Iterator[Document]:
    """Yields the documents of one file in its order; a JSON Lines file is read line by line.

    Raises InvalidRequest, which names the file and the line, where a line is not a document.
    """
    try:
        with _open_text(path) as lines:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                yield from _read_rows(path, lines)
            else:
                yield Document(text=lines.read())
    except (OSError, EOFError) as error:
        raise InvalidRequest("data", path.name, f"it can't be read: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("data", path.name, f"it is not UTF-8: {error}") from error


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _read_rows(path: Path, lines: TextIO) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield to_document(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InvalidRequest("data", f"{path.name}:{number}", str(error)) from error


def to_document(row: object) -> Document:
    """Returns the document of one JSON object. Raises ValueError where it holds none."""
    if not isinstance(row, dict):
        raise ValueError(f"its line must be an object, not {shown(row)}")
    if "messages" in row:
        return Document(turns=_turns(row["messages"]))
    if "text" in row:
        return Document(text=_string(row, "text"))
    for field in ("question", "prompt"):
        if field in row:
            question = Turn("user", _string(row, field))
            answer = (Turn("assistant", _string(row, "answer")),) if "answer" in row else ()
            return Document(turns=(question, *answer))
    raise ValueError(f"{_FIELDS}, and has {', '.join(map(str, row)) or 'nothing'}")


def _string(row: dict[str, object], field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"`{field}` must be a string, not {shown(value)}")
    return value


def _turns(messages: object) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` must be a list of messages, not {shown(messages)}")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"`messages` must hold objects, not {shown(message)}")
    for field in ("role", "content"):
        if any(field not in message for message in messages):
            raise ValueError(f"`messages` has one without `{field}`")
    return tuple(
        Turn(_string(message, "role"), _string(message, "content"), message.get("finish_reason") == "length")
        for message in messages
    )


class Encoder(Protocol):
    """The part of a tokenizer that packing uses."""

    @property
    def separator(self) -> int:
        """The token id that closes a document."""

    def encode(self, text: str) -> list[int]:
        """Encodes plain text without special tokens around it."""

    def encode_chat(self, turns: Sequence[Turn]) -> list[RoledToken]:
        """Encodes a conversation through the chat template."""


class PairRevisions(NamedTuple):
    """The revisions of the models that a pass runs."""

    bottom: str
    top: str
    # Whose distribution is recorded.
    teacher: str


@dataclass(frozen=True)
class DataSettings:
    """Which data a pass reads, and how much of it."""

    files: tuple[Path, ...]
    # Tokens to fit on; an evaluation needs none.
    tokens: int
    held_out_tokens: int
    sequence_tokens: int = 512
    seed: int = 0
    # Training sequences that each file contributes per round; empty: one each.
    shares: tuple[int, ...] = ()

    def describe(self, models: PairRevisions, dtype: str) -> str:
        """Returns as JSON all that decides a pass's numbers, with the models' revisions and the compute dtype."""
        names = [path.name for path in self.files]
        mixture = {"shares": self.shares} if self.shares else {}
        return json.dumps({"models": models, "dtype": dtype, "files": names, "seed": self.seed, **mixture})


class Recallable(NamedTuple):
    """What a pass can take from an earlier one, over the same sequences."""

    states: bool
    teacher: bool


def recallable(earlier: str, own: str) -> Recallable:
    """Compares two passes, as `DataSettings.describe` gives them: their bottom and teacher, and the dtype."""
    first, second = json.loads(earlier), json.loads(own)
    theirs, ours = PairRevisions(*first["models"]), PairRevisions(*second["models"])
    is_same = first["dtype"] == second["dtype"]
    return Recallable(is_same and theirs.bottom == ours.bottom, is_same and theirs.teacher == ours.teacher)


@dataclass(frozen=True)
class PackedSequence:
    """Tokens of one file, packed without padding."""

    token_ids: tuple[int, ...]
    # Of each token.
    roles: tuple[Role, ...]
    # Index of the file in the list of training files.
    file: int


@dataclass(frozen=True)
class Corpus:
    """Training files as sequences, split into a training and a held-out part."""

    files: tuple[Path, ...]
    encoder: Encoder
    sequence_tokens: int = 512
    held_out_percent: int = HELD_OUT_PERCENT
    seed: int = 0
    # Training sequences per file and round; held-out sequences alternate one by one.
    shares: tuple[int, ...] = ()

    def training(self) -> Iterator[PackedSequence]:
        """Yields the sequences to fit on."""
        return self._alternate(self.shares or self._one_each(), held_out=False)

    def held_out(self, tokens: int) -> list[PackedSequence]:
        """Returns at least `tokens` tokens of the held-out part, or all of it; the same ones for every seed.

        Raises InvalidRequest where the held-out part does not fill one sequence.
        """
        sequences = list(islice(self._alternate(self._one_each(), held_out=True), -(-tokens // self.sequence_tokens)))
        if not sequences:
            limit = f"its held-out {self.held_out_percent} % must fill a sequence of {self.sequence_tokens} tokens"
            raise InvalidRequest("data", ", ".join(path.name for path in self.files), limit)
        return sequences

    def _one_each(self) -> tuple[int, ...]:
        return (1,) * len(self.files)

    def _alternate(self, shares: Sequence[int], held_out: bool) -> Iterator[PackedSequence]:
        streams = {number: self._of_file(number, held_out) for number in range(len(self.files))}
        while streams:
            for number, stream in list(streams.items()):
                batch = list(islice(stream, shares[number]))
                yield from batch
                if len(batch) < shares[number]:
                    del streams[number]

    def _of_file(self, number: int, held_out: bool) -> Iterator[PackedSequence]:
        documents = read_documents(self.files[number])
        selected = (document for document in documents if is_held_out(document, self.held_out_percent) == held_out)
        shuffled = shuffle(selected, 0 if held_out else self.seed)
        for tokens in pack((self._encode(document) for document in shuffled), self.sequence_tokens):
            yield PackedSequence(tuple(one.token_id for one in tokens), tuple(one.role for one in tokens), number)

    def _encode(self, document: Document) -> list[RoledToken]:
        separator = RoledToken(self.encoder.separator, Role.SEPARATOR)
        if document.turns:
            return [*self.encoder.encode_chat(document.turns), separator]
        return [*(RoledToken(one, Role.PLAIN) for one in self.encoder.encode(document.text)), separator]


def is_held_out(document: Document, percent: int) -> bool:
    """Whether a document belongs to the held-out part, which the SHA-256 of its `key` decides."""
    digest = hashlib.sha256(document.key().encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < percent


def shuffle(documents: Iterable[Document], seed: int, buffered: int = SHUFFLE_DOCUMENTS) -> Iterator[Document]:
    """Yields the documents in an order drawn from `seed`, holding at most `buffered` of them in memory."""
    draw = random.Random(seed)
    buffer: list[Document] = []
    for document in documents:
        buffer.append(document)
        if len(buffer) >= buffered:
            yield _pop_random(buffer, draw)
    while buffer:
        yield _pop_random(buffer, draw)


def _pop_random(buffer: list[Document], draw: random.Random) -> Document:
    index = draw.randrange(len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def pack(encoded: Iterable[list[Item]], length: int) -> Iterator[tuple[Item, ...]]:
    """Yields all tokens in their order, in sequences of `length`; an incomplete last sequence is dropped."""
    pending: list[Item] = []
    for tokens in encoded:
        pending += tokens
        whole = len(pending) - len(pending) % length
        for start in range(0, whole, length):
            yield tuple(pending[start : start + length])
        del pending[:whole]
