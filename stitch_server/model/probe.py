"""The route probe: predicts from hidden states at the earliest cut what each costlier route would gain.

    gain[route] = weight[route] · pooled(states) + bias[route]

One safetensors file holds `weight` [routes - 1, features] and `bias` [routes - 1], and as JSON in its metadata their
binding and how they were made. Nothing is unpickled; a file that doesn't fit is refused with the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stitch.errors import Incompatible
from stitch_server.model.description import ModelDescription

FORMAT = "stitch-probe/1"
METADATA_KEY = "probe"
PERCENTILES = 101
# The most tokens of a prompt that a probe may read: they are computed in one pass and sent in one step.
MAX_PROBE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ProbeBinding:
    """The model, depth and routes that a probe is made for."""

    bottom_id: str
    bottom_revision: str
    bottom_hidden: int
    # The probe reads states after this many layers: the earliest cut of all routes.
    layer: int
    # The number of a prompt's first tokens that are read.
    tokens: int
    # Cheapest first.
    routes: tuple[str, ...]
    tokenizer: str

    @classmethod
    def of(
        cls, bottom: ModelDescription, layer: int, tokens: int, routes: Sequence[str], tokenizer: str
    ) -> ProbeBinding:
        """Returns the binding to a model at one depth; `tokenizer` is its tokenizer's hash."""
        return cls(bottom.id, bottom.revision, bottom.hidden_size, layer, tokens, tuple(routes), tokenizer)


@dataclass(frozen=True)
class Probe:
    """Maps hidden states of a prompt's first tokens to gains over the cheapest route."""

    weight: Tensor
    bias: Tensor
    binding: ProbeBinding
    # The gain above which a route is chosen; one for each route but the cheapest.
    thresholds: tuple[float, ...]
    # The most expensive route's gain at 0 %, 1 %, … 100 % of the training prompts, each predicted when held out.
    percentiles: tuple[float, ...]
    # Data fingerprints, number of prompts, settings and cross-validated figures; JSON.
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        costlier = len(self.binding.routes) - 1
        shapes = tuple(self.weight.shape), tuple(self.bias.shape)
        wanted = (costlier, feature_count(self.binding.bottom_hidden)), (costlier,)
        if shapes != wanted:
            raise Incompatible(f"weight and bias have the shapes {shapes}, but {costlier + 1} routes need {wanted}")
        if self.weight.dtype != torch.float32 or self.bias.dtype != torch.float32:
            raise Incompatible(f"weight and bias are {self.weight.dtype} and {self.bias.dtype}, not float32")
        if costlier < 1 or self.binding.tokens < 1 or self.binding.layer < 1:
            raise Incompatible("a probe needs two routes, a layer and a token at least")
        if self.binding.tokens > MAX_PROBE_TOKENS:
            raise Incompatible(f"it reads {self.binding.tokens} tokens, and {MAX_PROBE_TOKENS} is the limit")
        counts = len(self.thresholds), len(self.percentiles)
        if counts != (costlier, PERCENTILES):
            raise Incompatible(f"{counts[0]} thresholds and {counts[1]} percentiles, not {costlier} and {PERCENTILES}")
        values = torch.cat([self.weight.flatten(), self.bias, torch.tensor([*self.thresholds, *self.percentiles])])
        if not bool(values.isfinite().all()):
            raise Incompatible("it has non-finite values")

    @property
    def fingerprint(self) -> str:
        """A hash of the tensors and the binding, 16 hex digits."""
        digest = hashlib.sha256(json.dumps(asdict(self.binding), sort_keys=True).encode())
        for tensor in (self.weight, self.bias):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def gains(self, states: Tensor) -> tuple[float, ...]:
        """Predicts from a prompt's first states `[tokens, bottom_hidden]` a gain for each route, 0 for the cheapest."""
        predicted: list[float] = torch.addmv(self.bias, self.weight, pool(states)).tolist()
        return (0.0, *predicted)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Probe:
        """Reads a probe. Raises Incompatible if the file is missing, truncated, or holds something else."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("weight", "bias")}
                fields = json.loads(file.metadata()[METADATA_KEY])
            stored = cls(**tensors, **_fields_of(fields))
            if stored.fingerprint != fields["fingerprint"]:
                raise Incompatible(f"its fingerprint is {fields['fingerprint']}, but it holds {stored.fingerprint}")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise Incompatible(f"{path} is no probe: {error}") from error
        except Incompatible as error:
            raise Incompatible(f"{path} is no probe: {error}") from error
        return stored.to(device)

    def save(self, path: Path) -> None:
        """Writes the probe; the same probe makes the same bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "binding": asdict(self.binding),
            "thresholds": self.thresholds,
            "percentiles": self.percentiles,
            "training": dict(self.training),
        }
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        # One metadata entry, since several would be written in any order. `save_file` would make a file that only its
        # owner reads, and shards may run as another user.
        path.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(fields, sort_keys=True)}))

    def to(self, device: torch.device) -> Probe:
        """Returns the same probe on another device."""
        moved = self.weight.to(device), self.bias.to(device)
        return Probe(*moved, self.binding, self.thresholds, self.percentiles, self.training)

    def check(self, bottom: ModelDescription, layer: int, routes: Sequence[str], tokenizer: str) -> None:
        """Raises Incompatible if it was made for another model, another cut or other routes."""
        bound = self.binding
        for what, made_for, given in (
            ("bottom model of revision", bound.bottom_revision, bottom.revision),
            ("tokenizer", bound.tokenizer[:16], tokenizer[:16]),
            ("earliest cut after layer", bound.layer, layer),
            ("set of routes", ", ".join(sorted(bound.routes)), ", ".join(sorted(routes))),
        ):
            if made_for != given:
                raise Incompatible(f"the probe is made for the {what} {made_for}, not for {given}")


def feature_count(hidden_size: int) -> int:
    """Returns the length of what `pool` returns for this hidden size."""
    return hidden_size


def pool(states: Tensor) -> Tensor:
    """Pools states `[tokens, hidden]`, at least one, to float32 `[features]`: their mean direction.

    Every state has the same weight, whatever its norm. The first is left out, since it is an attention sink, whose
    state depends little on the text.
    """
    directions = F.rms_norm(states.float(), states.shape[-1:])
    return directions[1:].mean(dim=0) if len(states) > 1 else directions[0]


def _fields_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get("format") != FORMAT:
        raise Incompatible(f"its format is {fields.get('format')}, and this version reads {FORMAT}")
    binding = fields["binding"]
    return {
        "binding": ProbeBinding(**{**binding, "routes": tuple(binding["routes"])}),
        "thresholds": tuple(map(float, fields["thresholds"])),
        "percentiles": tuple(map(float, fields["percentiles"])),
        "training": fields["training"],
    }
