"""How much memory is free, which batches fit into it, and halving the batches that did not fit.

Nothing here knows what the work is: `attribute` and `evaluate` pass it in, with what a few prompts of it take.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch

T = TypeVar("T")
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

    def over(self, batch: B, work: Callable[[B], T]) -> Iterator[T]:
        """Yield the results of `work` for pieces of the batch, in order; a piece that did not fit is split in two."""
        if not self.allowed:
            yield work(batch)
            return
        pieces = deque([batch])
        while pieces:
            piece, *rest = pieces.popleft().split(self.size)  # which may have fallen since
            pieces.extendleft(reversed(rest))
            results: list[T] = []
            if self._fits(lambda piece=piece, results=results: results.append(work(piece)), len(piece)):
                yield results.pop()
            else:
                pieces.appendleft(piece)

    def whole(self, work: Callable[[int], T]) -> T:
        """The result of `work` at this batch size, restarted with smaller ones until it fits."""
        results: list[T] = []
        while not self._fits(lambda: results.append(work(self.size)), self.size):
            pass
        return results.pop()

    def _fits(self, work: Callable[[], None], rows: int) -> bool:
        shortage = out_of_memory(work, last=rows == 1 or not self.allowed)
        if shortage is None:
            return True
        self.size = max(1, rows // 2)
        logger.warning("not enough memory for %d prompts (%s); continuing with %d", rows, shortage, self.size)
        return False


def out_of_memory(work: Callable[[], None], *, last: bool) -> str | None:
    """Do the work. None if that went well, else how memory ran out; on the `last` chance the error is raised."""
    try:
        work()
    except (RuntimeError, MemoryError) as error:  # torch.cuda.OutOfMemoryError is a RuntimeError
        message = str(error)
        known = ("out of memory", "not enough memory", "can't allocate")
        if last or not (isinstance(error, MemoryError) or any(words in message for words in known)):
            raise
    else:
        return None
    if torch.cuda.is_available():  # only here, when the frames that hold the batch's tensors are gone
        torch.cuda.empty_cache()
    return message.strip().splitlines()[0][:200] if message.strip() else "MemoryError"


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
    larger: list[int] = []
    if out_of_memory(lambda: larger.extend((peak(many // 2), peak(many))), last=False) is None:
        each = max(each, -(-(larger[1] - larger[0]) // (many - many // 2)))
    return fixed, each


def first_batch(fixed: int, each: int, available: int | None, n: int) -> int:
    """The batch size that "auto" starts with for n prompts: as many as fit into `FILL` of the memory, at least one."""
    most = min(_LARGEST, n)
    return most if available is None else max(1, min(most, (int(FILL * available) - fixed) // each))


def available_memory(model: _Weights) -> int | None:
    """Bytes free on the devices that hold the model's parameters; None where a device does not report it."""
    free = [_free(device) for device in {parameter.device for parameter in model.parameters()}]
    known = [one for one in free if one is not None]
    return sum(known) if len(known) == len(free) else None


def _free(device: torch.device) -> int | None:
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
