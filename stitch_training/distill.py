"""Distillation: trains a stitch, and adapters of the top model, through the frozen top model on a trace.

The optimizer is Adam. Its rate rises over the first steps, since Adam's first ones are as large as the rate whatever
the gradients, and falls linearly to zero over all steps. The order of sequences is drawn from the seed for every epoch,
so a run is determined by its trace and settings; a run resumed from its checkpoint gives the same numbers as an
uninterrupted one. Parameters and optimizer are on the models' device; all draws are the CPU's, so every device trains
on the same sequences from the same adapters.

The stitch is trained in coordinates in which one learning rate suits every entry, although the channels of a language
model differ in size by a factor of a thousand:

    y = W₀ x + b₀ + D (V P (x - x̄) + c)

W₀, b₀ is the closed-form map, P whitens the bottom's states and D holds the standard deviations of the top's, so
entries of V and c are shares of the variation. First tokens are mapped to the top's mean first state.

Adapters A, B of a layer are trained in the same way as shares of their input and output:

    A = U / σ_in,    B = σ_out V

σ_in are the root mean squares of what A reads and σ_out those of the layer's states, channel by channel, on one batch
through the frozen top. U is drawn from the seed and V starts at zero, so fresh adapters have no effect.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stitch.errors import InvalidRequest
from stitch_server.model.adapters import EPSILON, Adapters
from stitch_training.data import LossOn
from stitch_training.least_squares import AffineMap, CutPoint, identity_map
from stitch_training.models import FrozenModel, Pair
from stitch_training.objective import LossSettings, head_loss
from stitch_training.scoring import counted
from stitch_training.trace import Trace

# The target of the closed form: the top model's states, or the bottom model's output distribution (`readout`).
Aim = Literal["states", "answers"]
# Training ends after this number of evaluations in a row that are worse than an earlier one.
PATIENCE_EVALUATIONS = 3
# Of all steps, those over which the rate rises.
WARM_UP_SHARE = 0.05
# Tokens drawn for a step's normalizer from those that neither its teacher nor its text contains.
SAMPLED_TOKENS = 4096


@dataclass(frozen=True)
class ChannelScales:
    """Root mean squares `[layers, hidden]` of each layer's channels: of an adapter's input, and of the states."""

    inputs: Tensor
    states: Tensor


def channel_scales(top: FrozenModel, hidden: Tensor, first: int) -> ChannelScales:
    """Measures the layers from `first` on, whose input is `hidden` `[sequences, tokens, hidden]`.

    First tokens are left out: a few huge values would dominate the scales.
    """
    inputs, states = [], []
    with torch.no_grad():
        for layer in range(first, top.depth):
            rows = hidden[:, 1:].flatten(0, 1).float()
            states.append(_root_mean_square(rows))
            inputs.append(_root_mean_square(F.rms_norm(rows, rows.shape[1:], None, EPSILON)))
            hidden = top.run(hidden, layer, layer + 1)
    return ChannelScales(torch.stack(inputs), torch.stack(states))


def _root_mean_square(rows: Tensor) -> Tensor:
    return rows.square().mean(0).sqrt().clamp_min(EPSILON)


class TrainableAdapters:
    """U `[layers, rank, hidden]` and V `[layers, hidden, rank]`, and the adapters that they give."""

    def __init__(self, scales: ChannelScales, adapters: Adapters) -> None:
        self._first, self._scales = adapters.first, scales
        self._down = (adapters.down.float() * scales.inputs[:, None, :]).requires_grad_()
        self._up = (adapters.up.float() / scales.states[:, :, None]).requires_grad_()

    @classmethod
    def fresh(cls, first: int, rank: int, scales: ChannelScales, seed: int) -> TrainableAdapters:
        """Draws adapters without effect for the layers from `first` on."""
        layers, hidden = scales.inputs.shape
        draw = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(layers, rank, hidden, generator=draw) * hidden**-0.5).to(scales.inputs.device)
        unused = torch.zeros(layers, hidden, rank, device=drawn.device)
        return cls(scales, Adapters(first, drawn / scales.inputs[:, None, :], unused))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._scales.inputs.device

    def parameters(self) -> Sequence[Tensor]:
        """Returns the trained tensors."""
        return [self._down, self._up]

    def to_adapters(self) -> Adapters:
        """Returns the current adapters, through which gradients flow."""
        down, up = self._down / self._scales.inputs[:, None, :], self._up * self._scales.states[:, :, None]
        return Adapters(self._first, down, up)


@dataclass(frozen=True)
class Coordinates:
    """W₀, b₀, x̄, P, D and the image of first tokens: everything that training does not change, float32."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    whitening: Tensor
    # Standard deviations of the targets [outputs].
    deviations: Tensor
    # The top model's mean state of first tokens [outputs].
    first: Tensor


