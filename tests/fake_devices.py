"""Two devices on a machine that has none: tensors that say they live on "lazy:0" or "lazy:1", their numbers on the CPU.

Inside `with fake_devices():` torch makes, moves and computes on "lazy:N" as it does on "cuda:N", and raises where CUDA
would: an operation whose tensors live on different devices is an error, not a silent copy. Values are the CPU's own,
so a model spread over fake devices must give the numbers of the same model on the CPU.

What may mix is what torch lets pass beside a CUDA tensor, no more:

- a CPU tensor without dimensions, in operations element by element (not in `stack`, `index_select`, `gather`);
- CPU indices in `x[indices]` and `x[indices] = y`;
- `copy_` and `to`, which move; `fill_`, which reads a number.

`.numpy()` raises, a CPU generator on a device raises, `.item()` and `.tolist()` work. What is not shown: speed, memory,
streams, and kernels that only a real device has.

How: a wrapper subclass of Tensor whose `__torch_dispatch__` sees each operation below autograd. It unwraps, checks
devices, runs on the CPU and wraps. A dispatch mode does the same for operations that start from nothing
(`torch.zeros(3, device="lazy:1")`) or from the CPU (`x.to("lazy:1")`). The device type "lazy" is one of torch's own: it
has indices, and its backward runs in the caller's thread.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("lazy:0"), torch.device("lazy:1")

_aten = torch.ops.aten
_CPU_INDICES = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
_NO_CPU_SCALARS = {_aten.stack, _aten.index_select, _aten.gather}
_READS_A_NUMBER = {_aten.fill, _aten.fill_}


class DeviceTensor(torch.Tensor):
    """A tensor of a fake device; `held` holds its numbers on the CPU, and is shared by views as storage is."""

    held: Tensor

    @staticmethod
    def __new__(cls: type["DeviceTensor"], held: Tensor, device: torch.device) -> "DeviceTensor":
        """Put `held`, a CPU tensor, on the fake device, without a copy."""
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        self.held = held
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.held!r} on {self.device}"

    def tolist(self) -> Any:
        """Torch refuses this for subclasses; a CUDA tensor allows it."""
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory behind it, which the wrapper itself has none of."""
        return self.held.untyped_storage()

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_index(index), value)

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


@contextmanager
def fake_devices() -> Iterator[None]:
    """The block in which "lazy:0" and "lazy:1" are devices."""
    made: dict[str, Any] = {name: _made_on_the_cpu(getattr(torch, name)) for name in ("tensor", "as_tensor")}
    with _Operations(), mock.patch.multiple(torch, **made):
        yield


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _made_on_the_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Torch makes tensors of Python's numbers where no dispatch mode sees it: make them on the CPU, then move."""

    def make(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = function(data, **options)
        return made if device is None else made.to(device)

    return make


def _index(index: Any) -> Any:
    """Lists in an index as tensors on the CPU: the same holds of `x[:, [0, 2]]`."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list) else index


def _run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Check the devices of one operation, run it on the CPU, and put what it returns on its device."""
    tensors = _tensors((*args, *kwargs.values()))
    if kwargs.get("device") is None and not any(type(tensor) is DeviceTensor for tensor in tensors):
        return function(*args, **kwargs)  # all on the CPU
    device = _device(function, args, kwargs, tensors)
    wrappers = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
    given = {name: _unwrapped(value) for name, value in kwargs.items()}
    if given.get("device") is not None:
        given["device"] = CPU
    return _wrapped(function(*map(_unwrapped, args), **given), device, wrappers)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_unwrapped, value))
    return value.held if type(value) is DeviceTensor else value


def _wrapped(found: Any, device: torch.device, wrappers: Mapping[int, DeviceTensor]) -> Any:
    if isinstance(found, (list, tuple)):
        return type(found)(_wrapped(part, device, wrappers) for part in found)
    if not isinstance(found, Tensor):
        return found
    if id(found) in wrappers:  # in place, or out=
        return wrappers[id(found)]
    return found if device == CPU else DeviceTensor(found, device)


def _device(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> torch.device:
    """Where the result lives; raises where CUDA would."""
    operation = function.overloadpacket
    if operation is _aten.copy_:
        return args[0].device
    if kwargs.get("device") is not None:
        target = torch.device(kwargs["device"])
        device = target if target == CPU or target.index is not None else torch.device(target.type, 0)
    elif operation in _READS_A_NUMBER:
        device = args[0].device
    elif operation in _CPU_INDICES:
        device = _common(function, _but_scalars(_tensors((args[0], *args[2:], *kwargs.values()))))
        indices = {tensor.device for tensor in _tensors((args[1],))} - {CPU, device}
        if indices:
            raise RuntimeError(
                f"indices should be either on cpu or on the same device as the indexed tensor ({device})"
            )
    elif operation in _NO_CPU_SCALARS:
        device = _common(function, {tensor.device for tensor in tensors})
    else:
        changed = [args[place] if place < len(args) else kwargs.get(name) for place, name in _written(function)]
        device = _common(function, _but_scalars(tensors) | {tensor.device for tensor in _tensors(changed)})
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != device.type:
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{generator.device.type}'")
    return device


def _but_scalars(tensors: Sequence[Tensor]) -> set[torch.device]:
    return {tensor.device for tensor in tensors if tensor.dim() or tensor.device != CPU}


def _common(function: Any, devices: set[torch.device]) -> torch.device:
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices), reverse=True))
        message = f"Expected all tensors to be on the same device, but found at least two devices, {names}!"
        raise RuntimeError(f"{message} ({function})")
    return next(iter(devices), CPU)


@cache
def _written(function: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that the operation changes."""
    arguments = enumerate(function._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _tensors(parts: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for part in parts:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple)):
            found += _tensors(part)
    return found
