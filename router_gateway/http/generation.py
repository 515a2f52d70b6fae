"""What all endpoints that generate share: the parameters of sampling and routing, and the way from message to reply.

In: the fields that a body has beside its prompt. Out: a `GenerateRequest` for the pipeline, and its messages, told to a
`Shape` that makes OpenAI's JSON of them. Parameters that are not set have the defaults of the model's
`generation_config`, then OpenAI's.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import Field

from router_gateway.http.bodies import Body, Items
from router_gateway.http.calls import Call, Services
from router_gateway.http.errors import Refusal, event_of
from router_gateway.requests.limits import MAX_ANSWERS
from router_gateway.rpc.messages import AUTO
from router_gateway.rpc.servicer import RequestReader
from stitch.errors import InvalidRequest, StitchError
from stitch.v1 import inference_pb2

MAX_METADATA = 16
MAX_UINT32 = 2**32 - 1
MAX_INT32 = 2**31 - 1
# Of the model's `generation_config`, the fields that count as defaults.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OPENAI_DEFAULTS: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0}
FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
DONE = b"data: [DONE]\n\n"

TokenId = Annotated[int, Field(ge=0, le=MAX_UINT32)]
MaxTokens = Annotated[int, Field(ge=1, le=MAX_INT32)]


class StreamOptions(Body):
    include_usage: bool | None = None


class Objectives(Body):
    """Limits that the gateway predicts before an answer begins: beyond OpenAI's API."""

    max_ttft_seconds: float | None = None
    max_cost: float | None = None
    min_quality: float | None = None


class GenerationBody(Body):
    """The parameters that every endpoint takes which generates."""

    model: str = Field(description="A route, `auto`, or `auto@0.4`: the router decides, by this threshold.")
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | Items[str] | None = None
    # OpenAI's are signed.
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None
    # Beyond OpenAI's API.
    top_k: TokenId | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: TokenId | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Items[TokenId] | None = None
    objectives: Objectives | None = None
    conversation_id: str | None = None

    def message(
        self, request_id: str, routes: Sequence[str], defaults: Mapping[str, float]
    ) -> inference_pb2.GenerateRequest:
        """A message with everything but the prompt; `defaults` are the model's, by the names of `Sampling`.

        Raises InvalidRequest, or Refusal where `model` is none of the routes.
        """
        route, threshold = route_of(self.model, routes)
        objectives = {} if self.objectives is None else self.objectives.model_dump(exclude_none=True)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return inference_pb2.GenerateRequest(
            sampling=self._sampling({**OPENAI_DEFAULTS, **defaults}),
            stop=stop or (),
            route=route,
            request_id=request_id,
            objectives=inference_pb2.Objectives(**objectives),
            conversation_id=self.conversation_id or "",
            threshold=threshold,
        )

    def _sampling(self, defaults: Mapping[str, float]) -> inference_pb2.Sampling:
        given = {name: getattr(self, name) for name in _SAMPLING}
        chosen: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in given.items()}
        return inference_pb2.Sampling(
            **chosen,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else self.seed % 2**64,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            logit_bias={_token_id(key): bias for key, bias in (self.logit_bias or {}).items()},
            min_tokens=self.min_tokens or 0,
        )


