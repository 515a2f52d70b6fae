"""One pass over a mixed batch gives every segment what it would have got alone, and what the models say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stitch.sampling import Sampling
from stitch_server.cache.flash import PAGE_TOKENS
from stitch_server.cache.pool import blocks_for
from stitch_server.cache.store import KVStore
from stitch_server.engine.batch import Batch, Cut, Segment, StepOutput, ordered
from stitch_server.engine.graphs import DecodeGraphs
from stitch_server.engine.runner import Runner
from stitch_server.engine.sequence import Sequence as Kept
from stitch_server.engine.threads import Threads
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.embedding import Embedding
from stitch_server.model.head import Head
from stitch_server.model.stitch import Stitch
from tests.support.stitched_reference import StitchedReference, reference
from tests.support.tape import Tape
from tests.support.tiny_model import TOKENS, TinyPair, write_random_stitch, write_tiny_pair
from tests.support.varlen import varlen

CPU, DTYPE = torch.device("cpu"), torch.float32
# Route to (bottom_layers, top_from).
ROUTES = {"weak": (3, 2), "strong": (5, 1)}
ADAPTER_RANKS = {"weak": 3, "strong": 0}
BLOCKS = 64
TOP_FIRST = 1


@dataclass(frozen=True)
class Halves:
    """Both shards of a pair, and what they must equal together."""

    bottom: Runner
    top: Runner
    references: dict[str, StitchedReference]


def new_runner(folder: Path, first: int, end: int, *, as_on_a_gpu: bool = False, **parts: object) -> Runner:
    decoder = DecoderLayers.load(folder, first, end, CPU, DTYPE)
    shape = decoder.kv_heads, decoder.head_dim, CPU, DTYPE
    if not as_on_a_gpu:
        return Runner(decoder, KVStore(first, end, BLOCKS, *shape), CPU, Threads(1, 1), **parts)  # type: ignore[arg-type]
    store = KVStore(first, end, BLOCKS + 1, *shape, PAGE_TOKENS, varlen)
    graphs = DecodeGraphs(decoder, store, varlen, 2, Tape())
    return Runner(decoder, store, CPU, Threads(1, 1), graphs=graphs, **parts)  # type: ignore[arg-type]


def load(pair: TinyPair, folder: Path, as_on_a_gpu: bool = False) -> Halves:
    files = {
        route: write_random_stitch(
            folder / f"{route}.safetensors", pair.bottom, pair.top, *cut, adapter_rank=ADAPTER_RANKS[route]
        )
        for route, cut in ROUTES.items()
    }
    stitches = {route: Stitch.load(file, CPU, DTYPE) for route, file in files.items()}
    bottom = new_runner(pair.bottom, 0, 5, as_on_a_gpu=as_on_a_gpu, embed=Embedding.load(pair.bottom, CPU, DTYPE))
    head = Head.load(pair.top, CPU, DTYPE, TOKENS)
    adapters = {route: stitch.adapters for route, stitch in stitches.items() if stitch.adapters is not None}
    parts = {"stage": "top_prefill", "stitches": stitches, "adapters": adapters, "head": head}
    top = new_runner(pair.top, TOP_FIRST, 4, as_on_a_gpu=as_on_a_gpu, **parts)
    references = {route: reference(pair.bottom, pair.top, files[route], *cut) for route, cut in ROUTES.items()}
    return Halves(bottom, top, references)


@pytest.fixture(scope="module", params=["llama", "qwen2", "llama as on a GPU"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Halves:
    family, *where = request.param.split(maxsplit=1)
    folder = tmp_path_factory.mktemp(family)
    return load(write_tiny_pair(folder, family), folder, as_on_a_gpu=bool(where))


@dataclass
class Chain:
    """Two runners one behind the other, with sequences whose blocks lie apart."""

    halves: Halves
    free: list[int] = field(default_factory=lambda: list(range(BLOCKS)))
    blocks: dict[int, list[int]] = field(default_factory=dict)

    def sequence(self, route: str, token_ids: Sequence[int], **sampling: object) -> Kept:
        kept = Kept(route, (), Sampling(**sampling), list(token_ids), len(token_ids))  # type: ignore[arg-type]
        # Every second block, from the end.
        self.blocks[kept.number] = [self.free.pop(-1 - index % 2) for index in range(8)]
        return kept

    def segment(self, kept: Kept, length: int | None = None, wants_token: bool = True) -> Segment:
        """The next tokens of a sequence: all that are left, or `length`."""
        position = kept.cached
        length = len(kept.token_ids) - position if length is None else length
        kept.cached += length
        blocks = self.blocks[kept.number][: blocks_for(kept.cached)]
        return Segment(kept, Cut(0, ROUTES[kept.route][0]), position, length, wants_token, blocks)

    def bottom(self, *segments: Segment, pipelined: bool = False) -> tuple[Batch, StepOutput]:
        batch = Batch(ordered(segments), pipelined)
        return batch, self.halves.bottom.run(batch)

    def top(self, batch: Batch, hidden: Sequence[Tensor]) -> tuple[Batch, StepOutput]:
        """The same segments on the next shard."""
        received = [
            Segment(
                one.sequence,
                Cut(ROUTES[one.sequence.route][1], 4),
                one.position,
                one.length,
                one.wants_token,
                one.blocks,
                hidden=rows,
            )
            for one, rows in zip(batch.segments, hidden, strict=True)
        ]
        arrived = Batch(ordered(received))
        return arrived, self.halves.top.run(arrived)

    def run(self, *segments: Segment) -> dict[int, int]:
        """Sampled ids by the number of their sequence."""
        batch, output = self.bottom(*segments)
        arrived, answer = self.top(batch, output.hidden)
        return {arrived.segments[index].sequence.number: token.id for index, token in answer.tokens.items()}

    def expected(self, kept: Kept) -> int:
        """What `transformers` says comes next."""
        return int(self.halves.references[kept.route].logits(kept.token_ids)[-1, :TOKENS].argmax())


@pytest.fixture
def chain(loaded: Halves) -> Chain:
    return Chain(loaded)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 300, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("route", ROUTES)
def test_a_prompt_is_answered_as_the_models_do(chain: Chain, route: str) -> None:
    kept = chain.sequence(route, prompt(21))
    assert chain.run(chain.segment(kept)) == {kept.number: chain.expected(kept)}


@pytest.mark.parametrize("chunk", [1, 7, 16, 20])
def test_chunks_change_nothing(chain: Chain, chunk: int) -> None:
    kept = chain.sequence("weak", prompt(40))
    while len(kept.token_ids) - kept.cached > chunk:
        assert chain.run(chain.segment(kept, chunk, wants_token=False)) == {}
    assert chain.run(chain.segment(kept)) == {kept.number: chain.expected(kept)}


def test_routes_of_all_depths_share_every_batch(chain: Chain) -> None:
    weak, strong = chain.sequence("weak", prompt(18, 1)), chain.sequence("strong", prompt(9, 2))
    chain.run(chain.segment(weak, 10, wants_token=False))
    for _ in range(4):
        answers = chain.run(chain.segment(weak), chain.segment(strong))
        for kept in (weak, strong):
            assert answers[kept.number] == chain.expected(kept)
            kept.token_ids.append(answers[kept.number])


def test_two_chunks_of_one_sequence_in_one_batch(chain: Chain) -> None:
    kept, other = chain.sequence("weak", prompt(30)), chain.sequence("strong", prompt(5, 1))
    segments = [chain.segment(kept, 12, wants_token=False), chain.segment(other), chain.segment(kept)]
    answers = chain.run(*segments)
    assert answers == {kept.number: chain.expected(kept), other.number: chain.expected(other)}


def test_who_leaves_early_leaves_with_what_its_layers_made(chain: Chain) -> None:
    weak, strong = chain.sequence("weak", prompt(6, 1)), chain.sequence("strong", prompt(7, 2))
    batch, output = chain.bottom(chain.segment(weak), chain.segment(strong))
    assert [one.sequence.route for one in batch.segments] == ["strong", "weak"]
    assert [rows.shape for rows in output.hidden] == [(7, 48), (6, 48)]
    for one, rows in zip(batch.segments, output.hidden, strict=True):
        alone = chain.sequence(one.sequence.route, one.sequence.token_ids)
        _, expected = chain.bottom(chain.segment(alone))
        torch.testing.assert_close(rows, expected.hidden[0], rtol=1e-4, atol=1e-4)


def test_only_those_that_want_a_token_get_one(chain: Chain) -> None:
    silent, asking = chain.sequence("weak", prompt(6, 1)), chain.sequence("weak", prompt(7, 2))
    answers = chain.run(chain.segment(silent, wants_token=False), chain.segment(asking))
    assert answers.keys() == {asking.number}


def test_a_token_says_its_position_and_its_logprobs(chain: Chain) -> None:
    kept = chain.sequence("strong", prompt(6), logprobs=2)
    batch, output = chain.bottom(chain.segment(kept))
    _, answer = chain.top(batch, output.hidden)
    token = answer.tokens[0]
    expected = chain.halves.references["strong"].logits(kept.token_ids)[-1, :TOKENS].log_softmax(0)
    assert (token.id, token.position) == (int(expected.argmax()), 6)
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(float(expected.max()), abs=1e-3)
    assert [one for one, _ in token.logprobs.alternatives] == expected.topk(2).indices.tolist()


def test_penalties_see_the_whole_sequence(chain: Chain) -> None:
    kept = chain.sequence("weak", prompt(6))
    favourite = chain.expected(kept)
    shy = chain.sequence("weak", [*prompt(5), favourite], repetition_penalty=10.0)
    logits = chain.halves.references["weak"].logits(shy.token_ids)[-1].clone()
    seen = torch.tensor(shy.token_ids)
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 10, logits[seen] * 10)
    assert chain.run(chain.segment(shy)) == {shy.number: int(logits.argmax())}


class TestAsOnAGpu:
    """Steps of single tokens through captured passes, one for each stretch of layers that all of their rows pass."""

    @pytest.fixture(scope="class")
    @classmethod
    def captured(cls, tmp_path_factory: pytest.TempPathFactory) -> Halves:
        folder = tmp_path_factory.mktemp("captured")
        return load(write_tiny_pair(folder, "llama"), folder, as_on_a_gpu=True)

    @pytest.fixture
    def chain(self, captured: Halves) -> Chain:
        return Chain(captured)

    @staticmethod
    def replays(runner: Runner) -> int:
        graphs: Any = runner.graphs
        return int(graphs._capture.replayed)

    def decode(self, chain: Chain, *routes: str, steps: int = 3) -> tuple[int, int]:
        """Replays on the bottom and on the top for a step, of sessions that all say what the models say."""
        kept = [chain.sequence(route, prompt(5 + seed, seed)) for seed, route in enumerate(routes)]
        halves = chain.halves.bottom, chain.halves.top
        for step in range(steps + 1):
            if step == 1:
                before = [self.replays(half) for half in halves]
            answers = chain.run(*(chain.segment(one) for one in kept))
            for one in kept:
                assert answers[one.number] == chain.expected(one)
                one.token_ids.append(answers[one.number])
        bottom, top = (self.replays(half) - count for half, count in zip(halves, before, strict=True))
        return bottom // steps, top // steps

    def test_one_route_is_one_stretch(self, chain: Chain) -> None:
        assert self.decode(chain, "weak") == (1, 1)
        assert self.decode(chain, "strong", "strong", "strong") == (1, 1)

    def test_each_stretch_of_mixed_routes_is_replayed(self, chain: Chain) -> None:
        """Where some of its rows pass adapters and others don't, a stretch is computed as if nothing were captured."""
        assert self.decode(chain, "weak", "strong") == (2, 1)
        assert self.decode(chain, "strong", "weak", "weak") == (2, 1)

    def test_prompts_are_not_captured(self, chain: Chain) -> None:
        halves = chain.halves.bottom, chain.halves.top
        before = [self.replays(half) for half in halves]
        decoding = chain.sequence("strong", prompt(1, 3))
        chain.run(chain.segment(decoding), chain.segment(chain.sequence("strong", prompt(9))))
        assert [self.replays(half) for half in halves] == before

    @pytest.mark.parametrize(("tokens", "waits"), [(5, [1, 1]), (1, [1, 0])])
    def test_stages_of_prompts_end_when_they_are_computed(
        self, chain: Chain, monkeypatch: pytest.MonkeyPatch, tokens: int, waits: list[int]
    ) -> None:
        """Single tokens are waited for where they are sent on, and else with what is sampled."""
        waited: list[Runner] = []
        for half in (chain.halves.bottom, chain.halves.top):
            monkeypatch.setattr(half, "wait", partial(waited.append, half))
        kept = chain.sequence("weak", prompt(tokens))
        chain.run(chain.segment(kept))
        assert [waited.count(half) for half in (chain.halves.bottom, chain.halves.top)] == waits


