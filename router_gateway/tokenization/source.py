"""Fetches the tokenizer files from a first shard, so that the gateway needs no copy of them."""

from __future__ import annotations

import asyncio
import logging

import grpc

from router_gateway.shards.compatibility import TOKENIZER, Facts
from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import Replica
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch import tokenizer_files
from stitch.errors import Incompatible, Unavailable

_log = logging.getLogger(__name__)

# Large vocabularies have 12 MB.
MAX_FILES_BYTES = 128 << 20
FETCH_TIMEOUT_SECONDS = 60.0


class VocabularySource:
    """Has the vocabulary in `current` once `load` has fetched it from one of the registry's first shards.

    It is loaded again when the shards agree on another tokenizer.
    """

    def __init__(self, registry: ShardRegistry) -> None:
        self._registry = registry
        # By shard whose tokenizer is invalid.
        self._reasons: dict[str, str] = {}
        self.current: Vocabulary | None = None
        # What shards have in common where `current` is theirs.
        self.facts: Facts = {}

    @property
    def is_current(self) -> bool:
        """Whether the vocabulary is that of the shards."""
        return self.current is not None and self._registry.compatibility.continues(self.facts, ())

    def require(self) -> Vocabulary:
        """The vocabulary. Raises Unavailable until a shard has sent it."""
        if self.current is None or not self.is_current:
            names = ", ".join(replica.config.name for replica in self._registry.first_shards)
            reasons = "".join(f"; {name}: {reason}" for name, reason in self._reasons.items())
            what = "its tokenizer" if self.current is None else "the tokenizer that the shards have changed to"
            raise Unavailable(f"no shard with the embedding has sent {what} yet: {names}{reasons}")
        return self.current

    async def follow(self, pause_seconds: float) -> None:
        """Loads the vocabulary now and whenever the shards' tokenizer changes; never returns."""
        while True:
            version = self._registry.version
            if not self.is_current:
                await self.load(pause_seconds)
                self._registry.report_change()
            await self._registry.changed_since(version)

    async def load(self, pause_seconds: float) -> Vocabulary:
        """Asks the shards in turn, with a pause after each round, until one has sent a valid vocabulary."""
        while True:
            version = self._registry.version
            for replica in self._registry.first_shards:
                if replica.accepts_requests and await self._load_from(replica) and self.current is not None:
                    return self.current
            await self._registry.changed_since(version, pause_seconds)

    async def _load_from(self, replica: Replica) -> bool:
        """Whether the shard has sent a valid vocabulary, and still has the tokenizer that the shards agree on."""
        name, stated = replica.config.name, _tokenizer(replica)
        try:
            files = await fetch_files(replica)
            vocabulary = await asyncio.to_thread(Vocabulary.from_files, files)
        except grpc.aio.AioRpcError as error:
            _log.debug("no tokenizer from %s: %s", name, error.details())
            return False
        except Incompatible as error:
            self._record(name, str(error))
            return False
        if _tokenizer(replica) != stated or not replica.accepts_requests:
            return False
        if self.current is not None:
            _log.warning("the shards have changed their tokenizer: loaded that of %s", name)
        self.current, self.facts = vocabulary, {TOKENIZER: stated}
        return True

    def _record(self, shard: str, reason: str) -> None:
        """Logs why a shard's tokenizer is invalid, once."""
        if self._reasons.get(shard) != reason:
            _log.error("no tokenizer from %s: %s", shard, reason)
            self._reasons[shard] = reason


def _tokenizer(replica: Replica) -> str:
    return replica.identity.tokenizer if replica.identity is not None else ""


async def fetch_files(replica: Replica) -> dict[str, bytes]:
    """The tokenizer's files by name. Raises AioRpcError, or Incompatible for unexpected files or too many bytes."""
    pieces: dict[str, list[bytes]] = {}
    total = 0
    async for piece in replica.fetch_tokenizer(FETCH_TIMEOUT_SECONDS):
        total += len(piece.data)
        if piece.file not in tokenizer_files.NAMES or total > MAX_FILES_BYTES:
            raise Incompatible(f"{replica.config.name} sent {piece.file!r}, {total:,} bytes in total")
        pieces.setdefault(piece.file, []).append(piece.data)
    return {name: b"".join(data) for name, data in pieces.items()}
