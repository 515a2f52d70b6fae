"""Makes a route's stitch within a time limit, of the bottom's own answers, and packs all of it into one archive.

For a machine that is lent for minutes. Within the limit it

    1. samples the bottom's answers to prompts, held-out ones first, in batches     until half of the time is over
    2. runs the passes over as many tokens as take until 0.65 of it                 hidden states, sums, the teacher
    3. distils the stitch with adapters, from least squares on                      until what follows just fits
    4. measures it on the answers to prompts that are held out, and packs

The archive is replaced as a whole, first when there are answers. It has the stitch with its report, and what another
run needs to go on: answers, plan, and the checkpoint of the distillation; not the traces, which are made again. A run
directory into which an archive was unpacked is resumed: once a plan says on how many tokens to train, no more answers
are sampled, and distillation goes on from its checkpoint.
"""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest
from stitch_training.activations import CHECKPOINT_BATCHES, Progress
from stitch_training.answers import AnswersSettings
from stitch_training.data import DataSettings
from stitch_training.device import batch_prompts, batch_sequences
from stitch_training.distill import TrainingSettings
from stitch_training.fit import Fit, FitSettings, cut_of, fit, passes_for, required_cuts, write_fit
from stitch_training.models import LoadedPair, load_pair
from stitch_training.own_answers import OwnAnswers, Written
from stitch_training.report import write_json

# Shares of the limit after which a stage gives way to the next one.
HELD_OUT_ANSWERS_UNTIL, ANSWERS_UNTIL, PASSES_UNTIL = 0.2, 0.5, 0.65
# To write the stitch and the archive, and for the program to end.
PACK_SECONDS = 8.0
LEAST_SECONDS = 60.0
# Longer prompts are left out.
MOST_PROMPT_TOKENS = 512
ANSWERS, PLAN, RUN, STITCH = "answers.jsonl", "plan.json", "run.json", "stitch.safetensors"
# A member's header, and what rounds its size up.
_TAR_BLOCK = 512
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class FitWithinSettings:
    """What to train, on which prompts, where, and for how long."""

    cluster: ClusterConfig
    route: str
    prompts: tuple[Path, ...]
    run_dir: Path
    # The archive, a .tar.
    out: Path
    seconds: float
    device: torch.device
    dtype: str
    # Of prompts and answers, at most.
    tokens: int
    held_out_tokens: int
    sequence_tokens: int
    max_tokens: int
    temperature: float
    training: TrainingSettings
    pack_mebibytes: int

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, bool, object, str], ...] = (
            ("seconds", self.seconds >= LEAST_SECONDS, self.seconds, f"it must be at least {LEAST_SECONDS:g}"),
            ("max_tokens", self.max_tokens >= 1, self.max_tokens, "it must be at least 1"),
            ("temperature", 0 <= self.temperature <= 2, self.temperature, "it must be 0 to 2"),
            ("pack_mebibytes", self.pack_mebibytes >= 1, self.pack_mebibytes, "it must be at least 1"),
            ("epochs", self.training.epochs >= 1, self.training.epochs, "it must be at least 1"),
        )
        for field, is_valid, value, limit in checks:
            if not is_valid:
                raise InvalidRequest(field, value, limit)

    def data(self, tokens: int) -> DataSettings:
        """Returns the answers as the data of a fit on `tokens` of them."""
        seed = self.training.seed
        return DataSettings((self.run_dir / ANSWERS,), tokens, self.held_out_tokens, self.sequence_tokens, seed)


@dataclass(frozen=True)
class TimeLimit:
    """Seconds from `began` on, by `clock`."""

    seconds: float
    began: float
    clock: Callable[[], float] = time.monotonic

    def left(self, share: float = 1.0) -> float:
        """Returns the seconds until that share of the limit is over; negative afterwards."""
        return self.began + share * self.seconds - self.clock()

    def is_over(self, share: float) -> bool:
        """Whether that share of the limit is over."""
        return self.left(share) <= 0


