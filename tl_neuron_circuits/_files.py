"""How results are saved: a directory with one `*.safetensors` and one `*.json`, written completely or not at all."""

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ._errors import FileFormatError
from ._version import versions

_GENERATOR = "tl_neuron_circuits"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Twelve hexadecimal digits that identify weights: a hash of up to 1024 evenly spaced numbers of each tensor."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 1024)].to("cpu", torch.float32)
        digest.update(str(tuple(tensor.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:12]


def write_directory(
    path: str | Path, kind: str, schema: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
) -> None:
    """Write `kind.safetensors` and `kind.json` beside their final place, then move them there.

    Raises:
        FileFormatError: something of another kind is at `path` already.
    """
    path = Path(path)
    recover(path)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / f"{kind}.json").exists())):
        raise FileFormatError(
            f"expected no file, or a directory of saved {kind}, at {path}; found something else there. "
            "Choose another path."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        save_file(dict(tensors), staging / f"{kind}.safetensors")
        head = {"generator": _GENERATOR, "kind": kind, "schema": schema, "versions": versions()}
        (staging / f"{kind}.json").write_text(json.dumps(head | dict(notes), indent=1), encoding="utf-8")
        staging.chmod(0o755)
        _swap_in(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap_in(staging: Path, path: Path) -> None:
    if not path.exists():
        os.rename(staging, path)  # noqa: PTH104
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    os.rename(path, old / "old")  # noqa: PTH104
    os.rename(staging, path)  # noqa: PTH104
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Put back what `write_directory` moved aside if it was killed between its two renames; delete its leftovers."""
    ours = re.compile(rf"\.{re.escape(path.name)}-(old-)?[a-z0-9_]{{8}}")  # as tempfile.mkdtemp ends its names
    for left in sorted(path.parent.glob(f".{glob.escape(path.name)}-*")):
        if ours.fullmatch(left.name):
            if (left / "old").exists() and not path.exists():
                os.rename(left / "old", path)  # noqa: PTH104
            shutil.rmtree(left, ignore_errors=True)


def read_directory(
    path: str | Path, kind: str, schema: int, *, required: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and notes that `write_directory` wrote.

    Raises:
        FileFormatError: missing, truncated, foreign, of another kind or schema.
    """
    path = Path(path)
    if not path.exists():
        recover(path)
    note_file, tensor_file = path / f"{kind}.json", path / f"{kind}.safetensors"
    for file in (note_file, tensor_file):
        if not file.is_file():
            raise FileFormatError(
                f"expected saved {kind} at {path}, but {file.name} is missing. Give the directory that save() wrote."
            )
    try:
        notes = json.loads(note_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(
            f"{note_file} is not readable JSON ({error}): it is truncated or foreign. Save it again."
        ) from error
    if not isinstance(notes, dict) or notes.get("generator") != _GENERATOR or notes.get("kind") != kind:
        raise FileFormatError(
            f"expected {note_file} to describe {kind} saved by {_GENERATOR}; it describes something else. "
            "Give the directory that save() wrote."
        )
    if notes.get("schema") != schema:
        raise FileFormatError(
            f"expected schema {schema} in {note_file}; got {notes.get('schema')}. "
            f"It was written by version {notes.get('versions', {}).get('tl-neuron-circuits')} of this package: "
            "install that version, or save it again with this one."
        )
    missing = [key for key in required if key not in notes]
    if missing:
        raise FileFormatError(f"{note_file} lacks {missing}: it is damaged. Save it again.")
    try:
        tensors = load_file(tensor_file)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{tensor_file} cannot be read ({error}): it is truncated or foreign. Save it again."
        ) from error
    return tensors, notes
