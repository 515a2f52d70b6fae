"""Samples the next tokens from logits.

Grammar, logit bias and least number of tokens, penalties, temperature, top-k, top-p, min-p, in this order, as in vLLM
and `transformers`. The draw depends on the request's seed and the token's position alone, not on the batch or on
earlier draws, so an answer that is replayed on another shard continues with the same tokens.

A draw is a race: each token has an exponential time by seed, position and its own id, divided by its probability, and
the first one wins (the Gumbel-max trick, https://arxiv.org/abs/1611.01144). Shards whose logits differ in the last
digits so draw different tokens only where the first two come in at the same time. In a running sum of probabilities
such a difference would move the draws of all later tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stitch.sampling import Sampling, Token, TokenLogprobs
from stitch_server.devices import to_device_async
from stitch_server.model.constraint import Forbidden

# Top-p seldom needs more candidates. Finding these among 152 k tokens takes 0.5 ms, sorting all 11 ms.
TOP_P_CANDIDATES = 1024
# SplitMix64's constants (https://doi.org/10.1145/2714064.2660195) as signed numbers.
_STEP, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
# A tensor, or on a CPU an array: there NumPy takes a fifth of PyTorch's time.
_Array = Any


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """How the token of one row of logits is chosen."""

    sampling: Sampling
    # The position of the token to choose; the prompt's first token has 0.
    position: int
    # The tokens so far; read only if there are penalties.
    history: Sequence[int]
    # The number of tokens of `history` that are the prompt.
    prompt_tokens: int
    # The tokens that a grammar forbids, bool `[vocabulary]`; None: there is no grammar.
    forbidden: Forbidden | None = None

    @property
    def may_end(self) -> bool:
        """Whether the token may be an end token, and so the last one."""
        return self.position - self.prompt_tokens >= self.sampling.min_tokens


def sample(logits: Tensor, requests: Sequence[SampleRequest]) -> list[Token]:
    """Chooses n tokens from logits float32 `[n, vocabulary]` by n requests.

    The logits are finite, and may be changed; the log-probabilities, if requested, are the model's: those before
    grammars, bias, penalties and filters.
    """
    ids = _choose_ids(_without_forbidden(logits, requests), requests)
    return [
        Token(ids[row], request.position, _logprobs(logits, row, ids[row], request.sampling.logprobs))
        for row, request in enumerate(requests)
    ]


def _without_forbidden(logits: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """The logits, minus infinity where a grammar forbids the token; copied where log-probabilities are read later."""
    masks = {row: request.forbidden for row, request in enumerate(requests) if request.forbidden is not None}
    if not masks:
        return logits
    if any(requests[row].sampling.logprobs is not None for row in masks):
        logits = logits.clone()
    if logits.device.type == "cpu":
        for row, forbidden in masks.items():
            np.copyto(logits[row].numpy(), -np.inf, where=forbidden)
        return logits
    stacked = to_device_async(torch.from_numpy(np.stack(list(masks.values()))), logits.device)
    rows = to_device_async(torch.tensor(list(masks)), logits.device)
    return logits.index_copy_(0, rows, logits[rows].masked_fill_(stacked, -math.inf))


def _choose_ids(logits: Tensor, requests: Sequence[SampleRequest]) -> list[int]:
    plain = [_is_plain(request) for request in requests]
    ids = _argmax(logits) if any(plain) else [0] * len(requests)
    for index, request in enumerate(requests):
        if not plain[index]:
            ids[index] = _choose(logits[index], request)
    return ids


def _argmax(logits: Tensor) -> list[int]:
    # On a CPU PyTorch takes 600 µs for eight rows of 49 k, NumPy 24.
    rows = logits.numpy() if logits.device.type == "cpu" else logits
    ids: list[int] = rows.argmax(1).tolist()
    return ids


def _is_plain(request: SampleRequest) -> bool:
    """Whether the likeliest token is chosen; others don't slow down for one that is not."""
    sampling = request.sampling
    changes = sampling.penalizes or sampling.logit_bias or sampling.forced_token_ids
    return sampling.greedy and not changes and request.may_end


