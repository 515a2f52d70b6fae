"""A pass over the data: what it sums and leaves on disk, interrupted or not, and what it holds in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from stitch.errors import InvalidRequest
from stitch_training import activations as collecting
from stitch_training.activation_cache import Known
from stitch_training.activations import Collected, Pass, begun_in, collect
from stitch_training.frozen_models import FrozenModel, Pair, states_at
from stitch_training.packing import PackedSequence
from stitch_training.sums import Cut
from tests.support.tiny_fit import SEQUENCE_TOKENS, drawn_sequences, tiny_pair

CUTS: tuple[Cut, ...] = ((1, 1), (2, 1), (2, 0))


class Interrupted(Exception):
    """Stands for a signal in the middle of a pass."""


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair(tmp_path)


def collected(
    pair: Pair, folder: Path, count: int, stop_after: int = -1, settings: str = "x", cuts: tuple[Cut, ...] = CUTS
) -> Collected:
    def progress(done: int, of: int) -> None:
        if done == stop_after:
            raise Interrupted

    whole = Pass("training", count, SEQUENCE_TOKENS, cuts, settings)
    return collect(pair, whole, folder, drawn_sequences(count), progress)


def test_sums_are_over_all_tokens_but_the_first(pair: Pair, tmp_path: Path) -> None:
    sums = collected(pair, tmp_path / "work", 6).sums
    tokens = torch.tensor([sequence.token_ids for sequence in drawn_sequences(6)])
    with torch.no_grad():
        bottom, top = states_at(pair.bottom, tokens, [1, 2]), states_at(pair.top, tokens, [0, 1])
    x, y = bottom[2][:, 1:].flatten(0, 1).double(), top[1][:, 1:].flatten(0, 1).double()
    assert float(sums.grams[2].count) == 6 * (SEQUENCE_TOKENS - 1)
    torch.testing.assert_close(sums.grams[2].products, x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.crosses[2, 1].products, y.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.first_bottom[1].mean(), bottom[1][:, 0].double().mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.first_top[0].mean(), top[0][:, 0].double().mean(0), rtol=1e-5, atol=1e-5)


def test_the_trace_gives_back_what_passed(pair: Pair, tmp_path: Path) -> None:
    trace = collected(pair, tmp_path / "work", 5).trace
    rows = torch.tensor([4, 0])
    tokens = torch.tensor([drawn_sequences(5)[row].token_ids for row in rows])
    with torch.no_grad():
        states = states_at(pair.bottom, tokens, [1, 2, pair.bottom.depth])
        logprobs = pair.bottom.logits(states[pair.bottom.depth].flatten(0, 1)).log_softmax(1)
    assert torch.equal(trace.tokens(rows), tokens)
    assert trace.files(rows).tolist() == [0, 0]
    # bfloat16 keeps eight bits of a value.
    torch.testing.assert_close(trace.hidden(2, rows).float(), states[2], rtol=2**-7, atol=1e-3)
    teacher = trace.teacher(rows)
    expected = logprobs.gather(1, teacher.ids.flatten(0, 1))
    torch.testing.assert_close(teacher.logprobs.flatten(0, 1), expected, rtol=2e-3, atol=2e-3)


def test_one_model_twice_runs_once(pair: Pair, tmp_path: Path) -> None:
    same = Pair(pair.top, pair.top, pair.vocabulary)
    sums = collected(same, tmp_path / "work", 4, cuts=((1, 1),)).sums
    torch.testing.assert_close(sums.crosses[1, 1].products, sums.grams[1].products)


@pytest.mark.parametrize("stop_after", [4, 8, 16])
def test_interrupted_and_resumed_is_the_same(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr(collecting, "CHECKPOINT_BATCHES", 2)
    whole = collected(pair, tmp_path / "whole", 18)
    with pytest.raises(Interrupted):
        collected(pair, tmp_path / "parts", 18, stop_after=stop_after)
    resumed = collected(pair, tmp_path / "parts", 18)
    assert (resumed.fingerprint, resumed.sequences) == (whole.fingerprint, 18)
    for name, value in whole.sums.state().items():
        assert torch.equal(resumed.sums.state()[name], value)
    for name in ("tokens", "hidden-1", "teacher-ids", "teacher-logp"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_pass_is_not_run_again(pair: Pair, tmp_path: Path) -> None:
    collected(pair, tmp_path / "work", 4)
    assert collected(pair, tmp_path / "work", 4, stop_after=4).sequences == 4


def test_a_finished_pass_goes_on_for_more_sequences(pair: Pair, tmp_path: Path) -> None:
    whole = collected(pair, tmp_path / "whole", 12)
    collected(pair, tmp_path / "grown", 8)
    grown = collected(pair, tmp_path / "grown", 12)
    assert (grown.fingerprint, grown.sequences) == (whole.fingerprint, 12)
    for name, value in whole.sums.state().items():
        assert torch.equal(grown.sums.state()[name], value)
    for name in ("tokens", "hidden-2", "teacher-ids"):
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_pass_cannot_become_shorter(pair: Pair, tmp_path: Path) -> None:
    collected(pair, tmp_path / "work", 8)
    with pytest.raises(InvalidRequest, match=f"tokens is {4 * SEQUENCE_TOKENS}, but work has {8 * SEQUENCE_TOKENS}"):
        collected(pair, tmp_path / "work", 4)


def test_data_that_end_early_make_a_shorter_pass(pair: Pair, tmp_path: Path) -> None:
    whole = Pass("training", 100, SEQUENCE_TOKENS, CUTS, "x")
    found = collect(pair, whole, tmp_path / "work", drawn_sequences(3), lambda done, of: None)
    assert found.sequences == 3


def test_other_settings_are_refused(pair: Pair, tmp_path: Path) -> None:
    collected(pair, tmp_path / "work", 4)
    with pytest.raises(InvalidRequest, match=r"begun with other settings; remove .*work to begin anew"):
        collected(pair, tmp_path / "work", 4, settings="y")


def test_the_fingerprint_is_of_tokens_and_settings(pair: Pair, tmp_path: Path) -> None:
    runs = [collected(pair, tmp_path / f"{n}{name}", n, settings=name) for n, name in ((4, "x"), (5, "x"), (4, "y"))]
    assert len({run.fingerprint for run in runs}) == 3


def test_a_folder_tells_what_was_begun_in_it(pair: Pair, tmp_path: Path) -> None:
    assert begun_in(tmp_path / "work") is None
    collected(pair, tmp_path / "work", 2)
    begun = begun_in(tmp_path / "work")
    assert begun is not None
    assert (begun.cuts, begun.sequence_tokens, begun.settings, begun.done) == (CUTS, SEQUENCE_TOKENS, "x", 2)


class Reaching:
    """A model that notes how deep each sequence went."""

    def __init__(self, model: FrozenModel) -> None:
        self._model = model
        self.depths: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(self, hidden: torch.Tensor, first: int, end: int, adapters: None = None) -> torch.Tensor:
        self.depths += [end] * len(hidden)
        return self._model.run(hidden, first, end, adapters)


def test_a_trace_that_is_not_whole_is_not_filled_up(pair: Pair, tmp_path: Path) -> None:
    collected(pair, tmp_path / "work", 4)
    begun, array = begun_in(tmp_path / "work"), tmp_path / "work" / "hidden-2"
    assert begun is not None
    array.write_bytes(array.read_bytes()[:-1])
    with pytest.raises(ValueError, match="greater than file size"):
        begun.trace(tmp_path / "work", pair.bottom.hidden_size)
    array.unlink()
    with pytest.raises(FileNotFoundError):
        begun.trace(tmp_path / "work", pair.bottom.hidden_size)
    assert not array.exists()


def test_what_is_known_does_not_pass_the_bottom_model_again(pair: Pair, tmp_path: Path) -> None:
    collected(pair, tmp_path / "earlier", 5, cuts=((2, 1),))
    begun = begun_in(tmp_path / "earlier")
    assert begun is not None
    known = Known([begun.trace(tmp_path / "earlier", pair.bottom.hidden_size)])
    bottom = Reaching(pair.bottom)
    watched = Pair(cast(FrozenModel, bottom), pair.top, pair.vocabulary)
    whole = Pass("training", 8, SEQUENCE_TOKENS, ((1, 1), (2, 1)), "x")
    # Five that are known, behind and between three that are not.
    order = [drawn_sequences(8)[number] for number in (5, 0, 1, 6, 7, 2, 3, 4)]
    given = collect(watched, whole, tmp_path / "given", order, lambda done, of: None, known)
    # For the depth that was not traced a known one goes through one layer, a new one through all three.
    assert sorted(bottom.depths) == [1] * 8 + [2] * 3 + [3] * 3
    computed = collect(pair, whole, tmp_path / "computed", order, lambda done, of: None)
    rows = torch.arange(len(order))
    assert torch.equal(given.trace.tokens(rows), computed.trace.tokens(rows))
    for depth in (1, 2):
        one, other = (run.trace.hidden(depth, rows).float() for run in (given, computed))
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-3)
    one, other = (run.trace.teacher(rows).logprobs for run in (given, computed))
    torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)
    for name, value in computed.sums.state().items():
        torch.testing.assert_close(given.sums.state()[name], value, rtol=1e-2, atol=1e-2 * float(value.abs().max()))


def living_tensor_bytes() -> int:
    """What all tensors that Python still reaches hold."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor and found.layout is torch.strided]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_memory_does_not_grow_with_the_number_of_tokens(pair: Pair, tmp_path: Path) -> None:
    held: list[int] = []

    def sequences() -> Iterator[PackedSequence]:
        for number, sequence in enumerate(drawn_sequences(80)):
            if number % 8 == 0:
                held.append(living_tensor_bytes())
            yield sequence

    whole = Pass("training", 80, SEQUENCE_TOKENS, CUTS, "x")
    collect(pair, whole, tmp_path / "work", islice(sequences(), 80), lambda done, of: None)
    # The batch in work is there or not; eight more sequences of hidden states would be 24 kB.
    assert max(held[1:]) - min(held[1:]) < 8_000
