"""Packed token sequences out of training files, with a part held out. Knows no model.

Documents follow one another, each closed by the separator, and are cut into sequences of one length. Files take
turns, so that every one of them gives its share of the tokens until it is exhausted.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from stitch.errors import InvalidRequest
from stitch_training.data import Document, Turn, read_documents

# Documents among which the order is drawn; what bounds the memory of the shuffle.
SHUFFLE_DOCUMENTS = 8192


class Encoder(Protocol):
    """What packing needs of a tokenizer."""

    @property
    def separator(self) -> int:
        """The token that closes a document."""

    def encode(self, text: str) -> list[int]:
        """Plain text as it is, without special tokens around it."""

    def encode_chat(self, turns: Sequence[Turn]) -> list[int]:
        """A conversation through the chat template."""


@dataclass(frozen=True)
class DataSettings:
    """How much of which data; what decides every number of a pass."""

    files: tuple[Path, ...]
    # To fit on; an evaluation needs none.
    tokens: int
    held_out_tokens: int
    sequence_tokens: int = 512
    seed: int = 0
    # Sequences that each file gives in a turn, to fit on; empty: one each.
    shares: tuple[int, ...] = ()

    def described(self, models: tuple[str, str], dtype: str) -> str:
        """All of it as one string, with the models and the dtype that computes."""
        names = [path.name for path in self.files]
        mixture = {"shares": self.shares} if self.shares else {}
        return json.dumps({"models": models, "dtype": dtype, "files": names, "seed": self.seed, **mixture})


def same_models(one: str, other: str) -> bool:
    """Whether two passes, as `DataSettings.described` says them, ran the same models in the same dtype."""
    first, second = json.loads(one), json.loads(other)
    return all(first[name] == second[name] for name in ("models", "dtype"))


@dataclass(frozen=True)
class PackedSequence:
    """Tokens of one file, packed without padding."""

    token_ids: tuple[int, ...]
    # Position of the file in the list that was given.
    file: int


@dataclass(frozen=True)
class Corpus:
    """Training files as sequences; the same files and seed give the same sequences in the same order.

    Whether a document is held out depends on its text alone: it is so in every run, whatever files are beside it.
    """

    files: tuple[Path, ...]
    encoder: Encoder
    sequence_tokens: int = 512
    held_out_percent: int = 10
    seed: int = 0
    # Of every file in a turn of training; of the held-out part all give one.
    shares: tuple[int, ...] = ()

    def training(self) -> Iterator[PackedSequence]:
        """Sequences to fit on, endless only as the files are."""
        return self._in_turns(self.shares or self._ones(), held_out=False)

    def held_out(self, tokens: int) -> list[PackedSequence]:
        """At least `tokens` tokens of the held-out part, or all of it; the same ones for every seed.

        Raises InvalidRequest where not even one sequence is there.
        """
        found = list(islice(self._in_turns(self._ones(), held_out=True), -(-tokens // self.sequence_tokens)))
        if not found:
            limit = f"its held-out {self.held_out_percent} % must fill a sequence of {self.sequence_tokens} tokens"
            raise InvalidRequest("data", ", ".join(path.name for path in self.files), limit)
        return found

    def _ones(self) -> tuple[int, ...]:
        return (1,) * len(self.files)

    def _in_turns(self, shares: Sequence[int], held_out: bool) -> Iterator[PackedSequence]:
        streams = {number: self._of_file(number, held_out) for number in range(len(self.files))}
        while streams:
            for number, stream in list(streams.items()):
                taken = list(islice(stream, shares[number]))
                yield from taken
                if len(taken) < shares[number]:
                    del streams[number]

    def _of_file(self, number: int, held_out: bool) -> Iterator[PackedSequence]:
        documents = read_documents(self.files[number])
        chosen = (document for document in documents if is_held_out(document, self.held_out_percent) == held_out)
        mixed = shuffled(chosen, 0 if held_out else self.seed)
        for token_ids in packed((self._encoded(document) for document in mixed), self.sequence_tokens):
            yield PackedSequence(token_ids, number)

    def _encoded(self, document: Document) -> list[int]:
        if document.turns:
            return [*self.encoder.encode_chat(document.turns), self.encoder.separator]
        return [*self.encoder.encode(document.text), self.encoder.separator]


def is_held_out(document: Document, percent: int) -> bool:
    """Whether a document belongs to the held-out part: decided by its SHA-256, so by nothing but its text."""
    digest = hashlib.sha256(document.content().encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < percent


def shuffled(documents: Iterable[Document], seed: int, buffered: int = SHUFFLE_DOCUMENTS) -> Iterator[Document]:
    """The same documents in an order drawn from `seed`, among `buffered` of them at a time."""
    draw = random.Random(seed)
    buffer: list[Document] = []
    for document in documents:
        buffer.append(document)
        if len(buffer) >= buffered:
            yield _taken(buffer, draw)
    while buffer:
        yield _taken(buffer, draw)


def _taken(buffer: list[Document], draw: random.Random) -> Document:
    place = draw.randrange(len(buffer))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def packed(encoded: Iterable[list[int]], length: int) -> Iterator[tuple[int, ...]]:
    """All tokens in their order, cut into pieces of `length`; what is left over at the end is dropped."""
    pending: list[int] = []
    for token_ids in encoded:
        pending += token_ids
        whole = len(pending) - len(pending) % length
        for start in range(0, whole, length):
            yield tuple(pending[start : start + length])
        del pending[:whole]
