"""Shards without models, which send scripted tokens and scripted faults over gRPC on the loopback interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any

import grpc

from stitch import channels
from stitch.cluster import ClusterConfig, GatewayConfig, ModelConfig, PairConfig, RouteConfig, ShardConfig
from stitch.errors import StitchError, Unavailable, translated_errors
from stitch.local.cluster import keep_port
from stitch.v1 import inference_pb2, shard_pb2, shard_pb2_grpc
from tests.support.byte_tokenizer import tokenizer_files

LAYERS = {"bottom": (0, 4), "top": (4, 8)}
CONTEXT_TOKENS = 128
VOCABULARY_SIZE = 400
# The id of <|im_end|>, which ends every script.
END_TOKEN = 2

Context = grpc.aio.ServicerContext[Any, Any]
Fault = Callable[[Context], Awaitable[object]]

ROUTES = (
    RouteConfig(name="weak", bottom_layers=2, top_from=4, stitch="weak.safetensors"),
    RouteConfig(name="strong", bottom_layers=4, top_from=4),
)


class StreamEndedEarly(Exception):
    """The fake ends its stream without a finish reason."""


class FakeShard(shard_pb2_grpc.ShardServicer):
    """Generates forced tokens, `script`, and then the end token.

    A replayed session continues after the tokens that it brings.
    """

    def __init__(self, name: str, role: str, script: Sequence[int] = ()) -> None:
        self.name = name
        self.role = role
        self.script = list(script)
        self.files = tokenizer_files()
        self.tokenizer = "bytes"
        self.vocabulary_size = VOCABULARY_SIZE
        self.context_tokens = CONTEXT_TOKENS
        self.kv_capacity_tokens = self.free_kv_tokens = 10_000
        # Number of parameters that this shard reads for one token, by route.
        self.parameters = {"weak": 600, "strong": 900} if role == "bottom" else {"weak": 500, "strong": 500}
        self.stitches = {"weak": "s1"} if role == "top" else {}
        # Every session waits for it before its second token.
        self.script_waits: asyncio.Event | None = None
        # A fault by the index of the generated token before which it happens once.
        self.faults: dict[int, Fault] = {}
        # Sessions that Describe reports; None: those that run.
        self.reported_sessions: int | None = None
        self.quantization = "none"
        self.suspects: list[str] = []
        # The status with which the next calls of Describe end, one each.
        self.describe_faults: list[grpc.StatusCode] = []
        # Describe waits until this is set.
        self.answers_describe = asyncio.Event()
        self.answers_describe.set()
        # Whether it refuses new sessions; Describe reports it.
        self.draining = False
        self.position_error = 0
        self.omits_finish_reason = False
        self.logprob: float | None = None
        # What it says of every session's prompt.
        self.cached_tokens = 0
        # The decision of its probe for a request with candidates; None sends no decision.
        self.decision: shard_pb2.ProbeDecision | None = shard_pb2.ProbeDecision(
            route="weak", score=0.3, gains=[0.0, 0.25], thresholds=[0.5]
        )
        self.requests: list[shard_pb2.ShardGenerateRequest] = []
        self.deadlines: list[float | None] = []
        self.polls = 0
        self.running = 0
        self.cancelled = 0
        # Where it listens; `fake_cluster` keeps it from other programs while the shard is stopped.
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def config(self) -> ShardConfig:
        address = f"127.0.0.1:{self.port}"
        role: Any = self.role
        return ShardConfig(name=self.name, role=role, layers=LAYERS[self.role], address=address)

    async def start(self) -> None:
        server = channels.open_server()
        shard_pb2_grpc.add_ShardServicer_to_server(self, server)
        self.port = channels.listen(server, f"127.0.0.1:{self.port}")
        self._server = server
        await server.start()

    async def stop(self) -> None:
        """Closes all connections at once, as a killed process does."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    async def Generate(  # type: ignore[override]
        self, request: shard_pb2.ShardGenerateRequest, context: Context
    ) -> None:
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        self.running += 1
        try:
            async with translated_errors(context):
                if self.draining:
                    raise Unavailable(f"{self.name} is shutting down")
                await self._generate(request, context)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except StreamEndedEarly:
            return
        finally:
            self.running -= 1

    async def Describe(
        self, request: shard_pb2.ShardDescribeRequest, context: Context
    ) -> shard_pb2.ShardDescribeResponse:
        self.polls += 1
        await self.answers_describe.wait()
        if self.describe_faults:
            await context.abort(self.describe_faults.pop(0), "scripted")
        return shard_pb2.ShardDescribeResponse(
            identity=self._identity(),
            kv_free_tokens=self.free_kv_tokens,
            running_sessions=self.running if self.reported_sessions is None else self.reported_sessions,
            draining=self.draining,
            suspects=self.suspects,
        )

    async def FetchTokenizer(  # type: ignore[override]
        self, request: shard_pb2.FetchTokenizerRequest, context: Context
    ) -> None:
        for name, content in self.files.items():
            for start in range(0, len(content), 1_000):
                piece = content[start : start + 1_000]
                await context.write(shard_pb2.FetchTokenizerResponse(file=name, data=piece))

    def Link(self, request_iterator: Any, context: Context) -> Any:
        raise NotImplementedError

    async def _generate(self, request: shard_pb2.ShardGenerateRequest, context: Context) -> None:
        if request.candidates and self.decision is not None:
            await context.write(shard_pb2.ShardGenerateResponse(decision=self.decision))
        first = len(request.token_ids) - request.prompt_tokens
        for index in range(first, request.sampling.max_tokens):
            if index == 1 and self.script_waits is not None:
                await self.script_waits.wait()
            if index in self.faults:
                await self.faults.pop(index)(context)
            response = self._token(index, request)
            if index == first:
                response.stages.add(name="bottom_prefill", seconds=0.25)
                response.cached_tokens = self.cached_tokens
            finish = _finish(index, response.tokens[0].id, request)
            if not self.omits_finish_reason:
                response.finish_reason = finish
            await context.write(response)
            if finish:
                return

    def _token(self, index: int, request: shard_pb2.ShardGenerateRequest) -> shard_pb2.ShardGenerateResponse:
        planned = [*request.sampling.forced_token_ids, *self.script]
        token_id = planned[index] if index < len(planned) else END_TOKEN
        token = shard_pb2.GeneratedToken(id=token_id, position=request.prompt_tokens + index + self.position_error)
        if self.logprob is not None:
            token.logprobs.CopyFrom(inference_pb2.TokenLogprobs(token_id=token_id, logprob=self.logprob))
        return shard_pb2.ShardGenerateResponse(tokens=[token])

    def _identity(self) -> shard_pb2.ShardIdentity:
        first, end = LAYERS[self.role]
        model = inference_pb2.Model(
            id="fake", layers=8, vocabulary_size=self.vocabulary_size, context_length=self.context_tokens
        )
        return shard_pb2.ShardIdentity(
            shard=self.name,
            role=self.role,
            first_layer=first,
            end_layer=end,
            bottom=model,
            top=model,
            compute_dtype="float32",
            quantization=self.quantization,
            kv_capacity_tokens=self.kv_capacity_tokens,
            tokenizer=self.tokenizer,
            routes=[
                inference_pb2.RouteDescription(name=name, parameters=count, stitch=self.stitches.get(name, ""))
                for name, count in self.parameters.items()
            ],
        )


