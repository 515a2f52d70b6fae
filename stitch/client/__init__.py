"""The client library: prompts in, answers out, blocking or with asyncio. It talks to a gateway and to no shard.

with Client("127.0.0.1:7001") as client:
    print(client.generate("The capital of France is", max_tokens=8).text)
"""

from stitch.client.answers import (
    Alternative,
    Answer,
    Delta,
    RouteDecision,
    TokenLogprobs,
    ToolCall,
)
from stitch.client.asynchronous import AsyncClient, AsyncStream
from stitch.client.blocking import Client, Stream
from stitch.client.messages import Message, RequestFields, RouteFields

__all__ = [
    "Alternative",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Delta",
    "Message",
    "RequestFields",
    "RouteDecision",
    "RouteFields",
    "Stream",
    "TokenLogprobs",
    "ToolCall",
]
