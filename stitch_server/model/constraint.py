"""Which tokens a session's grammar allows next, on the last shard of a chain.

A grammar is compiled in one thread, and the masks of a pass are filled in another while the pass runs, so that the
engine's thread waits for neither. A session that is opened again, for a replay or after a preemption, consumes the
tokens generated so far. Invariant: a token that ends an answer is allowed exactly where the grammar may end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from stitch.grammar import Grammar, GrammarCompiler, InvalidGrammar

# How long a pass waits for grammars; nearly all compile in less, and a session whose grammar doesn't is recomputed.
COMPILE_WAIT_SECONDS = 0.05
# Of CPU, for one mask, which a whole pass waits for; nearly all take well under a millisecond.
MAX_MASK_SECONDS = 0.1
# True where the grammar forbids the token, bool `[logits]`.
Forbidden = NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class Constraint:
    """The grammar of one session's answer; the engine's thread calls it."""

    compiler: GrammarCompiler
    compiled: Future[LLMatcher]
    # Token ids that end the answer.
    ends: Sequence[int]
    logits: int
    # Sampled tokens that the matcher has not consumed yet.
    accepted: list[int] = field(default_factory=list)

    def accept(self, token_id: int) -> None:
        """Continues after a sampled token."""
        self.accepted.append(token_id)

    def forbidden(self) -> Forbidden | InvalidGrammar | None:
        """The tokens that may not come next, or why they can't be computed; None: the grammar is not compiled yet."""
        if not self.compiled.done():
            return None
        try:
            matcher = self.compiled.result()
            accepted, self.accepted = self.accepted, []
            return self._next(matcher, accepted)
        except InvalidGrammar as error:
            return error

    def _next(self, matcher: LLMatcher, accepted: list[int]) -> Forbidden:
        started = time.thread_time()
        consume(matcher, accepted)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise InvalidGrammar(matcher.get_error())
        if (seconds := time.thread_time() - started) > MAX_MASK_SECONDS:
            raise InvalidGrammar(f"the next tokens took {seconds:.2f} s of CPU, and may take {MAX_MASK_SECONDS:g} s")
        forbidden: Forbidden = np.unpackbits(bits, count=self.logits, bitorder="little") == 0
        # What the library takes for ends of any answer.
        forbidden[[end for end in self.compiler.tokenizer.eos_tokens if end < self.logits]] = True
        forbidden[[end for end in self.ends if end < self.logits]] = not matcher.is_accepting()
        if forbidden.all():
            raise InvalidGrammar("it allows no token of this model")
        return forbidden


def consume(matcher: LLMatcher, token_ids: Sequence[int]) -> None:
    """Raises InvalidGrammar where the grammar does not allow these tokens next."""
    if token_ids and not matcher.consume_tokens(list(token_ids)):
        raise InvalidGrammar(matcher.get_error())


class Constraints:
    """Makes the constraints of a shard's sessions; `logits` is their number for each token."""

    def __init__(self, compiler: GrammarCompiler, logits: int) -> None:
        self._compiler = compiler
        self._logits = logits
        self._compiling = ThreadPoolExecutor(1, "grammar")

    def __call__(self, grammar: Grammar, generated: Sequence[int], ends: Sequence[int]) -> Constraint:
        """The constraint of a session that has generated these tokens so far."""
        compiled = self._compiling.submit(self._start, grammar, tuple(generated))
        return Constraint(self._compiler, compiled, ends, self._logits)

    def _start(self, grammar: Grammar, generated: Sequence[int]) -> LLMatcher:
        matcher = self._compiler.compile(grammar)
        consume(matcher, generated)
        return matcher


class Masks:
    """Fills the masks of a pass while it runs."""

    def __init__(self) -> None:
        self._filling = ThreadPoolExecutor(1, "masks")

    def begin(self, constraints: Sequence[Constraint]) -> Future[list[Forbidden | InvalidGrammar | None]]:
        """What `Constraint.forbidden` returns for each of them."""
        return self._filling.submit(_fill, constraints)


def _fill(constraints: Sequence[Constraint]) -> list[Forbidden | InvalidGrammar | None]:
    wait([one.compiled for one in constraints], COMPILE_WAIT_SECONDS)
    return [one.forbidden() for one in constraints]
