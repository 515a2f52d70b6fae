"""Reads single tensors out of a model folder's safetensors files. Doesn't know what a tensor is for."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stitch.errors import Incompatible
from stitch_server.model.linear import AS_STORED, WeightFormat

INDEX_FILE = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files by name. Raises Incompatible where there are none."""
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise Incompatible(f"{folder} lacks {', '.join(missing) or 'safetensors files'}")
    return files


class Weights:
    """The tensors of one model folder, read one by one; a context manager, since the files stay open meanwhile."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, weight_format: WeightFormat = AS_STORED
    ) -> None:
        self._folder = folder
        self.device = device
        self.dtype = dtype
        # How whoever multiplies by a matrix keeps it.
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
        """The tensor of that name on the device in the dtype. Raises Incompatible where the folder lacks it."""
        if name not in self._file_of:
            raise Incompatible(f"tensor {name} is not in {self._folder}")
        stored: Tensor = self._file_of[name].get_tensor(name)
        return stored.to(self.device, self.dtype)
