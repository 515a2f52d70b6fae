"""Training through the frozen top: it learns, it repeats itself, and it survives interruptions bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stitch.errors import InvalidRequest
from stitch_training.activations import Collected, Pass, collect
from stitch_training.distill import PATIENCE, Distillation, History, Training
from stitch_training.frozen_models import Pair
from stitch_training.trainable_adapters import Sizes, TrainableAdapters
from stitch_training.trainable_stitch import Coordinates, TrainableStitch
from tests.support.tiny_fit import SEQUENCE_TOKENS, drawn_sequences, tiny_pair

CUT = (2, 1)
SEQUENCES = 10
SETTINGS = Training(epochs=3, batch_sequences=3, learning_rate=0.02, teacher_share=0.5, evaluations=4)


class Interrupted(Exception):
    """Stands for a signal in the middle of training."""


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair(tmp_path)


@pytest.fixture
def data(pair: Pair, tmp_path: Path) -> Collected:
    whole = Pass("training", SEQUENCES, SEQUENCE_TOKENS, (CUT,), "x")
    return collect(pair, whole, tmp_path / "trace", drawn_sequences(SEQUENCES), lambda done, of: None)


def fresh_stitch(adapter_rank: int = 0) -> TrainableStitch:
    draw = torch.Generator().manual_seed(0)
    sizes = Sizes(*(torch.rand(1, 32, generator=draw) + 0.5 for _ in range(2)))
    return TrainableStitch(
        Coordinates(
            weight=torch.randn(32, 48, generator=draw) / 7,
            bias=torch.randn(32, generator=draw),
            mean=torch.randn(48, generator=draw),
            whitening=torch.randn(48, 48, generator=draw) / 7,
            deviations=torch.rand(32, generator=draw) + 0.5,
            first=torch.randn(32, generator=draw),
        ),
        TrainableAdapters.fresh(CUT[1], adapter_rank, sizes, seed=0) if adapter_rank else None,
    )


def distillation(pair: Pair, data: Collected, checkpoint: Path, settings: Training = SETTINGS) -> Distillation:
    fresh = fresh_stitch(settings.adapter_rank)
    return Distillation(pair, CUT, data.trace, data.sequences, fresh, settings, checkpoint)


def of_change(stitch: TrainableStitch) -> float:
    """A stand-in for held-out loss that is less, the more the stitch has changed."""
    return -float(stitch.change.detach().abs().sum())


def test_the_loss_falls(pair: Pair, data: Collected, tmp_path: Path) -> None:
    run = distillation(pair, data, tmp_path / "run.safetensors", replace(SETTINGS, epochs=8))
    run.run(of_change, lambda step, steps, loss: None)
    losses = [loss for _, loss in run.history.training]
    assert len(losses) == run.steps == 8 * 4
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_same_run_gives_the_same_stitch(pair: Pair, data: Collected, tmp_path: Path) -> None:
    runs = [distillation(pair, data, tmp_path / f"{number}.safetensors") for number in range(2)]
    for run in runs:
        run.run(of_change, lambda step, steps, loss: None)
    assert torch.equal(runs[0].stitch.to_map().weight, runs[1].stitch.to_map().weight)
    assert runs[0].history == runs[1].history


def test_another_seed_gives_another_stitch(pair: Pair, data: Collected, tmp_path: Path) -> None:
    runs = [distillation(pair, data, tmp_path / f"{seed}.safetensors", replace(SETTINGS, seed=seed)) for seed in (0, 1)]
    for run in runs:
        run.run(of_change, lambda step, steps, loss: None)
    assert not torch.equal(runs[0].stitch.change, runs[1].stitch.change)


def test_adapters_lower_the_loss(pair: Pair, data: Collected, tmp_path: Path) -> None:
    def last_losses(rank: int) -> float:
        settings = replace(SETTINGS, epochs=8, adapter_rank=rank)
        run = distillation(pair, data, tmp_path / f"{rank}.safetensors", settings)
        run.run(of_change, lambda step, steps, loss: None)
        assert (run.stitch.trained_adapters() is None) == (rank == 0)
        return sum(loss for _, loss in run.history.training[-4:])

    assert last_losses(8) < 0.99 * last_losses(0)


@pytest.mark.parametrize(("stop_after", "rank"), [(2, 0), (4, 0), (7, 0), (11, 0), (7, 2)])
def test_interrupted_and_resumed_is_the_same(
    pair: Pair, data: Collected, tmp_path: Path, stop_after: int, rank: int
) -> None:
    settings = replace(SETTINGS, adapter_rank=rank)

    def stopping(step: int, steps: int, loss: float) -> None:
        if step == stop_after:
            raise Interrupted

    whole = distillation(pair, data, tmp_path / "whole.safetensors", settings)
    whole.run(of_change, lambda step, steps, loss: None)
    with pytest.raises(Interrupted):
        distillation(pair, data, tmp_path / "parts.safetensors", settings).run(of_change, stopping)
    resumed = distillation(pair, data, tmp_path / "parts.safetensors", settings)
    resumed.run(of_change, lambda step, steps, loss: None)
    assert resumed.history == whole.history
    assert torch.equal(resumed.stitch.to_map().weight, whole.stitch.to_map().weight)
    assert torch.equal(resumed.stitch.to_map().bias, whole.stitch.to_map().bias)
    for one, other in zip(resumed.stitch.parameters(), whole.stitch.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_other_settings_is_refused(pair: Pair, data: Collected, tmp_path: Path) -> None:
    distillation(pair, data, tmp_path / "run.safetensors").checkpoint()
    with pytest.raises(InvalidRequest, match=r"begun with other settings; remove .*run\.safetensors"):
        distillation(pair, data, tmp_path / "run.safetensors", replace(SETTINGS, data="other"))


def test_training_ends_early_and_leaves_the_best(pair: Pair, data: Collected, tmp_path: Path) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.3, 9.0, 9.0])
    changes: list[torch.Tensor] = []

    def worsening(stitch: TrainableStitch) -> float:
        changes.append(stitch.change.detach().clone())
        return next(losses)

    run = distillation(pair, data, tmp_path / "run.safetensors", replace(SETTINGS, evaluations=6))
    run.run(worsening, lambda step, steps, loss: None)
    assert len(changes) == 2 + PATIENCE
    assert run.step < run.steps
    assert torch.equal(run.stitch.change, changes[1])


def test_staleness_counts_evaluations_since_the_best() -> None:
    assert not History(held_out=[(0, 1.0), (1, 2.0), (2, 2.0)]).is_stale()
    assert History(held_out=[(0, 1.0), (1, 2.0), (2, 2.0), (3, 2.0)]).is_stale()
    assert not History(held_out=[(0, 1.0), (1, 2.0), (2, 2.0), (3, 0.5)]).is_stale()


def test_every_epoch_sees_every_sequence_once(pair: Pair, data: Collected, tmp_path: Path) -> None:
    run = distillation(pair, data, tmp_path / "run.safetensors")
    epochs = [torch.cat([run._rows(step) for step in range(first, first + 4)]) for first in (0, 4)]
    assert all(sorted(epoch.tolist()) == list(range(SEQUENCES)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_map_is_what_was_trained() -> None:
    stitch = fresh_stitch()
    with torch.no_grad():
        stitch.change.normal_(generator=torch.Generator().manual_seed(1))
        stitch.shift.normal_(generator=torch.Generator().manual_seed(2))
        states = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))
        trained, mapped = stitch(states), stitch.to_map()
    expected = states.double() @ mapped.weight.T + mapped.bias
    torch.testing.assert_close(trained[:, 1:].double(), expected[:, 1:], rtol=1e-4, atol=1e-4)


def test_first_tokens_stay_where_the_top_expects_them() -> None:
    stitch = fresh_stitch()
    moved = stitch(torch.randn(3, 4, 48))[:, 0]
    assert torch.equal(moved, stitch(torch.zeros(3, 4, 48))[:, 0])
