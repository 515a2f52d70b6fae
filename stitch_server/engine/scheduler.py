"""Which tokens of which sessions the first shard computes next. Plain Python; knows no tensor and no link."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stitch.errors import Exhausted
from stitch_server.engine.session import Request
from stitch_server.engine.types import LayerRange, Segment
from stitch_server.kv_cache.block_pool import BlockPool

# How long a session stays away after a shard behind had no room for it.
BACKOFF_SECONDS = 0.05
# Each so many that decode bring a prompt's share, too: their step takes longer, so that it delays them by less of it.
DECODING_WORTH_A_SHARE = 2
# Products take rows in tiles: one beyond so many takes about as long as all of a further tile.
WHOLE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one pass may hold."""

    # Tokens of one prompt in a pass.
    prefill_tokens: int = 128
    # A pass holds at most as many prompt tokens as so many prompts bring.
    prompts_together: int = 2
    # Passes over fewer take hardly less time: a prompt's end isn't halved into them.
    min_efficient_tokens: int = 1
    # Beside decoding sessions, whose next token they delay, each prompt that waits brings so many, and so do each few
    # of them.
    prefill_tokens_beside_decode: int = 28
    # There a token counts as one more for each so many tokens before it, which it takes as long to attend to as all
    # else of it does; 0: those count nothing.
    attention_cost_per_token: int = 0
    # Into how many groups the decoding sessions are split, so that neighbours work at the same time; one: in turns.
    groups: int = 2
    max_waiting_sessions: int = 256
    # Prompt tokens of which the route of an undecided session is read, in one pass.
    probe_tokens: int = 0


