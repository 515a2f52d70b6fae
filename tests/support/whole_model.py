"""A whole model by `transformers`: its logits and its greedy tokens; and its logits through this project's layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from stitch_server.attention import backend_for
from stitch_server.kv_cache.store import KVStore, Span
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.embedding_and_head import Embedding, Head
from stitch_server.model.weights import AS_STORED, WeightFormat
from tests.support.reference_attention import ReferenceAttention

CPU = torch.device("cpu")
PROMPT = [(17 * position + position**2) % 300 for position in range(40)]


@torch.inference_mode()
def our_logits(
    folder: Path,
    cuts: Sequence[int],
    chunks: Sequence[int],
    dtype: torch.dtype = torch.float32,
    weight_format: WeightFormat = AS_STORED,
) -> Tensor:
    """Logits `[tokens, vocabulary]` of PROMPT: `cuts` bound the shards' layers, `chunks` the passes' positions.

    Layers with kernels attend over a KV cache; the others by the reference attention.
    """
    shards = [DecoderLayers.load(folder, first, end, CPU, dtype, weight_format) for first, end in pairwise(cuts)]
    embedding, head = Embedding.load(folder, CPU, dtype), Head.load(folder, CPU, dtype)
    reference = ReferenceAttention()
    stores = [KVStore(each.first, each.end, 4, each.kv_heads, each.head_dim, CPU, dtype) for each in shards]
    logits = []
    for begin, stop in pairwise(chunks):
        hidden = embedding(torch.tensor(PROMPT[begin:stop]))
        for shard, store in zip(shards, stores, strict=True):
            cached = backend_for(store)([Span(begin, stop - begin, range(4))])
            if cached.paged_kv is not None and shard.is_compiled(stop - begin):
                hidden = shard.run_compiled(hidden, cached.paged_kv, shard.first, shard.end)
            else:
                attend = cached if weight_format.kernels else reference
                hidden = shard.run(hidden, shard.rotary(torch.arange(begin, stop)), attend, shard.first, shard.end)
        logits.append(head(hidden))
    return torch.cat(logits)


@torch.inference_mode()
def their_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same logits by `transformers`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    logits: Tensor = model(torch.tensor([PROMPT])).logits[0].float()
    return logits


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """The whole model's greedy token at every position of the answer.

    One pass over prompt and answer; equal to the answer exactly if greedy `generate` gives that answer.
    """
    logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
    predicted: list[int] = logits[len(prompt) - 1 : -1].argmax(dim=1).tolist()
    return predicted


@torch.inference_mode()
def generated(
    model: PreTrainedModel, prompt: Sequence[int], count: int, end: int | None = None, tokens: int | None = None
) -> list[int]:
    """The answer of greedy `generate`, which stops at the token `end`.

    Rows of the head from `tokens` on, which pad the vocabulary, are never chosen.
    """
    ids = torch.tensor([list(prompt)])
    model.generation_config.eos_token_id = end
    padding = None if tokens is None else list(range(tokens, model.config.vocab_size))
    found: torch.Tensor = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        suppress_tokens=padding or None,
    )
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer
