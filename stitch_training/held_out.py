"""Losses over a held-out trace, so that the bottom model's layers need not run again. Trains nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stitch_server.model.adapters import Adapters
from stitch_training.activations import Collected
from stitch_training.frozen_models import FrozenModel, Pair, next_token_losses
from stitch_training.scoring import BATCH_SEQUENCES, Mapping, alone, losses
from stitch_training.sums import Cut

ALONE = "alone.safetensors"


def tail_losses(
    top: FrozenModel, held: Collected, cut: Cut, mapping: Mapping, adapters: Adapters | None = None
) -> Tensor:
    """Mean cross-entropy `[sequences]` in nats a token of the top's layers behind `mapping` of the traced states."""
    found, (k, j) = [], cut
    with torch.no_grad():
        for rows in torch.split(torch.arange(held.sequences), BATCH_SEQUENCES):
            hidden = top.run(mapping(held.trace.hidden(k, rows)), j, top.depth, adapters)
            found.append(next_token_losses(top, hidden, held.trace.tokens(rows)).mean(1))
    return torch.cat(found).double()


def alone_losses(pair: Pair, held: Collected, folder: Path) -> dict[str, Tensor]:
    """Mean cross-entropy `[sequences]` of the `bottom` and the `top` model alone; computed once for a `folder`."""
    kept = folder / ALONE
    if kept.exists():
        with safe_open(kept, "pt") as file:
            if file.metadata()["data"] == held.fingerprint:
                return {name: file.get_tensor(name) for name in ("bottom", "top")}
    bottom = _of_bottom(pair.bottom, held)
    found = {"bottom": bottom, "top": bottom.clone() if pair.top is pair.bottom else _whole(pair.top, held)}
    save_file(found, kept, {"data": held.fingerprint})
    return found


def _of_bottom(model: FrozenModel, held: Collected) -> Tensor:
    """Its head alone where the trace has its last layer."""
    if model.depth in held.trace.shape.depths:
        return tail_losses(model, held, (model.depth, model.depth), lambda states: states)
    return _whole(model, held)


def _whole(model: FrozenModel, held: Collected) -> Tensor:
    return losses(alone(model), held.trace.tokens(torch.arange(held.sequences)))
