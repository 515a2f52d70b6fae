"""A compiled decoder layer against NumPy: RMSNorm, the QKV projection, RoPE, attention, and SwiGLU."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stitch_server.cpu import (
    PANEL_OUTPUTS,
    Activations,
    Instructions,
    Layers,
    Matrix,
    PagedKV,
    Pass,
    RowAdapters,
    new_task_counts,
    run_layers,
)

pytestmark = pytest.mark.slow

Array = NDArray[np.float32]
HEADS, KV_HEADS, HEAD_DIM, TOKENS = 4, 2, PANEL_OUTPUTS, 5
HIDDEN, INNER, EPSILON = HEADS * HEAD_DIM, 3 * PANEL_OUTPUTS, 1e-5
ROTATED, ALL_HEADS = HEADS + KV_HEADS, HEADS + 2 * KV_HEADS


def pack(weight: Array, bias: Array) -> Matrix:
    """One layer's matrix `[outputs, inputs]`, whose outputs fill whole panels."""
    panels = np.ascontiguousarray(weight.reshape(-1, PANEL_OUTPUTS, weight.shape[1]).transpose(0, 2, 1))
    return Matrix(panels[None], np.ones((1, len(weight)), np.float32), bias[None])


def rms_norm(x: Array, gains: Array) -> Array:
    normed: Array = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPSILON) * gains
    return normed


def silu(x: Array) -> Array:
    result: Array = x / (1 + np.exp(-x))
    return result


def rope(heads: Array, rotations: NDArray[np.complex64]) -> Array:
    """Rotates `[tokens, heads, HEAD_DIM]`, whose pairs are neighbours."""
    pairs = (heads[..., ::2] + 1j * heads[..., 1::2]) * rotations[:, None]
    rotated: Array = np.stack([pairs.real, pairs.imag], -1).reshape(heads.shape).astype(np.float32)
    return rotated


def attention(qkv: Array) -> Array:
    """Causal attention of the rotated heads `[tokens, ALL_HEADS, HEAD_DIM]`."""
    group = HEADS // KV_HEADS
    query, key, value = np.split(qkv.astype(np.float64), [HEADS, ROTATED], axis=1)
    scores = np.einsum("thd,shd->hts", query, key.repeat(group, axis=1)) / np.sqrt(HEAD_DIM)
    scores = np.where(np.tri(TOKENS, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), value.repeat(group, axis=1))
    result: Array = attended.reshape(TOKENS, HIDDEN).astype(np.float32)
    return result


@pytest.mark.parametrize("rank", [0, 20])
@pytest.mark.parametrize("has_query_key_norm", [False, True])
def test_decoder_layer_matches_numpy(has_query_key_norm: bool, rank: int) -> None:
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return draw.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[-1]))

    matrices = {
        name: (normal(outputs, inputs), normal(outputs))
        for name, outputs, inputs in (
            ("query_key_value", ALL_HEADS * HEAD_DIM, HIDDEN),
            ("attention_output", HIDDEN, HIDDEN),
            ("gate_up", 2 * INNER, HIDDEN),
            ("down", HIDDEN, INNER),
        )
    }
    norms, query_key_norm = 1 + normal(2, HIDDEN), 1 + normal(ROTATED, HEAD_DIM)
    rotations = np.exp(1j * draw.uniform(0, 6, (TOKENS, HEAD_DIM // 2))).astype(np.complex64)
    x = normal(TOKENS, HIDDEN) * 10

    layers = Layers(
        first=0,
        attention_norm=norms[:1],
        query_key_norm=query_key_norm[None] if has_query_key_norm else np.empty((1, 0, HEAD_DIM), np.float32),
        feed_forward_norm=norms[1:],
        windows=np.array([0]),
        **{name: pack(*matrix) for name, matrix in matrices.items()},
    )
    kv = np.zeros((1, 2 * TOKENS, 2 * KV_HEADS, HEAD_DIM), np.float32)
    slots, begins = draw.permutation(2 * TOKENS)[:TOKENS], np.zeros(TOKENS, np.int64)
    paged_kv = PagedKV(0, kv, slots, begins, np.arange(1, TOKENS + 1))
    widths = (ALL_HEADS * HEAD_DIM, HIDDEN, INNER)
    activations = Activations(*(np.empty((TOKENS, width), np.float32) for width in widths))
    adapted = slice(1, TOKENS - 1 if rank else 1)
    down, up = normal(rank, HIDDEN), normal(rank, HIDDEN)
    narrow = np.empty((adapted.stop - 1, rank), np.float32)
    adapters = RowAdapters(1, 0, down[None], up[None], narrow, EPSILON)
    states = Pass(x.copy(), rotations, paged_kv, activations, adapters)
    run_layers(states, layers, 0, 1, EPSILON, Instructions(False, False), 1, new_task_counts())

    def project(states: Array, name: str) -> Array:
        weight, bias = matrices[name]
        return states @ weight.T + bias

    qkv = project(rms_norm(x, norms[0]), "query_key_value").reshape(TOKENS, ALL_HEADS, HEAD_DIM)
    if has_query_key_norm:
        qkv[:, :ROTATED] = rms_norm(qkv[:, :ROTATED], query_key_norm)
    qkv[:, :ROTATED] = rope(qkv[:, :ROTATED], rotations)
    expected = x + project(attention(qkv), "attention_output")
    gate, linear = np.split(project(rms_norm(expected, norms[1]), "gate_up"), 2, axis=1)
    expected = expected + project(silu(gate) * linear, "down")
    expected[adapted] += silu(rms_norm(x[adapted], np.ones(HIDDEN, np.float32)) @ down.T) @ up
    np.testing.assert_allclose(states.hidden, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kv[0, slots], qkv[:, HEADS:], rtol=1e-4, atol=1e-4)
