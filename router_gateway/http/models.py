"""`GET /v1/models` and `/v1/models/{id}`: the cluster's routes, and `auto`, as OpenAI's models."""

from __future__ import annotations

import time
from typing import Any

from router_gateway.http.calls import Call, Services
from router_gateway.http.generation import compact, unknown_model
from router_gateway.rpc.messages import AUTO

STARTED = int(time.time())


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "stitch"}


async def models(services: Services, call: Call) -> None:
    """Replies with all models."""
    names = [AUTO, *services.models.routes()]
    await call.reply(compact({"object": "list", "data": [_model(name) for name in names]}))


async def model(services: Services, call: Call) -> None:
    """Replies with the model in the path. Raises Refusal where there is none."""
    name: str = call.path_params["id"]
    if name not in (AUTO, *services.models.routes()):
        raise unknown_model(name)
    await call.reply(compact(_model(name)))
