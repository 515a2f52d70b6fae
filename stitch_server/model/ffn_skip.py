"""Feed-forward networks that single tokens leave out, by gates of their layers.

After the attention of layer i a token has the state h, and the FFN's normalized input n. A token whose gate opens
passes a bottleneck in place of the FFN:

    h_{i+1} = h + B_i silu(A_i h / rms(h))    where w_i · n + b_i > threshold,

with A and B as in `adapters`. The first and the last layer have no gate. Only generated tokens skip: a prompt's KV is
exact. Invariant: whether a token skips depends on its own state alone, never on the batch around it. Skipping by tokens
is that of FFN-SkipLLM (Jaiswal et al., arXiv 2404.03865), whose rule needs no training; these gates are trained.

One safetensors file holds `gate` [layers, hidden], `bias` [layers], `healing.down` [layers, rank, hidden] and
`healing.up` [layers, hidden, rank] of all layers but two, and as JSON in its metadata the model that it is for, how it
was made, and by share of skipped FFNs the threshold, and the share that each layer then skips.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stitch.errors import Incompatible
from stitch_server.attention import Attend, Rotary
from stitch_server.model.adapters import Adapters
from stitch_server.model.description import ModelDescription, ParameterCount

METADATA_KEY = "ffn_skip"
# The first layer that has a gate, and the number of last layers that have none.
FIRST_GATED, SPARED_LAST = 1, 1


class GatedLayer(Protocol):
    """A decoder layer whose FFN can be left out."""

    @property
    def index(self) -> int: ...

    def add_attention(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Takes the layer's input, `[tokens, hidden]`, and returns the state after its attention."""

    def normalize(self, hidden: Tensor) -> Tensor:
        """Takes the state after the attention and returns the FFN's input."""

    def feed_forward(self, normed: Tensor) -> Tensor:
        """Takes its input and returns what the FFN adds to the state."""


@dataclass(frozen=True, eq=False)
class FfnSkip:
    """The gates of layers [first, end), at one threshold, and the bottlenecks in place of the FFNs."""

    # [layers, hidden], float32
    gate: Tensor
    # [layers], float32: the bias less the threshold.
    bias: Tensor
    healing: Adapters
    # The share of generated tokens that skip each layer's FFN, on the text of the calibration.
    rates: tuple[float, ...]
    # Of the file and the share.
    fingerprint: str

    @property
    def first(self) -> int:
        """The first layer that has a gate here."""
        return self.healing.first

    @property
    def end(self) -> int:
        """The end of the layers, exclusive; `first` where none has a gate here."""
        return self.healing.end

    def opens(self, layer: int, normed: Tensor) -> Tensor:
        """Returns which tokens skip the FFN, bool `[tokens]`, given its input `[tokens, hidden]`."""
        at = layer - self.first
        # A sum over each row, unlike a matmul, gives a row the same value in every batch.
        return (normed.float() * self.gate[at]).sum(1) + self.bias[at] > 0

    def between(self, first: int, end: int) -> FfnSkip:
        """Returns the gates of layers [first, end), which may be none."""
        first = min(max(first, self.first), self.end)
        end = max(first, min(end, self.end))
        kept = slice(first - self.first, end - self.first)
        down, up = self.healing.down[kept].clone(), self.healing.up[kept].clone()
        healing, rates = Adapters(first, down, up), self.rates[kept]
        return replace(self, gate=self.gate[kept], bias=self.bias[kept], healing=healing, rates=rates)

    def to(self, device: torch.device, dtype: torch.dtype) -> FfnSkip:
        """Returns the same gates on another device, with the bottlenecks in that dtype."""
        gate, bias = self.gate.to(device), self.bias.to(device)
        return replace(self, gate=gate, bias=bias, healing=self.healing.to(device, dtype))

    def saved_parameters(self, count: ParameterCount) -> int:
        """Returns how many parameters fewer a generated token reads on average, on the text of the calibration."""
        healing = self.healing.down[:1].numel() + self.healing.up[:1].numel()
        sizes = count.feed_forward[self.first : self.end]
        skipped = sum(rate * (size - healing) for rate, size in zip(self.rates, sizes, strict=True))
        return round(skipped) - self.gate.numel()


# Rows of a batch, int64, and the gates that they pass.
Skipping = Sequence[tuple[Tensor, FfnSkip]]


