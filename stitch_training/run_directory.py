"""The passes over the data that a fit or a sweep stands on, in a folder that outlives an interruption. Solves nothing.

WORK/held-out/   trace and sums of the held-out sequences
WORK/training/   the same of the training sequences
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stitch.errors import InvalidRequest
from stitch_training.activation_cache import Known
from stitch_training.activations import Collected, Pass, begun_in, collect
from stitch_training.frozen_models import Pair
from stitch_training.packing import Corpus, DataSettings, same_models
from stitch_training.sums import Cut
from stitch_training.trace import Trace

HELD_OUT, TRAINING = "held-out", "training"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Passes:
    """Both passes, finished."""

    training: Collected
    held_out: Collected


def taken_up(cuts: tuple[Cut, ...], work: Path, will_do: Callable[[tuple[Cut, ...]], bool]) -> tuple[Cut, ...]:
    """The cuts to go over: those of the pass that an earlier sweep or fit left, where they `will_do`, else `cuts`."""
    begun = begun_in(work / TRAINING)
    return begun.cuts if begun is not None and will_do(begun.cuts) else cuts


def run_passes(
    pair: Pair,
    cuts: tuple[Cut, ...],
    corpus: Corpus,
    data: DataSettings,
    settings: str,
    work: Path,
    progress: Progress,
    reuse: Sequence[Path] = (),
) -> Passes:
    """Goes over the held-out and the training sequences, or takes up what `work` already has of it.

    Sequences that passes in the work folders `reuse` went over don't pass the bottom model again, but for depths that
    were not traced. Raises InvalidRequest where the data are too few, or a folder holds something else.
    """
    known = Known(trace for folder in reuse for trace in _left_in(folder, pair, data, settings))
    held_sequences = corpus.held_out(data.held_out_tokens)
    held = Pass(HELD_OUT, len(held_sequences), data.sequence_tokens, cuts, settings)
    training = Pass(TRAINING, -(-data.tokens // data.sequence_tokens), data.sequence_tokens, cuts, settings)
    return Passes(
        held_out=collect(pair, held, work / HELD_OUT, held_sequences, lambda *n: progress("held-out", *n), known),
        training=collect(pair, training, work / TRAINING, corpus.training(), lambda *n: progress("data", *n), known),
    )


def _left_in(work: Path, pair: Pair, data: DataSettings, settings: str) -> Iterator[Trace]:
    """What passes have left in a work folder, finished or not."""
    begun = {name: pass_ for name in (HELD_OUT, TRAINING) if (pass_ := begun_in(work / name)) is not None}
    if not begun:
        raise InvalidRequest("reuse", work.name, "no pass was begun there")
    for name, one in begun.items():
        if not same_models(one.settings, settings):
            raise InvalidRequest("reuse", work.name, "its pass is of other models, or of another dtype")
        if one.sequence_tokens != data.sequence_tokens:
            limit = f"its sequences have {one.sequence_tokens} tokens, not {data.sequence_tokens}"
            raise InvalidRequest("reuse", work.name, limit)
        try:
            yield one.trace(work / name, pair.bottom.hidden_size)
        except (OSError, ValueError) as error:
            raise InvalidRequest("reuse", work.name, f"its {name} pass is not whole: {error}") from error