class Scheduler:
    """Continuous batching: decode first, then prompts in the order of their arrival, in chunks.

    While somebody decodes, prompts ride along with decode steps alone: a token on its way back would find its shard
    in the middle of another chunk, and would have to wait for that. Shards that take turns have the processor to
    themselves meanwhile: nothing begins here before all tokens are back.

    `drop` is called with a session whose KV is gone here and must go on the shards behind, too.
    """

    def __init__(
        self,
        pool: BlockPool,
        cuts: Mapping[str, LayerRange],
        limits: Limits,
        drop: Callable[[Request], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pool = pool
        self._cuts = cuts
        # What all routes have in common.
        self._earliest = min(cuts.values(), key=lambda cut: cut.end)
        self._limits = limits
        self._drop = drop
        self._clock = clock
        self._turn = 0
        # Ordered by arrival; sessions that lost their KV stand in front.
        self.waiting: deque[Request] = deque()
        # Ordered by admission: the last one is the youngest.
        self.running: dict[int, Request] = {}

    def add(self, session: Request) -> None:
        """Exhausted where too many wait already, or the cache could never hold the prompt."""
        tokens, room = len(session.token_ids), self._pool.tokens
        if tokens + 1 > room:
            raise Exhausted(f"the prompt has {tokens} tokens, but the KV cache holds {room}", 60.0)
        if len(self.waiting) >= self._limits.max_waiting_sessions:
            raise Exhausted(f"{len(self.waiting)} sessions wait already, which is the limit")
        # Alone in the cache it could grow no further.
        session.context_length = min(session.context_length, room)
        self.waiting.append(session)

    def remove(self, session: Request) -> None:
        """The session is over; its KV here is free."""
        if self.running.pop(session.id, None) is None and session in self.waiting:
            self.waiting.remove(session)
        self._pool.release(session.id)

    def preempt(self, session: Request) -> None:
        """The session begins anew later: its KV is freed here and behind, its tokens stay."""
        self.running.pop(session.id, None)
        self._pool.release(session.id)
        self._drop(session)
        session.reset_for_recompute()
        session.not_before = self._clock() + BACKOFF_SECONDS
        self.waiting.appendleft(session)

    def settled(self, session: Request) -> None:
        """The session has its route: what it computes may serve others on the same one."""
        self._pool.set_hashes(session.id, self._hashes(session))

    @property
    def ready(self) -> bool:
        """Whether the next batch would hold anything, as far as can be told without composing it."""
        if self._is_others_turn():
            return False
        decoding = [session for session in self.running.values() if session.decoding]
        return any(session.remaining for session in decoding or self.running.values())

    def next_segments(self) -> list[Segment]:
        """The segments of the next pass, none where there is nothing to compute."""
        self._turn += 1
        if self._is_others_turn():
            return []
        decoding = sum(session.decoding for session in self.running.values())
        segments = self._decodes()
        if decoding and not segments:
            return []
        whole = budget = float(self._prompt_tokens(decoding))
        beside = decoding > 0
        for session in list(self.running.values()):
            if budget <= 0:
                return segments
            # Making room for an earlier one may have pushed this one out.
            if session.id in self.running and session.remaining and not session.decoding:
                budget -= self._prefill(session, budget, beside, segments)
        while budget > 0 and (admitted := self._admit(budget, budget == whole)) is not None:
            budget -= self._prefill(admitted, budget, beside, segments, self._least(admitted))
        return segments

    def _is_others_turn(self) -> bool:
        """Whether shards take turns, and tokens are on their way through those behind."""
        return self._limits.groups == 1 and any(not session.remaining for session in self.running.values())

    def _prefill(self, session: Request, budget: float, beside: bool, segments: list[Segment], least: int = 1) -> float:
        """Appends the session's next chunk, of at least so many tokens; returns what of the budget it takes."""
        past, most = self._limits.attention_cost_per_token, self._limits.prefill_tokens
        weight = 1 + session.cached / past if beside and past else 1.0
        alone = len(self.running) + len(self.waiting) == 1
        is_end = session.reused < session.cached and session.remaining <= most
        if alone and is_end and most // 2 >= self._limits.min_efficient_tokens:
            # A long prompt's end comes in halves: while the shards behind compute its last chunk, this one is idle.
            most //= 2
        return self._schedule(session, max(min(int(budget / weight), most), least), segments) * weight

    def _prompt_tokens(self, decoding: int) -> int:
        """How many of a pass beside so many decoding sessions.

        Every prompt that waits brings its share. So do each few that decode: their step takes longer than that of one,
        so that more tokens beside them delay it by as much of it.
        """
        limits, prompts = self._limits, len(self.waiting) + len(self.running) - decoding
        most, share = limits.prefill_tokens * limits.prompts_together, limits.prefill_tokens_beside_decode
        shares = prompts + decoding // DECODING_WORTH_A_SHARE
        return max(share, min(most - decoding % WHOLE_ROWS, share * shares)) if decoding else most

    def _decodes(self) -> list[Segment]:
        decoding = [session for session in self.running.values() if session.decoding]
        ready = sorted((session for session in decoding if session.remaining), key=lambda session: session.turn)
        segments: list[Segment] = []
        for session in ready[: -(-len(decoding) // self._limits.groups)]:
            # An earlier one of this pass may have pushed it out.
            if session.id in self.running:
                self._schedule(session, 1, segments)
        return segments

    def _least(self, session: Request) -> int:
        """Tokens that the session's next pass must hold: what the probe reads, whatever the budget."""
        return min(self._limits.probe_tokens, session.prompt_tokens) if session.undecided else 1

    def _admit(self, budget: float, alone: bool) -> Request | None:
        """The next waiting session, if there is room for all that is known of it.

        One that must exceed the budget has to be `alone`, the first prompt of its pass.
        """
        if not self.waiting or self.waiting[0].not_before > self._clock():
            return None
        session = self.waiting[0]
        if self._least(session) > budget and not alone:
            return None
        # What others left behind belongs to a route; and the probe must see the beginning computed.
        hashes = [] if session.undecided else self._hashes(session)
        reused = self._pool.count_cached(hashes) if session.reusable else 0
        if self._pool.blocks_for(len(session.token_ids) + 1) > self._pool.free_blocks:
            return None
        self.waiting.popleft()
        self._pool.begin(session.id, hashes, reused)
        session.cached = session.reused = reused * self._pool.block_tokens
        self.running[session.id] = session
        session.first_scheduled = session.first_scheduled or self._clock()
        return session

    def _schedule(self, session: Request, budget: int, segments: list[Segment]) -> int:
        """Appends the session's next tokens, at most `budget`; returns how many."""
        length = min(session.remaining, budget)
        if not self._make_room(session, session.cached + length, segments):
            return 0
        segments.append(
            Segment(
                session=session,
                layers=self._earliest if session.undecided else self._cuts[session.route],
                position=session.cached,
                length=length,
                wants_token=length == session.remaining,
                blocks=self._pool.blocks_of(session.id),
                candidates=tuple(session.candidates),
            )
        )
        session.cached += length
        session.turn = self._turn
        return length

    def _make_room(self, session: Request, tokens: int, segments: list[Segment]) -> bool:
        """Frees the youngest sessions until `session` fits; False where it was itself the youngest."""
        while not self._pool.grow(session.id, tokens):
            youngest = next(reversed(self.running.values()))
            # What is already part of this pass goes with its session.
            segments[:] = [segment for segment in segments if segment.session is not youngest]
            self.preempt(youngest)
            if youngest is session:
                return False
        return True

    def _hashes(self, session: Request) -> list[bytes]:
        return self._pool.hashes(session.route, session.token_ids[: session.prompt_tokens])