class Student(ABC):
    """What is trained: a map of the bottom's states to the top's, and adapters of the top where there are any."""

    def __init__(self, adapters: TrainableAdapters | None) -> None:
        self._adapters = adapters

    @abstractmethod
    def __call__(self, states: Tensor) -> Tensor:
        """Maps the bottom's states `[sequences, tokens, inputs]` to the top's, `[sequences, tokens, outputs]`."""

    @abstractmethod
    def to_map(self) -> AffineMap:
        """Returns the current map, without the hold on first tokens, in float64."""

    def parameters(self) -> Sequence[Tensor]:
        """Returns the trained tensors."""
        return [] if self._adapters is None else self._adapters.parameters()

    def adapters(self) -> Adapters | None:
        """Returns the current adapters, if there are any, through which gradients flow."""
        return None if self._adapters is None else self._adapters.to_adapters()

    def trained_adapters(self) -> Adapters | None:
        """Returns the current adapters without gradients."""
        with torch.no_grad():
            return self.adapters()


class AdaptedModel(Student):
    """A whole model of `width` values with adapters, a control: its states pass as they are."""

    def __init__(self, adapters: TrainableAdapters, width: int) -> None:
        super().__init__(adapters)
        self._width, self._device = width, adapters.device

    def __call__(self, states: Tensor) -> Tensor:
        """See `Student`."""
        return states

    def to_map(self) -> AffineMap:
        """See `Student`."""
        return identity_map(self._width, self._device)


class TrainableStitch(Student):
    """V `[outputs, inputs]` and c `[outputs]`, the map that they give, and adapters of the top where there are any."""

    def __init__(self, coordinates: Coordinates, adapters: TrainableAdapters | None = None) -> None:
        super().__init__(adapters)
        self._fixed = coordinates
        self.change = torch.zeros_like(coordinates.weight).requires_grad_()
        self.shift = torch.zeros_like(coordinates.bias).requires_grad_()

    def __call__(self, states: Tensor) -> Tensor:
        """See `Student`."""
        fixed = self._fixed
        weight = fixed.weight + fixed.deviations[:, None] * (self.change @ fixed.whitening)
        centre = fixed.weight @ fixed.mean + fixed.bias + fixed.deviations * self.shift
        mapped = F.linear(states[:, 1:] - fixed.mean, weight, centre)
        first = fixed.first.expand(len(states), 1, -1)
        return torch.cat([first, mapped], dim=1)

    def parameters(self) -> Sequence[Tensor]:
        """See `Student`."""
        return [self.change, self.shift, *super().parameters()]

    def to_map(self) -> AffineMap:
        """See `Student`."""
        fixed = self._fixed
        weight, mean, deviations = fixed.weight.double(), fixed.mean.double(), fixed.deviations.double()
        trained = weight + deviations[:, None] * (self.change.double() @ fixed.whitening.double())
        centre = weight @ mean + fixed.bias.double() + fixed.deviations * self.shift
        return AffineMap(trained.detach(), (centre - trained @ mean).detach())


HeldOutLoss = Callable[[Student], float]


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; equal settings on equal data give equal stitches."""

    # Target of the closed form that training starts from.
    aim: Aim = "states"
    epochs: int = 1
    batch_sequences: int = 4
    learning_rate: float = 1e-3
    # Weight of the bottom model's distribution against the next token, 0 to 1.
    teacher_share: float = 0.5
    # The next tokens whose loss counts, in training and in its held-out loss.
    loss_on: LossOn = "content"
    # Held-out evaluations over the whole run.
    evaluations: int = 10
    # Rank of the adapters beside the top's layers; 0: no adapters.
    adapter_rank: int = 0
    seed: int = 0
    # Fingerprint of the trace.
    data: str = ""
    # Fingerprint of the stitch that training starts from; empty: the closed form.
    start: str = ""


@dataclass
class History:
    """Losses during training, in nats per token, as (step, loss)."""

    training: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def best(self) -> float:
        """Returns the lowest held-out loss so far."""
        return min((loss for _, loss in self.held_out), default=float("inf"))

    def is_stale(self) -> bool:
        """Whether the last PATIENCE_EVALUATIONS evaluations were all worse than an earlier one."""
        recent = [loss for _, loss in self.held_out[-PATIENCE_EVALUATIONS:]]
        return len(self.held_out) > PATIENCE_EVALUATIONS and min(recent) > self.best()


def counting_sequences(trace: Trace, sequences: int, loss_on: LossOn) -> Tensor:
    """Returns the indices of the sequences that have a token whose loss counts.

    Raises InvalidRequest where none has: text without conversations has no answers.
    """
    rows = torch.arange(sequences)
    found = rows[counted(trace.roles(rows), loss_on).any(1)]
    if not len(found):
        raise InvalidRequest("loss_on", loss_on, f"none of {sequences} sequences has such a token")
    return found


def rate_share(step: int, steps: int) -> float:
    """The rate of a step, of the whole run's: it rises over WARM_UP_SHARE of the steps, and falls to zero."""
    return min(1.0, (step + 1) / max(1.0, WARM_UP_SHARE * steps)) * (1 - step / steps)


