"""What a runner notes beside its results, what it takes from a neighbour, and what it does as on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from stitch_server.engine.types import Batch
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import ParallelismTuner
from tests.support.runner_chain import Chain, Halves, load, prompt, rows_of
from tests.support.tiny_model import write_tiny_pair


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
    def replays(runner: ModelRunner) -> int:
        graphs: Any = runner.graphs
        return int(graphs._capture.replayed)

    def decode(self, chain: Chain, *routes: str, steps: int = 3) -> tuple[int, int]:
        """Replays on the bottom and on the top for a step, of sessions that all say what the models say."""
        kept = [chain.session(route, prompt(5 + seed, seed)) for seed, route in enumerate(routes)]
        halves = chain.halves.bottom, chain.halves.top
        for step in range(steps + 1):
            if step == 1:
                before = [self.replays(half) for half in halves]
            answers = chain.run(*(chain.segment(one) for one in kept))
            for one in kept:
                assert answers[one.id] == chain.expected(one)
                one.token_ids.append(answers[one.id])
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
        decoding = chain.session("strong", prompt(1, 3))
        chain.run(chain.segment(decoding), chain.segment(chain.session("strong", prompt(9))))
        assert [self.replays(half) for half in halves] == before

    @pytest.mark.parametrize(("tokens", "waits"), [(5, [1, 1]), (1, [1, 0])])
    def test_stages_of_prompts_end_when_they_are_computed(
        self, chain: Chain, monkeypatch: pytest.MonkeyPatch, tokens: int, waits: list[int]
    ) -> None:
        """Single tokens are waited for where they are sent on, and else with what is sampled."""
        waited: list[ModelRunner] = []
        for half in (chain.halves.bottom, chain.halves.top):
            monkeypatch.setattr(half, "wait", partial(waited.append, half))
        kept = chain.session("weak", prompt(tokens))
        chain.run(chain.segment(kept))
        assert [waited.count(half) for half in (chain.halves.bottom, chain.halves.top)] == waits


class TestBookkeeping:
    def test_every_shard_names_its_stages(self, chain: Chain) -> None:
        batch, output = chain.bottom(chain.segment(chain.session("weak", prompt(5))))
        _, answer = chain.top(batch, rows_of(batch, output))
        assert output.stages.keys() == {"bottom_prefill"}
        assert answer.stages.keys() == {"top_prefill", "stitch", "sample"}
        assert all(seconds >= 0 for seconds in [*output.stages.values(), *answer.stages.values()])
        assert answer.hidden is None

    def test_without_a_token_nothing_is_sampled(self, chain: Chain) -> None:
        batch, output = chain.bottom(chain.segment(chain.session("weak", prompt(5)), wants_token=False))
        _, answer = chain.top(batch, rows_of(batch, output))
        assert (answer.tokens, "sample" in answer.stages) == ({}, False)

    def test_time_spent_is_summed_up(self, chain: Chain) -> None:
        before = chain.halves.bottom.busy_seconds
        chain.bottom(chain.segment(chain.session("weak", prompt(5))))
        assert chain.halves.bottom.busy_seconds > before

    def test_a_neighbour_gets_its_share_of_the_threads(self, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = [torch.get_num_threads()]
        monkeypatch.setattr(torch, "get_num_threads", lambda: wanted[-1])
        monkeypatch.setattr(torch, "set_num_threads", wanted.append)
        monkeypatch.setattr(chain.halves.bottom, "threads", ParallelismTuner(alone=7, pipelined=5))
        kept = chain.session("weak", prompt(20))
        for pipelined in (False, True, False):
            chain.bottom(chain.segment(kept, 5), pipelined=pipelined)
        # The third is the trial of one thread.
        assert wanted[1:] == [7, 5, 1]

    def test_rows_that_never_came_are_named(self, chain: Chain) -> None:
        kept = chain.session("weak", prompt(5))
        with pytest.raises(ValueError, match="without hidden states"):
            chain.halves.top.run(Batch((chain.segment(kept),)))
