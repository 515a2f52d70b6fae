"""Both models of a cluster, whole and frozen, as training runs them: any range of layers, over whole sequences.

Sequences are causal and start at position 0. Gradients flow to the hidden states and to adapters, never to the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch.cluster import ROLES, ClusterConfig, Quantization, Role
from stitch.environment import cache_folder
from stitch.errors import Incompatible
from stitch.tokenizer_files import tokenizer_hash
from stitch_server.attention import Attend, Layer, Rotary, backend_for
from stitch_server.kv_cache.store import KVStore, Span
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.description import ModelDescription, ParameterCount, read_config
from stitch_server.model.embedding_and_head import Embedding
from stitch_server.model.ffn_skip import FfnSkip, Skipping
from stitch_server.model.quantized import rounded
from stitch_server.model.stitch import Stitch
from stitch_server.model.weights import AS_STORED, WeightFormat, Weights
from stitch_server.sources.resolve import resolve
from stitch_training.data import PairRevisions
from stitch_training.device import CPU
from stitch_training.folder_encoder import FolderEncoder
from stitch_training.trace import TEACHER_TOKENS, Teacher

# Tokens whose logits are in memory at a time; over a vocabulary of 152 k and in float32, one token has 0.6 MB.
LOGIT_TOKENS = 256


class FrozenModel:
    """Embedding, all decoder layers and head of one model folder."""

    def __init__(self, embedding: Embedding, layers: DecoderLayers, head: DenseHead, dtype: torch.dtype) -> None:
        self._embedding, self._layers, self._head, self._dtype = embedding, layers, head, dtype
        self._device = head.weight.device

    @classmethod
    def load(
        cls,
        folder: Path,
        layers: int,
        device: torch.device,
        dtype: torch.dtype,
        weight_format: WeightFormat = AS_STORED,
    ) -> FrozenModel:
        """Raises Incompatible where the folder does not hold `layers` layers of a known family."""
        decoder = DecoderLayers.load(folder, 0, layers, device, dtype, weight_format)
        head = DenseHead.load(folder, device, dtype, weight_format)
        return cls(Embedding.load(folder, device, dtype), decoder, head, dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the states."""
        return self._device

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        return self._layers.end

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return self._layers.hidden_size

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the input of layer 0, `[sequences, tokens, hidden]`, for token ids `[sequences, tokens]`.

        The ids may be on the CPU.
        """
        return self._embedding(tokens.to(self._device))

    def run(
        self,
        hidden: Tensor,
        first: int,
        end: int,
        adapters: Adapters | None = None,
        skip: FfnSkip | None = None,
        generated: Tensor | None = None,
    ) -> Tensor:
        """Runs hidden states `[sequences, tokens, hidden]` through layers [first, end), with adapters beside them.

        Of the tokens that are `generated`, bool `[sequences, tokens]`, those `skip` FFNs whose gates open.
        """
        sequences, length, _ = hidden.shape
        packed, rotary = self._packed(hidden)
        attend, adapted = CausalSequences(sequences), self._adapted(adapters)
        skipping = [] if generated is None else self._skipping(skip, generated.flatten().nonzero()[:, 0])
        return self._layers.run(packed, rotary, attend, first, end, adapted, skipping).view(sequences, length, -1)

    def run_each(self, hidden: Tensor, run_layer: Callable[[Layer, Tensor, Rotary, Attend], Tensor]) -> Tensor:
        """Runs hidden states `[sequences, tokens, hidden]` through all layers, each packed by `run_layer`."""
        sequences, length, _ = hidden.shape
        packed, rotary = self._packed(hidden)
        for index in range(self.depth):
            packed = run_layer(self._layers.layer(index), packed, rotary, CausalSequences(sequences))
        return packed.view(sequences, length, -1)

    def new_store(self, first: int, end: int, blocks: int) -> KVStore:
        """Allocates a KV cache of `blocks` blocks for layers [first, end)."""
        layers = self._layers
        return KVStore(first, end, blocks, layers.kv_heads, layers.head_dim, self._device, self._dtype)

    def extend(
        self,
        hidden: Tensor,
        spans: Sequence[Span],
        store: KVStore,
        adapters: Adapters | None = None,
        skip: FfnSkip | None = None,
        generated: Sequence[int] = (),
    ) -> Tensor:
        """Runs packed hidden states `[tokens, hidden]`, which extend their `spans`, through the layers of `store`.

        The rows that are `generated` `skip` FFNs.
        """
        positions = torch.cat([torch.arange(span.position, span.end, device=hidden.device) for span in spans])
        rotary = self._layers.rotary(positions)
        attend, adapted = backend_for(store)(spans), self._adapted(adapters)
        skipping = self._skipping(skip, torch.tensor(list(generated), dtype=torch.int64))
        return self._layers.run(hidden.to(self._dtype), rotary, attend, store.first, store.end, adapted, skipping)

    def logits(self, hidden: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Returns float32 logits `[tokens, vocabulary]` of last-layer states `[tokens, hidden]`.

        With `token_ids` they are the logits of these vocabulary entries alone.
        """
        return self._head(hidden.to(self._dtype), token_ids)

    def head_weight(self) -> Tensor:
        """Returns the LM head with the final norm's gains multiplied in, `[vocabulary, hidden]`."""
        return self._head.weight * self._head.norm

    def _packed(self, hidden: Tensor) -> tuple[Tensor, Rotary]:
        """Returns the states `[tokens, hidden]` of whole sequences, and their rotations."""
        sequences, length, _ = hidden.shape
        rotary = self._layers.rotary(torch.arange(length, device=hidden.device).repeat(sequences))
        return hidden.to(self._dtype).flatten(0, 1), rotary

    def _skipping(self, skip: FfnSkip | None, rows: Tensor) -> Skipping:
        return [] if skip is None or not len(rows) else [(rows.to(self._device), skip.to(self._device, self._dtype))]

    def _adapted(self, adapters: Adapters | None) -> list[tuple[slice, Adapters]]:
        return [] if adapters is None else [(slice(None), adapters.to(self._device, self._dtype))]