class ChoicesBody(GenerationBody):
    """The parameters of endpoints whose replies have choices."""

    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def message(
        self, request_id: str, routes: Sequence[str], defaults: Mapping[str, float]
    ) -> inference_pb2.GenerateRequest:
        """As `GenerationBody.message`, with the number and the length of answers."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", self.stream_options, "it needs stream")
        message = super().message(request_id, routes, defaults)
        if self.n is not None:
            message.n = self.n
        if self.max_tokens is not None:
            message.sampling.max_tokens = self.max_tokens
        return message


class Shape(ABC):
    """Makes OpenAI's JSON of the messages of one request."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.created = int(time.time())
        self.started = inference_pb2.Started()
        self._finished: dict[int, inference_pb2.Finished] = {}

    def start(self, started: inference_pb2.Started) -> None:
        """Takes the route decision, before anything else."""
        self.started = started

    def finish(self, answer: int, finished: inference_pb2.Finished) -> None:
        """Takes the end of an answer."""
        self._finished[answer] = finished

    @abstractmethod
    def events(self, response: inference_pb2.GenerateResponse) -> bytes:
        """The events for a `delta` or `finished`, which `finish` has taken."""

    @abstractmethod
    def last_events(self) -> bytes:
        """The events after all answers."""

    def error_events(self, error: StitchError | Refusal) -> bytes:
        """The events that end a stream which has started."""
        return event_of(error)

    @abstractmethod
    def add(self, response: inference_pb2.GenerateResponse) -> None:
        """Takes a `delta` for the reply that `whole` makes."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The reply that isn't streamed."""

    @property
    def headers(self) -> dict[str, str]:
        """What the head of the reply says of the route decision."""
        decision = self.started.decision
        scored = {"x-stitch-score": f"{decision.score:.6g}"}
        return {"x-stitch-route": decision.route, **scored, "x-stitch-reason": decision.reason}

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt, which is computed once, and of all answers."""
        prompt = self.started.prompt_tokens
        generated = sum(one.generated_tokens for one in self._finished.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self._first.cached_tokens},
        }

    def stitch(self) -> dict[str, Any]:
        """The field `stitch`: how the reply has come about."""
        decision = self.started.decision
        return {
            "route": decision.route,
            "score": decision.score,
            "reason": decision.reason,
            "stages": {stage.name: stage.seconds for stage in self._first.stages},
            "replays": max((one.replays for one in self._finished.values()), default=0),
        }

    @property
    def _first(self) -> inference_pb2.Finished:
        """The end of the first answer, which has computed the prompt."""
        return self._finished.get(0, inference_pb2.Finished())


def message_of(call: Call, services: Services, body: GenerationBody) -> inference_pb2.GenerateRequest:
    """The body's message, with the defaults of the model. Raises as `GenerationBody.message` does."""
    vocabulary = services.source.current
    defaults = {} if vocabulary is None else vocabulary.sampling_defaults
    return body.message(call.request_id, services.models.routes(), defaults)


def generated(
    call: Call, services: Services, message: inference_pb2.GenerateRequest
) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    """The pipeline's messages; raises what it raises."""
    read = RequestReader(lambda: message)
    traceparent = call.headers.get("traceparent", "")
    return services.pipeline.generate(call.credentials, read, call.arrival, call.deadline, call.write, traceparent)


async def respond(
    call: Call, responses: AsyncGenerator[inference_pb2.GenerateResponse, None], stream: bool, shape: Shape
) -> None:
    """Replies with the pipeline's messages by `shape`. Raises what the pipeline raises."""
    has_started = False
    async with aclosing(responses):
        async for response in responses:
            match response.WhichOneof("event"):
                case "started":
                    shape.start(response.started)
                    if stream and not has_started:
                        call.start_events(shape.headers, shape.error_events)
                    has_started = True
                    continue
                case "finished":
                    shape.finish(response.answer, response.finished)
            if not stream:
                shape.add(response)
            elif events := shape.events(response):
                await call.send_events(events)
    if stream:
        await call.send_events(shape.last_events(), last=True)
    else:
        await call.reply(compact(shape.whole()), headers=shape.headers)


def compact(content: Any) -> bytes:
    """JSON without spaces. Characters beyond ASCII are escaped: some clients take U+2028 for the end of a line."""
    return json.dumps(content, separators=(",", ":")).encode()


def unknown_model(model: str) -> Refusal:
    """The refusal of a model that this gateway doesn't have."""
    return Refusal(404, "model_not_found", f"the model {model[:80]!r} does not exist", "model")


def route_of(model: str, routes: Sequence[str]) -> tuple[str, float | None]:
    """The route that a model names, or `auto`, and the threshold of this request. Raises Refusal where it is none."""
    name, at, threshold = model.partition("@")
    if name not in (AUTO, *routes) or (at and name != AUTO):
        raise unknown_model(model)
    try:
        return name, float(threshold) if at else None
    except ValueError:
        raise InvalidRequest("model", model, "after auto@ stands a threshold, 0 to 1") from None


def _token_id(key: str) -> int:
    if not (key.isdecimal() and key.isascii() and int(key[:12]) <= MAX_UINT32 and len(key) <= 10):
        raise InvalidRequest("logit_bias", key, "its keys are token ids")
    return int(key)
