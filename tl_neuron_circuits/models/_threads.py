"""One thread at a time on a model: hooks, flags and `requires_grad` sit on it, where every thread meets them.

A call holds its model until it ends, `relp` until it is left; the same thread may hold it again. Another thread is
refused at once: waiting for a user's `with relp(...)`, or for a thread that waits for us, could last forever. Our
hooks refuse to run in another thread, so that a plain `model(...)` there is not steered, and does not overwrite what
is read here. Backward passes are different: autograd runs them, and what they compute again (gradient checkpointing),
on threads of its own.

Who holds a model is kept here and not on the model, which may be copied, pickled and sent to other processes.
"""

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch

from .._errors import PropagationError
from ._protocol import TransformerLensModel
from ._run_state import require_steady

F = TypeVar("F", bound=Callable)


@dataclass
class _Hold:
    """Who holds a model, for what, and how many times over."""

    thread: int
    name: str
    purpose: str
    count: int = 1


_HOLDS: "weakref.WeakKeyDictionary[Any, _Hold]" = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()  # held for a look-up only
_LOCAL = threading.local()
_NUMBERS = itertools.count()
_REMEDY = "use one thread at a time, or a copy of the model (copy.deepcopy) for each"


def _this_thread() -> int:
    """One number per thread. The system's numbers are given to a new thread when one ends."""
    if not hasattr(_LOCAL, "number"):
        _LOCAL.number = next(_NUMBERS)
    return _LOCAL.number


def _after_fork() -> None:
    """Only the thread that forked lives on in the child, and the lock may have been held by another."""
    global _LOCK
    _LOCK = threading.RLock()
    for model, hold in list(_HOLDS.items()):
        if hold.thread != _this_thread():
            del _HOLDS[model]


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def take(model: Any, purpose: str) -> None:
    """Hold the model for this thread until `release`, once more if it does already.

    Raises:
        PropagationError: another thread holds it.
    """
    with _LOCK:
        hold = _HOLDS.get(model)
        if hold is None:
            _HOLDS[model] = _Hold(_this_thread(), threading.current_thread().name, purpose)
        elif hold.thread == _this_thread():
            hold.count += 1
        else:
            raise PropagationError(
                f"{purpose}: {hold.purpose} of the thread {hold.name!r} is using this model, and its hooks would act "
                f"here too ({threading.current_thread().name!r}). Use one thread at a time, or a copy of the model "
                "(copy.deepcopy) for each."
            )


def release(model: Any) -> None:
    """Undo one `take`."""
    with _LOCK:
        hold = _HOLDS.get(model)
        if hold is not None:
            hold.count -= 1
            if hold.count == 0:
                del _HOLDS[model]


@contextmanager
def held(model: Any, purpose: str) -> Iterator[None]:
    """Hold the model for this thread inside the block.

    Raises:
        PropagationError: another thread holds it.
    """
    take(model, purpose)
    try:
        yield
    finally:
        release(model)


def holding(function: F) -> F:
    """Let a public function hold the model, its argument `model` and the first, until it ends.

    Whatever runs a model is decorated, so it is also asked here, once a call, whether it would do the same twice.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        models = [value for value in (*args[:2], kwargs.get("model")) if isinstance(value, torch.nn.Module)]
        if not models:  # refused by its type
            return function(*args, **kwargs)
        with held(models[0], function.__name__):
            if isinstance(models[0], TransformerLensModel):  # else refused by its type
                require_steady(models[0], gradients=False)
            return function(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]


class _OneThread:
    """A hook, and the thread that may run it. An object and not a closure, so that a copied model has its own hook."""

    def __init__(self, hook: Callable[..., Any], remedy: str) -> None:
        self.hook, self.thread, self.remedy = hook, _this_thread(), remedy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.thread != _this_thread() and not _in_backward():
            raise PropagationError(
                f"the model was run in the thread {threading.current_thread().name!r} with hooks on it that another "
                f"thread made, which would act here too: {self.remedy}."
            )
        return self.hook(*args, **kwargs)


def this_thread_only(hook: Callable[..., Any], remedy: str = _REMEDY) -> Callable[..., Any]:
    """A forward hook that refuses to run in another thread than the one that made it.

    Raises:
        PropagationError: when it runs there, outside of a backward pass.
    """
    return _OneThread(hook, remedy)


def _in_backward() -> bool:
    """Whether autograd runs this thread now; torch's own checkpointing asks the same way."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def keep_value(store: dict[str, Any], name: str, value: Any, hook: Any) -> Any:
    """As a hook, `partial(keep_value, store, name)`: keep the value, and return it.

    Otherwise a view that TransformerLens reshapes for hooks (`hook_conversion`) is not in the graph.
    """
    store[name] = value
    return value


@contextmanager
def hooked(model: TransformerLensModel, hooks: Iterable[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """`model.hooks(fwd_hooks=hooks)` for this package's hooks: for this thread alone, which holds the model meanwhile.

    Raises:
        PropagationError: another thread holds the model.
    """
    ours = [(name, this_thread_only(hook)) for name, hook in hooks]
    with held(model, "a call"), _hooked_at_once(model, ours) if _is_slow(model) else model.hooks(fwd_hooks=ours):
        yield


def _is_slow(model: Any) -> bool:
    """Whether `model.hooks` makes the dictionary of hook points anew for every hook, as Bridges before 4 do: 5 ms each
    at 30 layers, a third of a learned mask's step on a small model.
    """
    return isinstance(getattr(type(model), "hook_dict", None), property) and not hasattr(model, "_resolve_hook_point")


@contextmanager
def _hooked_at_once(model: Any, hooks: Iterable[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """What `model.hooks(fwd_hooks=hooks)` does, from one dictionary of hook points."""
    points, added, level = model.hook_dict, [], model.context_level + 1
    try:
        model.context_level = level
        for name, hook in hooks:
            if name in points:  # as there, a name that is not is left out; callers check that their hooks fire
                model.check_hooks_to_add(points[name].name or name)
                points[name].add_hook(hook, dir="fwd", level=level)
                added.append(points[name])
        yield
    finally:
        for point in added:
            point.remove_hooks(dir="fwd", level=level)
        model.context_level = level - 1
