"""The stitch: an affine map from the bottom model's hidden states to the top's, and what it is bound to.

One safetensors file holds `weight` [top_hidden, bottom_hidden], `bias` [top_hidden] and, as JSON in its metadata,
the binding and how the map was made. It may hold adapters of the top's layers as well, `adapters.down` [layers, rank,
top_hidden] and `adapters.up` [layers, top_hidden, rank], and `first` [top_hidden], which stands for the first token of
every sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stitch.errors import Incompatible
from stitch.v1 import inference_pb2
from stitch_server.devices import to_device_async
from stitch_server.model.adapters import Adapters
from stitch_server.model.description import ModelDescription
from stitch_server.model.linear import Linear, linear

METADATA_KEY = "stitch"
ADAPTERS = ("adapters.down", "adapters.up")
FIRST = "first"


@dataclass(frozen=True, slots=True)
class StitchBinding:
    """The models and the cut that a stitch is made for: from layer `bottom_layers` - 1 to layer `top_from`."""

    bottom_id: str
    bottom_revision: str
    bottom_hidden: int
    bottom_layers: int
    top_id: str
    top_revision: str
    top_hidden: int
    top_from: int
    tokenizer: str

    @classmethod
    def of(
        cls, bottom: ModelDescription, top: ModelDescription, bottom_layers: int, top_from: int, tokenizer: str
    ) -> StitchBinding:
        """Returns the binding to two models at one cut; `tokenizer` is their tokenizer's hash."""
        return cls(
            bottom_id=bottom.id,
            bottom_revision=bottom.revision,
            bottom_hidden=bottom.hidden_size,
            bottom_layers=bottom_layers,
            top_id=top.id,
            top_revision=top.revision,
            top_hidden=top.hidden_size,
            top_from=top_from,
            tokenizer=tokenizer,
        )


