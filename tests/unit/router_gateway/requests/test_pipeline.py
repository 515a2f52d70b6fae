"""Tests of the request preparer, from a request to ids, route and sampling, and of the delta builder."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from router_gateway.metrics import Metrics
from router_gateway.requests.deltas import DeltaBuilder
from router_gateway.requests.preparer import RequestPreparer, complete_sampling, tokenize
from router_gateway.requests.types import Prompt, Request, TokenIds, user_turns
from router_gateway.routing.drift import DriftMonitor
from router_gateway.routing.router import REASON_KINDS, Query, RouteDecision
from router_gateway.routing.selector import NO_OPTIONS, RoutingOptions, Selector, conversation_routes
from router_gateway.routing.ttft_predictor import TtftPredictor
from router_gateway.shards.compatibility import CompatibilityCheck
from router_gateway.shards.models import ModelRegistry
from router_gateway.shards.registry import ShardRegistry
from router_gateway.tokenization.chat_template import Turn
from router_gateway.tokenization.source import VocabularySource
from router_gateway.tokenization.text_queues import TextQueues
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch.cluster import ClusterConfig, GatewayConfig, ModelConfig, PairConfig, ShardConfig
from stitch.errors import InvalidRequest, Unavailable
from stitch.sampling import Sampling
from stitch.v1.inference_pb2 import Alternative, Delta, TokenLogprobs
from stitch.v1.shard_pb2 import GeneratedToken
from tests.support.byte_tokenizer import byte_tokenizer, tokenizer_files, tokens
from tests.support.fake_shard import END_TOKEN, ROUTES

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
    """Stands in for the model registry of a cluster whose shards have answered."""

    context_tokens = 128
    vocabulary_size = 400
    prompt_vocabulary_size = 410

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
    registry = SimpleNamespace(compatibility=CompatibilityCheck(CLUSTER), first_shards=[])
    source = VocabularySource(cast(ShardRegistry, registry))
    source.current = VOCABULARY
    return source


@pytest.fixture
def preparer(router: AlwaysWeak, source: VocabularySource) -> Iterator[RequestPreparer]:
    with TextQueues(max_wait_seconds=5.0) as queues:
        models = cast(ModelRegistry, SmallModel())
        predictor, conversations = (
            TtftPredictor(models.routes(), lambda: 1, time.monotonic),
            conversation_routes(time.monotonic),
        )
        selector = Selector(
            router, models, predictor, conversations, DriftMonitor(Metrics(models.routes(), REASON_KINDS), None)
        )
        yield RequestPreparer(CLUSTER, models, source, selector, queues)


def request(
    prompt: Prompt = "hello", sampling: Sampling | None = None, routing: RoutingOptions = NO_OPTIONS
) -> Request:
    return Request("id", prompt, sampling or Sampling(), routing=routing)


async def test_prompt_is_tokenized_and_routed(preparer: RequestPreparer, router: AlwaysWeak) -> None:
    prepared = await preparer.prepare(request("hello world"))
    assert list(prepared.stream_input.token_ids) == tokens("hello world")
    assert prepared.stream_input.decision == RouteDecision("weak", 0.25, "because", "length")
    assert router.queries == [Query(("hello world",), ("weak", "strong"))]


async def test_conversation_is_rendered_and_routed_by_user_turns(preparer: RequestPreparer, router: AlwaysWeak) -> None:
    chat = (Turn("system", "Be brief."), Turn("user", "hello"), Turn("assistant", "hello"), Turn("user", "commit it"))
    prepared = await preparer.prepare(request(chat))
    text = byte_tokenizer().decode(list(prepared.stream_input.token_ids), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert text.endswith("commit it<|im_end|>\n<|im_start|>assistant\n")
    assert router.queries[0].turns == ("hello", "commit it")


async def test_named_route_keeps_the_score_of_the_router(preparer: RequestPreparer) -> None:
    decision = (await preparer.prepare(request(routing=RoutingOptions(route="strong")))).stream_input.decision
    assert (decision.route, decision.score, decision.kind) == ("strong", 0.25, "requested")
    assert "weak" in decision.reason


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (request(""), "prompt"),
        (request(()), "chat.messages"),
        (request("x" * 1_000_000), "prompt"),
        (request("!?" * 80), "prompt"),
        (request(routing=RoutingOptions(route="gone")), "route"),
        (request(sampling=Sampling(stop_token_ids=(400,))), "sampling.stop_token_ids[0]"),
        (request((Turn("wizard", "abracadabra"),)), "chat"),
    ],
)
async def test_prepare_refuses_invalid_requests_before_routing(
    preparer: RequestPreparer, router: AlwaysWeak, bad: Request, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await preparer.prepare(bad)
    assert caught.value.field == field
    assert router.queries == []


async def test_prepare_raises_unavailable_without_tokenizer(
    preparer: RequestPreparer, source: VocabularySource
) -> None:
    source.current = None
    with pytest.raises(Unavailable, match="tokenizer"):
        await preparer.prepare(request())


async def test_long_text_is_tokenized_in_a_thread(preparer: RequestPreparer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def spy(prompt: Prompt, vocabulary: Vocabulary, context_tokens: int, *options: object) -> list[int]:
        threads.append(threading.current_thread())
        return [5]

    monkeypatch.setattr("router_gateway.tokenization.text_queues.INLINE_BYTES", 8)
    monkeypatch.setattr("router_gateway.requests.preparer.tokenize", spy)
    await preparer.prepare(request("x" * 8))
    await preparer.prepare(request("x" * 9))
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


def test_tokenize_refuses_a_conversation_without_template() -> None:
    bare = Vocabulary.from_files({"tokenizer.json": tokenizer_files()["tokenizer.json"]})
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenize((Turn("user", "hello"),), bare, 99)


def test_tokenize_passes_on_the_refusal_of_the_template() -> None:
    with pytest.raises(
        InvalidRequest, match="chat is 'user, wizard', but the chat template refuses it: 'Unknown role'"
    ):
        tokenize((Turn("user", "hello"), Turn("wizard", "hello")), VOCABULARY, 99)


async def test_token_ids_are_taken_as_they_are_and_routed_by_their_text(
    preparer: RequestPreparer, router: AlwaysWeak
) -> None:
    ids = (1, *tokens("hello world"), END_TOKEN)
    prepared = await preparer.prepare(request(TokenIds(ids)))
    assert prepared.stream_input.token_ids == ids
    assert router.queries == [Query(("hello world",), ("weak", "strong"))]


@pytest.mark.parametrize(("count", "found"), [(0, "0 tokens"), (128, "128 tokens")])
async def test_token_ids_that_leave_no_room_are_refused(preparer: RequestPreparer, count: int, found: str) -> None:
    with pytest.raises(InvalidRequest, match=f"token_ids is {found}"):
        await preparer.prepare(request(TokenIds((5,) * count)))


async def test_tokens_of_a_prompt_are_those_of_a_request_with_their_bytes(preparer: RequestPreparer) -> None:
    text = "hello wörld<|im_end|>"
    found = await preparer.tokenize(text)
    assert tuple(found.token_ids) == (await preparer.prepare(request(text))).stream_input.token_ids
    assert b"".join(found.tokens) == text.encode()
    assert found.context_length == SmallModel.context_tokens
    assert await preparer.detokenize(list(found.token_ids)) == text


async def test_ids_beyond_the_vocabulary_or_the_context_are_not_decoded(preparer: RequestPreparer) -> None:
    with pytest.raises(InvalidRequest, match=rf"token_ids\[1\] is {VOCABULARY.size}"):
        await preparer.detokenize([1, VOCABULARY.size])
    with pytest.raises(InvalidRequest, match="token_ids is 129 ids, but it holds at most 128"):
        await preparer.detokenize([1] * 129)


def test_user_turns_leaves_out_other_roles() -> None:
    assert user_turns("plain") == ("plain",)
    assert user_turns((Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"))) == ("u",)


def test_complete_sampling_limits_max_tokens_to_the_context() -> None:
    assert complete_sampling(Sampling(max_tokens=50), 100, 128, ()).max_tokens == 28
    assert complete_sampling(Sampling(max_tokens=5), 100, 128, ()).max_tokens == 5
    assert complete_sampling(Sampling(), 100, 9_000, ()).max_tokens == 1_024


def test_complete_sampling_adds_end_tokens_unless_ignored() -> None:
    assert complete_sampling(Sampling(stop_token_ids=(7, 2)), 1, 9, (2, 0)).stop_token_ids == (7, 2, 0)
    assert complete_sampling(Sampling(stop_token_ids=(7,), ignore_eos=True), 1, 9, (2, 0)).stop_token_ids == (7,)


VOCABULARY = Vocabulary.from_files(tokenizer_files())


def output(*stop: str, min_tokens: int = 0) -> DeltaBuilder:
    return DeltaBuilder(VOCABULARY, stop, min_tokens=min_tokens)


def run(output: DeltaBuilder, ids: Sequence[int]) -> list[Delta]:
    deltas = [output.push([GeneratedToken(id=token_id)]) for token_id in ids]
    return [delta for delta in (*deltas, output.finish()) if delta is not None]


def ids_of(deltas: Sequence[Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_token_with_final_text_gives_a_delta_at_once() -> None:
    ids = tokens("hello world")
    assert [list(delta.token_ids) for delta in run(output(), ids)] == [[token_id] for token_id in ids]


def test_tokens_of_one_character_are_in_one_delta() -> None:
    ids = tokens("你")
    assert run(output(), ids) == [Delta(text="你", token_ids=ids)]


def test_tokens_without_text_are_in_the_last_delta() -> None:
    deltas = run(output(), [*tokens("hello"), 2])
    assert deltas[-1] == Delta(token_ids=[2])


def test_stop_string_ends_the_text_before_it() -> None:
    stopped = output(" jumps")
    ids = tokens("the quick brown fox jumps over")
    deltas = run(stopped, ids)
    assert stopped.stopped
    assert text_of(deltas) == "the quick brown fox"
    assert stopped.generated_tokens == len(ids_of(deltas))
    assert ids_of(deltas) == ids[: len(ids_of(deltas))]


def test_tokens_after_a_stop_string_in_the_same_step_are_dropped() -> None:
    stopped = output(" world")
    ids = tokens("hello world, hello there")
    delta = stopped.push([GeneratedToken(id=token_id) for token_id in ids])
    assert delta is not None
    assert delta.text == "hello"
    assert stopped.generated_tokens == len(delta.token_ids) < len(ids)


def test_incomplete_stop_string_is_in_the_last_delta() -> None:
    held = output("dog!")
    deltas = run(held, tokens("lazy dog"))
    assert text_of(deltas) == "lazy dog"
    assert ids_of(deltas) == tokens("lazy dog")
    assert not held.stopped


def test_stop_string_within_the_least_number_of_tokens_is_text() -> None:
    ids = tokens("the end of the end of it")
    first = tokens("the end of")
    assert ids[: len(first)] == first
    for min_tokens, text in ((0, "the"), (len(first), "the end of the"), (len(ids), "the end of the end of it")):
        assert text_of(run(output(" end", min_tokens=min_tokens), ids)) == text


def test_answer_without_tokens_has_no_delta() -> None:
    assert run(output("x"), []) == []


def test_delta_has_the_log_probabilities_of_its_tokens() -> None:
    [first, *_], [last] = tokens("hello"), tokens("!")
    bytes_of_a_character = tokens("❤")
    alternatives = [Alternative(token_id=token_id, logprob=-2.0) for token_id in (bytes_of_a_character[0], END_TOKEN)]
    logprobs = TokenLogprobs(token_id=last, logprob=-1.5, alternatives=alternatives)
    delta = output().push([GeneratedToken(id=first), GeneratedToken(id=last, logprobs=logprobs)])
    assert delta is not None
    [found] = delta.logprobs
    assert (found.token_id, found.logprob, found.token) == (last, -1.5, b"!")
    assert [one.token for one in found.alternatives] == [b"\xe2", b"<|im_end|>"]


async def test_tokens_that_a_model_has_not_are_refused(preparer: RequestPreparer) -> None:
    size = VOCABULARY.size
    for bad, field in [
        (request(sampling=Sampling(forced_token_ids=(1, size))), "sampling.forced_token_ids[1]"),
        (request(sampling=Sampling(stop_token_ids=(size,))), "sampling.stop_token_ids[0]"),
        (request(sampling=Sampling(logit_bias=((3, 1.0), (size, 1.0)))), "sampling.logit_bias[1]"),
        (request(TokenIds((1, 2, size))), "token_ids.ids[2]"),
    ]:
        with pytest.raises(InvalidRequest, match=f"the vocabulary ends at {size - 1}") as caught:
            await preparer.prepare(bad)
        assert caught.value.field == field


async def test_text_with_a_token_that_the_bottom_has_not_is_refused(
    preparer: RequestPreparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallModel, "prompt_vocabulary_size", 200)
    with pytest.raises(InvalidRequest) as caught:
        await preparer.prepare(request("hello world"))
    assert caught.value.field == "prompt"
    monkeypatch.undo()
    monkeypatch.setattr(SmallModel, "vocabulary_size", 200)
    with pytest.raises(InvalidRequest) as caught:
        await preparer.prepare(replace(request("x"), forced_answer="hello world"))
    assert caught.value.field == "forced_answer"
