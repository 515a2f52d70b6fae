"""A gateway without shards or a model, which echoes the prompt word by word, for tests of clients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from grpc_status import rpc_status

from stitch.errors import InvalidRequest, StitchError, to_status
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2, inference_pb2_grpc

ROUTES = ("weak", "strong")
STAGES = {"route": 0.001, "queue": 0.002, "bottom_prefill": 0.1, "wire": 0.003, "top_prefill": 0.05, "sample": 0.004}
WAIT_SECONDS = 20.0


@dataclass
class FakeGateway(inference_pb2_grpc.InferenceServicer):
    """Answers "echo: " and the words of the prompt; each word is one token, whose id is the word's length."""

    address: str = ""
    # All requests, in the order of arrival.
    requests: list[Any] = field(default_factory=list)
    # Returns the error with which a request fails, or None.
    failure: Callable[[inference_pb2.GenerateRequest], StitchError | None] = lambda request: None
    # Streams pause before this word of the answer until they are cancelled.
    stall_before_word: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    # Seconds to the first token, by route and number of prompt tokens.
    ttft_seconds: Callable[[str, int], float | None] = lambda route, tokens: 0.25
    # Whether every stream ends without `finished`.
    omits_finished: bool = False

    def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
        self.requests.append(request)
        ended = self._watch(context)
        try:
            yield from self._events(request)
        except StitchError as error:
            abort(context, error)
        ended.set()

    def GenerateBatch(self, request: inference_pb2.GenerateBatchRequest, context: Any) -> Iterator[Any]:
        self.requests.append(request)
        running = {index: self._events(one) for index, one in enumerate(request.requests)}
        while running:
            for index in list(running):
                yield from self._next_of(index, running)

    def _next_of(self, index: int, running: dict[int, Iterator[Any]]) -> Iterator[Any]:
        try:
            yield inference_pb2.GenerateBatchResponse(index=index, response=next(running[index]))
        except StopIteration:
            del running[index]
        except StitchError as error:
            del running[index]
            failed = inference_pb2.RequestError(code=to_status(error).code, message=str(error))
            yield inference_pb2.GenerateBatchResponse(index=index, error=failed)

    def Route(self, request: inference_pb2.RouteRequest, context: Any) -> inference_pb2.RouteResponse:
        self.requests.append(request)
        words = _words(request)
        return inference_pb2.RouteResponse(decision=_decision(words, ""), prompt_tokens=len(words))

    def Describe(self, request: inference_pb2.DescribeRequest, context: Any) -> inference_pb2.DescribeResponse:
        return description()

    def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        return inference_pb2.TokenizeResponse(token_ids=[len(word) for word in _words(request)])

    def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: Any) -> inference_pb2.DetokenizeResponse:
        return inference_pb2.DetokenizeResponse(text=" ".join("x" * length for length in request.token_ids))

    def _events(self, request: inference_pb2.GenerateRequest) -> Iterator[inference_pb2.GenerateResponse]:
        failure = self.failure(request)
        if failure is not None:
            raise failure
        sampling = Sampling.from_proto(request.sampling)
        words = _words(request)
        decision = _decision(words, request.route)
        started = inference_pb2.Started(decision=decision, prompt_tokens=len(words), request_id=request.request_id)
        yield inference_pb2.GenerateResponse(started=started)
        answer = ["echo:", *words][: sampling.max_tokens]
        yield from self._deltas(answer, sampling)
        if not self.omits_finished:
            finished = self._finished(decision.route, words, answer)
            yield inference_pb2.GenerateResponse(finished=finished)

    def _deltas(self, answer: list[str], sampling: Sampling) -> Iterator[inference_pb2.GenerateResponse]:
        for index, word in enumerate(answer):
            if index == self.stall_before_word:
                self.cancelled.wait(WAIT_SECONDS)
            delta = inference_pb2.Delta(text=word if index == 0 else f" {word}", token_ids=[len(word)])
            if sampling.logprobs is not None:
                other = inference_pb2.Alternative(token_id=7, logprob=-2.5)
                delta.logprobs.add(token_id=len(word), logprob=-0.5, alternatives=[other] * sampling.logprobs)
            yield inference_pb2.GenerateResponse(delta=delta)

    def _watch(self, context: Any) -> threading.Event:
        """Sets `cancelled` if the call ends before the returned event is set."""
        ended = threading.Event()

        def over() -> None:
            if not ended.is_set():
                self.cancelled.set()

        # False means that the call has ended already.
        if not context.add_callback(over):
            over()
        return ended

    def _finished(self, route: str, words: list[str], answer: list[str]) -> inference_pb2.Finished:
        whole = len(answer) == len(words) + 1
        return inference_pb2.Finished(
            reason=inference_pb2.FINISH_REASON_STOP if whole else inference_pb2.FINISH_REASON_LENGTH,
            prompt_tokens=len(words),
            generated_tokens=len(answer),
            ttft_seconds=self.ttft_seconds(route, len(words)),
            total_seconds=0.5,
            stages=[inference_pb2.Stage(name=name, seconds=seconds) for name, seconds in STAGES.items()],
        )


