"""The paths of the HTTP port, and their description as OpenAPI.

In: what the endpoints share. Out: an ASGI application whose every error, unknown paths included, has OpenAI's form.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prometheus_client import Counter
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router_gateway.http.calls import Endpoint, Services
from router_gateway.http.chat import ChatBody, chat
from router_gateway.http.completions import CompletionBody, completions
from router_gateway.http.errors import TABLE, Refusal, body_of
from router_gateway.http.generation import compact
from router_gateway.http.models import model, models
from router_gateway.http.responses import ResponseBody, responses
from router_gateway.http.tokens import DetokenizeBody, TokenizeBody, detokenize, tokenize

JSON = "application/json"


def endpoints(services: Services) -> list[Endpoint[Any]]:
    """All endpoints that need credentials."""
    return [
        Endpoint(services, "/v1/chat/completions", "Answer a conversation", partial(chat, services), ChatBody),
        Endpoint(services, "/v1/completions", "Complete prompts", partial(completions, services), CompletionBody),
        Endpoint(services, "/v1/responses", "Answer items", partial(responses, services), ResponseBody),
        Endpoint(services, "/tokenize", "Tokenize a prompt", partial(tokenize, services), TokenizeBody),
        Endpoint(services, "/detokenize", "Decode tokens", partial(detokenize, services), DetokenizeBody),
        Endpoint(services, "/v1/models", "List the routes", partial(models, services)),
        Endpoint(services, "/v1/models/{id}", "Describe a route", partial(model, services)),
    ]


def build_app(services: Services, requests: Counter) -> ASGIApp:
    """The application of a gateway's HTTP port; `requests` counts by the path's template and by status."""
    served = endpoints(services)
    described = compact(openapi(served))

    async def health(request: Request) -> Response:
        return Response(b'{"status":"ok"}', media_type=JSON)

    async def ready(request: Request) -> Response:
        is_ready = services.ready()
        return Response(compact({"ready": is_ready}), 200 if is_ready else 503, media_type=JSON)

    async def describe(request: Request) -> Response:
        return Response(described, media_type=JSON)

    routes = [
        *(Route(one.path, one, methods=[one.method]) for one in served),
        Route("/health", health),
        Route("/ready", ready),
        Route("/openapi.json", describe),
    ]
    paths: dict[object, str] = {route.endpoint: route.path for route in routes}
    for path in paths.values():
        requests.labels(path=path, code="200")
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refused})

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A path that the application doesn't have is the client's choice, so no label.
                path = paths.get(scope.get("endpoint"), "other")
                requests.labels(path=path, code=str(message["status"])).inc()
            await send(message)

        await app(scope, receive, count)

    return counted


async def _refused(request: Request, error: Exception) -> Response:
    """The reply to a path or a method that the application doesn't have."""
    status, headers = 404, None
    if isinstance(error, HTTPException):
        status, headers = error.status_code, error.headers
    code = "method_not_allowed" if status == 405 else "not_found"
    refusal = Refusal(status, code, f"there is no {request.method} {request.url.path[:80]!r}")
    return Response(body_of(refusal), status, headers, JSON)


def openapi(served: list[Endpoint[Any]]) -> dict[str, Any]:
    """OpenAPI of the endpoints, with the schemas of the models that parse their bodies."""
    template = "#/components/schemas/{model}"
    bodies = [(one.body, "validation") for one in served if one.body is not None]
    references, schemas = models_json_schema(bodies, ref_template=template)  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for one in served:
        statuses = sorted({row.status for row in TABLE.values()})
        operation: dict[str, Any] = {
            "summary": one.summary,
            "responses": {
                "200": {"description": "the reply", "content": {JSON: {}}},
                **{str(status): {"$ref": "#/components/responses/Error"} for status in statuses},
            },
        }
        if one.body is not None:
            schema = references[one.body, "validation"]
            operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
        if "{id}" in one.path:
            parameter = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            operation["parameters"] = [parameter]
        paths[one.path] = {one.method.lower(): operation}
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Stitch", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "responses": {"Error": {"description": "an error", "content": {JSON: {"schema": error}}}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
