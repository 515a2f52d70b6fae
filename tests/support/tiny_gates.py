"""Random gates of a tiny model's FFNs, the route of a tiny cluster that has them, and its reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from stitch_server.model.adapters import Adapters
from stitch_server.model.description import ModelDescription
from stitch_server.model.ffn_skip import FIRST_GATED, SPARED_LAST, Calibration, FfnGates
from tests.support.tiny_model import TOKENS

RANK = 2
# Thresholds at which few, about half, and most FFNs are skipped.
THRESHOLDS = {0.1: 3.0, 0.5: 0.0, 0.9: -3.0}
ROUTE, SHARE = "skipping", 0.5


def write_random_gates(file: Path, model: Path, seed: int = 3) -> Path:
    """Writes gates that depend on the token, and bottlenecks large enough to change the logits."""
    described, draw = ModelDescription.read(model, model.name), torch.Generator().manual_seed(seed)
    layers, width = described.layers - FIRST_GATED - SPARED_LAST, described.hidden_size
    gate, bias = torch.randn(layers, width, generator=draw) * 2 * width**-0.5, torch.randn(layers, generator=draw) * 0.1
    down = torch.randn(layers, RANK, width, generator=draw) * width**-0.5
    healing = Adapters(FIRST_GATED, down, torch.randn(layers, width, RANK, generator=draw))
    calibrations = {share: Calibration(threshold, (share,) * layers) for share, threshold in THRESHOLDS.items()}
    FfnGates(gate, bias, healing, model.name, described.revision, calibrations).save(file)
    return file


def add_skipping_route(cluster_file: Path, **route: Any) -> Path:
    """Adds gates of the bottom, and a route of it with them, to a cluster whose shards hold all of its layers."""
    write_random_gates(cluster_file.parent / "gates.safetensors", cluster_file.parent / "bottom")
    fields = json.loads(cluster_file.read_text())
    skip = {"file": "gates.safetensors", "share": SHARE}
    fields["routes"].append({"name": ROUTE, "bottom_layers": 5, "ffn_skip": skip, **route})
    cluster_file.write_text(json.dumps(fields))
    return cluster_file


class SkippingReference:
    """A whole model in `transformers` whose generated tokens leave out FFNs; no cache, no layers of ours."""

    def __init__(self, model: Path, gates: Path, share: float = SHARE) -> None:
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._gates, self._prompt_tokens = FfnGates.load(gates), 0
        self._threshold = self._gates.calibrations[share].threshold
        # Tokens of the last pass that skipped, by layer.
        self.skipped: dict[int, int] = {}
        layers: Any = self._model.model.layers
        for at in range(len(self._gates.gate)):
            self._replace(layers[at + FIRST_GATED], at)

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Logits `[tokens, vocabulary]` of a prompt and its answer, whose tokens skip."""
        self._prompt_tokens = len(prompt)
        logits: Tensor = self._model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
        return logits

    def greedy(self, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """The greedy token at every position of the answer, after the tokens before it."""
        likeliest: list[int] = self.logits(prompt, answer)[len(prompt) - 1 : -1, :TOKENS].argmax(1).tolist()
        return likeliest

    def _replace(self, layer: Any, at: int) -> None:
        """Makes the layer's FFN that of the formula; its norm is called with the state, the FFN with the result."""
        states: list[Tensor] = []
        layer.post_attention_layernorm.register_forward_pre_hook(lambda module, taken: states.append(taken[0]))
        compute = layer.mlp.forward

        def forward(normed: Tensor) -> Tensor:
            state = states.pop()
            opens = normed @ self._gates.gate[at] + self._gates.bias[at] > self._threshold
            opens[:, : self._prompt_tokens] = False
            self.skipped[at + FIRST_GATED] = int(opens.sum())
            narrow = state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ self._gates.healing.down[at].T
            healed = (narrow * narrow.sigmoid()) @ self._gates.healing.up[at].T
            return torch.where(opens[..., None], healed, compute(normed))

        layer.mlp.forward = forward
