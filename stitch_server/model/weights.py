"""Reads the files of a model folder, and says in which format layers keep their weights.

A file that isn't what its name says is refused by name: a Git LFS pointer, an empty or a broken file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stitch.cluster import ComputeConfig, Quantization
from stitch.errors import Incompatible
from stitch.tokenizer_files import json_object
from stitch_server import cpu

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# How a file begins that stands for another one: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
LFS_POINTER = b"version https://git-lfs"
# The limit of safetensors itself.
MAX_HEADER_BYTES = 100_000_000
# What oneDNN and this project's kernels multiply by.
PACKED_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How layers keep the matrices that they read."""

    quantization: Quantization = "none"
    # Packed for this project's CPU kernels.
    kernels: bool = False
    # Rounded to what quantized weights stand for, but kept in the dtype: to measure what quantization costs in quality.
    is_rounded: bool = False

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
        return dtype != torch.float32 and has_onednn(device, dtype)


AS_STORED = WeightFormat()


def has_onednn(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN multiplies by matrices of this dtype on this device; in bfloat16 it takes a CPU with AVX-512."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype is not torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def read_json(path: Path) -> dict[str, Any]:
    """Returns the fields of a JSON file. Raises Incompatible, which names the file, if it holds none."""
    try:
        return json_object({path.name: path.read_bytes()}, path.name)
    except Incompatible as error:
        raise Incompatible(f"{path.parent}: {error}") from error


class StoredTensor(NamedTuple):
    """A tensor's entry in the header of a safetensors file, with its first byte and its end in the file."""

    dtype: str
    shape: list[int]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name. Raises Incompatible, which says what the file is instead.

    Layout: https://huggingface.co/docs/safetensors/index#format
    """
    with path.open("rb") as file:
        length = int.from_bytes(start := file.read(8), "little")
        text = file.read(min(length, MAX_HEADER_BYTES))
    if (start + text).startswith(LFS_POINTER):
        raise Incompatible(f"{path} is a Git LFS pointer, and the file itself was not downloaded")
    if not start:
        raise Incompatible(f"{path} is no whole safetensors file: it is empty")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(entry["dtype"], entry["shape"], *(8 + length + at for at in entry["data_offsets"]))
            for name, entry in header.items()
        }
        if any(not 8 + length <= one.begin <= one.end < 1 << 63 for one in tensors.values()):
            raise ValueError("a tensor has no place in the file")
        return tensors
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Incompatible(f"{path} is no whole safetensors file: its header is broken") from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that `transformers` reads: model.safetensors, else those of the index.

    Raises Incompatible if there are none. Other files in the folder are not of the model.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise Incompatible(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; weights of other files are not read")
    file_of = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(name, str) for name in file_of.values()):
        raise Incompatible(f"{folder / INDEX_FILE}: weight_map must give every tensor's file")
    files = [folder / name for name in sorted(set(file_of.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise Incompatible(f"{folder} lacks {', '.join(missing)}, which {INDEX_FILE} names")
    return files


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of the model by name, from the headers of its files."""
    return {name: stored for path in weight_files(folder) for name, stored in read_header(path).items()}


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
            read_header(path)
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

    def head_name(self, tied: bool) -> str:
        """Returns the head's matrix: a file that has one means it, although it may be configured as tied."""
        return EMBEDDING if tied and HEAD not in self else HEAD

    def read(self, name: str) -> Tensor:
        """Returns the tensor of that name on the device in the dtype. Raises Incompatible if the folder lacks it."""
        if name not in self._file_of:
            raise Incompatible(f"tensor {name} is not in {self._folder}")
        stored: Tensor = self._file_of[name].get_tensor(name)
        return stored.to(self.device, self.dtype)
