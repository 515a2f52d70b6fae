"""What a pass over the data leaves on disk: tokens, hidden states, the teacher's choices. Knows no model.

Every array is a raw memory-mapped file, so that what a fit holds in memory does not grow with its tokens:

    tokens          int32     [sequences, tokens]
    files           int32     [sequences]                  which of the training files it is from
    hidden-K        bfloat16  [sequences, tokens, hidden]  of the bottom model behind K layers
    teacher-ids     int32     [sequences, tokens, kept]    the bottom model's likeliest next tokens
    teacher-logp    float16   [sequences, tokens, kept]    and their log-probabilities
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Of the bottom model's distribution this many likeliest tokens are kept; the rest counts as one.
TEACHER_TOKENS = 32


@dataclass(frozen=True)
class TraceShape:
    """How large a trace is."""

    sequences: int
    sequence_tokens: int
    hidden_size: int
    depths: tuple[int, ...]


@dataclass(frozen=True)
class Teacher:
    """The bottom model's likeliest next tokens `[..., kept]` and their log-probabilities."""

    ids: Tensor
    logprobs: Tensor


class Trace:
    """Memory-mapped arrays in a folder, of which the first `filled` sequences count."""

    def __init__(self, folder: Path, shape: TraceShape, changes: bool = True) -> None:
        """One that nobody `changes` must be there: raises OSError or ValueError where an array is missing or short."""
        if changes:
            folder.mkdir(parents=True, exist_ok=True)
        self.shape, mapped = shape, partial(_mapped if changes else _read, folder)
        tokens = (shape.sequences, shape.sequence_tokens)
        self._tokens = mapped("tokens", np.int32, tokens)
        self._files = mapped("files", np.int32, tokens[:1])
        self._ids = mapped("teacher-ids", np.int32, (*tokens, TEACHER_TOKENS))
        self._logprobs = mapped("teacher-logp", np.float16, (*tokens, TEACHER_TOKENS))
        # numpy has no bfloat16, so its bits travel as int16.
        states = (*tokens, shape.hidden_size)
        self._hidden = {depth: mapped(f"hidden-{depth}", np.int16, states) for depth in shape.depths}

    def write(self, start: int, tokens: Tensor, files: list[int], hidden: dict[int, Tensor], teacher: Teacher) -> None:
        """Fills the sequences from `start` on: tokens `[sequences, tokens]` and all that belongs to them."""
        rows = slice(start, start + len(tokens))
        self._tokens[rows] = tokens.numpy()
        self._files[rows] = files
        self._ids[rows] = teacher.ids.numpy()
        self._logprobs[rows] = teacher.logprobs.half().numpy()
        for depth, states in hidden.items():
            self._hidden[depth][rows] = states.bfloat16().view(torch.int16).numpy()

    def flush(self) -> None:
        """Leaves on disk what was written, before a checkpoint counts on it."""
        for array in (self._tokens, self._files, self._ids, self._logprobs, *self._hidden.values()):
            array.flush()

    def tokens(self, rows: Tensor) -> Tensor:
        """int64 `[rows, tokens]`."""
        return torch.from_numpy(self._tokens[rows.numpy()]).long()

    def files(self, rows: Tensor) -> Tensor:
        """int64 `[rows]`."""
        return torch.from_numpy(self._files[rows.numpy()]).long()

    def hidden(self, depth: int, rows: Tensor) -> Tensor:
        """bfloat16 `[rows, tokens, hidden]` behind `depth` layers of the bottom model."""
        return torch.from_numpy(self._hidden[depth][rows.numpy()]).view(torch.bfloat16)

    def teacher(self, rows: Tensor) -> Teacher:
        """What the bottom model would have said after each token; float32 log-probabilities."""
        ids = torch.from_numpy(self._ids[rows.numpy()]).long()
        return Teacher(ids, torch.from_numpy(self._logprobs[rows.numpy()]).float())


def _mapped(folder: Path, name: str, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    return np.memmap(folder / name, dtype, "r+" if (folder / name).exists() else "w+", shape=shape)


def _read(folder: Path, name: str, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    return np.memmap(folder / name, dtype, "r", shape=shape)