@dataclass(frozen=True)
class DenseHead:
    """Final norm and LM head as plain matrices, from which single vocabulary entries can be read."""

    norm: Tensor
    epsilon: float
    # [vocabulary, hidden]
    weight: Tensor

    @classmethod
    def load(
        cls, folder: Path, device: torch.device, dtype: torch.dtype, weight_format: WeightFormat = AS_STORED
    ) -> DenseHead:
        """Reads the head; a tied one is the embedding. Raises Incompatible where a tensor is missing."""
        config = read_config(folder)
        with Weights(folder, device, dtype) as weights:
            matrix = weights.read(weights.head_name(config.tie_word_embeddings))
            norm = weights.read("model.norm.weight")
        return cls(norm, config.rms_norm_eps, rounded(matrix, weight_format.for_head.quantization))

    def __call__(self, hidden: Tensor, token_ids: Tensor | None) -> Tensor:
        """Returns float32 `[tokens, vocabulary]`, or `[tokens, len(token_ids)]`, of states `[tokens, hidden]`."""
        normed = F.rms_norm(hidden, self.norm.shape, self.norm, self.epsilon)
        return F.linear(normed, self.weight if token_ids is None else self.weight[token_ids]).float()


class CausalSequences:
    """Causal attention within each of `sequences` packed sequences of equal length, without a KV cache."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Implements `model.attend.Attend`."""
        query, key, value = (self._by_sequence(packed) for packed in (query, key, value))
        length = query.shape[2]
        mask = None if window is None or window >= length else banded_mask(length, window, query.device)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)

    def _by_sequence(self, packed: Tensor) -> Tensor:
        """`[tokens, heads, head_dim]` to `[sequences, heads, tokens, head_dim]`."""
        return packed.view(self._sequences, -1, *packed.shape[1:]).transpose(1, 2)


def banded_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Returns a bool mask `[length, length]` by which token p attends to p - window + 1 up to p."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)


@dataclass(frozen=True)
class Pair:
    """A bottom and a top model; one object twice where a model is cut against itself."""

    bottom: FrozenModel
    top: FrozenModel
    # Tokens that both models have; vocabulary entries beyond are padding of one of them.
    vocabulary: int
    # Of a control, whose bottom is not the model that training imitates; None: it is the bottom.
    other_teacher: FrozenModel | None = None

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return self.bottom.device

    @property
    def teacher(self) -> FrozenModel:
        """The model whose distribution training imitates."""
        return self.bottom if self.other_teacher is None else self.other_teacher


def states_at(model: FrozenModel, tokens: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
    """Returns for each of `depths` the states `[sequences, tokens, hidden]` after that number of layers."""
    hidden, reached, states = model.embed(tokens), 0, {}
    for depth in sorted(set(depths)):
        hidden = model.run(hidden, reached, depth) if depth > reached else hidden
        reached, states[depth] = depth, hidden
    return states


def teacher_of(model: FrozenModel, hidden: Tensor, vocabulary: int) -> Teacher:
    """Returns the likeliest of the first `vocabulary` tokens for last-layer states `[sequences, tokens, hidden]`."""
    kept = [_likeliest(model.logits(some)[:, :vocabulary]) for some in torch.split(hidden.flatten(0, 1), LOGIT_TOKENS)]
    shape = (*hidden.shape[:2], TEACHER_TOKENS)
    ids, logprobs = (torch.cat(parts).view(shape) for parts in zip(*kept, strict=True))
    return Teacher(ids, logprobs)


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = logits.topk(TEACHER_TOKENS)
    return ids, values - logits.logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class LoadedPair:
    """Two models in memory, with their descriptions, parameter counts and common tokenizer."""

    pair: Pair
    bottom: ModelDescription
    top: ModelDescription
    bottom_count: ParameterCount
    top_count: ParameterCount
    encoder: FolderEncoder
    # Hash of the tokenizer.
    tokenizer: str
    # Of `pair.other_teacher`.
    teacher: ModelDescription | None = None

    @property
    def is_one_model(self) -> bool:
        """Whether a model is cut against itself."""
        return self.pair.bottom is self.pair.top

    @property
    def revisions(self) -> PairRevisions:
        """What identifies the weights that a pass over the data runs."""
        teacher = self.bottom if self.teacher is None else self.teacher
        return PairRevisions(self.bottom.revision, self.top.revision, teacher.revision)

    def control(self, role: Role) -> LoadedPair:
        """Returns one of the models as a pair with itself, which training teaches to imitate the bottom."""
        if self.is_one_model:
            return self
        bottom, top, vocabulary = self.pair.bottom, self.pair.top, self.pair.vocabulary
        if role == "bottom":
            return replace(self, pair=Pair(bottom, bottom, vocabulary), top=self.bottom, top_count=self.bottom_count)
        pair = Pair(top, top, vocabulary, other_teacher=bottom)
        return replace(self, pair=pair, bottom=self.top, bottom_count=self.top_count, teacher=self.bottom)

    def load_stitch(self, path: Path, cut: tuple[int, int]) -> Stitch:
        """Reads a stitch in float32 onto the models' device.

        Raises Incompatible where it was made for another pair or cut point.
        """
        stitch = Stitch.load(path, self.pair.device, torch.float32)
        stitch.check_models(self.bottom.to_proto(), self.top.to_proto())
        stitch.check_cut(*cut)
        stitch.check_tokenizer(self.tokenizer)
        stitch.check_depth(self.top.layers)
        return stitch


def load_pair(
    cluster: ClusterConfig, dtype: torch.dtype, device: torch.device = CPU, quantization: Quantization = "none"
) -> LoadedPair:
    """Loads both models on the device in `dtype`; once where both roles have the same folder.

    Their weights are rounded to those that the `quantization` stands for.

    Raises Incompatible where their tokenizers differ.
    """
    sources = cluster.models.bottom, cluster.models.top
    folders = [resolve(cluster.model_source(role), cache_folder()) for role in ROLES]
    hashes = [tokenizer_hash(folder) for folder in folders]
    if hashes[0] != hashes[1]:
        raise Incompatible(f"the tokenizers of {sources[0].id} and {sources[1].id} differ")
    descriptions = [ModelDescription.read(folder, source.id) for folder, source in zip(folders, sources, strict=True)]
    weight_format = WeightFormat(quantization, is_rounded=True)
    bottom = FrozenModel.load(folders[0], descriptions[0].layers, device, dtype, weight_format)
    top = bottom
    if folders[0] != folders[1]:
        top = FrozenModel.load(folders[1], descriptions[1].layers, device, dtype, weight_format)
    return LoadedPair(
        pair=Pair(bottom, top, min(model.vocabulary_size for model in descriptions)),
        bottom=descriptions[0],
        top=descriptions[1],
        bottom_count=ParameterCount.read(folders[0]),
        top_count=ParameterCount.read(folders[1]),
        encoder=FolderEncoder(folders[0]),
        tokenizer=hashes[0],
    )
