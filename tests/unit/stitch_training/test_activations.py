"""A pass over the data: its sums, its trace, its resumption and its memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from stitch.errors import InvalidRequest
from stitch_training import activations
from stitch_training.activations import ActivationCache, PassResult, PassSettings, read_checkpoint, record
from stitch_training.data import PackedSequence
from stitch_training.least_squares import CutPoint
from stitch_training.models import FrozenModel, Pair, states_at
from tests.support.tiny_fit import SEQUENCE_TOKENS, drawn_sequences, tiny_pair

CUTS = (CutPoint(1, 1), CutPoint(2, 1), CutPoint(2, 0))


class Interrupted(Exception):
    """Simulates a signal in the middle of a pass."""


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair(tmp_path)


def recorded(
    pair: Pair, folder: Path, count: int, stop_after: int = -1, settings: str = "x", cuts: tuple[CutPoint, ...] = CUTS
) -> PassResult:
    def progress(done: int, total: int) -> None:
        if done == stop_after:
            raise Interrupted

    whole = PassSettings("training", count, SEQUENCE_TOKENS, cuts, settings)
    return record(pair, whole, folder, drawn_sequences(count), progress)


def test_sums_exclude_first_tokens(pair: Pair, tmp_path: Path) -> None:
    sums = recorded(pair, tmp_path / "work", 6).sums
    tokens = torch.tensor([sequence.token_ids for sequence in drawn_sequences(6)])
    with torch.no_grad():
        bottom, top = states_at(pair.bottom, tokens, [1, 2]), states_at(pair.top, tokens, [0, 1])
    x, y = bottom[2][:, 1:].flatten(0, 1).double(), top[1][:, 1:].flatten(0, 1).double()
    assert float(sums.grams[2].count) == 6 * (SEQUENCE_TOKENS - 1)
    torch.testing.assert_close(sums.grams[2].products, x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.crosses[CutPoint(2, 1)].products, y.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.first_bottom[1].mean(), bottom[1][:, 0].double().mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.first_top[0].mean(), top[0][:, 0].double().mean(0), rtol=1e-5, atol=1e-5)


def test_trace_returns_the_states_and_teacher_of_a_pass(pair: Pair, tmp_path: Path) -> None:
    trace = recorded(pair, tmp_path / "work", 5).trace
    rows = torch.tensor([4, 0])
    tokens = torch.tensor([drawn_sequences(5)[row].token_ids for row in rows])
    with torch.no_grad():
        states = states_at(pair.bottom, tokens, [1, 2, pair.bottom.depth])
        logprobs = pair.bottom.logits(states[pair.bottom.depth].flatten(0, 1)).log_softmax(1)
    assert torch.equal(trace.tokens(rows), tokens)
    assert trace.files(rows).tolist() == [0, 0]
    assert trace.roles(torch.tensor([1, 0])).tolist() == [list(drawn_sequences(2)[row].roles) for row in (1, 0)]
    # bfloat16 keeps eight bits of a value.
    torch.testing.assert_close(trace.hidden(2, rows).float(), states[2], rtol=2**-7, atol=1e-3)
    teacher = trace.teacher(rows)
    expected = logprobs.gather(1, teacher.ids.flatten(0, 1))
    torch.testing.assert_close(teacher.logprobs.flatten(0, 1), expected, rtol=2e-3, atol=2e-3)


def test_pass_of_one_model_runs_it_once(pair: Pair, tmp_path: Path) -> None:
    same = Pair(pair.top, pair.top, pair.vocabulary)
    sums = recorded(same, tmp_path / "work", 4, cuts=(CutPoint(1, 1),)).sums
    torch.testing.assert_close(sums.crosses[CutPoint(1, 1)].products, sums.grams[1].products)


@pytest.mark.parametrize("stop_after", [4, 8, 16])
def test_resumed_pass_equals_an_uninterrupted_one(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr(activations, "CHECKPOINT_BATCHES", 2)
    whole = recorded(pair, tmp_path / "whole", 18)
    with pytest.raises(Interrupted):
        recorded(pair, tmp_path / "resumed", 18, stop_after=stop_after)
    resumed = recorded(pair, tmp_path / "resumed", 18)
    assert (resumed.fingerprint, resumed.sequences) == (whole.fingerprint, 18)
    for name, value in whole.sums.state().items():
        assert torch.equal(resumed.sums.state()[name], value)
    for name in ("tokens", "hidden-1", "teacher-ids", "teacher-logp"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_finished_pass_is_not_run_again(pair: Pair, tmp_path: Path) -> None:
    recorded(pair, tmp_path / "work", 4)
    assert recorded(pair, tmp_path / "work", 4, stop_after=4).sequences == 4


def test_finished_pass_is_extended_by_more_sequences(pair: Pair, tmp_path: Path) -> None:
    whole = recorded(pair, tmp_path / "whole", 12)
    recorded(pair, tmp_path / "grown", 8)
    grown = recorded(pair, tmp_path / "grown", 12)
    assert (grown.fingerprint, grown.sequences) == (whole.fingerprint, 12)
    for name, value in whole.sums.state().items():
        assert torch.equal(grown.sums.state()[name], value)
    for name in ("tokens", "hidden-2", "teacher-ids"):
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_pass_with_fewer_sequences_than_recorded_is_refused(pair: Pair, tmp_path: Path) -> None:
    recorded(pair, tmp_path / "work", 8)
    with pytest.raises(
        InvalidRequest,
        match=f"tokens is {4 * SEQUENCE_TOKENS}, but the run directory already has {8 * SEQUENCE_TOKENS}",
    ):
        recorded(pair, tmp_path / "work", 4)


def test_pass_ends_with_its_data(pair: Pair, tmp_path: Path) -> None:
    whole = PassSettings("training", 100, SEQUENCE_TOKENS, CUTS, "x")
    found = record(pair, whole, tmp_path / "work", drawn_sequences(3), lambda done, total: None)
    assert found.sequences == 3


def test_checkpoint_of_other_settings_is_refused(pair: Pair, tmp_path: Path) -> None:
    recorded(pair, tmp_path / "work", 4)
    with pytest.raises(InvalidRequest, match=r"it has other settings; remove .*work to start over"):
        recorded(pair, tmp_path / "work", 4, settings="y")


def test_pass_fingerprint_depends_on_tokens_and_settings(pair: Pair, tmp_path: Path) -> None:
    runs = [recorded(pair, tmp_path / f"{n}{name}", n, settings=name) for n, name in ((4, "x"), (5, "x"), (4, "y"))]
    assert len({run.fingerprint for run in runs}) == 3


def test_read_checkpoint_returns_the_settings_of_a_pass(pair: Pair, tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "work") is None
    recorded(pair, tmp_path / "work", 2)
    checkpoint = read_checkpoint(tmp_path / "work")
    assert checkpoint is not None
    assert (checkpoint.cuts, checkpoint.sequence_tokens, checkpoint.settings, checkpoint.done) == (
        CUTS,
        SEQUENCE_TOKENS,
        "x",
        2,
    )


class DepthRecorder:
    """A model that records through how many layers each sequence ran."""

    def __init__(self, model: FrozenModel) -> None:
        self._model = model
        self.depths: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(self, hidden: torch.Tensor, first: int, end: int, adapters: None = None) -> torch.Tensor:
        self.depths += [end] * len(hidden)
        return self._model.run(hidden, first, end, adapters)


def test_incomplete_trace_is_refused_and_left_unchanged(pair: Pair, tmp_path: Path) -> None:
    recorded(pair, tmp_path / "work", 4)
    checkpoint, array = read_checkpoint(tmp_path / "work"), tmp_path / "work" / "hidden-2"
    assert checkpoint is not None
    array.write_bytes(array.read_bytes()[:-1])
    with pytest.raises(ValueError, match="greater than file size"):
        checkpoint.open_trace(tmp_path / "work", pair.bottom.hidden_size)
    array.unlink()
    with pytest.raises(FileNotFoundError):
        checkpoint.open_trace(tmp_path / "work", pair.bottom.hidden_size)
    assert not array.exists()


def test_cached_sequences_do_not_run_through_the_bottom_model(pair: Pair, tmp_path: Path) -> None:
    recorded(pair, tmp_path / "earlier", 5, cuts=(CutPoint(2, 1),))
    checkpoint = read_checkpoint(tmp_path / "earlier")
    assert checkpoint is not None
    cache = ActivationCache([checkpoint.open_trace(tmp_path / "earlier", pair.bottom.hidden_size)])
    bottom = DepthRecorder(pair.bottom)
    instrumented = Pair(cast(FrozenModel, bottom), pair.top, pair.vocabulary)
    whole = PassSettings("training", 8, SEQUENCE_TOKENS, (CutPoint(1, 1), CutPoint(2, 1)), "x")
    # Five cached sequences, after and between three that are not cached.
    order = [drawn_sequences(8)[number] for number in (5, 0, 1, 6, 7, 2, 3, 4)]
    cached = record(instrumented, whole, tmp_path / "cached", order, lambda done, total: None, cache)
    # For the depth that was not traced a cached sequence runs through one layer, a new one through all three.
    assert sorted(bottom.depths) == [1] * 8 + [2] * 3 + [3] * 3
    computed = record(pair, whole, tmp_path / "computed", order, lambda done, total: None)
    rows = torch.arange(len(order))
    assert torch.equal(cached.trace.tokens(rows), computed.trace.tokens(rows))
    for depth in (1, 2):
        one, other = (run.trace.hidden(depth, rows).float() for run in (cached, computed))
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-3)
    one, other = (run.trace.teacher(rows).logprobs for run in (cached, computed))
    torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)
    for name, value in computed.sums.state().items():
        torch.testing.assert_close(cached.sums.state()[name], value, rtol=1e-2, atol=1e-2 * float(value.abs().max()))


def live_tensor_bytes() -> int:
    """Returns the bytes of all tensors that Python still references."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor and found.layout is torch.strided]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.slow
def test_pass_memory_does_not_grow_with_its_tokens(pair: Pair, tmp_path: Path) -> None:
    measured: list[int] = []

    def sequences() -> Iterator[PackedSequence]:
        for number, sequence in enumerate(drawn_sequences(80)):
            if number % 8 == 0:
                measured.append(live_tensor_bytes())
            yield sequence

    whole = PassSettings("training", 80, SEQUENCE_TOKENS, CUTS, "x")
    record(pair, whole, tmp_path / "work", islice(sequences(), 80), lambda done, total: None)
    # The current batch is allocated or not; eight more sequences of hidden states would be 24 kB.
    assert max(measured[1:]) - min(measured[1:]) < 8_000