class Distillation:
    """One training run on the first `sequences` of a trace, resumed from `checkpoint` where that file exists."""

    def __init__(
        self,
        pair: Pair,
        cut: CutPoint,
        trace: Trace,
        sequences: int,
        student: Student,
        settings: TrainingSettings,
        checkpoint: Path,
    ) -> None:
        self._top, self._vocabulary, self._cut = pair.top, pair.vocabulary, cut
        self._trace, self._sequences = trace, sequences
        self.student, self._settings, self._checkpoint = student, settings, checkpoint
        self._counting = counting_sequences(trace, sequences, settings.loss_on)
        self.history, self.step = History(), 0
        self._optimizer = torch.optim.Adam(student.parameters(), settings.learning_rate, betas=(0.9, 0.98))
        self._best = [parameter.detach().clone() for parameter in student.parameters()]
        self.steps = settings.epochs * (-(-len(self._counting) // settings.batch_sequences))
        self.interval = max(1, self.steps // settings.evaluations)
        if checkpoint.exists():
            self._resume()

    def run(
        self,
        held_out_loss: HeldOutLoss,
        progress: Callable[[int, int, float], None],
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Trains until the last step, until held-out loss stops falling or `is_over()`, and restores the best stitch.

        `progress(step, steps, loss)` is called after every step, and `is_over` before it.
        """
        if not self.history.held_out:
            self._evaluate(held_out_loss)
        while self.step < self.steps and not self.history.is_stale() and not is_over():
            loss = self._train_step()
            progress(self.step, self.steps, loss)
            if self.step % self.interval == 0 or self.step == self.steps:
                self._evaluate(held_out_loss)
                self.checkpoint()
        if self.step > self.history.held_out[-1][0]:
            # Ended between two evaluations.
            self._evaluate(held_out_loss)
            self.checkpoint()
        with torch.no_grad():
            for parameter, best in zip(self.student.parameters(), self._best, strict=True):
                parameter.copy_(best)

    def _evaluate(self, held_out_loss: HeldOutLoss) -> None:
        loss = held_out_loss(self.student)
        if loss < self.history.best():
            self._best = [parameter.detach().clone() for parameter in self.student.parameters()]
        self.history.held_out.append((self.step, loss))

    def _train_step(self) -> float:
        top, rows = self._top, self._rows(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * rate_share(self.step, self.steps)
        k, j = self._cut
        states, adapters = self.student(self._trace.hidden(k, rows).to(top.device).float()), self.student.adapters()
        hidden = top.run(states, j, top.depth, adapters)
        generator = self._generator(self.step)
        settings = LossSettings(self._settings.teacher_share, self._vocabulary, SAMPLED_TOKENS, generator)
        tokens, teacher, on = self._trace.tokens(rows), self._trace.teacher(rows), self._settings.loss_on
        loss = head_loss(top, hidden, tokens, teacher, counted(self._trace.roles(rows), on), settings)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.step += 1
        value = loss.item()
        self.history.training.append((self.step, value))
        return value

    def _rows(self, step: int) -> Tensor:
        """Returns the sequence indices of a step; every epoch has its own order."""
        size = self._settings.batch_sequences
        epoch, batch = divmod(step, -(-len(self._counting) // size))
        order = torch.randperm(len(self._counting), generator=self._generator(-1 - epoch))
        return self._counting[order[batch * size : (batch + 1) * size]]

    def _generator(self, key: int) -> torch.Generator:
        """Returns the generator of a step (key 0, 1, …) or an epoch (key -1, -2, …), independent of earlier draws."""
        return torch.Generator().manual_seed(self._settings.seed * 1_000_003 + key)

    def checkpoint(self) -> None:
        """Writes the state of the run atomically."""
        tensors = {f"parameter.{n}": parameter.detach() for n, parameter in enumerate(self.student.parameters())}
        tensors |= {f"best.{n}": best for n, best in enumerate(self._best)}
        for n, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{n}.{name}": value for name, value in state.items()}
        metadata = {"run": self._describe(), "step": str(self.step), "history": json.dumps(asdict(self.history))}
        partial = self._checkpoint.with_suffix(".partial")
        save_file(tensors, partial, metadata)
        partial.replace(self._checkpoint)

    def _describe(self) -> str:
        return json.dumps({"cut": self._cut, "sequences": self._sequences, **asdict(self._settings)})

    def _resume(self) -> None:
        with safe_open(self._checkpoint, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}
        if metadata["run"] != self._describe():
            limit = f"it has other settings; remove {self._checkpoint} to start over"
            raise InvalidRequest("run_dir", self._checkpoint.name, limit)
        history = json.loads(metadata["history"])
        self.step = int(metadata["step"])
        self.history = History(**{name: [(step, loss) for step, loss in pairs] for name, pairs in history.items()})
        self._best = [tensors[f"best.{n}"].to(self._top.device) for n in range(len(self._best))]
        state = self._optimizer.state_dict()
        with torch.no_grad():
            for n, parameter in enumerate(self.student.parameters()):
                parameter.copy_(tensors[f"parameter.{n}"])
                state["state"][n] = {key: tensors[f"adam.{n}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        self._optimizer.load_state_dict(state)
