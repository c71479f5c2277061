"""How much memory is free, which batches fit into it, and halving the batches that did not fit.

Nothing here knows what the work is: `attribute` and `evaluate` pass it in, with what a few prompts of it take.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch

T = TypeVar("T")
P = TypeVar("P")
logger = logging.getLogger(__name__)
FILL = 0.8  # of what is available, for "auto"
_LARGEST = 128  # a larger batch is not faster


@runtime_checkable
class _Weights(Protocol):
    def parameters(self) -> Iterable[torch.Tensor]: ...


@runtime_checkable
class _Rows(Protocol):
    def __len__(self) -> int: ...

    def split(self: "B", size: int) -> "Iterator[B]": ...


B = TypeVar("B", bound=_Rows)


@dataclass
class Halving:
    """The batch size, halved when memory runs out if that is allowed; otherwise the error is raised."""

    size: int
    allowed: bool

    def pieces(self, batch: B) -> "Iterator[Attempt[B]]":
        """Yield pieces of the batch, in order, each to be worked on in a `with` block; one that did not fit is split.

        Work that ran out of memory leaves its block early and is tried again on smaller pieces: what it adds to must
        be added to last.
        """
        waiting = deque([batch])
        while waiting:
            piece = waiting.popleft()
            if self.allowed:  # the size may have fallen since this piece was cut
                piece, *rest = piece.split(self.size)
                waiting.extendleft(reversed(rest))
            attempt = Attempt(piece, last=not self.allowed or len(piece) == 1)
            yield attempt
            if attempt.shortage is not None:  # here the error is gone, and with it the frames that held the tensors
                self._halve(len(piece), attempt.shortage)
                waiting.appendleft(piece)

    def whole(self, work: Callable[[int], T]) -> T:
        """The result of `work` at this batch size, restarted with smaller ones until it fits."""
        while True:
            results: list[T] = []
            attempt = Attempt(self.size, last=not self.allowed or self.size == 1)
            with attempt as size:
                results.append(work(size))
            if attempt.shortage is None:
                return results.pop()
            self._halve(self.size, attempt.shortage)

    def _halve(self, rows: int, shortage: str) -> None:
        _empty_cache()
        self.size = max(1, rows // 2)
        logger.warning("not enough memory for %d prompts (%s); continuing with %d", rows, shortage, self.size)


class Attempt(Generic[P]):
    """One piece of work in a `with` block that running out of memory ends early, unless it is the last chance."""

    def __init__(self, piece: P, *, last: bool) -> None:
        self._piece, self._last = piece, last
        self.shortage: str | None = None
        """How memory ran out; None while it has not."""

    def __enter__(self) -> P:
        return self._piece

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None or self._last or not is_out_of_memory(error):
            return False
        message = str(error).strip()
        self.shortage = message.splitlines()[0][:200] if message else type(error).__name__
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a lack of memory, and not another error of the kind that torch raises for it."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    known = ("out of memory", "not enough memory", "can't allocate")  # the CPU's allocator, MPS: a plain RuntimeError
    return isinstance(error, RuntimeError) and any(words in str(error) for words in known)


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def growth(peak: Callable[[int], int], available: int | None, wanted: int) -> tuple[int, int]:
    """Bytes that any batch needs, and bytes more per prompt, from the peaks of one and of two prompts.

    Larger batches may peak at another moment, which grows faster: where there is room, four and eight are measured too.
    """
    peak(1)  # what is allocated once, on first use, does not count
    one, two = peak(1), peak(2)
    each = max(two - one, 1)
    fixed, many = max(one - each, 0), min(8, wanted)
    if many < 4 or (available is not None and 2 * (fixed + many * each) >= available):
        return fixed, each
    attempt = Attempt(many, last=False)
    with attempt:
        half, full = peak(many // 2), peak(many)
        each = max(each, -(-(full - half) // (many - many // 2)))
    if attempt.shortage is not None:
        _empty_cache()
    return fixed, each


def first_batch(fixed: int, each: int, available: int | None, n: int) -> int:
    """The batch size that "auto" starts with for n prompts: as many as fit into `FILL` of the memory, at least one."""
    most = min(_LARGEST, n)
    return most if available is None else max(1, min(most, (int(FILL * available) - fixed) // each))


def available_memory(model: _Weights) -> int | None:
    """Bytes free on the devices that hold the model's parameters; None where a device does not report it."""
    free = [free_memory(device) for device in {parameter.device for parameter in model.parameters()}]
    known = [one for one in free if one is not None]
    return sum(known) if len(known) == len(free) else None


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a device; None where it does not report it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    limits = [_meminfo(), _cgroup()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _meminfo() -> int | None:
    """Linux: what can be allocated without swapping."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return _pages()
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _pages() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup() -> int | None:
    """A container's limit less what it uses, the file cache not counted."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
