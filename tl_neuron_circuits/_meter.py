"""How many bytes of tensors a piece of work holds at once.

Every tensor that torch makes passes a dispatch mode, which counts its storage until it is freed: the same on every
device, and whatever the model is made of. What kernels allocate inside themselves is not seen.
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Meter(TorchDispatchMode):
    """Counts inside a `with` block; `peak` is the largest number of bytes, allocated there, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if _stored(x)}
        for tensor in tree_iter(result):
            if _stored(tensor) and id(tensor.untyped_storage()) not in given:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive or size == 0:
            return
        self._alive[key] = weakref.ref(storage, partial(self._freed, key, size))
        self._now += size
        self.peak = max(self.peak, self._now)

    def _freed(self, key: int, size: int, _: Any) -> None:
        self._alive.pop(key, None)
        self._now -= size


def _stored(value: Any) -> bool:
    """Whether it is a tensor with a storage: what a sparse one is made of is counted, itself it has none."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided
