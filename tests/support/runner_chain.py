"""Two model runners in a chain, bottom and top, and the references whose logits the chain must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stitch.sampling import Sampling
from stitch_server.attention import backend_for
from stitch_server.attention.flash import PAGE_TOKENS
from stitch_server.engine.types import Batch, LayerRange, Segment, Session, StepOutput, in_layer_order
from stitch_server.kv_cache.block_pool import blocks_for
from stitch_server.kv_cache.store import KVStore
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.embedding_and_head import Embedding, Head
from stitch_server.model.stitch import Stitch
from stitch_server.model.weights import AS_STORED, WeightFormat
from stitch_server.worker.cuda_graphs import DecodeGraphs
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import ParallelismTuner
from tests.support.cpu_capture import CpuCapture
from tests.support.reference_varlen_kernel import reference_varlen
from tests.support.stitched_reference import StitchedReference, reference
from tests.support.tiny_model import TOKENS, TinyPair, write_random_stitch

CPU, DTYPE = torch.device("cpu"), torch.float32
# Route to (bottom_layers, top_from).
ROUTES = {"weak": (3, 2), "strong": (5, 1)}
ADAPTER_RANKS = {"weak": 3, "strong": 0}
BLOCKS = 64
TOP_FIRST = 1


@dataclass(frozen=True)
class Halves:
    """The bottom and the top runner of a pair, and the references by route."""

    bottom: ModelRunner
    top: ModelRunner
    references: dict[str, StitchedReference]


def new_runner(
    folder: Path,
    first: int,
    end: int,
    *,
    as_on_a_gpu: bool = False,
    weight_format: WeightFormat = AS_STORED,
    **parts: object,
) -> ModelRunner:
    decoder = DecoderLayers.load(folder, first, end, CPU, DTYPE, weight_format)
    shape = decoder.kv_heads, decoder.head_dim, CPU, DTYPE
    if not as_on_a_gpu:
        attention = backend_for(KVStore(first, end, BLOCKS, *shape))
        return ModelRunner(decoder, attention, CPU, ParallelismTuner(1, 1), **parts)  # type: ignore[arg-type]
    store = KVStore(first, end, BLOCKS + 1, *shape, PAGE_TOKENS)
    graphs = DecodeGraphs(decoder, store, reference_varlen, 2, CpuCapture())
    attention = backend_for(store, reference_varlen)
    return ModelRunner(decoder, attention, CPU, ParallelismTuner(1, 1), graphs=graphs, **parts)  # type: ignore[arg-type]


def load(pair: TinyPair, folder: Path, as_on_a_gpu: bool = False, weight_format: WeightFormat = AS_STORED) -> Halves:
    files = {
        route: write_random_stitch(
            folder / f"{route}.safetensors", pair.bottom, pair.top, *cut, adapter_rank=ADAPTER_RANKS[route]
        )
        for route, cut in ROUTES.items()
    }
    stitches = {route: Stitch.load(file, CPU, DTYPE) for route, file in files.items()}
    bottom = new_runner(
        pair.bottom,
        0,
        5,
        as_on_a_gpu=as_on_a_gpu,
        weight_format=weight_format,
        embed=Embedding.load(pair.bottom, CPU, DTYPE),
    )
    head = Head.load(pair.top, CPU, DTYPE, TOKENS)
    adapters = {route: stitch.adapters for route, stitch in stitches.items() if stitch.adapters is not None}
    parts: dict[str, object] = {"stage": "top_prefill", "stitches": stitches, "adapters": adapters, "head": head}
    parts["ending"] = frozenset(ROUTES)
    top = new_runner(pair.top, TOP_FIRST, 4, as_on_a_gpu=as_on_a_gpu, weight_format=weight_format, **parts)
    references = {route: reference(pair.bottom, pair.top, files[route], *cut) for route, cut in ROUTES.items()}
    return Halves(bottom, top, references)


@dataclass
class Chain:
    """Two runners in a chain, and sessions whose blocks are not adjacent."""

    halves: Halves
    free: list[int] = field(default_factory=lambda: list(range(BLOCKS)))
    blocks: dict[int, list[int]] = field(default_factory=dict)

    def session(self, route: str, token_ids: Sequence[int], **sampling: object) -> Session:
        session = Session(route, (), Sampling(**sampling), list(token_ids), len(token_ids))  # type: ignore[arg-type]
        # Every second block, from the end.
        self.blocks[session.id] = [self.free.pop(-1 - index % 2) for index in range(8)]
        return session

    def segment(self, session: Session, length: int | None = None, wants_token: bool = True) -> Segment:
        """The next `length` tokens of a session; by default all remaining ones."""
        position = session.cached
        length = len(session.token_ids) - position if length is None else length
        session.cached += length
        blocks = self.blocks[session.id][: blocks_for(session.cached)]
        return Segment(session, LayerRange(0, ROUTES[session.route][0]), position, length, wants_token, blocks)

    def bottom(self, *segments: Segment, pipelined: bool = False) -> tuple[Batch, StepOutput]:
        batch = Batch(in_layer_order(segments), pipelined)
        return batch, self.halves.bottom.run(batch)

    def top(self, batch: Batch, hidden: Sequence[Tensor]) -> tuple[Batch, StepOutput]:
        """The same segments on the next shard."""
        received = [
            Segment(
                one.session,
                LayerRange(ROUTES[one.session.route][1], 4),
                one.position,
                one.length,
                one.wants_token,
                one.blocks,
                hidden=rows,
            )
            for one, rows in zip(batch.segments, hidden, strict=True)
        ]
        arrived = Batch(in_layer_order(received))
        return arrived, self.halves.top.run(arrived)

    def run(self, *segments: Segment) -> dict[int, int]:
        """Sampled token ids by session id."""
        batch, output = self.bottom(*segments)
        arrived, answer = self.top(batch, rows_of(batch, output))
        return {arrived.segments[index].session.id: token.id for index, token in answer.tokens.items()}

    def expected(self, session: Session) -> int:
        """The most likely next token by `transformers`."""
        return int(self.halves.references[session.route].logits(session.token_ids)[-1, :TOKENS].argmax())


def rows_of(batch: Batch, output: StepOutput) -> tuple[Tensor, ...]:
    """Each segment's hidden states."""
    assert output.hidden is not None
    return torch.split(output.hidden, [one.length for one in batch.segments])


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 300, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
