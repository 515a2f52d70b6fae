"""The passes over the data that a fit or a sweep stands on, in a folder that outlives an interruption. Solves nothing.

WORK/held-out/   trace and sums of the held-out sequences
WORK/training/   the same of the training sequences
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stitch_server.fit.collect import Collected, Pass, collect, cuts_of
from stitch_server.fit.frozen import Pair
from stitch_server.fit.packing import Corpus, DataSettings
from stitch_server.fit.sums import Cut

HELD_OUT, TRAINING = "held-out", "training"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Passes:
    """Both passes, finished."""

    training: Collected
    held_out: Collected


def taken_up(cuts: tuple[Cut, ...], work: Path, will_do: Callable[[tuple[Cut, ...]], bool]) -> tuple[Cut, ...]:
    """The cuts to go over: those of the pass that an earlier sweep or fit left, where they `will_do`, else `cuts`."""
    found = cuts_of(work / TRAINING)
    return found if will_do(found) else cuts


def run_passes(
    pair: Pair, cuts: tuple[Cut, ...], corpus: Corpus, data: DataSettings, settings: str, work: Path, progress: Progress
) -> Passes:
    """Goes over the held-out and the training sequences, or takes up what `work` already has of it.

    Raises InvalidRequest where the data are too few, or the folder holds something else.
    """
    held_sequences = corpus.held_out(data.held_out_tokens)
    held = Pass(HELD_OUT, len(held_sequences), data.sequence_tokens, cuts, settings)
    training = Pass(TRAINING, -(-data.tokens // data.sequence_tokens), data.sequence_tokens, cuts, settings)
    return Passes(
        held_out=collect(pair, held, work / HELD_OUT, held_sequences, lambda *done: progress("held-out", *done)),
        training=collect(pair, training, work / TRAINING, corpus.training(), lambda *done: progress("data", *done)),
    )
