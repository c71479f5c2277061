"""Checkpoints of a training run: `checkpoint-00000500/` with one safetensors file and one JSON file.

Each is written beside its place and moved there whole, and older ones are removed only after that: a process that is
killed while writing leaves the earlier ones as they were, and a folder `.checkpoint-...` that the next write clears.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from .._errors import FileFormatError, SettingsError
from .._files import read_directory, write_directory
from ._config import TrainingConfig

SCHEMA = 2
_NAME = re.compile(r"checkpoint-(\d{8})")
_REQUIRED = ("config", "step", "buffer", "history", "sums", "sites", "seconds", "positions", "material")


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints in a directory, oldest first."""
    return sorted(path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name))


def write_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], keep: int
) -> Path:
    """Write the state after `step` steps.

    Raises:
        FileFormatError: it could not be written (a full disk, no permission); the earlier checkpoints are as they were.
    """
    path = directory / f"checkpoint-{step:08d}"
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        for leftover in directory.glob(".checkpoint-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        write_directory(path, "checkpoint", SCHEMA, whole, dict(notes) | {"step": step})
    except (OSError, SafetensorError) as error:
        earlier = checkpoints(directory)
        remedy = (
            f"{earlier[-1]} is whole: make room and go on with resume=True" if earlier else "make room and start again"
        )
        raise FileFormatError(f"the checkpoint {path} could not be written ({error}); {remedy}.") from error
    for old in checkpoints(directory)[:-keep] if keep else ():
        shutil.rmtree(old)
    return path


def newest_checkpoint(directory: Path) -> Path:
    """The newest whole checkpoint in a directory.

    Raises:
        FileFormatError: there is none.
    """
    found = checkpoints(directory)
    if not found:
        raise FileFormatError(
            f"expected checkpoints in {directory} to resume from; there is none. Pass resume=False to start."
        )
    return found[-1]


def read_checkpoint(
    path: Path, config: TrainingConfig, material: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint of a run with these settings, on this model and these tokens.

    Args:
        material: what else must be as it was, by name: the model, the tokens, the number of processes.

    Raises:
        SettingsError: it belongs to other settings, another model or other tokens.
        FileFormatError: it is damaged.
    """
    tensors, notes = read_directory(path, "checkpoint", SCHEMA, required=_REQUIRED)
    for name, value in material.items():
        if notes["material"].get(name) != value:
            raise SettingsError(
                f"{path} was written with another {name} ({notes['material'].get(name)} there, {value} here). Resume "
                "with what it was trained on, or choose another directory."
            )
    here = config.to_json()
    other = {name: value for name, value in notes["config"].items() if here.get(name) != value}
    if other or set(notes["config"]) != set(here):
        raise SettingsError(
            f"{path} was written with other settings: {other} there, "
            f"{ {name: here.get(name) for name in other} } here. Resume with its settings, or choose another directory."
        )
    return tensors, notes


def check_fresh(directory: Path) -> None:
    """Refuse a directory that holds a run already.

    Raises:
        SettingsError: it does.
    """
    found = checkpoints(directory)
    if found:
        raise SettingsError(f"{directory} holds checkpoints already ({found[-1].name}): resume=True goes on from them.")
