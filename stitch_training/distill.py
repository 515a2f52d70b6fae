"""Training a stitch through the frozen top model, from a trace. Knows no file format of stitches.

Adam with a rate that falls linearly to zero over all steps. The order of sequences is drawn anew for every epoch from
the seed, so a run is determined by its trace and its settings; a run that is resumed from its checkpoint makes the
same numbers as one that was never interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stitch.errors import InvalidRequest
from stitch_training.fit_start import Aim
from stitch_training.frozen_models import Pair
from stitch_training.objective import Choice, head_loss
from stitch_training.sums import Cut
from stitch_training.trace import Trace
from stitch_training.trainable_stitch import TrainableStitch

HeldOutLoss = Callable[[TrainableStitch], float]
# Evaluations without a better one, after which training ends.
PATIENCE = 3
# Tokens that neither teacher nor text of a step names, drawn for its normalizer.
SAMPLED_TOKENS = 4096


@dataclass(frozen=True)
class Training:
    """How to train; equal settings on equal data give equal stitches."""

    # What least squares aims at before: see `starting.Aim`.
    aim: Aim = "states"
    epochs: int = 1
    batch_sequences: int = 4
    learning_rate: float = 1e-3
    # Weight of the bottom model's distribution against the next token's.
    teacher_share: float = 0.5
    # Held-out evaluations over the whole run.
    evaluations: int = 10
    # Of adapters beside the top's layers; 0: none.
    adapter_rank: int = 0
    seed: int = 0
    # What the data are: the fingerprint of the trace.
    data: str = ""
    # The fingerprint of the stitch whose training goes on, if there is one.
    start: str = ""


@dataclass
class History:
    """Losses along the way, in nats a token: (step, loss)."""

    training: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def best(self) -> float:
        """The least held-out loss so far."""
        return min((loss for _, loss in self.held_out), default=float("inf"))

    def is_stale(self) -> bool:
        """Whether the last PATIENCE evaluations were all worse than one before them."""
        recent = [loss for _, loss in self.held_out[-PATIENCE:]]
        return len(self.held_out) > PATIENCE and min(recent) > self.best()


class Distillation:
    """One run of training on the first `sequences` of a trace, resumed from `checkpoint` where that exists."""

    def __init__(
        self,
        pair: Pair,
        cut: Cut,
        trace: Trace,
        sequences: int,
        stitch: TrainableStitch,
        settings: Training,
        checkpoint: Path,
    ) -> None:
        self._top, self._vocabulary, self._cut = pair.top, pair.vocabulary, cut
        self._trace, self._sequences = trace, sequences
        self.stitch, self._settings, self._checkpoint = stitch, settings, checkpoint
        self.history, self.step = History(), 0
        self._optimizer = torch.optim.Adam(stitch.parameters(), settings.learning_rate, betas=(0.9, 0.98))
        self._best = [parameter.detach().clone() for parameter in stitch.parameters()]
        self.steps = settings.epochs * (-(-sequences // settings.batch_sequences))
        self.interval = max(1, self.steps // settings.evaluations)
        if checkpoint.exists():
            self._resume()

    def run(self, held_out_loss: HeldOutLoss, progress: Callable[[int, int, float], None]) -> None:
        """Trains until the last step, or until held-out loss stops falling; leaves the best stitch of all.

        `progress(step, of, loss)` is called after every step.
        """
        if not self.history.held_out:
            self._evaluate(held_out_loss)
        while self.step < self.steps and not self.history.is_stale():
            loss = self._train_step()
            progress(self.step, self.steps, loss)
            if self.step % self.interval == 0 or self.step == self.steps:
                self._evaluate(held_out_loss)
                self.checkpoint()
        with torch.no_grad():
            for parameter, best in zip(self.stitch.parameters(), self._best, strict=True):
                parameter.copy_(best)

    def _evaluate(self, held_out_loss: HeldOutLoss) -> None:
        loss = held_out_loss(self.stitch)
        if loss < self.history.best():
            self._best = [parameter.detach().clone() for parameter in self.stitch.parameters()]
        self.history.held_out.append((self.step, loss))

    def _train_step(self) -> float:
        rows = self._rows(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * (1 - self.step / self.steps)
        k, j = self._cut
        entering, adapters = self.stitch(self._trace.hidden(k, rows).float()), self.stitch.adapters()
        hidden = self._top.run(entering, j, self._top.depth, adapters)
        choice = Choice(self._settings.teacher_share, self._vocabulary, SAMPLED_TOKENS, self._drawn(self.step))
        loss = head_loss(self._top, hidden, self._trace.tokens(rows), self._trace.teacher(rows), choice)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.step += 1
        self.history.training.append((self.step, loss.item()))
        return loss.item()

    def _rows(self, step: int) -> Tensor:
        """The sequences of a step: each epoch has an order of its own."""
        size = self._settings.batch_sequences
        epoch, place = divmod(step, -(-self._sequences // size))
        order = torch.randperm(self._sequences, generator=self._drawn(-1 - epoch))
        return order[place * size : (place + 1) * size]

    def _drawn(self, purpose: int) -> torch.Generator:
        """A generator of its own for every step (0, 1, …) and every epoch (-1, -2, …), whatever was drawn before."""
        return torch.Generator().manual_seed(self._settings.seed * 1_000_003 + purpose)

    def checkpoint(self) -> None:
        """Leaves the run on disk, whole or not at all."""
        tensors = {f"parameter.{n}": parameter.detach() for n, parameter in enumerate(self.stitch.parameters())}
        tensors |= {f"best.{n}": best for n, best in enumerate(self._best)}
        for n, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{n}.{name}": value for name, value in state.items()}
        metadata = {"run": self._described(), "step": str(self.step), "history": json.dumps(asdict(self.history))}
        partial = self._checkpoint.with_suffix(".partial")
        save_file(tensors, partial, metadata)
        partial.replace(self._checkpoint)

    def _described(self) -> str:
        return json.dumps({"cut": self._cut, "sequences": self._sequences, **asdict(self._settings)})

    def _resume(self) -> None:
        with safe_open(self._checkpoint, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}
        if metadata["run"] != self._described():
            limit = f"it was begun with other settings; remove {self._checkpoint} to begin anew"
            raise InvalidRequest("work", self._checkpoint.name, limit)
        history = json.loads(metadata["history"])
        self.step = int(metadata["step"])
        self.history = History(**{name: [(step, loss) for step, loss in pairs] for name, pairs in history.items()})
        self._best = [tensors[f"best.{n}"] for n in range(len(self._best))]
        state = self._optimizer.state_dict()
        with torch.no_grad():
            for n, parameter in enumerate(self.stitch.parameters()):
                parameter.copy_(tensors[f"parameter.{n}"])
                state["state"][n] = {key: tensors[f"adam.{n}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        self._optimizer.load_state_dict(state)
