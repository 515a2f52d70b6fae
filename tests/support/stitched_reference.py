"""A stitched pair in one process, computed by `transformers` models: the reference for every chain of shards.

It uses none of the layers, caches or engines that are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from stitch.tokenizer_files import token_count
from stitch_server.model.stitch import Stitch

logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class StitchedReference:
    """Layers [0, bottom_layers) of one model, a stitch, layers [top_from, …) of another; no cache."""

    def __init__(
        self,
        bottom: Path,
        top: Path,
        stitch: Callable[[Tensor], Tensor] | None,
        bottom_layers: int,
        top_from: int,
        adapters: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        self._bottom = _with_layers(bottom, 0, bottom_layers)
        self._bottom.model.norm = nn.Identity()
        self._stitch, self._tokens = stitch, token_count(bottom)
        self._top = _with_layers(top, top_from, None)
        for layer, (down, up) in zip(self._top.model.layers, adapters, strict=bool(adapters)):
            layer.register_forward_hook(_adapting(down, up))

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits `[tokens, vocabulary]` of one whole sequence."""
        hidden = self._bottom.model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).last_hidden_state
        if self._stitch is not None:
            hidden = self._stitch(hidden[0])[None]
        logits: Tensor = self._top(inputs_embeds=hidden, use_cache=False).logits[0]
        return logits

    def generate(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Returns `count` greedy tokens; generation continues past end tokens."""
        sequence = list(token_ids)
        for _ in range(count):
            sequence.append(int(self.logits(sequence)[-1, : self._tokens].argmax()))
        return sequence[len(token_ids) :]


class WholeReference:
    """One model alone; no cache."""

    def __init__(self, folder: Path) -> None:
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits `[tokens, vocabulary]` of one whole sequence."""
        found: Tensor = self._model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return found


def stitched_logits(
    bottom: Path, top: Path, stitch: Path | None, bottom_layers: int, top_from: int, token_ids: Sequence[int]
) -> Tensor:
    """Logits `[tokens, vocabulary]` of the stitched model over one sequence."""
    return reference(bottom, top, stitch, bottom_layers, top_from).logits(token_ids)


def reference(bottom: Path, top: Path, stitch: Path | None, bottom_layers: int, top_from: int) -> StitchedReference:
    """The reference for two model folders and a stitch file; without one, bottom and top are the same model."""
    loaded = None if stitch is None else Stitch.load(stitch, torch.device("cpu"), torch.float32)
    affine = None if loaded is None else partial(_mapped, loaded)
    adapters_of_stitch = None if loaded is None else loaded.adapters
    adapters = (
        [] if adapters_of_stitch is None else list(zip(adapters_of_stitch.down, adapters_of_stitch.up, strict=True))
    )
    return StitchedReference(bottom, top, affine, bottom_layers, top_from, adapters)


def _mapped(stitch: Stitch, hidden: Tensor) -> Tensor:
    mapped = hidden @ stitch.weight.T + stitch.bias
    return mapped if stitch.first is None else torch.cat([stitch.first[None], mapped[1:]])


def _adapting(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds `up silu(down x / rms(x))` of a layer's input to its output."""

    def hook(layer: nn.Module, taken: tuple[Tensor, ...], given: Tensor) -> Tensor:
        (x,) = taken
        narrow = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ down.T
        return given + (narrow * narrow.sigmoid()) @ up.T

    return hook


def _with_layers(folder: Path, first: int, end: int | None) -> PreTrainedModel:
    """Loads a model with the layers [first, end) only; masks and rotary embeddings stay those of the model."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers = model.model.layers[first:end]
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[first:end]
    return model