@contextmanager
def serving(gateway: FakeGateway) -> Iterator[FakeGateway]:
    """Serves `gateway` on a free port of the loopback interface while the block runs."""
    server = grpc.server(ThreadPoolExecutor(max_workers=16))
    inference_pb2_grpc.add_InferenceServicer_to_server(gateway, server)
    gateway.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield gateway
    finally:
        server.stop(grace=None).wait()


def abort(context: Any, error: StitchError) -> NoReturn:
    """Ends a call of a blocking server with the status of `error`, as `translated_errors` does for asyncio."""
    context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise error


def description() -> inference_pb2.DescribeResponse:
    """A cluster of two models of different widths, with two routes and three shards, one of which does not serve."""
    found = inference_pb2.DescribeResponse(cluster="fake")
    found.bottom.CopyFrom(_model("org/large", layers=28, hidden_size=1536))
    found.top.CopyFrom(_model("org/small", layers=24, hidden_size=896))
    found.routes.add(name="weak", bottom_layers=15, top_from=13, stitch="abcdef0123456789", parameters=900_000_000)
    found.routes.add(name="strong", bottom_layers=20, top_from=15, stitch="0123456789abcdef", parameters=1_200_000_000)
    found.shards.add(
        name="bottom-0",
        role="bottom",
        first_layer=0,
        end_layer=20,
        serving=True,
        state="ready",
        kv_capacity_tokens=4096,
    )
    found.shards.add(
        name="top-0", role="top", first_layer=13, end_layer=24, serving=True, state="ready", kv_capacity_tokens=2048
    )
    found.shards.add(name="top-1", role="top", first_layer=13, end_layer=24, state="gone")
    found.membership.source, found.membership.last_change = "file fake.toml", "added top-1"
    found.membership.seconds_since_change = 75.4
    found.membership.problems.append("DNS top.test: it has no address")
    for index, shard in enumerate(found.shards):
        shard.address, shard.device, shard.dtype = f"127.0.0.1:{7001 + index}", "cpu", "float32"
    return found


def _model(name: str, layers: int, hidden_size: int) -> inference_pb2.Model:
    return inference_pb2.Model(
        id=name,
        revision="r1",
        architecture="qwen2",
        layers=layers,
        hidden_size=hidden_size,
        vocabulary_size=151_936,
        context_length=32_768,
    )


def _words(request: Any) -> list[str]:
    text = request.prompt or " ".join(message.content for message in request.chat.messages)
    if not text:
        raise InvalidRequest("prompt", text, "it must not be empty")
    return str(text).split()


def _decision(words: list[str], route: str) -> inference_pb2.RouteDecision:
    if route not in ("", "auto", *ROUTES):
        raise InvalidRequest("route", route, "this cluster has: weak, strong, auto")
    score = min(1.0, len(words) / 16)
    if route in ROUTES:
        return inference_pb2.RouteDecision(route=route, score=score, reason="asked for")
    chosen = "strong" if score >= 0.5 else "weak"
    return inference_pb2.RouteDecision(route=chosen, score=score, reason=f"{len(words)} words")
