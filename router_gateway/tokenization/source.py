"""Fetches the tokenizer files from the first shard that answers, so that the gateway needs no copy of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc

from router_gateway.shards.replica import Replica
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch import tokenizer_files
from stitch.cluster import ClusterConfig
from stitch.errors import Incompatible, Unavailable

_log = logging.getLogger(__name__)

# Large vocabularies have 12 MB.
MAX_FILES_BYTES = 128 << 20
FETCH_TIMEOUT_SECONDS = 60.0


class VocabularySource:
    """Has the vocabulary in `current` once `load` has fetched it from one of `first_shards`."""

    def __init__(self, first_shards: Sequence[Replica]) -> None:
        self._first_shards = first_shards
        # By shard whose tokenizer is invalid.
        self._reasons: dict[str, str] = {}
        self.current: Vocabulary | None = None

    def require(self) -> Vocabulary:
        """The vocabulary. Raises Unavailable until a shard has sent it."""
        if self.current is None:
            names = ", ".join(replica.config.name for replica in self._first_shards)
            reasons = "".join(f"; {name}: {reason}" for name, reason in self._reasons.items())
            raise Unavailable(f"no shard with the embedding has sent its tokenizer yet: {names}{reasons}")
        return self.current

    async def load(self, pause_seconds: float) -> Vocabulary:
        """Asks the shards in turn, with a pause after each round, until one has sent a valid vocabulary."""
        while True:
            for replica in self._first_shards:
                try:
                    files = await fetch_files(replica)
                    self.current = await asyncio.to_thread(Vocabulary.from_files, files)
                except grpc.aio.AioRpcError as error:
                    _log.debug("no tokenizer from %s: %s", replica.config.name, error.details())
                except Incompatible as error:
                    self._record(replica.config.name, str(error))
                else:
                    return self.current
            await asyncio.sleep(pause_seconds)

    def _record(self, shard: str, reason: str) -> None:
        """Logs why a shard's tokenizer is invalid, once."""
        if self._reasons.get(shard) != reason:
            _log.error("no tokenizer from %s: %s", shard, reason)
            self._reasons[shard] = reason


def first_shard_names(cluster: ClusterConfig) -> list[str]:
    """The shards that hold the embedding, and so the tokenizer."""
    return [shard.name for shard in cluster.shards if shard.role == "bottom" and shard.layers[0] == 0]


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
