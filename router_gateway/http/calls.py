"""One call over HTTP from its head to the end of its reply: who calls, its body within the limits, its end.

In: an ASGI request for an `Endpoint`. Out: a reply, events, or an error of the one tree. Calls and bytes are counted by
the receiver of the gRPC port, before anything is parsed. Invariant: a call whose client goes away ends, whether or not
its reply has started.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from router_gateway.admission.tenants import Credentials
from router_gateway.http.bodies import Body, parse
from router_gateway.http.errors import Refusal, body_of, event_of, headers_of, row_of
from router_gateway.requests import limits
from router_gateway.requests.pipeline import Pipeline
from router_gateway.requests.request_log import RequestLog
from router_gateway.rpc.callers import key_of
from router_gateway.rpc.receiver import Receiver
from router_gateway.rpc.servicer import log_defect
from router_gateway.shards.models import ModelRegistry
from router_gateway.tokenization.source import VocabularySource
from stitch.access import Access
from stitch.cluster import GatewayConfig
from stitch.errors import Draining, Expired, InvalidRequest, StitchError, plain
from stitch.identity import Peer
from stitch.process import InFlightTracker

BodyType = TypeVar("BodyType", bound=Body)
Headed = Mapping[str, str]
ErrorEvents = Callable[[StitchError | Refusal], bytes]

# Events are followed by a comment this often, so that nothing between client and gateway takes the stream for dead.
COMMENT_SECONDS = 15.0
COMMENT = b": still here\n\n"
# A call whose client reads nothing ends this long after its deadline.
UNREAD_SECONDS = 5.0
# Timers of the event loop take no longer ones.
MAX_DEADLINE_SECONDS = 1_000_000
REQUEST_ID = "x-request-id"
DEADLINE = "x-stitch-deadline-seconds"
_JSON = {"content-type": "application/json"}
_EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


class ClientGone(Exception):
    """The client has closed its connection: nobody reads a reply."""


@dataclass(frozen=True, slots=True)
class Services:
    """What the endpoints of one gateway share."""

    config: GatewayConfig
    pipeline: Pipeline
    models: ModelRegistry
    source: VocabularySource
    authenticate: Callable[[Credentials], object]
    receiver: Receiver
    in_flight: InFlightTracker
    # Whether a tokenizer is loaded and a whole route accepts requests.
    ready: Callable[[], bool]
    # Where clients show certificates.
    access: Access | None = None
    log: RequestLog = field(default_factory=lambda: RequestLog(time.monotonic))
    # Those that compute or send now.
    calls: set[Call] = field(default_factory=set)

    def end_calls(self) -> None:
        """Ends all calls, because the gateway stops."""
        for call in list(self.calls):
            call.end(Draining("this gateway has stopped"))


class Call:
    """A request that is being answered: its headers, and the ways to reply."""

    def __init__(self, scope: Scope, send: Send, services: Services) -> None:
        state, headers = scope.get("state", {}), Headers(scope=scope)
        host, *_ = scope.get("client") or ("unknown",)
        self.path: str = scope["path"]
        self.path_params: dict[str, Any] = scope.get("path_params", {})
        self.headers = headers
        self.peer: Peer | None = state.get("peer")
        self.client: str = host
        self.credentials = Credentials(
            key_of(headers.get("authorization")), () if self.peer is None else self.peer.names
        )
        self.arrival = services.pipeline.now()
        self.request_id = uuid.uuid4().hex
        # When the client stops waiting, by the clock of `arrival`.
        self.deadline: float | None = None
        self.write = services.log.of(self.client)
        # Whether any byte of the reply has left.
        self.sent = False
        self._abort: Callable[[], None] = state.get("abort", lambda: None)
        self._send = send
        # The head of a stream whose first event has not come.
        self._head: dict[str, Any] | None = None
        self._error_events: ErrorEvents = event_of
        self._ends: asyncio.Timeout | None = None
        self._reason: StitchError | ClientGone | None = None
        self._complete = False

    def read_headers(self, content_limit: int | None) -> None:
        """Takes the id and the deadline that the client sets. Raises InvalidRequest, or Refusal for no JSON.

        `content_limit` is in bytes; None: there is no body.
        """
        if given := self.headers.get(REQUEST_ID):
            limits.check_id(REQUEST_ID, given)
            self.request_id = given
        if (seconds := self.headers.get(DEADLINE)) is not None:
            self.deadline = self.arrival + _seconds(seconds)
        if content_limit is None:
            return
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another site may post any other type from a browser on this machine.
        if kind != "application/json":
            raise Refusal(415, "unsupported_media_type", f"content-type is {kind!r}, but it must be application/json")
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > content_limit:
            raise too_large(content_limit)

    async def reply(self, content: bytes, status: int = 200, headers: Headed | None = None) -> None:
        """Sends a whole reply in JSON."""
        length = {"content-length": str(len(content))}
        await self._start(status, {**_JSON, **length, **(headers or {})})
        await self._write(content, last=True)

    def start_events(self, headers: Headed, error_events: ErrorEvents = event_of) -> None:
        """Begins a stream of events; its head leaves with the first one, so that an error until then has a status.

        `error_events` are those that end the stream at a later error.
        """
        self._head, self._error_events = {**_EVENTS, **headers}, error_events

    async def send_events(self, events: bytes, last: bool = False) -> None:
        """Sends events, each of which ends with an empty line."""
        if self._head is not None:
            head, self._head = self._head, None
            await self._start(200, head)
        await self._write(events, last)

    async def fail(self, error: StitchError | Refusal) -> None:
        """Sends an error: a reply where none has started, else as the stream's last event, without `[DONE]`."""
        if self._complete:
            return
        if isinstance(error, Expired) and self._ends is not None and self._ends.expired():
            # The client reads nothing, so it can't be told.
            self._abort()
        elif self.sent:
            await self._write(self._error_events(error), last=True)
        else:
            self._head = None
            await self.reply(body_of(error), row_of(error).status, headers_of(error))

    def end(self, reason: StitchError | ClientGone) -> None:
        """Ends the block of `attended` by raising `reason` in it."""
        if self._ends is not None and not self._ends.expired():
            self._reason = self._reason or reason
            self._ends.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def attended(self, receive: Receive, services: Services) -> AsyncIterator[None]:
        """Runs the block until the client goes away or `end` is called.

        Raises ClientGone, what `end` was called with, or Expired where the client reads nothing until its deadline.
        """
        deadline = self.arrival + services.config.default_deadline_seconds if self.deadline is None else self.deadline
        watching = asyncio.create_task(self._await_end(receive))
        services.calls.add(self)
        try:
            async with asyncio.timeout(deadline - services.pipeline.now() + UNREAD_SECONDS) as self._ends:
                yield
        except TimeoutError:
            if self._ends is None or not self._ends.expired():
                raise
            raise self._reason or Expired("the client has read nothing until its deadline") from None
        finally:
            services.calls.discard(self)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _await_end(self, receive: Receive) -> None:
        """Ends the call when its client goes away; between events, sends comments."""
        while not self._complete:
            try:
                async with asyncio.timeout(COMMENT_SECONDS):
                    while (await receive())["type"] != "http.disconnect":
                        pass
            except TimeoutError:
                if self._head is not None or (self.sent and not self._complete):
                    await self.send_events(COMMENT)
            else:
                if not self._complete:
                    self.end(ClientGone("the client has closed its connection"))
                return

    async def _start(self, status: int, headers: Headed) -> None:
        self.sent = True
        named = {REQUEST_ID: self.request_id, **headers}
        encoded = [(name.encode(), plain(value).encode("latin-1", "replace")) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _write(self, content: bytes, last: bool) -> None:
        self._complete = self._complete or last
        await self._send({"type": "http.response.body", "body": content, "more_body": not last})


class Endpoint(Generic[BodyType]):
    """One method of one path: authenticates, counts, reads and parses a call, and lets `answer` reply to it.

    Without a `body` type the method is GET.
    """

    def __init__(
        self,
        services: Services,
        path: str,
        summary: str,
        answer: Callable[[Call, BodyType], Awaitable[None]] | Callable[[Call], Awaitable[None]],
        body: type[BodyType] | None = None,
    ) -> None:
        self.path = path
        self.summary = summary
        self.body = body
        self._services = services
        self._answer: Callable[..., Awaitable[None]] = answer

    @property
    def method(self) -> Literal["GET", "POST"]:
        """The one method that the path has."""
        return "GET" if self.body is None else "POST"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; an ASGI application."""
        call = Call(scope, send, self._services)
        try:
            await self._run(call, receive)
        except ClientGone:
            return
        except (StitchError, Refusal) as error:
            await call.fail(error)
        # A defect that one request hits must not show its text to anybody.
        except Exception as error:
            await call.fail(StitchError(log_defect(error, call.request_id)))

    async def _run(self, call: Call, receive: Receive) -> None:
        services, limit = self._services, self._services.config.limits.request_bytes
        access = services.access
        async with access.admitted(call.path, call.peer, call.client) if access is not None else nullcontext():
            # Before anything is read, whose size anybody may choose.
            services.authenticate(call.credentials)
            call.read_headers(None if self.body is None else limit)
            with services.receiver.call():
                if self.body is None:
                    await self._answer(call)
                    return
                data = await services.receiver.receive(partial(_content, receive, limit))
                with services.receiver.held(data), services.in_flight.admit():
                    body = parse(self.body, data)
                    async with call.attended(receive, services):
                        await self._answer(call, body)


def too_large(limit: int) -> Refusal:
    """The refusal of a body that has more bytes than that."""
    return Refusal(413, "request_too_large", f"a request has at most {limit:,} bytes")


async def _content(receive: Receive, limit: int) -> bytes:
    """The whole body of a request. Raises Refusal where it has more than `limit` bytes, and ClientGone."""
    content = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client has closed its connection")
        content += message.get("body", b"")
        more = message.get("more_body", False)
        if len(content) > limit:
            raise too_large(limit)
    return bytes(content)


def _seconds(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_DEADLINE_SECONDS:
        raise InvalidRequest(DEADLINE, given, f"it must be above 0 and at most {MAX_DEADLINE_SECONDS:,}")
    return seconds