def _logprobs(logits: Tensor, row: int, token: int, alternatives: int | None) -> TokenLogprobs | None:
    """None where none are requested; the alternatives are the likeliest tokens, likeliest first."""
    if alternatives is None:
        return None
    # Of logits at both ends of float32 the difference overflows.
    logprobs = logits[row].log_softmax(dim=0).clamp(min=torch.finfo(logits.dtype).min)
    values, ids = logprobs.topk(min(alternatives, len(logprobs)))
    return TokenLogprobs(float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _choose(row: Tensor, request: SampleRequest) -> int:
    forced, generated = request.sampling.forced_token_ids, request.position - request.prompt_tokens
    if 0 <= generated < len(forced):
        return forced[generated]
    if request.sampling.logit_bias or not request.may_end:
        row = apply_bias(row, request)
    if request.sampling.penalizes:
        row = apply_penalties(row, request)
    if request.sampling.greedy:
        return int(row.argmax())
    if request.sampling.filters:
        return _draw(*top_candidates(row, request.sampling), request)
    weights = (row - row.max()).div_(request.sampling.temperature).softmax(dim=0)
    return _draw(weights, None, request)


def apply_bias(row: Tensor, request: SampleRequest) -> Tensor:
    """Returns finite logits `[vocabulary]`, biased and with the least one for end tokens too early, as a new tensor."""
    row = row.clone()
    if request.sampling.logit_bias:
        ids, biases = zip(*request.sampling.logit_bias, strict=True)
        row.index_add_(0, torch.tensor(ids, device=row.device), torch.tensor(biases, dtype=row.dtype).to(row.device))
    if not request.may_end:
        # Of several ends none is likelier, also where a request names the whole vocabulary. A model's end tokens may
        # only pad its vocabulary, and have no logit here.
        ends = [end for end in request.sampling.stop_token_ids if end < len(row)]
        row[torch.tensor(ends, dtype=torch.int64, device=row.device)] = torch.finfo(row.dtype).min
    return row


def apply_penalties(row: Tensor, request: SampleRequest) -> Tensor:
    """Returns finite logits float64 `[vocabulary]` with the penalties for earlier tokens, as a new tensor.

    The repetition penalty counts prompt and answer, as in https://arxiv.org/abs/1909.05858; presence and frequency
    count the answer alone, as in https://platform.openai.com/docs/api-reference/completions.
    """
    sampling, row = request.sampling, row.double()
    history = torch.as_tensor(request.history, dtype=torch.int64, device=row.device)
    occurred, generated = _count(history, len(row)) > 0, _count(history[request.prompt_tokens :], len(row))
    # A tiny penalty overflows.
    divided = (row / sampling.repetition_penalty).clamp(max=torch.finfo(row.dtype).max)
    repeated = torch.where(row > 0, divided, row * sampling.repetition_penalty)
    row = torch.where(occurred, repeated, row)
    return row - sampling.frequency_penalty * generated.double() - sampling.presence_penalty * (generated > 0).double()


def _count(ids: Tensor, vocabulary: int) -> Tensor:
    """How often each token occurs, `[vocabulary]`; a prompt may hold ids that only pad it and have no logit here."""
    return torch.bincount(ids[ids < vocabulary], minlength=vocabulary)


def top_candidates(row: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Returns the probabilities `[candidates]` of the tokens that top-k, top-p and min-p leave, and their ids.

    `row` is logits `[vocabulary]`. The probabilities sum to 1 before top-p, which like min-p does not renormalize.
    """
    # From the largest down, so that a temperature near zero overflows to minus infinity and not to NaN.
    distribution = ((row - row.max()) / sampling.temperature).softmax(dim=0, dtype=torch.float64)
    probabilities, ids = _rank(distribution, sampling)
    if sampling.top_p < 1.0:
        # A token stays if the sum of likelier ones is below top_p: the smallest set that reaches it.
        likelier = probabilities.cumsum(dim=0) - probabilities
        probabilities, ids = _select(likelier < sampling.top_p, probabilities, ids)
    if sampling.min_p > 0.0:
        probabilities, ids = _select(probabilities >= sampling.min_p * probabilities.max(), probabilities, ids)
    return probabilities, ids


def _rank(distribution: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Returns the candidates after top-k and their ids; if top-p is used, likeliest first and as many as it needs."""
    if 0 < sampling.top_k < len(distribution):
        values, ids = distribution.topk(sampling.top_k)
        return values / values.sum(), ids
    if sampling.top_p < 1.0:
        values, ids = distribution.topk(min(TOP_P_CANDIDATES, len(distribution)))
        return (values, ids) if float(values.sum()) >= sampling.top_p else torch.sort(distribution, descending=True)
    return distribution, torch.arange(len(distribution), device=distribution.device)


def _select(keep: Tensor, probabilities: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return probabilities[keep], ids[keep]


def _draw(weights: Tensor, ids: Tensor | None, request: SampleRequest) -> int:
    """The token that wins the race of weights `[candidates]`; `ids` are the candidates', None: their indices."""
    uniforms, weight = _uniforms(weights, ids, request), _array(weights)
    leader = int(weight.argmax())
    # A time is at least its uniform number, so few tokens can come in before the likeliest one.
    latest = -math.log1p(-float(uniforms[leader])) / float(weight[leader])
    near = (uniforms <= weight * (latest * 1.000001)).nonzero()
    near = near[0] if isinstance(near, tuple) else near[:, 0]
    log1p: Any = torch.log1p if isinstance(uniforms, Tensor) else np.log1p
    winner = int(near[(log1p(-uniforms[near]) / weight[near]).argmax()])
    return winner if ids is None else int(ids[winner])


def _uniforms(weights: Tensor, ids: Tensor | None, request: SampleRequest) -> _Array:
    """A float32 in (0, 1) for each candidate, by the request's seed and position and the token's id alone.

    These are 32 bits each of SplitMix64, two tokens for a step, started at a place that seed and position determine.
    """
    start = random.Random(request.sampling.seed << 32 | request.position).getrandbits(64) - (1 << 63)
    if ids is None:
        halves = _mixed(_all_steps((len(weights) + 1) // 2, weights.device) + start)
        bits = halves.view(torch.int32 if isinstance(halves, Tensor) else np.uint32)[: len(weights)]
    else:
        chosen = _array(ids)
        bits = _mixed((chosen >> 1) * _STEP + start) >> (chosen & 1) * 32
    if isinstance(bits, Tensor) or ids is not None:
        bits = bits & 0xFFFFFFFF
    numbers = bits.float() if isinstance(bits, Tensor) else bits.astype(np.float32)
    numbers += 0.5
    numbers *= (1 - 2.0**-24) * 2.0**-32
    return numbers


def _array(tensor: Tensor) -> _Array:
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


@lru_cache(maxsize=4)
def _all_steps(count: int, device: torch.device) -> _Array:
    return _array(torch.arange(count, device=device) * _STEP)


def _mixed(bits: _Array) -> _Array:
    """SplitMix64's function of int64 values, in place."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        high = bits >> shift
        # As unsigned numbers.
        high &= (1 << (64 - shift)) - 1
        bits ^= high
        bits *= factor
    return bits
