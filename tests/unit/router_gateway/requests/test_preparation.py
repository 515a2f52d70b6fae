"""From a request to ids, route and sampling, without any shard."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from router_gateway.metrics import Metrics
from router_gateway.requests.preparation import Preparation, complete, tokenize
from router_gateway.requests.types import Prompt, Request, Turn
from router_gateway.routing.conversations import Conversations
from router_gateway.routing.drift_monitor import DriftMonitor
from router_gateway.routing.router import REASON_KINDS, Query, RouteDecision
from router_gateway.routing.selector import Selection, user_turns
from router_gateway.routing.ttft_predictor import TtftPredictor
from router_gateway.shards.models import ModelRegistry
from router_gateway.tokenization.source import VocabularySource
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch.cluster import ClusterConfig, GatewayConfig, ModelConfig, PairConfig, ShardConfig
from stitch.errors import InvalidRequest, Unavailable
from stitch.sampling import Sampling
from tests.support.byte_tokenizer import byte_tokenizer, tokenizer_files, tokens
from tests.support.fake_shard import ROUTES

VOCABULARY = Vocabulary.from_files(tokenizer_files())
SOURCE = ModelConfig(id="fake", source="nowhere")
CLUSTER = ClusterConfig(
    name="fake",
    models=PairConfig(bottom=SOURCE, top=SOURCE),
    routes=ROUTES,
    shards=(
        ShardConfig(name="b", role="bottom", layers=(0, 4), address="h:1"),
        ShardConfig(name="t", role="top", layers=(4, 8), address="h:2"),
    ),
    gateway=GatewayConfig(address="h:3"),
)


class SmallModel:
    """Stands for the catalogue of a cluster whose shards have answered."""

    context_tokens = 128
    vocabulary_size = 400

    def routes(self) -> list[str]:
        return ["weak", "strong"]


class AlwaysWeak:
    def __init__(self) -> None:
        self.queries: list[Query] = []

    def decide(self, query: Query) -> RouteDecision:
        self.queries.append(query)
        return RouteDecision("weak", 0.25, "because", "length")


@pytest.fixture
def router() -> AlwaysWeak:
    return AlwaysWeak()


@pytest.fixture
def source() -> VocabularySource:
    source = VocabularySource([])
    source.current = VOCABULARY
    return source


@pytest.fixture
def preparation(router: AlwaysWeak, source: VocabularySource) -> Iterator[Preparation]:
    with ThreadPoolExecutor(1, "text") as threads:
        catalogue = cast(ModelRegistry, SmallModel())
        pace, conversations = (
            TtftPredictor(catalogue.routes(), lambda: 1, time.monotonic),
            Conversations(time.monotonic),
        )
        selection = Selection(
            router, catalogue, pace, conversations, DriftMonitor(Metrics(catalogue.routes(), REASON_KINDS), None)
        )
        yield Preparation(CLUSTER, catalogue, source, selection, threads)


def request(prompt: Prompt = "hello", sampling: Sampling | None = None, **fields: Any) -> Request:
    return Request("id", prompt, sampling or Sampling(), **fields)


async def test_a_prompt_becomes_ids_and_a_route(preparation: Preparation, router: AlwaysWeak) -> None:
    prepared = await preparation.prepare(request("hello world"))
    assert list(prepared.token_ids) == tokens("hello world")
    assert prepared.decision == RouteDecision("weak", 0.25, "because", "length")
    assert router.queries == [Query(("hello world",), ("weak", "strong"))]


async def test_a_conversation_goes_through_the_template_and_all_user_turns_are_judged(
    preparation: Preparation, router: AlwaysWeak
) -> None:
    chat = (Turn("system", "Be brief."), Turn("user", "hello"), Turn("assistant", "hello"), Turn("user", "commit it"))
    prepared = await preparation.prepare(request(chat))
    text = byte_tokenizer().decode(list(prepared.token_ids), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert text.endswith("commit it<|im_end|>\n<|im_start|>assistant\n")
    assert router.queries[0].turns == ("hello", "commit it")


async def test_a_named_route_is_taken_and_the_score_is_said_all_the_same(preparation: Preparation) -> None:
    decision = (await preparation.prepare(request(route="strong"))).decision
    assert (decision.route, decision.score, decision.kind) == ("strong", 0.25, "requested")
    assert "weak" in decision.reason


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (request(""), "prompt"),
        (request(()), "chat.messages"),
        (request("x" * 1_000_000), "prompt"),
        (request("!?" * 80), "prompt"),
        (request(route="gone"), "route"),
        (request(sampling=Sampling(stop_token_ids=(400,))), "sampling.stop_token_ids[0]"),
        (request((Turn("wizard", "abracadabra"),)), "chat"),
    ],
)
async def test_what_can_t_be_served_is_refused_by_its_field(
    preparation: Preparation, router: AlwaysWeak, bad: Request, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await preparation.prepare(bad)
    assert caught.value.field == field
    assert router.queries == []


async def test_without_a_tokenizer_nothing_is_served(preparation: Preparation, source: VocabularySource) -> None:
    source.current = None
    with pytest.raises(Unavailable, match="tokenizer"):
        await preparation.prepare(request())


async def test_long_text_is_tokenized_off_the_event_loop(
    preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def spy(prompt: Prompt, vocabulary: Vocabulary) -> list[int]:
        threads.append(threading.current_thread())
        return [5]

    monkeypatch.setattr("router_gateway.requests.preparation.INLINE_BYTES", 8)
    monkeypatch.setattr("router_gateway.requests.preparation.tokenize", spy)
    await preparation.prepare(request("x" * 8))
    await preparation.prepare(request("x" * 9))
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


def test_a_model_without_a_template_takes_no_conversation() -> None:
    bare = Vocabulary.from_files({"tokenizer.json": tokenizer_files()["tokenizer.json"]})
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenize((Turn("user", "hello"),), bare)


def test_a_refusal_says_what_the_template_says() -> None:
    with pytest.raises(
        InvalidRequest, match="chat is 'user, wizard', but the chat template refuses it: 'Unknown role'"
    ):
        tokenize((Turn("user", "hello"), Turn("wizard", "hello")), VOCABULARY)


def test_only_the_user_s_words_are_judged() -> None:
    assert user_turns("plain") == ("plain",)
    assert user_turns((Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"))) == ("u",)


def test_max_tokens_end_with_the_context() -> None:
    assert complete(Sampling(max_tokens=50), 100, 128, ()).max_tokens == 28
    assert complete(Sampling(max_tokens=5), 100, 128, ()).max_tokens == 5
    assert complete(Sampling(), 100, 9_000, ()).max_tokens == 1_024


def test_the_model_s_end_tokens_are_added_unless_ignored() -> None:
    assert complete(Sampling(stop_token_ids=(7, 2)), 1, 9, (2, 0)).stop_token_ids == (7, 2, 0)
    assert complete(Sampling(stop_token_ids=(7,), ignore_eos=True), 1, 9, (2, 0)).stop_token_ids == (7,)
