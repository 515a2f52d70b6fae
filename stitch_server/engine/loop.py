"""The engine's thread: take a batch, compute it, deliver its output.

In: messages in one inbox, from any thread. Out: what the batch source sends and reports. Invariants: one thread alone
touches sessions, KV cache and model, so none of them needs a lock; no event loop ever computes; and a session that
cannot be computed ends alone. Where a GPU fails, or nothing can be computed any more, the loop ends with the error.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from stitch_server.devices import is_device_fault
from stitch_server.engine.in_flight import BatchSource
from stitch_server.engine.pass_age import PassAge
from stitch_server.engine.types import Batch, KvRoom, LinkEvent, LinkLost, LinkReply, StepOutput

log = logging.getLogger(__name__)

# How long an idle engine waits for a message before it looks for deadlines that have passed and room to give.
IDLE_SECONDS = 0.02
# The loop ends when the passes of this many prompts have failed and none has succeeded since. One prompt that no shard
# can compute counts once, however often it is replayed.
MAX_FAILED_PROMPTS = 3

Command = Callable[[], None]
# None ends the loop.
Inbox = queue.SimpleQueue[Command | LinkEvent | None]


class Runner(Protocol):
    """Computes one forward pass."""

    def run(self, batch: Batch) -> StepOutput: ...


class EngineBroken(Exception):
    """The passes of several prompts have failed, one after the other."""


class Engine:
    """Runs the batches of one source in a thread of its own."""

    def __init__(
        self,
        source: BatchSource,
        runner: Runner,
        inbox: Inbox,
        observe: Callable[[Batch, float, float], None] = lambda batch, started, ended: None,
    ) -> None:
        """`observe` is called with each computed batch, and the seconds at which its pass started and ended."""
        self._source = source
        self._runner = runner
        self._inbox = inbox
        self._observe = observe
        self.pass_age = PassAge()
        # Since the last pass that succeeded.
        self._failed_prompts: set[tuple[int, ...]] = set()
        # Done when the thread ends; holds the exception that broke the loop, if one did.
        self.ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def step(self) -> bool:
        """Computes one pass; returns False where there was nothing to compute."""
        batch = self._source.next_batch()
        if batch is None:
            return False
        self.pass_age.begin()
        try:
            self._compute(batch)
        finally:
            self.pass_age.end()
        return True

    def _compute(self, batch: Batch) -> None:
        """Computes and delivers a batch; computes one that fails again, session by session.

        What the failed pass has written is overwritten: the same tokens have the same places in the KV cache. Raises
        what ends the loop: the fault of a GPU, or EngineBroken.
        """
        started = time.perf_counter()
        try:
            output = self._runner.run(batch)
        except Exception as error:
            log.exception("a batch of %d tokens failed", batch.num_tokens)
            if len(parts := batch.by_session()) == 1 or is_device_fault(error):
                self._fail(batch, error)
            for part in parts if len(parts) > 1 else ():
                self._compute(part)
            return
        ended = time.perf_counter()
        try:
            # A GPU's errors may surface only here, where its results are read.
            self._source.deliver(batch, output)
            self._observe(batch, started, ended)
            self._failed_prompts.clear()
        except Exception as error:  # ends the sessions of this batch, of which some may have been sent
            log.exception("a batch of %d tokens was not delivered", batch.num_tokens)
            self._fail(batch, error)

    def _fail(self, batch: Batch, error: Exception) -> None:
        """Ends the sessions of a batch. Raises the error where it ends the loop, or EngineBroken."""
        self._source.fail(batch, error)
        if is_device_fault(error):
            raise error
        session = batch.segments[0].session
        self._failed_prompts.add(tuple(session.token_ids[: session.prompt_tokens]))
        if len(self._failed_prompts) >= MAX_FAILED_PROMPTS:
            raise EngineBroken(f"the passes of {len(self._failed_prompts)} prompts failed in a row: {error}") from error

    def post(self, command: Command) -> None:
        """Runs `command` in the engine's thread, after all messages posted before; callable from any thread."""
        self._inbox.put(command)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the current step and all messages posted before, and waits for the end."""
        self._inbox.put(None)
        self._thread.join()

    def _loop(self) -> None:
        computed = True
        try:
            while self.handle_messages(wait=not computed):
                computed = self.step()
        except Exception as error:  # a shard without its loop is useless: the process ends with this error
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def handle_messages(self, wait: bool) -> bool:
        """Handles all messages, so that no cancelled session is computed again; returns False at the end."""
        try:
            while (message := self._inbox.get(wait, IDLE_SECONDS)) is not None:
                self._handle(message)
                wait = False
        except queue.Empty:
            return True
        return False

    def _handle(self, message: Command | LinkEvent) -> None:
        try:
            match message:
                case LinkReply(neighbour, reply):
                    self._source.on_reply(neighbour, reply)
                case KvRoom(neighbour, tokens):
                    self._source.on_kv_room(neighbour, tokens)
                case LinkLost(neighbour, error):
                    self._source.on_link_lost(neighbour, error)
                case _:
                    message()
        except Exception:
            log.exception("the engine failed to handle %r", message)
