"""All shards of a cluster in one process and one thread; what travels between them are bytes. Opens no port."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from stitch.cluster import ClusterConfig
from stitch.v1 import shard_pb2
from stitch_server.build import load_stage
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.next_stage import NextStage, ReceivedStep
from stitch_server.engine.session import RequestOutput
from stitch_server.engine.types import OutgoingStep, StepReply
from stitch_server.metrics import Metrics
from stitch_server.rpc.frames import Assembly, reply_frame, reply_of, step_frames
from stitch_server.rpc.tensors import pack
from stitch_server.shard import Shard, build_shard
from tests.support.engine_fakes import new_session

CPU = torch.device("cpu")


@dataclass
class ChainInProcess:
    """The shards by name; a shard's name is its address."""

    cluster: ClusterConfig
    shards: dict[str, Shard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place in self.cluster.shards:
            loaded = load_stage(self.cluster, place, CPU)
            links = LinksInProcess(self, place.name)
            self.shards[place.name] = build_shard(self.cluster, place, loaded, CPU, links, Metrics(place.name))

    def generate(self, token_ids: Sequence[int], route: str, chain: tuple[str, ...], count: int) -> list[int]:
        """`count` greedy tokens behind `token_ids`; raises what the session ended with."""
        heard: list[RequestOutput] = []
        session = new_session(len(token_ids), route, chain=chain, heard=heard, max_tokens=count)
        session.token_ids = list(token_ids)
        origin = self.shards["bottom-0"].front
        assert isinstance(origin, FirstStage)
        origin.admit(session)
        while not heard or heard[-1].finish_reason is None:
            for shard in self.shards.values():
                shard.engine.step()
            if heard and heard[-1].error is not None:
                raise heard[-1].error
        return [progress.token.id for progress in heard if progress.token is not None]

    @property
    def idle(self) -> bool:
        """Whether no shard holds a session or a block."""
        return all(shard.front.running_sessions == 0 and shard.pool.usage == 0.0 for shard in self.shards.values())


@dataclass
class LinksInProcess:
    """A shard's links to those behind it."""

    chain: ChainInProcess
    own: str
    ends: dict[str, LinkEnd] = field(default_factory=dict)

    def send(self, address: str, step: OutgoingStep) -> None:
        end = self._end(address)
        packed = pack(step.hidden, self.chain.shards[self.own].cluster.compute.wire_dtype)
        for frame in step_frames(step, packed):
            end.take(shard_pb2.LinkRequest.FromString(frame.SerializeToString()).step)

    def close(self, address: str, numbers: Sequence[int]) -> None:
        end = self._end(address)
        end.relay.close(end, numbers)

    def _end(self, address: str) -> LinkEnd:
        if address not in self.ends:
            self.ends[address] = LinkEnd(self.chain.shards[self.own], self.chain.shards[address])
        return self.ends[address]


class LinkEnd:
    """The receiving end of one link."""

    def __init__(self, sender: Shard, receiver: Shard) -> None:
        assert isinstance(receiver.front, NextStage)
        self.relay = receiver.front
        self._sender, self._receiver = sender, receiver
        width = receiver.incoming_width(sender.config.role)
        self._assembly = Assembly(width, receiver.identity.wire_dtype, receiver.max_step_tokens)

    def take(self, frame: shard_pb2.Step) -> None:
        step = self._assembly.add(frame)
        if step is not None:
            hidden = partial(self._receiver.unpack, step.rows)
            self.relay.receive(ReceivedStep(self, step.number, step.segments, hidden, step.pipelined))

    def reply(self, reply: StepReply) -> None:
        sent = reply_frame(reply).SerializeToString()
        self._sender.front.replied(reply_of(shard_pb2.LinkResponse.FromString(sent).reply))
