"""All shards of a cluster in one process and one thread, linked by serialized frames instead of ports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stitch.cluster import ClusterConfig
from stitch.grammar import Grammar
from stitch.membership import Membership
from stitch.v1 import shard_pb2
from stitch_server.build import load_stage
from stitch_server.engine.request import RequestOutput
from stitch_server.engine.types import Batch, LinkEvent, OutgoingStep, StepReply
from stitch_server.metrics import Metrics
from stitch_server.neighbours import Neighbours
from stitch_server.rpc.frames import StepAssembler, StepLimits, reply_frame, reply_of, step_frames
from stitch_server.rpc.handshake import routes_between
from stitch_server.rpc.tensors import pack
from stitch_server.shard import Shard, build_shard
from tests.support.engine_fakes import new_request

CPU = torch.device("cpu")


@dataclass
class ChainInProcess:
    """The shards by name."""

    cluster: ClusterConfig
    shards: dict[str, Shard] = field(default_factory=dict)
    # By shard: the routes of each of its passes.
    passes: dict[str, list[set[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for config in self.cluster.shards:
            loaded = load_stage(self.cluster, config, CPU)
            name = config.name
            links, neighbours = LinksInProcess(self, name), Neighbours(Membership(self.cluster), config)
            passes = self.passes[name] = []

            def record(batch: Batch, started: float, ended: float, passes: list[set[str]] = passes) -> None:
                passes.append({one.session.route for one in batch.segments})

            self.shards[name] = build_shard(
                self.cluster, config, loaded, CPU, links.opened, Metrics(name), neighbours, record
            )

    def generate(
        self, token_ids: Sequence[int], route: str, chain: tuple[str, ...], count: int, tenant: str = ""
    ) -> list[int]:
        """`count` greedy tokens after `token_ids`. Raises the error with which the request ends."""
        outputs = self.admit(token_ids, route, ("bottom-0", *chain), count, tenant)
        self.run(outputs)
        return [output.token.id for output in outputs if output.token is not None]

    def admit(
        self,
        token_ids: Sequence[int],
        route: str,
        chain: tuple[str, ...],
        count: int,
        tenant: str = "",
        grammar: Grammar | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """The outputs of a new request on these shards, the first one included, which `run` computes.

        `fields` are those of `new_request`.
        """
        outputs: list[RequestOutput] = []
        first, *rest = chain
        shard = self.shards[first]
        hops = (*shard.first_hop, *rest)
        fields |= {"chain": hops, "outputs": outputs, "max_tokens": count, "tenant": tenant}
        request = new_request(len(token_ids), route, **fields)
        request.token_ids, request.grammar = list(token_ids), grammar
        assert shard.first_stage is not None
        shard.first_stage.admit(request)
        return outputs

    def run(self, *requests: list[RequestOutput]) -> None:
        """Runs all shards until these requests have their last token. Raises the error with which one ends."""
        while not all(outputs and outputs[-1].finish_reason is not None for outputs in requests):
            for shard in self.shards.values():
                assert shard.engine.handle_messages(wait=False)
                shard.engine.step()
            for error in (outputs[-1].error for outputs in requests if outputs):
                if error is not None:
                    raise error

    @property
    def idle(self) -> bool:
        """Whether no shard holds a session or a block."""
        return all(shard.running_sessions == 0 and shard.pool.usage == 0.0 for shard in self.shards.values())


@dataclass
class LinksInProcess:
    """The links of one shard to its next shards."""

    chain: ChainInProcess
    own: str
    ends: dict[str, LinkEnd] = field(default_factory=dict)
    identity: shard_pb2.ShardIdentity = field(default_factory=shard_pb2.ShardIdentity)
    suspects: frozenset[str] = frozenset()
    doubted: frozenset[str] = frozenset()

    def opened(self, identity: shard_pb2.ShardIdentity, on_event: Callable[[LinkEvent], None]) -> LinksInProcess:
        """These links, for `build_shard`; replies over them are handled at once instead of by `on_event`."""
        self.identity = identity
        return self

    def send(self, neighbour: str, step: OutgoingStep) -> None:
        end = self._end(neighbour)
        for frame in step_frames(step, pack(step.hidden, self.identity.wire_dtype)):
            end.add(shard_pb2.LinkRequest.FromString(frame.SerializeToString()).step)

    def close(self, neighbour: str, session_ids: Sequence[int]) -> None:
        end = self._end(neighbour)
        end.stage.close(end, session_ids)

    def want(self, neighbour: str, tokens: int, chain: Sequence[str]) -> None:
        end = self._end(neighbour)
        end.stage.want(end, tokens, tuple(chain))

    def _end(self, neighbour: str) -> LinkEnd:
        if neighbour not in self.ends:
            self.ends[neighbour] = LinkEnd(self.chain.shards[self.own], self.chain.shards[neighbour])
        return self.ends[neighbour]


class LinkEnd:
    """The receiving end of one link."""

    is_local = False

    def __init__(self, sender: Shard, receiver: Shard) -> None:
        assert receiver.next_stage is not None
        self.stage = receiver.next_stage
        self.routes = routes_between(sender.identity, receiver.identity)
        self.prefix_scope = sender.config.name
        self._sender = sender
        self._receiver = receiver.config.name
        width = receiver.incoming_width(sender.config.role)
        limits = StepLimits(receiver.max_prefill_tokens, 1 << 30)
        self._assembler = StepAssembler(width, receiver.identity.wire_dtype, limits, receiver.unpack)

    def add(self, frame: shard_pb2.Step) -> None:
        step = self._assembler.add(frame)
        if step is not None:
            self.stage.receive(self, step)

    def reply(self, reply: StepReply) -> None:
        self._assembler.answered(reply.step)
        message = shard_pb2.LinkResponse.FromString(reply_frame(reply).SerializeToString()).reply
        source = self._sender.next_stage or self._sender.first_stage
        assert source is not None
        source.on_reply(self._receiver, reply_of(message))

    def grant(self, tokens: int) -> None:
        source = self._sender.next_stage or self._sender.first_stage
        assert source is not None
        source.on_kv_room(self._receiver, tokens)
