"""Records a function's operators on a CPU, and replays them, as a CUDA graph does on a GPU.

A replay runs the same operators over the same memory, with the host's values at the time of the capture. Operators that
a graph can't hold, because the host would wait for the device or send it data, raise HostSynchronized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stitch_server.worker.cuda_graphs import Replay

_ATEN = torch.ops.aten
# Operators that return values to the host, tensors whose size depends on values, or tensors made of host values.
REFUSED = {
    _ATEN._local_scalar_dense.default,
    _ATEN.nonzero.default,
    _ATEN.equal.default,
    _ATEN.lift_fresh.default,
}
# Refused with a boolean mask, because the number of elements then depends on values.
INDEXING = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}


class HostSynchronized(Exception):
    """A captured function made the host wait for the device, or send it data."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REFUSED or (func in INDEXING and any(index.dtype is torch.bool for index in _tensors(args[1]))):
            raise HostSynchronized(str(func))
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result


@dataclass
class CpuCapture:
    """A `Capture` that counts its captures and replays."""

    captured: int = 0
    replayed: int = 0
    # The number of operators of each captured function.
    lengths: list[int] = field(default_factory=list)

    def __call__(self, compute: Callable[[], Tensor]) -> Replay:
        compute()
        with _Recorder() as recorder:
            result = compute()
        self.captured += 1
        self.lengths.append(len(recorder.steps))

        def replay() -> Tensor:
            self.replayed += 1
            for function, args, kwargs, before in recorder.steps:
                _overwrite(_tensors(before), _tensors(function(*args, **kwargs)))
            return result

        return replay


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _overwrite(recorded: Iterable[Tensor], recomputed: Iterable[Tensor]) -> None:
    """Copies results to the memory of the recorded ones; views and in-place results share that memory already."""
    for old, new in zip(recorded, recomputed, strict=True):
        if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
            old.copy_(new)
