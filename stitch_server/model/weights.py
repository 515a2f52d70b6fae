"""Reads single tensors of a model folder's safetensors files, and says in which format layers keep their weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stitch.cluster import ComputeConfig, Quantization
from stitch.errors import Incompatible
from stitch_server import cpu

INDEX_FILE = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
# What oneDNN and this project's kernels multiply by.
PACKED_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How layers keep the matrices that they read."""

    quantization: Quantization = "none"
    # Packed for this project's CPU kernels.
    kernels: bool = False

    @classmethod
    def of(cls, compute: ComputeConfig) -> WeightFormat:
        """Returns the format that the cluster file configures."""
        return cls(compute.quantization, compute.kernels)

    @property
    def for_head(self) -> WeightFormat:
        """The format of the head's matrix, which chooses the tokens: four bits are too few for it."""
        return replace(self, quantization="int8") if self.quantization == "int4" else self

    def bits(self, dtype: torch.dtype) -> int:
        """Returns the bits of a weight that is read as `dtype`, without the scales of int8."""
        if self.quantization == "int4":
            return cpu.INT4_BITS_PER_GROUP // cpu.INT4_GROUP
        return 8 if self.quantization == "int8" else 8 * dtype.itemsize

    def uses_kernels(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether this project's kernels multiply by weights of this dtype on this device."""
        return self.kernels and device.type == "cpu" and dtype in PACKED_DTYPES

    def keeps_two_layouts(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a matrix is kept in two layouts, one for a few tokens and one for many."""
        if not self.uses_kernels(device, dtype):
            return False
        if self.quantization != "none":
            return self.quantization == "int8" and not cpu.has_amx()
        return dtype != torch.float32 and has_onednn(device)


AS_STORED = WeightFormat()


def has_onednn(device: torch.device) -> bool:
    """Whether oneDNN multiplies matrices on this device."""
    return torch.backends.mkldnn.is_available() and device.type == "cpu"  # type: ignore[no-untyped-call]


def weight_files(folder: Path) -> list[Path]:
    """Returns the folder's safetensors files by name. Raises Incompatible if there are none."""
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise Incompatible(f"{folder} lacks {', '.join(missing) or 'safetensors files'}")
    return files


class Weights:
    """The tensors of one model folder, read one by one; a context manager, since it keeps the files open."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, weight_format: WeightFormat = AS_STORED
    ) -> None:
        self._folder = folder
        self.device = device
        self.dtype = dtype
        # The format that layers made of these tensors keep them in; `read` returns tensors of `dtype`.
        self.weight_format = weight_format
        # safetensors' files have no types of their own.
        self._file_of: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file: Any = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise Incompatible(f"{path} is no whole safetensors file: {error}") from error
            self._file_of.update(dict.fromkeys(file.keys(), file))

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file_of.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> Tensor:
        """Returns the tensor of that name on the device in the dtype. Raises Incompatible if the folder lacks it."""
        if name not in self._file_of:
            raise Incompatible(f"tensor {name} is not in {self._folder}")
        stored: Tensor = self._file_of[name].get_tensor(name)
        return stored.to(self.device, self.dtype)
