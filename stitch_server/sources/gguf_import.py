"""Turns a GGUF file into a model folder, the same bytes on every machine. Doesn't know where the file came from.

Weights are stored as float32, since nothing smaller holds a dequantized value (an integer of 4 to 8 bits times a
float16 scale, plus a float16 minimum) exactly, and the folder shall be the model that the GGUF file is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from stitch_server.model.weights import INDEX_FILE
from stitch_server.sources.gguf_tensors import GgufFile
from stitch_server.sources.gguf_tokenizer import write_json, write_tokenizer
from stitch_server.sources.progress import Progress

# So much is held in memory at a time.
FILE_BYTES = 1 << 30


def import_gguf(path: Path, folder: Path, progress: Progress) -> None:
    """Writes config.json, the weights and the tokenizer's files into an existing folder.

    Raises Incompatible where the file is none that can be read.
    """
    progress(f"reading {path.name}", 0.0)
    file = GgufFile.open(path)
    config = file.config()
    write_json(folder / "config.json", config)
    write_tokenizer(file, folder)
    _write_weights(file, folder, progress)


def _write_weights(file: GgufFile, folder: Path, progress: Progress) -> None:
    sizes = file.tensor_bytes()
    tensors = file.tensors()
    done = 0
    file_of: dict[str, str] = {}
    counts = tensors_per_file(sizes, FILE_BYTES)
    for number, count in enumerate(counts, start=1):
        name = "model.safetensors" if len(counts) == 1 else f"model-{number:05d}-of-{len(counts):05d}.safetensors"
        held: dict[str, NDArray[np.float32]] = {}
        for tensor_name, tensor in _next(tensors, count):
            held[tensor_name] = tensor
            done += tensor.nbytes
            progress(f"importing {file.path.name}", done / sum(sizes))
        save_file(held, folder / name, metadata={"format": "pt"})
        # safetensors lets only the owner read.
        (folder / name).chmod(0o644)
        file_of.update(dict.fromkeys(held, name))
    if len(counts) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": file_of})


def tensors_per_file(sizes: list[int], limit: int) -> list[int]:
    """How many consecutive tensors go into each file, so that none exceeds the limit by more than one tensor."""
    files = [reached // limit for reached in accumulate(sizes, initial=0)][:-1]
    return [files.count(number) for number in sorted(set(files))]


def _next(tensors: Iterator[tuple[str, NDArray[np.float32]]], count: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for _ in range(count):
        yield next(tensors)