class TestSpoilt:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_it_is_found_and_spoils_no_other(self, chain: Chain, value: float) -> None:
        kept = [chain.sequence(route, prompt(5, seed)) for seed, route in enumerate(("weak", "strong", "weak"))]
        batch, output = chain.bottom(*(chain.segment(one) for one in kept))
        hidden = [rows.clone() for rows in output.hidden]
        victim = batch.segments[1].sequence
        hidden[1][2, 3] = value
        arrived, answer = chain.top(batch, hidden)
        assert {arrived.segments[index].sequence.number for index in answer.spoilt} == {victim.number}
        for index, token in answer.tokens.items():
            assert token.id == chain.expected(self.of(arrived, index))
        assert len(answer.tokens) == 2

    @staticmethod
    def of(batch: Batch, index: int) -> Kept:
        return batch.segments[index].sequence

    def test_a_batch_may_be_spoilt_as_a_whole(self, chain: Chain) -> None:
        batch, output = chain.bottom(chain.segment(chain.sequence("weak", prompt(5))))
        _, answer = chain.top(batch, [rows * float("nan") for rows in output.hidden])
        assert (answer.spoilt, answer.tokens) == (frozenset({0}), {})

    def test_its_blocks_may_be_used_again(self, chain: Chain) -> None:
        kept = chain.sequence("weak", prompt(5))
        batch, output = chain.bottom(chain.segment(kept))
        chain.top(batch, [rows * float("nan") for rows in output.hidden])
        kept.cached = 0
        assert chain.run(chain.segment(kept)) == {kept.number: chain.expected(kept)}


