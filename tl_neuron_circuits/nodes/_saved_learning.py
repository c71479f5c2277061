"""What a learned mask has learned so far, and its file: a stopped run, or one with more steps, continues from it."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from .._errors import FileFormatError, SettingsError
from .._files import present, read_directory, require_shapes, write_directory

KIND, SCHEMA = "learning", 3
_WRITING = 20  # writing may take one part in this many of the time


_TENSORS = ("scores", "first", "second", "best")


@dataclass
class Learning:
    """Scores, Adam's moments and the losses of all steps so far, and the best scores on development pairs."""

    scores: Tensor
    first: Tensor
    second: Tensor
    losses: list[float]
    best: Tensor
    looks: list[float]
    """Losses on development pairs, one after the other."""

    def to(self, device: torch.device) -> None:
        for name in _TENSORS:
            setattr(self, name, getattr(self, name).to(device))

    def look(self, loss: float) -> None:
        """Take a look at the development pairs into account."""
        if not self.looks or loss < min(self.looks):
            self.best = self.scores.clone()
        self.looks.append(loss)

    @property
    def best_look(self) -> int:
        """The look with the least loss, from 1."""
        return self.looks.index(min(self.looks)) + 1 if self.looks else 0

    @property
    def looks_without_gain(self) -> int:
        """How many looks have passed since the best one."""
        return len(self.looks) - self.best_look


class SavedLearning:
    """Writes the state after a step, unless writing would take more than a twentieth of the time."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self._directory, self._identity = directory, identity
        self._written_at, self._cost = time.monotonic(), 0.0

    def __call__(self, state: Learning, *, last: bool) -> None:
        started = time.monotonic()
        if not last and started - self._written_at < _WRITING * self._cost:
            return
        tensors = {name: getattr(state, name).cpu().contiguous() for name in _TENSORS}
        notes = {"settings": dict(self._identity), "losses": state.losses, "looks": state.looks}
        write_directory(self._directory, KIND, SCHEMA, tensors, notes)
        self._written_at = time.monotonic()
        self._cost = self._written_at - started


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    settings: dict[str, Any]
    losses: list[float]
    looks: list[float]


def read_learning(directory: Path, identity: Mapping[str, Any], steps: int) -> Learning | None:
    """The state on disk; None where there is none yet."""
    if not directory.exists() or (directory.is_dir() and not present(directory)):
        return None
    tensors, notes = read_directory(directory, KIND, SCHEMA, _Notes)
    n = tensors["scores"].numel() if "scores" in tensors else 0
    require_shapes(directory, tensors, dict.fromkeys(_TENSORS, (n,)))
    wanted = json.loads(json.dumps(dict(identity)))
    if notes.settings != wanted:
        keys = sorted(wanted.keys() | notes.settings.keys())
        differ = [key for key in keys if notes.settings.get(key) != wanted.get(key)]
        raise FileFormatError(
            f"{directory} is of another run ({differ} differ). Resume from another directory, or remove it."
        )
    if len(notes.losses) > steps:
        raise SettingsError(
            f"{directory} holds {len(notes.losses)} steps, more than the {steps} asked for. Ask for at least as "
            "many, or begin in another directory."
        )
    scores, first, second, best = (tensors[name] for name in _TENSORS)
    return Learning(scores, first, second, notes.losses, best, notes.looks)
