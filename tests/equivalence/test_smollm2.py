"""SmolLM2, split over two shards, generates the same tokens as the whole model in `transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from stitch.client import Answer
from stitch.cluster import load_cluster
from stitch.environment import cache_folder
from stitch_server.sources.resolve import resolve
from tests.support.processes import Cluster, running_cluster
from tests.support.prompts import PROMPTS
from tests.support.whole_model import generated, greedy

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

PRESET = "smollm2"
ANSWER_TOKENS = 64
# Compared with `generate`, which is slow; the other answers are compared by one pass over prompt and answer.
GENERATED = PROMPTS[:2]
LONG_TOKENS = 1_500


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(PRESET, tmp_path_factory.mktemp("smollm2")) as running:
        yield running


@pytest.fixture(scope="module")
def folder() -> str:
    """The folder of the whole model."""
    return str(resolve(load_cluster(PRESET).models.bottom.source, cache_folder()))


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def whole(folder: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@pytest.fixture(scope="module")
def alone(cluster: Cluster) -> dict[str, Answer]:
    """The answer of every prompt while nothing else runs."""
    return {prompt: strong(cluster, prompt) for prompt in PROMPTS}


def strong(cluster: Cluster, prompt: str) -> Answer:
    return cluster.generate(prompt, route="strong", max_tokens=ANSWER_TOKENS, ignore_eos=True)


def test_twenty_answers_equal_the_whole_model(alone: dict[str, Answer], tokenizer: Any, whole: PreTrainedModel) -> None:
    for prompt, answer in alone.items():
        ids = tokenizer(prompt)["input_ids"]
        assert (answer.route, answer.prompt_tokens, len(answer.token_ids)) == ("strong", len(ids), ANSWER_TOKENS)
        assert list(answer.token_ids) == greedy(whole, ids, answer.token_ids), prompt


def test_answers_equal_transformers_generate(alone: dict[str, Answer], tokenizer: Any, whole: PreTrainedModel) -> None:
    for prompt in GENERATED:
        wanted = generated(whole, tokenizer(prompt)["input_ids"], ANSWER_TOKENS)
        assert list(alone[prompt].token_ids) == wanted
        assert alone[prompt].text == tokenizer.decode(wanted, skip_special_tokens=True)


def test_chat_answer_stops_where_transformers_generate_stops(
    cluster: Cluster, tokenizer: Any, whole: PreTrainedModel
) -> None:
    messages = [{"role": "user", "content": "What is 2 + 2? Answer in one short sentence."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = cluster.generate(messages=messages, route="strong", max_tokens=ANSWER_TOKENS)
    assert answer.prompt_tokens == len(ids)
    assert answer.finish_reason == "stop"
    assert list(answer.token_ids) == generated(whole, ids, ANSWER_TOKENS, end=tokenizer.eos_token_id)


def test_answer_to_a_long_prompt_equals_the_whole_model(
    cluster: Cluster, tokenizer: Any, whole: PreTrainedModel
) -> None:
    prompt = tokenizer.decode(tokenizer(" ".join(PROMPTS) * 8)["input_ids"][:LONG_TOKENS])
    ids = tokenizer(prompt)["input_ids"]
    answer = strong(cluster, prompt)
    assert abs(len(ids) - LONG_TOKENS) < 10
    assert answer.prompt_tokens == len(ids)
    assert list(answer.token_ids) == greedy(whole, ids, answer.token_ids)


def test_conversation_that_moves_to_the_whole_model_equals_it(
    cluster: Cluster, tokenizer: Any, whole: PreTrainedModel
) -> None:
    # No other test sends it, so no other route has computed it.
    texts = (" ".join(["This conversation moves.", *PROMPTS[:6]]), PROMPTS[7])
    prompt, question = (tokenizer(text)["input_ids"] for text in texts)
    resumed = "stitch_prefix_tokens_resumed_total"
    first = cluster.generate(token_ids=prompt, route="weak", max_tokens=ANSWER_TOKENS, ignore_eos=True)
    before, ids = cluster.metric("bottom-0", resumed), [*prompt, *first.token_ids, *question]
    answer = cluster.generate(token_ids=ids, route="strong", max_tokens=ANSWER_TOKENS, ignore_eos=True)
    assert list(answer.token_ids) == greedy(whole, ids, answer.token_ids)
    # All but the last token of the first answer, in whole blocks of 16.
    assert cluster.metric("bottom-0", resumed) - before == (len(prompt) + ANSWER_TOKENS - 1) // 16 * 16


def test_batch_of_eight_equals_single_answers(cluster: Cluster, alone: dict[str, Answer]) -> None:
    prompts = PROMPTS[:8]
    fields = {"route": "strong", "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    outcomes = cluster.client.batch([{"prompt": prompt, **fields} for prompt in prompts])
    assert tokens_of(outcomes) == [alone[prompt].token_ids for prompt in prompts]


def test_batch_over_both_routes_equals_single_answers(cluster: Cluster, alone: dict[str, Answer]) -> None:
    prompts = PROMPTS[8:12]
    fields = {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    requests = [{"prompt": prompt, "route": route, **fields} for prompt in prompts for route in ("weak", "strong")]
    outcomes = tokens_of(cluster.client.batch(requests))
    assert outcomes[1::2] == [alone[prompt].token_ids for prompt in prompts]
    weak_alone = [cluster.generate(prompt, route="weak", **fields).token_ids for prompt in prompts[:2]]
    assert outcomes[:4:2] == weak_alone
    assert weak_alone != outcomes[1:5:2]


def tokens_of(outcomes: Sequence[Any]) -> list[tuple[int, ...]]:
    """The tokens of the answers. Raises the first error among them."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome.token_ids for outcome in outcomes]
