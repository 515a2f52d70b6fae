"""A conversation that moves to another route gives that route's tokens, and computes no layer below its cut again."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from stitch.cluster import load_cluster
from stitch_server.engine.types import Segment
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.hidden_states import HiddenStateCache
from stitch_server.worker.model_runner import ModelRunner
from tests.support.in_process import ChainInProcess
from tests.support.stitched_reference import reference
from tests.support.tiny_cluster import CUTS, ENDS, WHOLE_BOTTOM, WHOLE_TOP, write_tiny_cluster
from tests.support.tiny_model import TOKENS
from tests.support.whole_model import generated

PROMPT_TOKENS, ANSWER_TOKENS, QUESTION_TOKENS = 70, 21, 9
HIDDEN_BYTES = 48 * 4
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    # Computed by the layers of `transformers`.
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.3},
}
# Bottom shards. The cut of `weak` is in the middle of one, at the end of one, and on the second one.
LAYOUTS: dict[str, list[tuple[int, int]]] = {
    "one": [WHOLE_BOTTOM],
    "cut at the end of the first": [(0, 3), (3, 5)],
    "cut within the second": [(0, 2), (2, 5)],
}
Greedy = Callable[[str, Sequence[int], int], list[int]]


def drawn(seed: int, tokens: int) -> list[int]:
    """Random token ids."""
    return random.Random(seed).choices(range(3, TOKENS), k=tokens)


def chain_of(folder: Path, family: str = "llama", layout: str = "one", **compute: Any) -> ChainInProcess:
    """All shards of a pair with all routes."""
    compute = {"max_prefill_chunk": 16, **compute}
    file = write_tiny_cluster(
        folder, family, bottoms=LAYOUTS[layout], tops=[WHOLE_TOP], model=FAMILIES[family], with_ends=True, **compute
    )
    return ChainInProcess(load_cluster(str(file)))


def names(chain: ChainInProcess, route: str) -> tuple[str, ...]:
    """The shards of a route."""
    return tuple(stage[0].name for stage in chain.cluster.stages(chain.cluster.route(route)))


def generate(
    chain: ChainInProcess, token_ids: Sequence[int], route: str, count: int = ANSWER_TOKENS, **fields: Any
) -> list[int]:
    """`count` greedy tokens."""
    outputs = chain.admit(token_ids, route, names(chain, route), count, **fields)
    chain.run(outputs)
    return [output.token.id for output in outputs if output.token is not None]


def next_turn(token_ids: Sequence[int], answer: Sequence[int], seed: int = 7) -> list[int]:
    """The conversation with the answer and another question."""
    return [*token_ids, *answer, *drawn(seed, QUESTION_TOKENS)]


def resumed(chain: ChainInProcess, shard: str = "bottom-0") -> int:
    """Tokens of which the shard has not computed lower layers again."""
    value = chain.shards[shard].metrics.registry.get_sample_value(
        "stitch_prefix_tokens_resumed_total", {"shard": shard}
    )
    assert value is not None
    return int(value)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int, int]]:
    """How often each layer of the bottom was computed for each position, by `("bottom", layer, position)`."""
    counts: Counter[tuple[str, int, int]] = Counter()
    run = ModelRunner._run_layer_range

    def counted(
        self: ModelRunner, inputs: Any, segments: Sequence[Segment], hidden: Tensor, first: int, end: int
    ) -> Tensor:
        for one in segments:
            for layer in range(first, end):
                for position in range(one.position, one.position + one.length):
                    counts[self.stage.removesuffix("_prefill"), layer, position] += 1
        return run(self, inputs, segments, hidden, first, end)

    monkeypatch.setattr(ModelRunner, "_run_layer_range", counted)
    return counts


@pytest.fixture(scope="module")
def greedy_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Greedy]]:
    """By family, the tokens that `transformers` gives for a route."""

    @functools.cache
    def load(family: str) -> Greedy:
        folder = tmp_path_factory.mktemp(family)
        write_tiny_cluster(folder, family, model=FAMILIES[family])
        whole = AutoModelForCausalLM.from_pretrained(folder / "bottom", dtype="float32")
        files = {"weak": folder / "stitch.safetensors", "strong": folder / "strong.safetensors"}
        stitched = {route: reference(folder / "bottom", folder / "top", files[route], *CUTS[route]) for route in CUTS}

        def greedy(route: str, token_ids: Sequence[int], count: int) -> list[int]:
            if route == "whole":
                return generated(whole, token_ids, count, tokens=TOKENS)
            return stitched[route].generate(token_ids, count)

        return greedy

    yield load
    load.cache_clear()


@pytest.mark.parametrize(
    ("family", "layout"), [*(("llama", one) for one in LAYOUTS), *((one, "one") for one in FAMILIES if one != "llama")]
)
def test_conversation_gives_each_route_s_own_tokens(
    family: str, layout: str, tmp_path: Path, greedy_of: Callable[[str], Greedy]
) -> None:
    chain, greedy, token_ids = chain_of(tmp_path, family, layout), greedy_of(family), drawn(1, PROMPT_TOKENS)
    for turn, route in enumerate(("weak", "strong", "whole", "weak", "strong")):
        answer = generate(chain, token_ids, route)
        assert answer == greedy(route, token_ids, ANSWER_TOKENS), f"turn {turn}"
        token_ids = next_turn(token_ids, answer, turn)
    assert resumed(chain) > 3 * PROMPT_TOKENS
    assert chain.idle


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("route", ["strong", "whole"])
def test_nothing_below_the_cut_is_computed_twice(
    layout: str, route: str, tmp_path: Path, computed: Counter[tuple[str, int, int]]
) -> None:
    chain, prompt = chain_of(tmp_path, layout=layout), drawn(1, PROMPT_TOKENS)
    answer = generate(chain, prompt, "weak")
    # The last token of an answer has not been computed; a shard in the middle knows the tokens of prompts alone.
    first = LAYOUTS[layout][0][1]
    whole = {
        layer: (PROMPT_TOKENS + (ANSWER_TOKENS - 1 if layer < first else 0)) // BLOCK_TOKENS * BLOCK_TOKENS
        for layer in range(CUTS["weak"][0])
    }
    assert whole[0] > PROMPT_TOKENS
    generate(chain, next_turn(prompt, answer), route, 2)
    counts = {layer: [computed["bottom", layer, at] for at in range(end)] for layer, end in whole.items()}
    assert counts == {layer: [1] * end for layer, end in whole.items()}
    # Those above were not computed for the cheaper route.
    costlier = range(CUTS["weak"][0], CUTS["strong"][0])
    assert {computed["bottom", layer, at] for layer in costlier for at in range(PROMPT_TOKENS)} == {1}


def test_all_is_computed_twice_where_no_states_are_kept(
    tmp_path: Path, computed: Counter[tuple[str, int, int]]
) -> None:
    chain, prompt = chain_of(tmp_path, state_cache_bytes=0), drawn(1, PROMPT_TOKENS)
    generate(chain, next_turn(prompt, generate(chain, prompt, "weak")), "strong", 2)
    assert {computed["bottom", 0, at] for at in range(PROMPT_TOKENS)} == {2}
    assert resumed(chain) == 0


def test_next_turn_on_one_route_computes_no_answer_again(
    tmp_path: Path, computed: Counter[tuple[str, int, int]], greedy_of: Callable[[str], Greedy]
) -> None:
    chain, prompt = chain_of(tmp_path), drawn(2, PROMPT_TOKENS)
    answer = generate(chain, prompt, "weak")
    token_ids = next_turn(prompt, answer)
    assert generate(chain, token_ids, "weak") == greedy_of("llama")("weak", token_ids, ANSWER_TOKENS)
    known = (PROMPT_TOKENS + ANSWER_TOKENS - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert {computed["bottom", 0, at] for at in range(known)} == {1}


def test_other_tenant_finds_no_states(tmp_path: Path, greedy_of: Callable[[str], Greedy]) -> None:
    chain, prompt = chain_of(tmp_path), drawn(3, PROMPT_TOKENS)
    token_ids = next_turn(prompt, generate(chain, prompt, "weak", tenant="acme"))
    expected = greedy_of("llama")("strong", token_ids, ANSWER_TOKENS)
    for tenant, tokens in (("other", 0), ("", 0), ("acme", (PROMPT_TOKENS + ANSWER_TOKENS - 1) // 16 * 16)):
        before = resumed(chain)
        assert generate(chain, token_ids, "strong", tenant=tenant) == expected
        assert resumed(chain) - before == tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sessions_of_all_routes_in_one_batch(layout: str, tmp_path: Path, greedy_of: Callable[[str], Greedy]) -> None:
    chain, greedy = chain_of(tmp_path, layout=layout, max_prefill_chunk=24), greedy_of("llama")
    prompts = [drawn(10 + number, PROMPT_TOKENS - 7 * number) for number in range(3)]
    conversations = [next_turn(one, generate(chain, one, route)) for one in prompts for route in ("weak", "strong")]
    requests = [
        (route, token_ids) for token_ids in (*conversations, drawn(20, 33)) for route in ("weak", "strong", "whole")
    ]
    outputs = [chain.admit(one, route, names(chain, route), ANSWER_TOKENS) for route, one in requests]
    chain.run(*outputs)
    for (route, token_ids), given in zip(requests, outputs, strict=True):
        tokens = [output.token.id for output in given if output.token is not None]
        assert tokens == greedy(route, token_ids, ANSWER_TOKENS), route
    assert {"weak", "strong", "whole"} in chain.passes["bottom-0"]
    assert chain.idle


@pytest.mark.parametrize("route", ["strong", "whole"])
def test_replay_of_an_escalated_answer_goes_on_with_the_same_tokens(
    route: str, tmp_path: Path, computed: Counter[tuple[str, int, int]]
) -> None:
    chain, prompt = chain_of(tmp_path), drawn(4, PROMPT_TOKENS)
    token_ids = next_turn(prompt, generate(chain, prompt, "weak"))
    sampling: dict[str, Any] = {"temperature": 0.8, "seed": 5}
    answer = generate(chain, token_ids, route, **sampling)
    computed.clear()
    fields = {"prompt_tokens": len(token_ids), "count": ANSWER_TOKENS, **sampling}
    again = generate(chain, [*token_ids, *answer[:9]], route, **fields)
    assert again == answer[9:]
    cut = CUTS["weak"][0]
    assert not any(computed["bottom", layer, at] for layer in range(cut) for at in range(PROMPT_TOKENS))


def test_top_that_has_lost_its_kv_gets_the_states_again(
    tmp_path: Path, computed: Counter[tuple[str, int, int]], greedy_of: Callable[[str], Greedy]
) -> None:
    chain, prompt = chain_of(tmp_path), drawn(5, PROMPT_TOKENS)
    answer = generate(chain, prompt, "strong")
    pool = chain.shards["top-0"].pool
    assert pool.begin(-1, [], 0)
    assert pool.grow(-1, pool.tokens)
    pool.release(-1)
    computed.clear()
    assert generate(chain, prompt, "strong") == answer == greedy_of("llama")("strong", prompt, ANSWER_TOKENS)
    known = PROMPT_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
    assert not any(computed["bottom", 0, at] for at in range(known))
    assert {computed["top", 3, at] for at in range(known)} == {1}


def test_states_stay_within_their_bytes_and_texts_the_same(tmp_path: Path, greedy_of: Callable[[str], Greedy]) -> None:
    # Room for three blocks: less than a conversation has.
    capacity = 3 * BLOCK_TOKENS * HIDDEN_BYTES
    chain, greedy = chain_of(tmp_path, state_cache_bytes=capacity), greedy_of("llama")
    conversations = [drawn(30 + number, PROMPT_TOKENS) for number in range(3)]
    for route in ("weak", "strong", "whole"):
        for number, token_ids in enumerate(conversations):
            answer = generate(chain, token_ids, route)
            assert answer == greedy(route, token_ids, ANSWER_TOKENS)
            conversations[number] = next_turn(token_ids, answer, number)
            gauge = chain.shards["bottom-0"].metrics.registry.get_sample_value
            assert 0 < (gauge("stitch_state_cache_usage_ratio", {"shard": "bottom-0"}) or 0) <= 1


def test_states_evicted_in_the_middle_of_a_prefill_are_computed_again(
    tmp_path: Path, greedy_of: Callable[[str], Greedy], monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, prompt = chain_of(tmp_path), drawn(6, PROMPT_TOKENS)
    token_ids = next_turn(prompt, generate(chain, prompt, "weak"))
    read, reads = HiddenStateCache.read, list[int]()

    def evicting(
        self: HiddenStateCache, layer: int, blocks: Sequence[int], position: int, tokens: int
    ) -> Tensor | None:
        if position >= 2 * BLOCK_TOKENS:
            self.discard(blocks[position // BLOCK_TOKENS])
        states = read(self, layer, blocks, position, tokens)
        reads.append(0 if states is None else len(states))
        return states

    monkeypatch.setattr(HiddenStateCache, "read", evicting)
    assert generate(chain, token_ids, "strong") == greedy_of("llama")("strong", token_ids, ANSWER_TOKENS)
    assert reads[0] > 0
    assert reads[-1] == 0


def test_preempted_session_resumes_its_own_states(tmp_path: Path, greedy_of: Callable[[str], Greedy]) -> None:
    chain, greedy = chain_of(tmp_path, kv_tokens=12 * BLOCK_TOKENS), greedy_of("llama")
    prompts = [drawn(40 + number, 45) for number in range(4)]
    for _ in range(24):
        generate(chain, [1], "strong", 1)
    outputs = [chain.admit(one, "strong", names(chain, "strong"), ANSWER_TOKENS) for one in prompts]
    chain.run(*outputs)
    for one, given in zip(prompts, outputs, strict=True):
        tokens = [output.token.id for output in given if output.token is not None]
        assert tokens == greedy("strong", one, ANSWER_TOKENS)
    assert chain.idle


def test_routes_of_the_table_have_states_at_their_cuts(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    assert chain.shards["bottom-0"].loaded.cuts == tuple(cut for cut, _ in CUTS.values())
    assert set(ENDS) == {route.name for route in chain.cluster.routes}
    assert chain.shards["top-0"].loaded.cuts == ()
