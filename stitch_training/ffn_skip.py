"""Trains gates by which generated tokens leave out FFNs, with the bottlenecks that heal what is left out.

In: a whole model, and a recorded pass over text with its own likeliest next tokens. Out: `FfnGates`, calibrated to
shares of all FFNs. The loss is the divergence from the whole model's distribution after generated tokens, with

    h_{i+1} = h + (1 - m) FFN_i(n) + m B_i silu(A_i h / rms(h)),    m = [z > threshold],    z = w_i · n + b_i.

The gradient of m is that of a sigmoid (straight-through), and each step trains the gates at another share. A threshold
follows the share's quantile of z over the last steps, and a penalty keeps the gates from evading it: PENALTY times the
square of the relative difference between the mean sigmoid and what it would be at the quantile.

Gates start from the harm of each FFN's absence: b_i is minus half the log of the mean squared derivative of the loss by
m, and w_i regresses the tokens' own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stitch.cluster import ClusterConfig, Role
from stitch.errors import Incompatible, InvalidRequest
from stitch_server.attention import Attend, Layer, Rotary
from stitch_server.model.adapters import Adapters
from stitch_server.model.ffn_skip import FIRST_GATED, SPARED_LAST, Calibration, FfnGates, FfnSkip
from stitch_server.model.llama import NativeLayer
from stitch_training.activations import PassResult, Progress
from stitch_training.data import DataSettings
from stitch_training.device import CPU
from stitch_training.distill import SAMPLED_TOKENS, ChannelScales, TrainableAdapters
from stitch_training.fit import passes_for
from stitch_training.least_squares import CutPoint
from stitch_training.models import FrozenModel, LoadedPair, load_pair
from stitch_training.objective import LossSettings, head_loss
from stitch_training.scoring import counted, generated_tokens

# The width of the sigmoid whose gradient stands for that of a gate.
TEMPERATURE = 0.5
# The weight of a step's quantile in the threshold, in training and in the passes of a calibration.
FOLLOWING, CALIBRATING = 0.3, 0.7
PENALTY = 10.0
CALIBRATION_PASSES = 3
# The strength of the regression of single tokens' harm, as a share of the input's mean variance times the tokens.
RIDGE = 1.0
START_SEQUENCES = 4
BIAS_RATE = 10.0


@dataclass(frozen=True)
class SkipSettings:
    """The model, the data, and how the gates are trained."""

    cluster: ClusterConfig
    role: Role
    data: DataSettings
    dtype: str
    run_dir: Path
    shares: tuple[float, ...] = (0.1, 0.2, 0.3)
    rank: int = 16
    epochs: int = 1
    batch_sequences: int = 2
    # In shares as in `distill`; biases learn faster by BIAS_RATE.
    learning_rate: float = 1e-3
    reuse: tuple[Path, ...] = ()
    device: torch.device = CPU

    def describe(self) -> dict[str, Any]:
        """Returns what the file says of its training."""
        names = ("shares", "rank", "epochs", "batch_sequences", "learning_rate")
        return {name: getattr(self, name) for name in names}


@dataclass
class GateStudent:
    """The trained tensors: gates `[layers, hidden]` in deviations of their inputs, biases, and the bottlenecks."""

    model: FrozenModel
    # Root mean squares [layers, hidden] of what the gates read.
    scales: Tensor
    bottlenecks: TrainableAdapters
    gate: Tensor
    bias: Tensor
    # The thresholds by share.
    thresholds: dict[float, float] = field(default_factory=dict)

    def skip(self, share: float) -> FfnSkip:
        """Returns the current gates at the threshold of a share, through which gradients flow."""
        healing, bias = self.bottlenecks.to_adapters(), self.bias - self.thresholds[share]
        return FfnSkip(self.gate / self.scales, bias, healing, (0.0,) * len(self.bias), "")

    def run(self, hidden: Tensor, generated: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Returns the last layer's states, and z [layers, generated tokens] before the threshold."""
        skip, seen = self.skip(share), list[Tensor]()
        rows, at_rows = generated.flatten().to(hidden.device), _indices(generated, hidden.device)

        def run_layer(layer: Layer, states: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
            native = _native(layer)
            if not skip.first <= native.index < skip.end:
                return native(states, rotary, attend)
            states = native.add_attention(states, rotary, attend)
            normed = native.normalize(states)
            at = native.index - skip.first
            z = (normed.float() * skip.gate[at]).sum(1) + skip.bias[at]
            seen.append(z[at_rows] + self.thresholds[share])
            soft = torch.sigmoid(z / TEMPERATURE)
            mask = ((z > 0).float() + soft - soft.detach()) * rows
            computed, healed = native.feed_forward(normed), skip.healing(native.index, states)
            return states + computed + (mask[:, None] * (healed - computed)).to(states.dtype)

        return self.model.run_each(hidden, run_layer), torch.stack(seen)

    def penalty(self, z: Tensor, share: float) -> Tensor:
        """Returns what the gates' evading of a threshold costs, whose gradient moves all of them alike."""
        target = torch.sigmoid((z.detach() - _quantile(z.detach(), share, self.model.depth)) / TEMPERATURE).mean()
        found = torch.sigmoid((z - self.thresholds[share]) / TEMPERATURE).mean()
        return PENALTY * (found / target - 1).square()

    def follow(self, z: Tensor) -> None:
        """Moves the thresholds towards the quantiles of z."""
        for share, threshold in self.thresholds.items():
            found = _quantile(z, share, self.model.depth)
            self.thresholds[share] = threshold + FOLLOWING * (found - threshold)


def _native(layer: Layer) -> NativeLayer:
    if not isinstance(layer, NativeLayer):
        raise Incompatible("FFNs can be left out of native layers alone")
    return layer


def _indices(generated: Tensor, device: torch.device) -> Tensor:
    """The indices of the generated tokens `[sequences, tokens]` among all, on a device, which isn't waited for."""
    return generated.flatten().nonzero()[:, 0].to(device)


def _quantile(z: Tensor, share: float, depth: int) -> float:
    """Returns the threshold over which a share of all layers' FFNs is, of z [gated layers, tokens]."""
    values = z.flatten().sort(descending=True).values
    return float(values[min(len(values) - 1, int(share * depth * z.shape[1]))])


@dataclass(frozen=True)
class Harm:
    """Of one batch and every gated layer: what gates and bottlenecks read, and the derivatives of the loss by m."""

    # [layers, hidden]: root mean squares of the gates' inputs, of the bottlenecks', and of the states.
    normed: Tensor
    scales: ChannelScales
    # [layers, generated tokens, hidden], and squared derivatives [layers, generated tokens].
    inputs: Tensor
    squares: Tensor


def measure_harm(model: FrozenModel, data: PassResult, vocabulary: int) -> Harm:
    """Measures what leaving out single FFNs changes, to first order of the next token's likelihood, on one batch."""
    rows = torch.arange(min(START_SEQUENCES, data.sequences))
    tokens, roles = data.trace.tokens(rows), data.trace.roles(rows)
    generated = _indices(generated_tokens(roles), model.device)
    inputs, states, masks = list[Tensor](), list[Tensor](), list[Tensor]()

    def run_layer(layer: Layer, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        native = _native(layer)
        if not FIRST_GATED <= native.index < model.depth - SPARED_LAST:
            return native(hidden, rotary, attend)
        hidden = native.add_attention(hidden, rotary, attend)
        normed = native.normalize(hidden)
        masks.append(torch.zeros(len(hidden), device=hidden.device, requires_grad=True))
        inputs.append(normed.detach()[generated].float())
        states.append(hidden.detach()[generated].float())
        return hidden + ((1 - masks[-1][:, None]) * native.feed_forward(normed)).to(hidden.dtype)

    hidden = model.run_each(model.embed(tokens), run_layer)
    settings = LossSettings(0.0, vocabulary, SAMPLED_TOKENS, torch.Generator().manual_seed(0))
    on = counted(roles, "content") & generated_tokens(roles)[:, :-1]
    loss = head_loss(model, hidden, tokens, data.trace.teacher(rows), on, settings) * int(on.sum())
    squares = torch.stack(torch.autograd.grad(loss, masks))[:, generated].square()
    spread = [one / one.square().mean(1, keepdim=True).sqrt() for one in states]
    scales = ChannelScales(_root_mean_squares(spread), _root_mean_squares(states))
    return Harm(_root_mean_squares(inputs), scales, torch.stack(inputs), squares)


def _root_mean_squares(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([one.square().mean(0).sqrt().clamp_min(1e-6) for one in rows])


def start(model: FrozenModel, harm: Harm, settings: SkipSettings) -> GateStudent:
    """Returns gates that order FFNs by the harm of leaving them out, and bottlenecks without effect."""
    mean = harm.squares.mean(1, keepdim=True)
    bias = -0.5 * mean.clamp_min(1e-12).log()[:, 0]
    gate = []
    for inputs, squares, scale, level in zip(harm.inputs, harm.squares, harm.normed, mean, strict=True):
        x = inputs / scale
        # The logarithm of a square of a normal value has a deviation of 2.2; a root keeps outliers from deciding.
        y = -(squares / level.clamp_min(1e-12)).pow(0.25)
        kernel = x @ x.T + RIDGE * x.shape[1] * torch.eye(len(x), device=x.device)
        gate.append(x.T @ torch.linalg.solve(kernel, y - y.mean()))
    bottlenecks = TrainableAdapters.fresh(FIRST_GATED, settings.rank, harm.scales, settings.data.seed)
    student = GateStudent(model, harm.normed, bottlenecks, torch.stack(gate).requires_grad_(), bias.requires_grad_())
    with torch.no_grad():
        z = torch.einsum("lth,lh->lt", harm.inputs, student.gate / harm.normed) + student.bias[:, None]
    student.thresholds = {share: _quantile(z, share, model.depth) for share in settings.shares}
    return student


def train(student: GateStudent, data: PassResult, vocabulary: int, settings: SkipSettings, progress: Progress) -> None:
    """Trains for the settings' epochs, at the shares in turn."""
    rates = [settings.learning_rate, settings.learning_rate, settings.learning_rate * BIAS_RATE]
    trained = [student.bottlenecks.parameters(), [student.gate], [student.bias]]
    groups = [{"params": list(some), "lr": rate} for some, rate in zip(trained, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    size = settings.batch_sequences
    steps = settings.epochs * (data.sequences // size)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        epoch, batch = divmod(step, data.sequences // size)
        order = torch.randperm(data.sequences, generator=torch.Generator().manual_seed(settings.data.seed + epoch))
        rows = order[batch * size : (batch + 1) * size]
        loss = _step(student, data, rows, settings.shares[step % len(settings.shares)], vocabulary, step)
        if loss is not None:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        progress("gates", step + 1, steps)


def _step(
    student: GateStudent, data: PassResult, rows: Tensor, share: float, vocabulary: int, step: int
) -> Tensor | None:
    """Returns the loss of a step; None where no token counts."""
    tokens, roles = data.trace.tokens(rows), data.trace.roles(rows)
    generated = generated_tokens(roles)
    on = counted(roles, "content") & generated[:, :-1]
    if not on.any():
        return None
    hidden, z = student.run(student.model.embed(tokens), generated, share)
    student.follow(z.detach())
    settings = LossSettings(1.0, vocabulary, SAMPLED_TOKENS, torch.Generator().manual_seed(step))
    divergence = head_loss(student.model, hidden, tokens, data.trace.teacher(rows), on, settings)
    return divergence + student.penalty(z, share)


def calibrate(student: GateStudent, data: PassResult, share: float) -> Calibration:
    """Finds the threshold at which the share of skipped FFNs holds on a pass, and what each layer then skips.

    What one layer skips changes the states that later ones see, so the threshold is followed over some passes.
    """
    rows = torch.arange(data.sequences)
    generated = generated_tokens(data.trace.roles(rows))
    hidden = student.model.embed(data.trace.tokens(rows))

    def pass_over() -> Tensor:
        parts = zip(torch.split(hidden, 4), torch.split(generated, 4), strict=True)
        with torch.no_grad():
            return torch.cat([student.run(some, part, share)[1] for some, part in parts], dim=1)

    for _ in range(CALIBRATION_PASSES):
        found = _quantile(pass_over(), share, student.model.depth)
        student.thresholds[share] += CALIBRATING * (found - student.thresholds[share])
    skipped = pass_over() > student.thresholds[share]
    return Calibration(student.thresholds[share], tuple(skipped.float().mean(1).tolist()))


@dataclass(frozen=True)
class FittedGates:
    """Trained gates, and what a report says of them."""

    gates: FfnGates
    report: Mapping[str, Any]


def fit_gates(settings: SkipSettings, progress: Progress) -> FittedGates:
    """Trains and calibrates the gates of one of a cluster's models.

    Raises InvalidRequest for data that can't be read or a run directory of another fit.
    """
    started_at = time.monotonic()
    loaded: LoadedPair = load_pair(settings.cluster, getattr(torch, settings.dtype), settings.device).control(
        settings.role
    )
    if any(not 0 < share < 1 for share in settings.shares):
        raise InvalidRequest("shares", settings.shares, "each must be over 0 and below 1")
    cuts = (CutPoint(0, 0),)
    passes = passes_for(loaded, cuts, settings.data, settings.dtype, settings.run_dir, progress, settings.reuse)
    model, vocabulary = loaded.pair.top, loaded.pair.vocabulary
    student = start(model, measure_harm(model, passes.training, vocabulary), settings)
    train(student, passes.training, vocabulary, settings, progress)
    with torch.no_grad():
        calibrations = {share: calibrate(student, passes.held_out, share) for share in settings.shares}
        healing = student.bottlenecks.to_adapters()
        gate, bias = (student.gate / student.scales).cpu().detach(), student.bias.cpu().detach()
    making = {
        "data": passes.training.fingerprint,
        "files": [path.name for path in settings.data.files],
        "tokens": passes.training.sequences * settings.data.sequence_tokens,
        "dtype": settings.dtype,
        **settings.describe(),
    }
    described = loaded.top
    healing = Adapters(healing.first, healing.down.cpu(), healing.up.cpu())
    gates = FfnGates(gate, bias, healing, described.id, described.revision, calibrations, making)
    report = {**making, "device": str(settings.device), "seconds": time.monotonic() - started_at}
    report["calibrations"] = {f"{share:g}": asdict(one) for share, one in calibrations.items()}
    return FittedGates(gates, report)
