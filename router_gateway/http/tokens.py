"""`POST /tokenize` and `/detokenize`, in vLLM's shapes: a prompt or a conversation in, token ids out, and back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from router_gateway.http.bodies import Body, Items
from router_gateway.http.calls import Call, Services
from router_gateway.http.chat import Message, message_to_proto
from router_gateway.http.generation import TokenId, compact, route_of
from router_gateway.rpc.messages import MAX_MESSAGES, to_prompt
from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    # Of a prompt, those that the tokenizer adds; the template writes those of a conversation.
    add_special_tokens: bool | None = None
    add_generation_prompt: Literal[True] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Items[TokenId]


async def tokenize(services: Services, call: Call, body: TokenizeBody) -> None:
    """Replies with the tokens of a prompt."""
    _check_model(body.model, services)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt", body.prompt, "a request has either a prompt or messages")
    plain = body.add_special_tokens is False
    if body.messages is None:
        message = inference_pb2.TokenizeRequest(prompt=body.prompt)
    elif body.add_special_tokens:
        raise InvalidRequest("add_special_tokens", True, "the chat template writes those of a conversation")
    else:
        chat = inference_pb2.Chat(messages=map(message_to_proto, body.messages))
        message = inference_pb2.TokenizeRequest(chat=chat)
    found = await services.pipeline.tokenize(call.credentials, to_prompt(message), plain=plain)
    reply = {"count": len(found.token_ids), "max_model_len": found.context_length, "tokens": list(found.token_ids)}
    strings = [token.decode(errors="replace") for token in found.tokens] if body.return_token_strs else None
    await call.reply(compact({**reply, "token_strs": strings}))


async def detokenize(services: Services, call: Call, body: DetokenizeBody) -> None:
    """Replies with the text of tokens."""
    _check_model(body.model, services)
    try:
        text = await services.pipeline.detokenize(call.credentials, body.tokens)
    except InvalidRequest as error:
        raise InvalidRequest(error.field.replace("token_ids", "tokens"), error.value, error.limit) from error
    await call.reply(compact({"prompt": text}))


def _check_model(model: str | None, services: Services) -> None:
    """Raises Refusal where the gateway doesn't have it; all have one tokenizer."""
    if model is not None:
        route_of(model, services.models.routes())
