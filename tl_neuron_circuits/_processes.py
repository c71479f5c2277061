"""Many processes, one result: work is shared out, sums are reduced, and an error anywhere is an error everywhere.

Started by `accelerate launch`, `torchrun` or anything that sets RANK and WORLD_SIZE, every process runs the same script
and makes the same calls. A call of this package then goes

    processes = current_processes()
    with processes.together("attribute", settings):     # checks that all make the same call; errors reach all
        for batch in processes.share(batches):          # its own part of the work
            sums += ...
        sums = processes.total(sums)                    # the sums of all, the same on every process

Control messages go through a gloo group of its own, so a process that was killed closes its connection and the others
raise at once; one that hangs is waited for `TL_NEURON_CIRCUITS_TIMEOUT` seconds (1800 unless set). Tensors are reduced
where the default group can: NCCL on the GPU of the process, gloo on the CPU.
With a single process none of this does anything.
"""

import functools
import itertools
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ._errors import ProcessesError
from ._indices import as_count
from ._memory import is_out_of_memory

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
TIMEOUT = "TL_NEURON_CIRCUITS_TIMEOUT"
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)


@dataclass(frozen=True)
class Processes:
    """This process among those that run the same script."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """This process' share of the items: every `count`-th one."""
        return itertools.islice(items, self.rank, None, self.count)

    def fair(self, batch_size: int, n: int) -> int:
        """The largest batch size up to `batch_size` at which every process gets some of n prompts."""
        as_count(batch_size, "batch_size")
        return max(1, min(batch_size, -(-n // self.count)))

    @contextmanager
    def together(self, what: str, settings: Any = None) -> Iterator[None]:
        """A section that all processes go through: an error in one of them raises in all, at their next exchange.

        Raises:
            ProcessesError: another process raised, died, hangs, or made another call or one with other settings.
        """
        if self.count == 1:
            yield
            return
        outer = _INSIDE.set(True)
        try:
            mine = f"{what} {json.dumps(settings, sort_keys=True, default=str)}"
            calls = self.gather(mine)
            if len(set(calls)) > 1:
                raise ProcessesError(
                    "expected the same call on every process; they differ: "
                    + "; ".join(f"process {rank}: {call[:300]}" for rank, call in enumerate(calls))
                    + ". Let every process run the same script, or call inside `with tnc.single_process():`.",
                    told=True,
                )
            yield
            self.gather("done")
        except Exception as error:  # an interrupt ends the process, which the others notice
            told = isinstance(error, ProcessesError) and error.told
            if not told and outer.old_value is not True:  # one message: the outermost section sends it
                self._tell(error)
            raise
        finally:
            _INSIDE.reset(outer)

    def gather(self, value: T) -> list[T]:
        """`value` of every process, in order of rank.

        Raises:
            ProcessesError: another process raised, died or hangs.
        """
        return [value] if self.count == 1 else self._exchange(value, None)

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns (or raises) on the first process, on all of them; the others do not run it."""
        if self.count == 1:
            return work()
        outcome: Any = (None, None)
        if self.first:
            try:
                outcome = (work(), None)
            except Exception as error:  # noqa: BLE001 - raised below, on every process
                outcome = (None, error)
        value, error = self.gather(outcome)[0]
        if error is not None:
            raise error
        return value

    def total(self, tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """The sum over processes of each tensor; one that has no such tensor counts as zeros. Same on every process.

        Raises:
            ProcessesError: another process raised, died or hangs, or shapes differ.
        """
        if self.count == 1:
            return dict(tensors)
        shapes = self.gather({key: (tuple(t.shape), t.dtype) for key, t in tensors.items()})
        known: dict[K, tuple[tuple[int, ...], torch.dtype]] = {}
        for found in shapes:
            for key, shape in found.items():
                if known.setdefault(key, shape) != shape:
                    raise ProcessesError(
                        f"expected {key} of one shape everywhere; got {known[key]} and {shape}. "
                        "Give every process the same arguments."
                    )
        device, group = _reducing()
        summed = {}
        for key, (shape, dtype) in known.items():
            mine = tensors.get(key)
            home = device if mine is None else mine.device
            part = torch.zeros(shape, dtype=dtype, device=device) if mine is None else mine.to(device, copy=True)
            with _connected():
                distributed.all_reduce(part, group=group)
            summed[key] = part.to(home)
        return summed

    def _exchange(self, value: Any, error: str | None) -> list[Any]:
        """Every process' value. Raises where any of them sends an error instead."""
        received: list[Any] = [None] * self.count
        with _connected():
            distributed.all_gather_object(received, (value, error), group=_control(distributed.group.WORLD))
        failed = {rank: message for rank, (_, message) in enumerate(received) if message is not None}
        if failed and error is None:
            messages = "; ".join(f"process {rank}: {message}" for rank, message in failed.items())
            raise ProcessesError(f"stopped because another process raised. {messages}", told=True)
        return [value for value, _ in received]

    def _tell(self, error: BaseException) -> None:
        """Let the others know at their next exchange; if they cannot be reached, the error itself is enough."""
        try:
            self._exchange(None, f"{type(error).__name__}: {error}")
        except ProcessesError:
            pass


def current_processes() -> Processes:
    """The processes that this one works with: one, unless a launcher started several.

    The first call joins them (through accelerate, which also chooses the process' GPU), so all must make it.
    """
    if _ALONE.get():
        return Processes()
    if not (distributed.is_available() and distributed.is_initialized()):
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR"} <= set(os.environ)
        if not launched or not distributed.is_available():
            return Processes()
        from accelerate import PartialState

        PartialState(timeout=_timeout())
    return Processes(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def single_process() -> Iterator[None]:
    """Let this process work alone inside the context, for what only one process should do.

    Yields:
        Nothing; calls inside neither share work with other processes nor wait for them.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> with tnc.single_process():
        ...     scores = tnc.attribute(tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4))
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def _timeout() -> timedelta:
    return timedelta(seconds=float(os.environ.get(TIMEOUT, "1800")))


@functools.cache
def _control(world: Any) -> Any:
    """A gloo group beside the default one, made once for it."""
    return distributed.new_group(backend="gloo", timeout=_timeout())


def _reducing() -> tuple[torch.device, Any]:
    """Where tensors are added up, and by which group."""
    if "nccl" in str(distributed.get_backend()) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device()), None
    return torch.device("cpu"), _control(distributed.group.WORLD)


@contextmanager
def _connected() -> Iterator[None]:
    """Turn a lost connection or a time-out into an error that says so."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ProcessesError(
            f"another process died, or did not answer within {_timeout().total_seconds():g} s "
            f"({TIMEOUT} in the environment sets it): {str(error).strip().splitlines()[0][:300]}",
            told=True,
        ) from error
