"""PyTorch's `meta` device as an accelerator without data, to test that tensors are where a device needs them.

Operations on it compute shapes and dtypes alone. What the CPU reads of it is zeros, where PyTorch itself would refuse.
An operation on tensors of both devices is an error, as on a GPU; only copies between them are allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

META = torch.device("meta")
# Operations of which the CPU reads a truth value, with the one that zeros give.
_TRUE_OF_ZEROS: dict[Any, bool | Tensor] = {
    torch.ops.aten.equal.default: True,
    torch.ops.aten.all.default: torch.tensor(True),
}
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class MixedDevices(AssertionError):
    """An operation had tensors of both devices."""


class MetaAccelerator(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block the `meta` device behaves as a GPU whose numbers are all zero."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Operations on the device, by name.
        self.operations: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        devices = {one.device.type for one in tensors}
        if "meta" in devices:
            if func in _COPIES:
                return _copied(func, args, kwargs)
            if func is torch.ops.aten._local_scalar_dense.default:
                return 0.0 if args[0].is_floating_point() else 0
            if func.overloadpacket is torch.ops.aten.to:
                # In inference mode a copy arrives undivided.
                with self:
                    return func.decompose(*args, **kwargs)
            if func in _TRUE_OF_ZEROS:
                return _TRUE_OF_ZEROS[func]
            if any(one.device.type != "meta" and one.ndim for one in tensors):
                raise MixedDevices(f"{func} of tensors on {sorted(devices)}")
            self.operations.add(str(func))
        return func(*args, **kwargs)


def _copied(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten.copy_.default:
        target, source = args[0], args[1]
        return target.zero_() if source.device.type == "meta" and target.device.type == "cpu" else func(*args, **kwargs)
    source, device = args[0], kwargs.get("device") or args[0].device
    if source.device.type == "meta" and torch.device(device).type == "cpu":
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
    return func(*args, **kwargs)
