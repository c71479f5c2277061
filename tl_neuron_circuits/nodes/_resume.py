"""Resume an interrupted `attribute`: the sums so far, written beside each other, never over each other.

A directory holds, for every process, one folder `process0of1-000012`: the sums after 12 of its batches. The next one is
complete before this one goes, so a kill at any moment leaves one that can be read. Sums are float32 as in memory and
batches come in the same order, so on the same machine the result has the same bits as that of a run in one piece.
Writing takes at most about a twentieth of the time.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from .._errors import FileFormatError
from .._files import read_directory, require_shapes, write_directory
from .._processes import Processes
from ..bases._dictionary_variance import VarianceSums
from ..bases._site import Site
from ._sums import Sums

SCHEMA = 3
KIND = "partial"
_SHARE = 20  # of the time may go by for one part that writing takes


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    settings: dict[str, Any]
    done: int
    planned: int
    batch_size: int
    devices: dict[str, str]
    variance: dict[str, tuple[int, float, float]]


class SavedSums:
    """The sums of one process on disk.

    Raises:
        FileFormatError: the directory holds something else, or a run with other settings or another number of
            processes.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any], processes: Processes) -> None:
        self._directory = Path(directory)
        self._settings = json.loads(json.dumps({**settings, "processes": processes.count}))
        self._prefix = f"process{processes.rank}of{processes.count}-"
        self._written_at, self._cost = time.monotonic(), 0.0
        self._check()

    @property
    def planned(self) -> int | None:
        """The batch size that the sums on disk were planned with; None where there are none."""
        folders = self._folders()
        return self._load(folders[-1])[1].planned if folders else None

    def read(self, sites: Sequence[Site]) -> tuple[Sums, int, int, int] | None:
        """The sums on disk, how many batches they cover, of which size, and the size in use then."""
        folders = self._folders()
        if not folders:
            return None
        tensors, notes = max((self._load(folder) for folder in folders), key=lambda saved: saved[1].done)
        sums = Sums()
        for site in sites:  # files forget the order, which is that of the nodes
            for kind in ("node", *site.vectors):
                name = f"{kind}/{site.hook}"
                if name in tensors:
                    sums.blocks[site.hook, kind] = _moved(tensors[name], notes.devices[name])
        for hook, (count, variation, error) in notes.variance.items():
            sums.variance[hook] = VarianceSums(count, tensors[f"mean/{hook}"], variation, error)
        return sums, notes.done, notes.planned, notes.batch_size

    def write(self, sums: Sums, done: int, planned: int, batch_size: int, *, last: bool = False) -> None:
        """Write the sums after `done` batches, unless writing was just done and more batches follow."""
        started = time.monotonic()
        if not last and started - self._written_at < _SHARE * self._cost:
            return
        tensors = {f"{kind}/{hook}": block for (hook, kind), block in sums.blocks.items()}
        tensors |= {f"mean/{hook}": variance.mean for hook, variance in sums.variance.items()}
        head = {
            "settings": self._settings,
            "done": done,
            "planned": planned,
            "batch_size": batch_size,
            "devices": {name: str(tensor.device) for name, tensor in tensors.items()},
            "variance": {hook: [v.count, v.variation, v.error] for hook, v in sums.variance.items()},
        }
        target = self._directory / f"{self._prefix}{done:06d}"
        if target not in self._folders():
            write_directory(target, KIND, SCHEMA, tensors, head)
        for folder in self._directory.glob(f"{self._prefix}*"):
            if folder != target:
                shutil.rmtree(folder, ignore_errors=True)
        self._written_at = time.monotonic()
        self._cost = self._written_at - started

    def _folders(self) -> list[Path]:
        """Those that were written to their end."""
        return sorted(file.parent for file in self._directory.glob(f"{self._prefix}*/{KIND}.safetensors"))

    def _load(self, folder: Path) -> tuple[dict[str, Tensor], _Notes]:
        tensors, notes = read_directory(folder, KIND, SCHEMA, _Notes)
        if notes.settings != self._settings:
            keys = sorted(self._settings.keys() | notes.settings.keys())
            differ = [key for key in keys if notes.settings.get(key) != self._settings.get(key)]
            raise FileFormatError(
                f"{folder} is of another run ({differ} differ). Resume from another directory, or remove it."
            )
        named = notes.devices.keys() | {f"mean/{hook}" for hook in notes.variance}
        require_shapes(folder, tensors, {name: tuple(tensors[name].shape) if name in tensors else () for name in named})
        return tensors, notes

    def _check(self) -> None:
        if self._directory.exists() and not self._directory.is_dir():
            raise FileFormatError(f"expected a directory to resume from at {self._directory}; there is a file.")
        if not self._directory.exists():
            return
        for entry in self._directory.iterdir():
            if not entry.name.startswith((".", "process")) or not entry.is_dir():
                raise FileFormatError(
                    f"expected {self._directory} to be absent, empty or the directory of an attribution that was "
                    f"stopped; it holds {entry.name!r}. Choose another directory."
                )
            elif not entry.name.startswith("."):
                count = self._prefix.partition("of")[2]
                if f"of{count}" not in entry.name:
                    raise FileFormatError(
                        f"{entry} was written by another number of processes than {count.rstrip('-')}. Start as many "
                        "as then, or choose another directory."
                    )


def _moved(tensor: Tensor, device: str) -> Tensor:
    try:
        return tensor.to(device)
    except (RuntimeError, AssertionError) as error:
        raise FileFormatError(
            f"expected the device {device!r}, where the run that was stopped had its sums; it cannot be used here "
            f"({str(error).splitlines()[0]}). Resume where it was started, or choose another directory."
        ) from error