class TestBookkeeping:
    def test_every_shard_names_its_stages(self, chain: Chain) -> None:
        batch, output = chain.bottom(chain.segment(chain.sequence("weak", prompt(5))))
        _, answer = chain.top(batch, output.hidden)
        assert output.stages.keys() == {"bottom_prefill"}
        assert answer.stages.keys() == {"top_prefill", "stitch", "sample"}
        assert all(seconds >= 0 for seconds in [*output.stages.values(), *answer.stages.values()])
        assert answer.hidden == ()

    def test_without_a_token_nothing_is_sampled(self, chain: Chain) -> None:
        batch, output = chain.bottom(chain.segment(chain.sequence("weak", prompt(5)), wants_token=False))
        _, answer = chain.top(batch, output.hidden)
        assert (answer.tokens, "sample" in answer.stages) == ({}, False)

    def test_time_spent_is_summed_up(self, chain: Chain) -> None:
        before = chain.halves.bottom.busy_seconds
        chain.bottom(chain.segment(chain.sequence("weak", prompt(5))))
        assert chain.halves.bottom.busy_seconds > before

    def test_a_neighbour_gets_its_share_of_the_threads(self, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = [torch.get_num_threads()]
        monkeypatch.setattr(torch, "get_num_threads", lambda: wanted[-1])
        monkeypatch.setattr(torch, "set_num_threads", wanted.append)
        monkeypatch.setattr(chain.halves.bottom, "threads", Threads(alone=7, pipelined=5))
        kept = chain.sequence("weak", prompt(20))
        for pipelined in (False, True, False):
            chain.bottom(chain.segment(kept, 5), pipelined=pipelined)
        # The third is the trial of one thread.
        assert wanted[1:] == [7, 5, 1]

    @pytest.mark.parametrize(("layers_beside", "wanted"), [(0, [5, 7]), (2, [5, 7]), (9, [5])])
    def test_the_cores_of_an_idle_neighbour_are_taken(
        self, chain: Chain, monkeypatch: pytest.MonkeyPatch, layers_beside: int, wanted: list[int]
    ) -> None:
        told = [torch.get_num_threads()]
        monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
        monkeypatch.setattr(torch, "set_num_threads", told.append)
        monkeypatch.setattr(chain.halves.bottom, "threads", Threads(alone=7, pipelined=5))
        asked: list[int] = []

        def idle() -> bool:
            asked.append(told[-1])
            return len(asked) > layers_beside

        kept = [chain.sequence("weak", prompt(20, 1)), chain.sequence("strong", prompt(9, 2))]
        batch = Batch(ordered([chain.segment(one) for one in kept]), pipelined=True, neighbour_idle=idle)
        output = chain.halves.bottom.run(batch)
        # Before each of five layers until there is an answer.
        assert (told[1:], len(asked)) == (wanted, min(layers_beside + 1, 5))
        arrived, answer = chain.top(batch, output.hidden)
        answers = {arrived.segments[index].sequence.number: token.id for index, token in answer.tokens.items()}
        assert answers == {one.number: chain.expected(one) for one in kept}

    def test_rows_that_never_came_are_named(self, chain: Chain) -> None:
        kept = chain.sequence("weak", prompt(5))
        with pytest.raises(ValueError, match="without hidden states"):
            chain.halves.top.run(Batch((chain.segment(kept),)))
