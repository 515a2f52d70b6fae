"""Whole decoder layers, one after the other, in one call that threads share. Arrays in and out.

A layer has five stages, each divided into tasks: the QKV projection with RoPE, attention, its output projection, the
gate and up projections with SwiGLU, and the down projection. A stage begins when the previous one is done. The first
half of an adapter is computed beside the first stage, and its second half is added in the last one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stitch_server.cpu.attention.dispatch import PagedKV, attend, divide, new_scratch, store_kv, task_count
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.features import Instructions
from stitch_server.cpu.matmul.dispatch import (
    Workspace,
    matmul,
    new_workspace,
    outputs_per_task,
    prepare_input,
    release_workspace,
)
from stitch_server.cpu.matmul.panels import ADD, PANEL_OUTPUTS, REPLACE, Matrix
from stitch_server.cpu.scalars import Floats, Indices, exponential
from stitch_server.cpu.tasks import first_task, next_task, wait_for

# A task of an adapter's first half: enough values to outweigh its bookkeeping.
ADAPTER_VALUES_PER_TASK = 16
NO_ADAPTER = -1


class Layers(NamedTuple):
    """Decoder layers of one shape; every array, those of matrices too, has a leading axis for the layer."""

    # The index of the first layer in the whole model.
    first: int
    attention_norm: Floats
    query_key_value: Matrix
    # [layers, rotated heads, head_dim]; [layers, 0, head_dim] where the family has none.
    query_key_norm: Floats
    attention_output: Matrix
    feed_forward_norm: Floats
    gate_up: Matrix
    down: Matrix
    # Sliding windows: how many tokens a token attends to, itself included; 0: all.
    windows: Indices


class Activations(NamedTuple):
    """Intermediate results of a layer, which all threads share."""

    # [tokens, (heads + 2 * kv_heads) * head_dim]
    qkv: Floats
    # [tokens, heads * head_dim]
    attended: Floats
    # [tokens, intermediate_size]
    gated: Floats


class RowAdapters(NamedTuple):
    """The adapters beside each layer of rows `begin` to `begin + len(narrow)` of a batch; none if `narrow` is empty."""

    begin: int
    # The index of the first layer in the whole model.
    first: int
    # Both [layers, rank, hidden_size]; `up` is transposed, so that its rows are read in their order.
    down: Floats
    up: Floats
    # [rows, rank]: the bottleneck's values, which all threads share.
    narrow: Floats
    epsilon: float


class Pass(NamedTuple):
    """The inputs and buffers of one forward pass."""

    # [tokens, hidden_size], in and out.
    hidden: Floats
    # [positions, head_dim / 2]: RoPE's rotations.
    rotations: NDArray[np.complex64]
    paged: PagedKV
    activations: Activations
    adapters: RowAdapters


@compiled()
def run_layers(
    states: Pass,
    layers: Layers,
    first: int,
    end: int,
    epsilon: float,
    instructions: Instructions,
    threads: int,
    counts: Indices,
) -> None:
    """Takes a batch through layers [first, end), on all threads that call it; returns when all tasks are done."""
    hidden, paged, activations, adapters = states.hidden, states.paged, states.activations, states.adapters
    tokens, head_dim, inner = len(hidden), paged.kv.shape[3], activations.gated.shape[1]
    all_heads, heads = activations.qkv.shape[1] // head_dim, activations.attended.shape[1] // head_dim
    qkv = activations.qkv.reshape(tokens, all_heads, head_dim)
    attended = activations.attended.reshape(tokens, heads, head_dim)
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    plan, scratch = divide(paged, heads, threads, instructions.amx), new_scratch(paged, heads, head_dim)
    heads_per_task = _heads_per_task(head_dim)
    gates_per_task = outputs_per_task(hidden.shape[1])
    normed = np.empty_like(hidden)
    gate_up = np.empty((tokens, 2 * gates_per_task), np.float32)
    widest = max(hidden.shape[1], activations.attended.shape[1], inner)
    workspace = new_workspace(tokens, widest, layers.down.weight[0], instructions, threads)
    narrow_tasks = -(-adapters.narrow.size // ADAPTER_VALUES_PER_TASK)
    task, done = first_task(counts), 0
    for layer in range(first - layers.first, end - layers.first):
        kv = paged.kv[layers.first + layer - paged.first]
        beside = layers.first + layer - adapters.first
        heads_end = done + -(-all_heads // heads_per_task)
        stage_end = heads_end + narrow_tasks
        if task < stage_end:
            wait_for(counts, done)
            _rms_norm_rows(hidden, layers.attention_norm[layer], epsilon, normed)
            prepare_input(normed, workspace)
        while task < stage_end:
            if task < heads_end:
                head = (task - done) * heads_per_task
                last = min(head + heads_per_task, all_heads)
                _project_qkv(normed, layers, layer, head, last, epsilon, workspace, states)
            else:
                _narrow(hidden, adapters, beside, (task - heads_end) * ADAPTER_VALUES_PER_TASK)
            task = next_task(counts)
        done, stage_end = stage_end, stage_end + task_count(plan)
        if task < stage_end:
            wait_for(counts, done)
        while task < stage_end:
            attend(task - done, plan, qkv, kv, paged, layers.windows[layer], scale, scratch, attended)
            task = next_task(counts)
        matrix = _of_layer(layers.attention_output, layer)
        done, task = _add_linear(activations.attended, matrix, workspace, states, NO_ADAPTER, stage_end, task, counts)
        stage_end = done + -(-inner // gates_per_task)
        if task < stage_end:
            wait_for(counts, done)
            _rms_norm_rows(hidden, layers.feed_forward_norm[layer], epsilon, normed)
            prepare_input(normed, workspace)
        matrix = _of_layer(layers.gate_up, layer)
        while task < stage_end:
            gate = (task - done) * gates_per_task
            _swiglu(normed, matrix, gate, min(gate + gates_per_task, inner), workspace, gate_up, activations.gated)
            task = next_task(counts)
        matrix = _of_layer(layers.down, layer)
        done, task = _add_linear(activations.gated, matrix, workspace, states, beside, stage_end, task, counts)
    release_workspace(workspace)
    wait_for(counts, done)


@compiled()
def _heads_per_task(head_dim: int) -> int:
    """The smallest number of heads that fill whole panels."""
    heads = 1
    while heads * head_dim % PANEL_OUTPUTS != 0:
        heads += 1
    return heads


@compiled()
def _project_qkv(
    normed: Floats, layers: Layers, layer: int, first: int, end: int, epsilon: float, workspace: Workspace, states: Pass
) -> None:
    """Projects heads [first, end) of queries, keys and values, applies norms and RoPE, and caches keys and values."""
    paged, qkv = states.paged, states.activations.qkv
    head_dim, cached_heads = paged.kv.shape[3], paged.kv.shape[2]
    all_heads = qkv.shape[1] // head_dim
    begin = first * head_dim
    matmul(normed, _of_layer(layers.query_key_value, layer), begin, end * head_dim, workspace, qkv, begin, REPLACE)
    kv = paged.kv[layers.first + layer - paged.first]
    for head in range(first, end):
        for token in range(len(qkv)):
            vector = qkv[token, head * head_dim : (head + 1) * head_dim]
            if head < all_heads - cached_heads // 2:
                if layers.query_key_norm.shape[1] > 0:
                    _rms_norm(vector, layers.query_key_norm[layer, head], epsilon, vector)
                _rotate(vector, states.rotations[paged.ends[token] - paged.begins[token] - 1])
            if head >= all_heads - cached_heads:
                store_kv(vector, token, head - (all_heads - cached_heads), kv, paged)


@compiled()
def _add_linear(
    x: Floats, matrix: Matrix, workspace: Workspace, states: Pass, beside: int, done: int, task: int, counts: Indices
) -> tuple[int, int]:
    """The stage hidden += x · matrixᵀ and what the adapters `beside` a layer add, after `done` tasks.

    Returns the tasks up to its end, and the next one to do.
    """
    hidden = states.hidden
    outputs = hidden.shape[1]
    at_once = outputs_per_task(x.shape[1])
    stage_end = done + -(-outputs // at_once)
    if task < stage_end:
        wait_for(counts, done)
        prepare_input(x, workspace)
    while task < stage_end:
        first = (task - done) * at_once
        last = min(first + at_once, outputs)
        matmul(x, matrix, first, last, workspace, hidden, first, ADD)
        if beside != NO_ADAPTER:
            _widen(states.adapters, beside, first, last, hidden)
        task = next_task(counts)
    return stage_end, task


@compiled()
def _narrow(hidden: Floats, adapters: RowAdapters, beside: int, first: int) -> None:
    """Computes the values of `narrow` from the one numbered `first` on: silu(down · h / rms(h))."""
    rank, size = adapters.narrow.shape[1], hidden.shape[1]
    down = adapters.down[beside]
    for number in range(first, min(first + ADAPTER_VALUES_PER_TASK, adapters.narrow.size)):
        state, weights = hidden[adapters.begin + number // rank], down[number % rank]
        total, squares = np.float32(0), np.float32(0)
        for index in range(size):
            total += weights[index] * state[index]
            squares += state[index] * state[index]
        value = total / np.sqrt(squares / np.float32(size) + np.float32(adapters.epsilon))
        adapters.narrow[number // rank, number % rank] = value / (np.float32(1) + exponential(-value))


@compiled()
def _widen(adapters: RowAdapters, beside: int, first: int, end: int, hidden: Floats) -> None:
    """hidden[:, first:end] += up · narrow, of the adapted rows."""
    for row in range(len(adapters.narrow)):
        state = hidden[adapters.begin + row, first:end]
        for bottleneck in range(adapters.narrow.shape[1]):
            value, weights = adapters.narrow[row, bottleneck], adapters.up[beside, bottleneck, first:end]
            for index in range(end - first):
                state[index] += value * weights[index]


@compiled()
def _swiglu(
    normed: Floats, matrix: Matrix, first: int, end: int, workspace: Workspace, gate_up: Floats, gated: Floats
) -> None:
    """gated[:, first:end] = silu(gate) · up; `gate_up` is a buffer."""
    count, inner = end - first, gated.shape[1]
    matmul(normed, matrix, first, end, workspace, gate_up, np.int64(0), REPLACE)
    matmul(normed, matrix, inner + first, inner + end, workspace, gate_up, count, REPLACE)
    for token in range(len(normed)):
        for index in range(count):
            gate = gate_up[token, index]
            gated[token, first + index] = gate / (np.float32(1) + exponential(-gate)) * gate_up[token, count + index]


@compiled(inline="always")
def _of_layer(matrices: Matrix, layer: int) -> Matrix:
    return Matrix(matrices.weight[layer], matrices.scales[layer], matrices.bias[layer])


@compiled()
def _rms_norm(values: Floats, gains: Floats, epsilon: float, normed: Floats) -> None:
    """values / sqrt(mean(values²) + ε) · gains; `normed` may be `values`."""
    total = np.float32(0)
    for index in range(gains.size):
        total += values[index] * values[index]
    inverse = np.float32(1) / np.sqrt(total / np.float32(gains.size) + np.float32(epsilon))
    for index in range(gains.size):
        normed[index] = values[index] * inverse * gains[index]


@compiled()
def _rms_norm_rows(rows: Floats, gains: Floats, epsilon: float, normed: Floats) -> None:
    for row in range(len(rows)):
        _rms_norm(rows[row], gains, epsilon, normed[row])


@compiled()
def _rotate(head: Floats, rotations: NDArray[np.complex64]) -> None:
    """RoPE on neighbouring pairs, in place."""
    for pair in range(rotations.size):
        real, imaginary, rotation = head[2 * pair], head[2 * pair + 1], rotations[pair]
        head[2 * pair] = real * rotation.real - imaginary * rotation.imag
        head[2 * pair + 1] = real * rotation.imag + imaginary * rotation.real