@dataclass(frozen=True)
class Packed:
    """The names in an archive, and of what its size limit left out."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]


def fit_within(settings: FitWithinSettings, limit: TimeLimit, progress: Progress) -> Packed:
    """Runs or resumes all stages. Raises what `OwnAnswers`, `run_passes` and `fit` raise."""
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    loaded = load_pair(settings.cluster, getattr(torch, settings.dtype), settings.device)
    written = _answer(settings, loaded, limit, progress)
    answers = {"training": asdict(written[False]), "held_out": asdict(written[True])}
    record = {"seconds": settings.seconds, "device": str(settings.device), "answers": answers}
    _pack(settings, record)
    least = settings.sequence_tokens
    if min(one.tokens for one in written.values()) < least:
        needed = f"answers of each part must fill a sequence of {least} tokens first; the same run directory goes on"
        raise InvalidRequest("seconds", settings.seconds, needed)
    tokens = _planned_tokens(settings, loaded, written, limit, progress)
    del loaded
    fitted = fit(_fit_settings(settings, tokens), progress, lambda: limit.left() - PACK_SECONDS)
    write_fit(fitted, settings.run_dir / STITCH, "float32")
    return _pack(settings, record | _described(fitted, settings.seconds - limit.left()))


def _answer(
    settings: FitWithinSettings, loaded: LoadedPair, limit: TimeLimit, progress: Progress
) -> dict[bool, Written]:
    """Samples answers until their share of the time is over; none once a plan relies on those that there are.

    Returns what there is, by whether the prompt is held out.
    """
    given = AnswersSettings(
        data=settings.prompts,
        out=settings.run_dir / ANSWERS,
        route="bottom",
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=settings.training.seed,
    )
    answers = OwnAnswers(loaded, given, MOST_PROMPT_TOKENS)
    if (settings.run_dir / PLAN).exists():
        return answers.written
    # An incomplete last sequence is dropped.
    held_out = settings.held_out_tokens + settings.sequence_tokens
    parts = (True, held_out, HELD_OUT_ANSWERS_UNTIL), (False, settings.tokens, ANSWERS_UNTIL)
    for part, tokens, until in parts:
        name = "held-out answers" if part else "answers"
        together, report = batch_prompts(settings.device), partial(progress, name)
        answers.append(part, tokens, together, partial(limit.is_over, until), report)
    return answers.written


def _planned_tokens(
    settings: FitWithinSettings, loaded: LoadedPair, written: dict[bool, Written], limit: TimeLimit, progress: Progress
) -> int:
    """Returns on how many tokens to train: as many as the passes have time for, by the pace of the first ones."""
    plan = settings.run_dir / PLAN
    if plan.exists():
        return int(json.loads(plan.read_text())["tokens"])
    cuts, _ = required_cuts(cut_of(settings.cluster.route(settings.route)), loaded.bottom.layers, "states")
    first = CHECKPOINT_BATCHES * batch_sequences(settings.device) * settings.sequence_tokens
    began = limit.clock()
    passes = passes_for(loaded, cuts, settings.data(first), settings.dtype, settings.run_dir, progress)
    recorded = (passes.training.sequences + passes.held_out.sequences) * settings.sequence_tokens
    pace = recorded / max(limit.clock() - began, 1e-9)
    more = max(0, int(pace * limit.left(PASSES_UNTIL)))
    tokens = min(first + more, max(first, written[False].tokens))
    write_json(plan, {"tokens": tokens, "tokens_per_second": pace})
    return tokens


def _fit_settings(settings: FitWithinSettings, tokens: int) -> FitSettings:
    return FitSettings(
        cluster=settings.cluster,
        subject=settings.route,
        data=settings.data(tokens),
        training=settings.training,
        dtype=settings.dtype,
        run_dir=settings.run_dir,
        device=settings.device,
    )


def _described(fitted: Fit, used: float) -> dict[str, Any]:
    names = ("tokens", "held_out_tokens", "steps", "losses")
    return {"seconds_used": used, **{name: fitted.report[name] for name in names}}


def _pack(settings: FitWithinSettings, record: dict[str, Any]) -> Packed:
    """Replaces the archive: the most important files first, each if it fits."""
    run_dir, room = settings.run_dir, settings.pack_mebibytes * _MEBIBYTE - 4 * _MEBIBYTE // 64
    checkpoints = sorted(path.name for path in run_dir.glob("distil-*.safetensors"))
    stitch = [STITCH, *(str(Path(STITCH).with_suffix(suffix)) for suffix in (".json", ".png"))]
    taken, left_out = list[str](), list[str]()
    for name in [*stitch, PLAN, ANSWERS, *checkpoints]:
        path = run_dir / name
        if not path.exists():
            continue
        size = _TAR_BLOCK * (2 + path.stat().st_size // _TAR_BLOCK)
        (taken if size <= room else left_out).append(name)
        room -= size if size <= room else 0
    write_json(run_dir / RUN, {**record, "left_out": left_out})
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    partial = settings.out.with_name(settings.out.name + ".partial")
    with tarfile.open(partial, "w") as archive:
        for name in [RUN, *taken]:
            archive.add(run_dir / name, name)
    partial.replace(settings.out)
    return Packed((RUN, *taken), tuple(left_out))
