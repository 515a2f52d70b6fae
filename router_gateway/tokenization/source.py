"""Where the gateway's tokenizer comes from: the first shard that answers. Knows no file of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc

from router_gateway.shards.replica import Replica
from router_gateway.tokenization.vocabulary import FILES, Vocabulary
from stitch.cluster import ClusterConfig
from stitch.errors import Incompatible, Unavailable

_log = logging.getLogger(__name__)

# Large vocabularies take 12 MB; a shard that sends more sends no tokenizer.
MAX_BYTES = 128 << 20
FETCH_SECONDS = 60.0


class VocabularySource:
    """Holds the vocabulary once `load` has found it."""

    def __init__(self, firsts: Sequence[Replica]) -> None:
        self._firsts = firsts
        self.current: Vocabulary | None = None

    def require(self) -> Vocabulary:
        """The vocabulary, or Unavailable as long as no shard has sent it."""
        if self.current is None:
            names = ", ".join(replica.place.name for replica in self._firsts)
            raise Unavailable(f"no shard with the embedding has sent its tokenizer yet: {names}")
        return self.current

    async def load(self, pause_seconds: float) -> Vocabulary:
        """Asks one shard after the other, again and again, until the vocabulary is there."""
        while True:
            for replica in self._firsts:
                try:
                    files = await fetch_files(replica)
                    self.current = await asyncio.to_thread(Vocabulary.from_files, files)
                except grpc.aio.AioRpcError as error:
                    _log.debug("no tokenizer from %s: %s", replica.place.name, error.details())
                except Incompatible as error:
                    _log.error("no tokenizer from %s: %s", replica.place.name, error)
                else:
                    return self.current
            await asyncio.sleep(pause_seconds)


def first_shards(cluster: ClusterConfig) -> list[str]:
    """Names of the shards that hold the embedding, and so the tokenizer."""
    return [shard.name for shard in cluster.shards if shard.role == "bottom" and shard.layers[0] == 0]


async def fetch_files(replica: Replica) -> dict[str, bytes]:
    """The tokenizer's files by name. Raises AioRpcError, or Incompatible for files that no shard sends."""
    pieces: dict[str, list[bytes]] = {}
    total = 0
    async for piece in replica.fetch_tokenizer(FETCH_SECONDS):
        total += len(piece.data)
        if piece.file not in FILES or total > MAX_BYTES:
            raise Incompatible(f"{replica.place.name} sent {piece.file!r}, {total:,} bytes in all")
        pieces.setdefault(piece.file, []).append(piece.data)
    return {name: b"".join(parts) for name, parts in pieces.items()}