def aborts(code: grpc.StatusCode, message: str = "scripted") -> Fault:
    """The shard ends the call with this status."""

    async def fault(context: Context) -> None:
        await context.abort(code, message)

    return fault


def raises(error: StitchError) -> Fault:
    """The shard raises this error."""

    async def fault(context: Context) -> None:
        raise error

    return fault


def waits_for(event: asyncio.Event) -> Fault:
    """The shard sends nothing more until the event is set."""
    return lambda context: event.wait()


async def ends_stream_early(context: Context) -> None:
    """The shard closes the stream without a finish reason."""
    raise StreamEndedEarly


@asynccontextmanager
async def fake_cluster(*shards: FakeShard, **gateway: Any) -> AsyncIterator[ClusterConfig]:
    """Starts these shards, yields their cluster with the routes `weak` and `strong`, and stops them after the block.

    `gateway` is passed to `GatewayConfig`.
    """
    source = ModelConfig(id="fake", source="nowhere")
    async with AsyncExitStack() as stack:
        bound = stack.enter_context(ExitStack())
        for shard in shards:
            shard.port = keep_port(bound)
            stack.push_async_callback(shard.stop)
            await shard.start()
        yield ClusterConfig(
            name="fake",
            models=PairConfig(bottom=source, top=source),
            routes=ROUTES,
            shards=tuple(shard.config for shard in shards),
            gateway=GatewayConfig(address="127.0.0.1:0", **gateway),
        )


def _finish(index: int, token_id: int, request: shard_pb2.ShardGenerateRequest) -> inference_pb2.FinishReason:
    if token_id in request.sampling.stop_token_ids:
        return inference_pb2.FINISH_REASON_STOP
    if index + 1 == request.sampling.max_tokens:
        return inference_pb2.FINISH_REASON_LENGTH
    return inference_pb2.FINISH_REASON_UNSPECIFIED
