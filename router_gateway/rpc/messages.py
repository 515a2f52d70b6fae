"""Messages of `stitch.v1` to the gateway's values and back. Decides nothing but what an unset field means."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import replace
from typing import assert_never

from router_gateway.requests import limits
from router_gateway.requests.limits import Amount
from router_gateway.requests.types import Delta, Event, Finished, FinishReason, Prompt, Request, Started, Turn
from router_gateway.routing.objectives import Objectives
from router_gateway.routing.router import RouteDecision
from stitch.errors import InvalidRequest
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2

# Asks for the router's judgement, as no name at all does.
AUTO = "auto"
# What is longer would keep the event loop busy before the context is known that it does not fit into.
MAX_MESSAGES = 32_768
MAX_STOP_TOKENS = 1_024
MAX_FORCED_TOKENS = 32_768

_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


def to_request(message: inference_pb2.GenerateRequest) -> Request:
    """Raises InvalidRequest for a message without input, or with a sampling outside of its limits."""
    limits.check_id("request_id", message.request_id)
    limits.check_stop(message.stop)
    return Request(
        request_id=message.request_id or uuid.uuid4().hex,
        prompt=to_prompt(message),
        sampling=_to_sampling(message.sampling),
        stop=tuple(message.stop),
        route=None if message.route in ("", AUTO) else message.route,
        objectives=_to_objectives(message.objectives),
        conversation_id=_to_conversation_id(message),
        forced_answer=message.forced_answer if message.HasField("forced_answer") else None,
    )


def to_question(message: inference_pb2.RouteRequest) -> Request:
    """A request that is only to be judged; errors as `to_request`."""
    return Request(
        request_id="",
        prompt=to_prompt(message),
        sampling=Sampling(),
        objectives=_to_objectives(message.objectives),
        conversation_id=_to_conversation_id(message),
    )


def to_prompt(message: inference_pb2.GenerateRequest | inference_pb2.RouteRequest) -> Prompt:
    match message.WhichOneof("input"):
        case "prompt":
            return message.prompt
        case "chat":
            limits.check_count("chat.messages", message.chat.messages, MAX_MESSAGES, "messages")
            return tuple(Turn(turn.role, turn.content) for turn in message.chat.messages)
        case _:
            raise InvalidRequest("input", Amount("not set"), "a request has a prompt or a chat")


def to_response(event: Event) -> inference_pb2.GenerateResponse:
    match event:
        case Started():
            return inference_pb2.GenerateResponse(started=_started(event))
        case Delta():
            return inference_pb2.GenerateResponse(delta=_delta(event))
        case Finished():
            return inference_pb2.GenerateResponse(finished=_finished(event))
        case _:
            assert_never(event)


def to_decision(decision: RouteDecision) -> inference_pb2.RouteDecision:
    return inference_pb2.RouteDecision(route=decision.route, score=decision.score or 0.0, reason=decision.reason)


def _to_objectives(message: inference_pb2.Objectives) -> Objectives:
    given = {field.name: value for field, value in message.ListFields()}
    objectives = Objectives(**given)
    limits.check_objectives(objectives)
    return objectives


def _to_conversation_id(message: inference_pb2.GenerateRequest | inference_pb2.RouteRequest) -> str:
    limits.check_id("conversation_id", message.conversation_id)
    return message.conversation_id


def _to_sampling(message: inference_pb2.Sampling) -> Sampling:
    limits.check_count("sampling.stop_token_ids", message.stop_token_ids, MAX_STOP_TOKENS, "ids")
    limits.check_count("sampling.forced_token_ids", message.forced_token_ids, MAX_FORCED_TOKENS, "ids")
    sampling = Sampling.from_proto(message)
    return sampling if message.HasField("seed") else replace(sampling, seed=secrets.randbits(64))


def _started(event: Started) -> inference_pb2.Started:
    decision = to_decision(event.decision)
    return inference_pb2.Started(request_id=event.request_id, decision=decision, prompt_tokens=event.prompt_tokens)


def _delta(event: Delta) -> inference_pb2.Delta:
    return inference_pb2.Delta(
        text=event.text,
        token_ids=[token.id for token in event.tokens],
        logprobs=[token.logprobs for token in event.tokens if token.logprobs is not None],
    )


def _finished(event: Finished) -> inference_pb2.Finished:
    return inference_pb2.Finished(
        reason=_REASONS[event.reason],
        prompt_tokens=event.prompt_tokens,
        generated_tokens=event.generated_tokens,
        ttft_seconds=event.ttft_seconds,
        total_seconds=event.total_seconds,
        stages=[inference_pb2.Stage(name=stage.name, seconds=stage.seconds) for stage in event.stages],
    )
