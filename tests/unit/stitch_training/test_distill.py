"""Training through the frozen top lowers the loss, is deterministic, and resumes bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stitch.errors import InvalidRequest
from stitch_server.model.adapters import Adapters
from stitch_training.activations import PassResult, PassSettings, record
from stitch_training.distill import (
    PATIENCE_EVALUATIONS,
    WARM_UP_SHARE,
    ChannelScales,
    Coordinates,
    Distillation,
    History,
    TrainableAdapters,
    TrainableStitch,
    TrainingSettings,
    channel_scales,
    rate_share,
)
from stitch_training.least_squares import CutPoint
from stitch_training.models import Pair
from tests.support.tiny_fit import SEQUENCE_TOKENS, TOP_LAYERS, drawn_sequences, tiny_pair
from tests.support.tiny_model import TOKENS

CUT = CutPoint(2, 1)
SEQUENCES = 10
SETTINGS = TrainingSettings(epochs=3, batch_sequences=3, learning_rate=0.02, teacher_share=0.5, evaluations=4)


class Interrupted(Exception):
    """Simulates a signal in the middle of training."""


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair(tmp_path)


@pytest.fixture
def data(pair: Pair, tmp_path: Path) -> PassResult:
    whole = PassSettings("training", SEQUENCES, SEQUENCE_TOKENS, (CUT,), "x")
    return record(pair, whole, tmp_path / "trace", drawn_sequences(SEQUENCES), lambda done, total: None)


def fresh_stitch(adapter_rank: int = 0) -> TrainableStitch:
    draw = torch.Generator().manual_seed(0)
    scales = ChannelScales(*(torch.rand(1, 32, generator=draw) + 0.5 for _ in range(2)))
    return TrainableStitch(
        Coordinates(
            weight=torch.randn(32, 48, generator=draw) / 7,
            bias=torch.randn(32, generator=draw),
            mean=torch.randn(48, generator=draw),
            whitening=torch.randn(48, 48, generator=draw) / 7,
            deviations=torch.rand(32, generator=draw) + 0.5,
            first=torch.randn(32, generator=draw),
        ),
        TrainableAdapters.fresh(CUT[1], adapter_rank, scales, seed=0) if adapter_rank else None,
    )


def distillation(pair: Pair, data: PassResult, checkpoint: Path, settings: TrainingSettings = SETTINGS) -> Distillation:
    fresh = fresh_stitch(settings.adapter_rank)
    return Distillation(pair, CUT, data.trace, data.sequences, fresh, settings, checkpoint)


def negative_change(stitch: TrainableStitch) -> float:
    """Returns a substitute for held-out loss that falls as the stitch changes."""
    return -float(stitch.change.detach().abs().sum())


def test_training_lowers_the_loss(pair: Pair, data: PassResult, tmp_path: Path) -> None:
    run = distillation(pair, data, tmp_path / "run.safetensors", replace(SETTINGS, epochs=8))
    run.run(negative_change, lambda step, steps, loss: None)
    losses = [loss for _, loss in run.history.training]
    assert len(losses) == run.steps == 8 * 4
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_same_settings_give_the_same_stitch(pair: Pair, data: PassResult, tmp_path: Path) -> None:
    runs = [distillation(pair, data, tmp_path / f"{number}.safetensors") for number in range(2)]
    for run in runs:
        run.run(negative_change, lambda step, steps, loss: None)
    assert torch.equal(runs[0].student.to_map().weight, runs[1].student.to_map().weight)
    assert runs[0].history == runs[1].history


def test_another_seed_gives_another_stitch(pair: Pair, data: PassResult, tmp_path: Path) -> None:
    runs = [distillation(pair, data, tmp_path / f"{seed}.safetensors", replace(SETTINGS, seed=seed)) for seed in (0, 1)]
    for run in runs:
        run.run(negative_change, lambda step, steps, loss: None)
    assert not torch.equal(runs[0].student.change, runs[1].student.change)


def test_adapters_lower_the_loss(pair: Pair, data: PassResult, tmp_path: Path) -> None:
    def last_losses(rank: int) -> float:
        settings = replace(SETTINGS, epochs=8, adapter_rank=rank)
        run = distillation(pair, data, tmp_path / f"{rank}.safetensors", settings)
        run.run(negative_change, lambda step, steps, loss: None)
        assert (run.student.trained_adapters() is None) == (rank == 0)
        return sum(loss for _, loss in run.history.training[-4:])

    assert last_losses(8) < 0.99 * last_losses(0)


@pytest.mark.parametrize(("stop_after", "rank"), [(2, 0), (4, 0), (7, 0), (11, 0), (7, 2)])
def test_resumed_training_equals_an_uninterrupted_one(
    pair: Pair, data: PassResult, tmp_path: Path, stop_after: int, rank: int
) -> None:
    settings = replace(SETTINGS, adapter_rank=rank)

    def stopping(step: int, steps: int, loss: float) -> None:
        if step == stop_after:
            raise Interrupted

    whole = distillation(pair, data, tmp_path / "whole.safetensors", settings)
    whole.run(negative_change, lambda step, steps, loss: None)
    with pytest.raises(Interrupted):
        distillation(pair, data, tmp_path / "resumed.safetensors", settings).run(negative_change, stopping)
    resumed = distillation(pair, data, tmp_path / "resumed.safetensors", settings)
    resumed.run(negative_change, lambda step, steps, loss: None)
    assert resumed.history == whole.history
    assert torch.equal(resumed.student.to_map().weight, whole.student.to_map().weight)
    assert torch.equal(resumed.student.to_map().bias, whole.student.to_map().bias)
    for one, other in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_checkpoint_of_other_settings_is_refused(pair: Pair, data: PassResult, tmp_path: Path) -> None:
    distillation(pair, data, tmp_path / "run.safetensors").checkpoint()
    with pytest.raises(InvalidRequest, match=r"it has other settings; remove .*run\.safetensors"):
        distillation(pair, data, tmp_path / "run.safetensors", replace(SETTINGS, data="other"))


def test_training_stops_early_and_restores_the_best_stitch(pair: Pair, data: PassResult, tmp_path: Path) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.3, 9.0, 9.0])
    changes: list[torch.Tensor] = []

    def worsening(stitch: TrainableStitch) -> float:
        changes.append(stitch.change.detach().clone())
        return next(losses)

    run = distillation(pair, data, tmp_path / "run.safetensors", replace(SETTINGS, evaluations=6))
    run.run(worsening, lambda step, steps, loss: None)
    assert len(changes) == 2 + PATIENCE_EVALUATIONS
    assert run.step < run.steps
    assert torch.equal(run.student.change, changes[1])


def test_history_is_stale_after_patience_evaluations_without_a_better_one() -> None:
    assert not History(held_out=[(0, 1.0), (1, 2.0), (2, 2.0)]).is_stale()
    assert History(held_out=[(0, 1.0), (1, 2.0), (2, 2.0), (3, 2.0)]).is_stale()
    assert not History(held_out=[(0, 1.0), (1, 2.0), (2, 2.0), (3, 0.5)]).is_stale()


def test_epoch_has_every_sequence_once_in_its_own_order(pair: Pair, data: PassResult, tmp_path: Path) -> None:
    run = distillation(pair, data, tmp_path / "run.safetensors")
    epochs = [torch.cat([run._rows(step) for step in range(first, first + 4)]) for first in (0, 4)]
    assert all(sorted(epoch.tolist()) == list(range(SEQUENCES)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_sequences_without_a_token_that_counts_are_left_out(pair: Pair, data: PassResult, tmp_path: Path) -> None:
    answers = replace(SETTINGS, loss_on="assistant")
    run = distillation(pair, data, tmp_path / "run.safetensors", answers)
    # Every second one is of plain text.
    epoch = torch.cat([run._rows(step) for step in range(run.steps // 3)])
    assert sorted(epoch.tolist()) == list(range(1, SEQUENCES, 2))
    run.run(negative_change, lambda step, steps, loss: None)
    all_tokens = distillation(pair, data, tmp_path / "all.safetensors", replace(SETTINGS, loss_on="all"))
    all_tokens.run(negative_change, lambda step, steps, loss: None)
    assert not torch.equal(run.student.change, all_tokens.student.change)


def test_text_without_a_token_that_counts_is_refused(pair: Pair, tmp_path: Path) -> None:
    whole = PassSettings("training", 1, SEQUENCE_TOKENS, (CUT,), "x")
    plain = record(pair, whole, tmp_path / "plain", drawn_sequences(1), lambda done, total: None)
    with pytest.raises(InvalidRequest, match="loss_on is 'assistant', but none of 1 sequences has such a token"):
        distillation(pair, plain, tmp_path / "run.safetensors", replace(SETTINGS, loss_on="assistant"))


def test_to_map_equals_the_trained_stitch() -> None:
    stitch = fresh_stitch()
    with torch.no_grad():
        stitch.change.normal_(generator=torch.Generator().manual_seed(1))
        stitch.shift.normal_(generator=torch.Generator().manual_seed(2))
        states = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))
        trained, mapped = stitch(states), stitch.to_map()
    expected = states.double() @ mapped.weight.T + mapped.bias
    torch.testing.assert_close(trained[:, 1:].double(), expected[:, 1:], rtol=1e-4, atol=1e-4)


def test_first_tokens_are_mapped_to_a_constant() -> None:
    stitch = fresh_stitch()
    moved = stitch(torch.randn(3, 4, 48))[:, 0]
    assert torch.equal(moved, stitch(torch.zeros(3, 4, 48))[:, 0])


HIDDEN, RANK = 32, 3


def drawn_scales() -> ChannelScales:
    draw = torch.Generator().manual_seed(0)
    return ChannelScales(*(torch.rand(TOP_LAYERS, HIDDEN, generator=draw) + 0.1 for _ in range(2)))


def drawn_tokens() -> Tensor:
    return torch.randint(TOKENS, (2, 8), generator=torch.Generator().manual_seed(0))


def test_fresh_adapters_have_no_effect(tmp_path: Path) -> None:
    top = tiny_pair(tmp_path).top
    fresh = TrainableAdapters.fresh(0, RANK, drawn_scales(), seed=0).to_adapters()
    hidden = top.embed(drawn_tokens())
    assert fresh.down.abs().max() > 0
    assert torch.equal(top.run(hidden, 0, top.depth, fresh), top.run(hidden, 0, top.depth))


def test_channel_scales_are_root_mean_squares_without_first_tokens(tmp_path: Path) -> None:
    top = tiny_pair(tmp_path).top
    hidden = top.embed(drawn_tokens())
    # The first token must not count.
    hidden[:, 0] *= 1000
    scales = channel_scales(top, hidden, 0)
    assert scales.states.shape == scales.inputs.shape == (TOP_LAYERS, HIDDEN)
    rows = top.run(hidden, 0, 1)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(scales.states[1], rows.square().mean(0).sqrt())
    normed = rows / rows.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(scales.inputs[1], normed.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)


def test_adapter_seed_decides_the_draw() -> None:
    drawn = [TrainableAdapters.fresh(0, RANK, drawn_scales(), seed).to_adapters().down for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_adapter_coordinates_are_shares_of_the_scales() -> None:
    scales, trained = drawn_scales(), TrainableAdapters.fresh(1, RANK, drawn_scales(), seed=0)
    down, up = trained.parameters()
    with torch.no_grad():
        up.fill_(1.0)
    made = trained.to_adapters()
    assert made.first == 1
    torch.testing.assert_close(made.down * scales.inputs[:, None, :], down)
    torch.testing.assert_close(made.up, scales.states[:, :, None].expand(-1, -1, RANK))


def test_gradients_reach_both_adapter_tensors(tmp_path: Path) -> None:
    top = tiny_pair(tmp_path).top
    trained = TrainableAdapters.fresh(0, RANK, drawn_scales(), seed=0)
    with torch.no_grad():
        trained.parameters()[1].normal_(std=0.1)

    def loss(adapters: Adapters) -> Tensor:
        return top.run(top.embed(drawn_tokens()), 0, top.depth, adapters).square().mean()

    loss(trained.to_adapters()).backward()
    for parameter in trained.parameters():
        gradient = parameter.grad
        assert gradient is not None
        at = tuple(int(place) for place in torch.nonzero(gradient.abs() == gradient.abs().max())[0])
        with torch.no_grad():
            parameter[at] += 1e-2
            above = loss(trained.to_adapters())
            parameter[at] -= 2e-2
            below = loss(trained.to_adapters())
            parameter[at] += 1e-2
        torch.testing.assert_close((above - below) / 2e-2, gradient[at], rtol=0.05, atol=1e-5)


def test_rate_rises_over_a_twentieth_of_the_steps_and_falls_to_zero() -> None:
    shares = [rate_share(step, 200) for step in range(200)]
    assert shares[0] == pytest.approx(0.1)
    assert shares.index(max(shares)) == 200 * WARM_UP_SHARE - 1
    assert shares[-1] == pytest.approx(1 / 200)
    # Also a run of one step has a rate.
    assert rate_share(0, 1) == 1
