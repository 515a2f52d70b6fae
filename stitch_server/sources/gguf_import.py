"""Converts a GGUF file to a model folder, the same bytes on every machine.

Weights are stored as float32, since no smaller type holds a dequantized value (an integer of 4 to 8 bits times a
float16 scale, plus a float16 minimum) exactly, so the folder is the same model as the GGUF file.
"""

from __future__ import annotations

from itertools import accumulate, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from stitch_server.model.weights import INDEX_FILE
from stitch_server.sources import Progress
from stitch_server.sources.gguf_tensors import GgufFile
from stitch_server.sources.gguf_tokenizer import write_json, write_tokenizer

# The size of a safetensors file, which is built in memory.
FILE_BYTES = 1 << 30


def import_gguf(path: Path, folder: Path, progress: Progress) -> None:
    """Writes config.json, the weights and the tokenizer's files into an existing folder.

    Raises Incompatible if the file can't be read.
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
        tensors_of_file: dict[str, NDArray[np.float32]] = {}
        for tensor_name, tensor in islice(tensors, count):
            tensors_of_file[tensor_name] = tensor
            done += tensor.nbytes
            progress(f"importing {file.path.name}", done / sum(sizes))
        save_file(tensors_of_file, folder / name, metadata={"format": "pt"})
        # safetensors makes a file that only its owner reads.
        (folder / name).chmod(0o644)
        file_of.update(dict.fromkeys(tensors_of_file, name))
    if len(counts) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": file_of})


def tensors_per_file(sizes: list[int], limit: int) -> list[int]:
    """Returns the number of consecutive tensors of each file; no file exceeds the limit by more than one tensor."""
    files = [end // limit for end in accumulate(sizes, initial=0)][:-1]
    return [files.count(number) for number in sorted(set(files))]
