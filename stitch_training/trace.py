"""The arrays that a pass over the data leaves on disk: tokens, hidden states, the teacher's likeliest tokens.

Every array is a raw memory-mapped file, so the memory of a fit does not grow with its number of tokens.
Tensors are read and written from any device, and returned on the CPU:

    tokens          int32     [sequences, tokens]
    roles           int8      [sequences, tokens]          of the text that a token is a part of (`data.Role`)
    files           int32     [sequences]                  index of the training file
    hidden-K        bfloat16  [sequences, tokens, hidden]  of the bottom model after K layers
    teacher-ids     int32     [sequences, tokens, kept]    the bottom model's likeliest next tokens
    teacher-logp    float16   [sequences, tokens, kept]    and their log-probabilities
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stitch_training.data import PackedSequence

# The likeliest tokens of the bottom model's distribution that are kept; all others count as one outcome.
TEACHER_TOKENS = 32


@dataclass(frozen=True)
class TraceShape:
    """The dimensions of a trace, and the bottom depths whose hidden states it has."""

    sequences: int
    sequence_tokens: int
    hidden_size: int
    depths: tuple[int, ...]


@dataclass(frozen=True)
class Teacher:
    """The bottom model's likeliest next tokens `[..., kept]` and their log-probabilities."""

    ids: Tensor
    logprobs: Tensor

    def to(self, device: torch.device) -> Teacher:
        """Returns the same on a device."""
        return Teacher(self.ids.to(device), self.logprobs.to(device))


class Trace:
    """The memory-mapped arrays of one pass in a folder."""

    def __init__(self, folder: Path, shape: TraceShape, writable: bool = True) -> None:
        """Opens the arrays, or creates them where `writable`.

        A read-only trace must be complete: raises OSError or ValueError where an array is missing or too short.
        """
        if writable:
            folder.mkdir(parents=True, exist_ok=True)
        self.shape, mapped = shape, partial(_open_writable if writable else _open_read_only, folder)
        tokens = (shape.sequences, shape.sequence_tokens)
        self._tokens = mapped("tokens", np.int32, tokens)
        self._roles = mapped("roles", np.int8, tokens)
        self._files = mapped("files", np.int32, tokens[:1])
        self._ids = mapped("teacher-ids", np.int32, (*tokens, TEACHER_TOKENS))
        self._logprobs = mapped("teacher-logp", np.float16, (*tokens, TEACHER_TOKENS))
        # numpy has no bfloat16, so its bits are stored as int16.
        states = (*tokens, shape.hidden_size)
        self._hidden = {depth: mapped(f"hidden-{depth}", np.int16, states) for depth in shape.depths}

    def write(
        self, start: int, batch: Sequence[PackedSequence], hidden: Mapping[int, Tensor], teacher: Teacher
    ) -> None:
        """Writes sequences from index `start` on, with their states by depth and their teacher."""
        rows = slice(start, start + len(batch))
        self._tokens[rows] = [sequence.token_ids for sequence in batch]
        self._roles[rows] = [sequence.roles for sequence in batch]
        self._files[rows] = [sequence.file for sequence in batch]
        self._ids[rows] = teacher.ids.cpu().numpy()
        self._logprobs[rows] = teacher.logprobs.half().cpu().numpy()
        for depth, states in hidden.items():
            self._hidden[depth][rows] = states.bfloat16().view(torch.int16).cpu().numpy()

    def flush(self) -> None:
        """Flushes all arrays to disk; a checkpoint may then refer to them."""
        for array in (self._tokens, self._roles, self._files, self._ids, self._logprobs, *self._hidden.values()):
            array.flush()

    def tokens(self, rows: Tensor) -> Tensor:
        """Returns token ids, int64 `[rows, tokens]`."""
        return torch.from_numpy(self._tokens[rows.numpy()]).long()

    def roles(self, rows: Tensor) -> Tensor:
        """Returns the role of every token, int64 `[rows, tokens]`."""
        return torch.from_numpy(self._roles[rows.numpy()]).long()

    def files(self, rows: Tensor) -> Tensor:
        """Returns the index of each sequence's training file, int64 `[rows]`."""
        return torch.from_numpy(self._files[rows.numpy()]).long()

    def hidden(self, depth: int, rows: Tensor) -> Tensor:
        """Returns the bottom model's states after `depth` layers, bfloat16 `[rows, tokens, hidden]`."""
        return torch.from_numpy(self._hidden[depth][rows.numpy()]).view(torch.bfloat16)

    def teacher(self, rows: Tensor) -> Teacher:
        """Returns the bottom model's likeliest next tokens, with float32 log-probabilities."""
        ids = torch.from_numpy(self._ids[rows.numpy()]).long()
        return Teacher(ids, torch.from_numpy(self._logprobs[rows.numpy()]).float())


def _open_writable(folder: Path, name: str, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    return np.memmap(folder / name, dtype, "r+" if (folder / name).exists() else "w+", shape=shape)


def _open_read_only(folder: Path, name: str, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    return np.memmap(folder / name, dtype, "r", shape=shape)