def run_layer(layer: GatedLayer, hidden: Tensor, rotary: Rotary, attend: Attend, skipping: Skipping) -> Tensor:
    """Runs a layer over `[tokens, hidden]`; those of the `skipping` rows whose gates open leave out its FFN."""
    hidden = layer.add_attention(hidden, rotary, attend)
    normed = layer.normalize(hidden)
    kept = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    for rows, skip in skipping:
        skipped = rows[skip.opens(layer.index, normed[rows])]
        kept[skipped] = False
        hidden[skipped] += skip.healing(layer.index, hidden[skipped])
    if bool(kept.all()):
        return layer.feed_forward(normed).add_(hidden)
    hidden[kept] += layer.feed_forward(normed[kept])
    return hidden


@dataclass(frozen=True)
class Calibration:
    """The threshold at which a share of all FFNs is skipped, and the share that each gated layer then skips."""

    threshold: float
    rates: tuple[float, ...]


@dataclass(frozen=True)
class FfnGates:
    """The content of a file: gates of a whole model with their calibrations, by share."""

    gate: Tensor
    bias: Tensor
    healing: Adapters
    # Id and revision of the model.
    model: str
    revision: str
    calibrations: Mapping[float, Calibration]
    # How it was made, for information: data, tokens, settings, losses in nats per token.
    making: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, found = len(self.healing.down), (tuple(self.gate.shape), tuple(self.bias.shape))
        if found != ((layers, self.healing.width), (layers,)):
            raise Incompatible(f"gates {found[0]} with biases {found[1]} do not fit {layers} bottlenecks")
        if any(len(one.rates) != layers for one in self.calibrations.values()):
            raise Incompatible(f"a calibration has other layers than the {layers} with gates")
        if not all(bool(tensor.isfinite().all()) for tensor in self._tensors().values()):
            raise Incompatible("gates have non-finite values")

    @classmethod
    def load(cls, path: Path) -> FfnGates:
        """Reads a file. Raises Incompatible where it is missing, truncated, or holds something else."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("gate", "bias", "healing.down", "healing.up")}
                fields = json.loads(file.metadata()[METADATA_KEY])
            calibrations = {
                float(share): Calibration(one["threshold"], tuple(one["rates"]))
                for share, one in fields["calibrations"].items()
            }
            healing = Adapters(FIRST_GATED, tensors["healing.down"].float(), tensors["healing.up"].float())
            gate, bias = tensors["gate"].float(), tensors["bias"].float()
            return cls(gate, bias, healing, fields["model"], fields["revision"], calibrations, fields["making"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise Incompatible(f"{path} has no gates of FFNs: {error}") from error
        except Incompatible as error:
            raise Incompatible(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Writes the tensors; the same gates make the same bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrations = {f"{share:g}": asdict(one) for share, one in sorted(self.calibrations.items())}
        fields = {"model": self.model, "revision": self.revision, "calibrations": calibrations, "making": self.making}
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        # `save_file` would make a file that only its owner reads, and shards may run as another user.
        path.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(fields, sort_keys=True)}))

    def check_model(self, model: ModelDescription) -> None:
        """Raises Incompatible where the gates are not those of the model."""
        if model.revision != self.revision:
            made_for = f"made for the model {self.model} revision {self.revision}"
            raise Incompatible(f"the gates of FFNs are {made_for}, not for {model.id} revision {model.revision}")
        found = len(self.gate), self.healing.width
        if found != (model.layers - FIRST_GATED - SPARED_LAST, model.hidden_size):
            raise Incompatible(f"{found[0]} gates of width {found[1]} are not those of {model.layers} layers")

    def at(self, share: float) -> FfnSkip:
        """Returns the gates at the threshold of that share. Raises Incompatible where it was not calibrated."""
        if (found := self.calibrations.get(share)) is None:
            known = ", ".join(f"{one:g}" for one in sorted(self.calibrations))
            raise Incompatible(f"the gates of FFNs are not calibrated to the share {share:g}, only to {known}")
        return FfnSkip(self.gate, self.bias - found.threshold, self.healing, found.rates, self._fingerprint(found))

    def _fingerprint(self, calibration: Calibration) -> str:
        digest = hashlib.sha256(f"{self.revision} {calibration.threshold!r}".encode())
        for tensor in self._tensors().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by their names in the file."""
        return {
            "gate": self.gate,
            "bias": self.bias,
            "healing.down": self.healing.down,
            "healing.up": self.healing.up,
        }
