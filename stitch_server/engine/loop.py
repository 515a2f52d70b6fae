"""The loop: take a batch, compute it, deliver the results. Knows no RPC; whoever wants something calls `post`.

One thread owns sessions, cache and model, so none of them needs a lock, and the event loop never computes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from stitch_server.engine.in_flight import BatchSource
from stitch_server.engine.types import Batch, StepOutput

log = logging.getLogger(__name__)

# How long an idle engine sleeps before it looks at sessions that were postponed.
IDLE_SECONDS = 0.02


class Computes(Protocol):
    def run(self, batch: Batch) -> StepOutput: ...


class Engine:
    """Runs a front's batches in a thread of its own."""

    def __init__(
        self,
        front: BatchSource,
        runner: Computes,
        observe: Callable[[Batch, float, float], None] = lambda batch, started, ended: None,
    ) -> None:
        self._front = front
        self._runner = runner
        self._observe = observe
        # Done when the thread is: with the exception, where the loop itself broke.
        self.ended: Future[None] = Future()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def step(self) -> bool:
        """One pass; False where there was nothing to compute."""
        batch = self._front.next_batch()
        if batch is None:
            return False
        started = time.perf_counter()
        try:
            output = self._runner.run(batch)
            ended = time.perf_counter()
            # A GPU may tell only here, where its results are read, what went wrong before.
            self._front.deliver(batch, output)
            self._observe(batch, started, ended)
        except Exception as error:  # the sessions of this batch end, the others and the process go on
            log.exception("a batch of %d tokens failed", batch.num_tokens)
            self._front.fail(batch, error)
        return True

    def post(self, command: Callable[[], None]) -> None:
        """Runs `command` in the engine's thread, in the order of the calls; callable from any thread."""
        self._inbox.put(command)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the step that is being computed, and waits for that."""
        self._inbox.put(None)
        self._thread.join()

    def _loop(self) -> None:
        worked = True
        try:
            while self._drain(wait=not worked):
                worked = self.step()
        except Exception as error:  # whoever waits for the end hears of it; a shard without its loop is of no use
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def _drain(self, wait: bool) -> bool:
        """Obeys all that has arrived, since a cancelled session must not be computed once more; False: stop."""
        try:
            while (command := self._inbox.get(wait, IDLE_SECONDS)) is not None:
                self._obey(command)
                wait = False
        except queue.Empty:
            return True
        return False

    def _obey(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:
            log.exception("a command failed")