@dataclass(frozen=True)
class Stitch:
    """Maps hidden states `[tokens, bottom_hidden]` to `[tokens, top_hidden]`."""

    weight: Tensor
    bias: Tensor
    binding: StitchBinding
    # How it was made, for information: method, data fingerprint, number of tokens, losses in nats per token.
    making: Mapping[str, Any] = field(default_factory=dict)
    # A hash of the stored tensors and the binding; computed if not given.
    fingerprint: str = ""
    # Adapters of every layer of the top from the cut on; None if the stitch was trained without.
    adapters: Adapters | None = None
    # [top_hidden]: the state of a sequence's first token; None if it is mapped like the others.
    first: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (self.binding.top_hidden, self.binding.bottom_hidden)
        found = tuple(self.weight.shape), tuple(self.bias.shape)
        if found != (shape, shape[:1]):
            raise Incompatible(
                f"a stitch with weight {found[0]} and bias {found[1]} can't map {shape[1]} to {shape[0]}"
            )
        if self.first is not None and self.first.shape != shape[:1]:
            raise Incompatible(f"a stitch to {shape[0]} values has a first token of {tuple(self.first.shape)}")
        if self.adapters is not None and (self.adapters.first, self.adapters.width) != (
            self.binding.top_from,
            shape[0],
        ):
            beside = f"from layer {self.adapters.first} with {self.adapters.width} values"
            raise Incompatible(f"the stitch {self._cut()} of {shape[0]} values has adapters {beside}")
        if not all(bool(tensor.isfinite().all()) for tensor in self._tensors().values()):
            raise Incompatible(f"the stitch {self._cut()} has non-finite values")
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint(self._tensors().values(), self.binding))

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype) -> Stitch:
        """Reads a stitch. Raises Incompatible if the file is missing, truncated, or holds something else."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("weight", "bias")}
                fields = json.loads(file.metadata()[METADATA_KEY])
                names = set(file.keys())
                down_up = [file.get_tensor(name) for name in ADAPTERS if ADAPTERS[0] in names]
                first = file.get_tensor(FIRST) if FIRST in names else None
            binding = StitchBinding(**fields["binding"])
            adapters = Adapters(binding.top_from, *down_up) if down_up else None
            stored = cls(**tensors, binding=binding, making=fields["making"], adapters=adapters, first=first)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise Incompatible(f"{path} is no stitch: {error}") from error
        except Incompatible as error:
            raise Incompatible(f"{path}: {error}") from error
        return stored.to(device, dtype)

    def save(self, path: Path) -> None:
        """Writes the tensors in their dtypes; the same stitch makes the same bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"binding": asdict(self.binding), "making": dict(self.making)}
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        # `save_file` would make a file that only its owner reads, and shards may run as another user.
        path.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(fields, sort_keys=True)}))

    def to(self, device: torch.device, dtype: torch.dtype) -> Stitch:
        """Returns the same stitch on another device or in another dtype."""
        moved = self.weight.to(device, dtype), self.bias.to(device, dtype)
        adapters = None if self.adapters is None else self.adapters.to(device, dtype)
        first = None if self.first is None else self.first.to(device, dtype)
        return Stitch(*moved, self.binding, self.making, self.fingerprint, adapters, first)

    def __call__(self, hidden: Tensor, begins: Sequence[int] = ()) -> Tensor:
        """Maps `[tokens, bottom_hidden]`; `begins` are the indices of sequences' first tokens."""
        mapped = self._linear(hidden.to(self.weight.dtype))
        if self.first is not None and begins:
            mapped[to_device_async(torch.tensor(begins), mapped.device)] = self.first
        return mapped

    @cached_property
    def _linear(self) -> Linear:
        return linear(self.weight, self.bias)

    def check_models(self, bottom: inference_pb2.Model | None = None, top: inference_pb2.Model | None = None) -> None:
        """Raises Incompatible if one of the given models has other weights than the one it was made for.

        The revision identifies weights; a model may have another id on another machine.
        """
        bound = self.binding
        if bottom is not None and bottom.revision != bound.bottom_revision:
            raise self._other_model("bottom", bound.bottom_id, bound.bottom_revision, bottom)
        if top is not None and top.revision != bound.top_revision:
            raise self._other_model("top", bound.top_id, bound.top_revision, top)

    def check_cut(self, bottom_layers: int, top_from: int) -> None:
        """Raises Incompatible if the route has another cut."""
        if (bottom_layers, top_from) != (self.binding.bottom_layers, self.binding.top_from):
            raise Incompatible(f"the stitch {self._cut()} can't serve a cut from layer {bottom_layers} to {top_from}")

    def check_tokenizer(self, tokenizer: str) -> None:
        """Raises Incompatible if the tokenizer has another hash."""
        if tokenizer != self.binding.tokenizer:
            ours = self.binding.tokenizer[:16]
            raise Incompatible(f"the stitch {self._cut()} is for tokenizer {ours}, not for {tokenizer[:16]}")

    def check_depth(self, layers: int) -> None:
        """Raises Incompatible if adapters don't cover all layers from the cut to the top's last one."""
        if self.adapters is not None and self.adapters.end != layers:
            ours = f"has adapters up to layer {self.adapters.end - 1}"
            raise Incompatible(f"the stitch {self._cut()} {ours}, and the top model's last one is {layers - 1}")

    def _tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by their names in the file."""
        tensors = {"weight": self.weight, "bias": self.bias}
        if self.adapters is not None:
            tensors |= dict(zip(ADAPTERS, (self.adapters.down, self.adapters.up), strict=True))
        if self.first is not None:
            tensors[FIRST] = self.first
        return tensors

    def _cut(self) -> str:
        return f"from layer {self.binding.bottom_layers} to {self.binding.top_from}"

    def _other_model(self, role: str, model_id: str, revision: str, given: inference_pb2.Model) -> Incompatible:
        made_for = f"made for the {role} model {model_id} revision {revision}"
        return Incompatible(f"the stitch {self._cut()} is {made_for}, not for {given.id} revision {given.revision}")


def _fingerprint(tensors: Iterable[Tensor], binding: StitchBinding) -> str:
    digest = hashlib.sha256(json.dumps(asdict(binding), sort_keys=True).encode())
    for tensor in tensors:
        digest.update(str(tensor.dtype).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
