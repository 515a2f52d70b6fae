"""Between the stages of a bottom shard and its `HiddenStateCache`: what is read before a pass, and kept after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from stitch_server.engine.types import Batch, KeptStates, LayerRange, Segment, Session, StepOutput
from stitch_server.kv_cache.block_pool import BlockPool

if TYPE_CHECKING:
    from stitch_server.kv_cache.hidden_states import HiddenStateCache


class KeptPrefixes:
    """The KV blocks of a stage's sessions, and the hidden states that it keeps of them, by which they share blocks."""

    def __init__(
        self, pool: BlockPool, layer_ranges: Mapping[str, LayerRange], states: HiddenStateCache | None
    ) -> None:
        """`layer_ranges` are those of routes whose states depend on tokens alone; `states` None: none are kept."""
        self.pool = pool
        self._layer_ranges = layer_ranges
        self._states = states

    def begin(self, session: Session, hashes: list[bytes], reused_blocks: int, expected_tokens: int) -> bool:
        """Starts the session's sequence in the pool with all leading blocks that it can share.

        The other arguments and the result are those of `BlockPool.begin`.
        """
        if self._states is None or session.route not in self._layer_ranges:
            session.resumed = 0
            return self.pool.begin(session.id, hashes, reused_blocks, expected_tokens)
        last_layer = self._layer_ranges[session.route].end
        layer, found = self._states.match(session.tenant, session.token_ids, last_layer, reused_blocks)
        session.resumed, session.resumed_layer = len(found) * self.pool.block_tokens, layer
        return self.pool.begin(session.id, hashes, reused_blocks, expected_tokens, found)

    def attach(self, segment: Segment) -> Segment:
        """The segment with the states that are kept of its leading tokens."""
        session, most = segment.session, segment.session.resumed - segment.position
        if self._states is None or most <= 0:
            return segment
        layer = session.resumed_layer
        states = self._states.read(layer, segment.blocks, segment.position, min(most, segment.length))
        # The rest was evicted in the meantime: its layers are computed again, in the same blocks.
        if states is None or len(states) < min(most, segment.length):
            session.resumed = 0
        return segment if states is None else replace(segment, kept=KeptStates(layer, states))

    def keep(self, batch: Batch, output: StepOutput) -> None:
        """Keeps the states of a pass whose sessions go on to a next shard."""
        if self._states is None or output.hidden is None:
            return
        slots, rows, row = list[int](), list[int](), 0
        for index, segment in enumerate(batch.segments):
            session = segment.session
            is_kept = bool(session.chain) and session.route in self._layer_ranges and index not in output.non_finite
            if is_kept and self.pool.is_open(session.id):
                layer, position = self._layer_ranges[session.route].end, segment.position
                reserved = self._states.reserve(
                    session.tenant, session.token_ids, layer, segment.blocks, position, segment.length
                )
                slots += reserved
                rows += range(row, row + len(reserved))
            row += segment.length
        self._states.write(slots, output.hidden if len(rows) == row else output.hidden[rows])
