"""How files are written, at once or not at all, and read, whole or not at all.

Writing: `staged(path)` gives a place in a hidden, locked folder beside `path`. What was written there is flushed to the
disk and then renamed to `path`, which is atomic: a reader, a kill or a full disk sees the old file or the new one.
Folders that a killed process left behind are swept by the next save; the lock tells them from those in use.

Results: `save(directory)` writes one safetensors file into the directory. Its header carries everything else as JSON,
and a SHA-256 of that JSON and of all tensors, so that settings and numbers of different saves cannot meet.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._errors import FileFormatError, SaveError
from ._version import versions

try:
    import fcntl
except ImportError:  # Windows: no locks, so nothing is swept either
    fcntl = None

_GENERATOR = "tl_neuron_circuits"
_STAGE = re.compile(r"\.tnc-[0-9a-f]{16}\.stage")
_DEEPEST = 64
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PLACES = 100  # how often a reader starts again because the file was replaced meanwhile
T = TypeVar("T")


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Twelve hexadecimal digits that identify weights: a hash of up to 1024 evenly spaced numbers of each tensor."""
    digest = hashlib.sha256()
    for tensor in tensors:
        places = torch.arange(0, tensor.numel(), max(1, tensor.numel() // 1024), device=tensor.device)
        whole = tensor.detach()[None]  # flattening a view of a mapped file would read all of it
        sample = whole[torch.unravel_index(places, whole.shape)].to("cpu", torch.float32)
        digest.update(str(tuple(tensor.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:12]


# --- Writing ---


@contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; what is there when the block ends replaces `path` at once.

    Raises:
        SaveError: the disk is full or read-only, or permission is missing; `path` is as it was.
    """
    target = Path(os.path.realpath(path))  # the file behind a link is replaced, not the link
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        if target.exists() and not target.is_file():
            yield target  # a pipe or a device, such as /dev/stdout, cannot be replaced
            return
        if target.exists():
            target.open("ab").close()  # a file that may not be written is not replaced either
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        stage, lock = _make_stage(target.parent)
        try:
            yield stage / target.name
            _flush(stage / target.name, stage.stat().st_mode & 0o666)
            os.replace(stage / target.name, target)  # noqa: PTH105
            _flush_names(target.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    except SaveError:
        raise
    except (OSError, SafetensorError) as error:
        raise save_error(path, error) from error


def save_error(path: str | Path, cause: Exception) -> SaveError:
    """Say which file could not be written, why, and that nothing was lost; `errno` is the cause's."""
    error = SaveError(
        f"{path} could not be written ({cause}); what was there before is unchanged. Make room, or choose a folder "
        "that you may write to, and save again."
    )
    told = re.search(r"\(os error (\d+)\)", str(cause))  # as safetensors writes it
    error.errno = getattr(cause, "errno", None) or (int(told[1]) if told else None)
    return error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8; half surrogates, which bytes in tokens can leave, as their escapes.

    Raises:
        SaveError: it could not be written; an older file is as it was.
    """
    content = text.encode("utf-8", "backslashreplace")
    with staged(path) as place:
        place.write_bytes(content)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], content: str) -> str:
    """Write one safetensors file whose header holds `content` and the checksum of both, which is returned.

    Raises:
        SaveError: it could not be written; an older file is as it was.
    """
    plain: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if place in memory else own  # safetensors refuses shared memory
        memory.add(place)
    digest = _checksum(content, plain)
    with staged(path) as place:
        save_file(plain, place, metadata={_GENERATOR: content, "sha256": digest})
    return digest


def write_directory(
    path: str | Path, kind: str, schema: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
) -> None:
    """Write `kind.safetensors`, with `notes` in its header, into the directory `path`, which is made if need be.

    Raises:
        FileFormatError: something of another kind is at `path` already.
        SaveError: it could not be written; what was saved there before is as it was.
    """
    path = Path(path)
    content = json.dumps({"kind": kind, "schema": schema, "versions": versions(), "notes": dict(notes)})
    names = present(path) if path.is_dir() else set()
    if (path.exists() and not path.is_dir()) or (names and not names & {f"{kind}.safetensors", f"{kind}.json"}):
        raise FileFormatError(
            f"expected no file, or a directory of saved {kind}, at {path}; found something else there. "
            "Choose another path."
        )
    write_tensors(path / f"{kind}.safetensors", tensors, content)
    with suppress(OSError):
        (path / f"{kind}.json").unlink(missing_ok=True)  # of a version that wrote two files


def present(folder: Path) -> set[str]:
    """What is in a folder, except what is being written to it.

    Raises:
        FileFormatError: it cannot be listed.
    """
    try:
        return {entry.name for entry in folder.iterdir() if not _STAGE.fullmatch(entry.name)}
    except OSError as error:
        raise FileFormatError(f"{folder} cannot be listed ({error}). Give a folder that you may read.") from error


def _make_stage(folder: Path) -> tuple[Path, int | None]:
    """A new hidden folder and its lock; no lock where the file system has none."""
    while True:
        stage = folder / f".tnc-{secrets.token_hex(8)}.stage"
        stage.mkdir()
        try:
            lock = _lock(stage)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process swept it between these two lines
        if stage.is_dir():
            return stage, lock
        if lock is not None:
            os.close(lock)


def _lock(stage: Path) -> int | None:
    """Lock a folder until the number is closed, or this process ends in whatever way; None where locks do not exist.

    Raises:
        BlockingIOError: another one holds the lock.
        FileNotFoundError: the folder is gone.
    """
    if fcntl is None:
        return None
    number = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(number)
        if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
            return None
        raise
    return number


@contextmanager
def reserved(folder: Path | None) -> Iterator[None]:
    """Keep a folder of many files, made if need be, for this process inside the block; None for no folder.

    Raises:
        SaveError: another process has it, whose files would mix with ours; or it cannot be made.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except BlockingIOError:
        raise SaveError(
            f"{folder} is in use by another process, and the files of the two would mix. Wait for it, or choose "
            "another directory."
        ) from None
    except OSError as error:
        raise save_error(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # where nothing came of it
        if lock is not None:
            os.close(lock)


def remove_empty(folder: Path) -> None:
    """Remove the directory of a save that was never finished, unless one is at work in it."""
    _sweep(folder)
    with suppress(OSError):
        folder.rmdir()


def _sweep(folder: Path) -> None:
    """Remove what killed processes left: stages whose lock is free."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if _STAGE.fullmatch(entry.name):
                with suppress(OSError):
                    lock = _lock(Path(entry.path))
                    if lock is not None:
                        shutil.rmtree(entry.path, ignore_errors=True)
                        os.close(lock)


def _flush(file: Path, mode: int) -> None:
    with file.open("r+b") as written:
        os.fsync(written.fileno())
    file.chmod(mode)


def _flush_names(folder: Path) -> None:
    """Make the renaming itself last; not every file system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# --- Reading ---


def read_text(path: str | Path) -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: missing, not a regular file (a pipe would never end), or unreadable.
        ValueError: not UTF-8.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")
    return path.read_bytes().decode("utf-8-sig")


def parse_json(text: str, *, surrogates: bool = False, constants: bool = False) -> Any:
    """The value of strict JSON: no nesting beyond 64 levels, no half surrogates and no NaN unless they are allowed.

    Raises:
        ValueError: it is not; the message says what and where.
    """
    try:
        value = json.loads(text, parse_constant=None if constants else _refuse)
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [child for one in level for child in _children(one)]
        if not level:
            break
    else:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if not surrogates and _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def parse_json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of JSON lines, which end at line feeds and nowhere else; blank lines are left out.

    Raises:
        ValueError: a line is not strict JSON; the message has its number.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({short(error)})") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_json(path: str | Path, form: type[T], *, surrogates: bool = False) -> T:
    """A JSON file of the given form.

    Raises:
        FileFormatError: missing, not JSON, or of another form; the message names the field.
    """
    try:
        value = parse_json(read_text(path), surrogates=surrogates)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} is not readable JSON ({short(error)}): it is truncated or foreign.") from error
    return formed(value, form, path)


def formed(value: Any, form: type[T], source: str | Path) -> T:
    """The value as `form`, by msgspec: every field there, of its type, and none that the form does not know.

    Raises:
        FileFormatError: it is not; the message names the field.
    """
    try:
        return msgspec.convert(value, form, str_keys=True)
    except (ValueError, RecursionError, OverflowError) as error:
        raise FileFormatError(f"{source} does not have the expected form: {short(error)}. Save it again.") from error


def short(error: BaseException | str) -> str:
    """The first 300 characters of a message: damaged files make long ones."""
    text = str(error) or repr(error)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None, str]:
    """The tensors of a safetensors file, and what `write_tensors` put beside them: the content and the checksum.

    Content is None, and the checksum empty, in files of others.

    Raises:
        FileFormatError: missing, truncated, foreign, or another checksum than it says.
    """
    for _ in range(_PLACES):
        before = _identity(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError) as error:
            failure = f"{path} cannot be read ({short(error)}): it is truncated or foreign. Save it again."
            cause: Exception | None = error
        else:
            content = metadata.get(_GENERATOR)
            if content is None or metadata.get("sha256") == _checksum(content, tensors):
                return tensors, content, metadata.get("sha256", "") if content is not None else ""
            failure = f"{path} is damaged: its content has another checksum than it says. Save it again."
            cause = None
        if _identity(path) == before:  # else another process replaced it between two looks at it
            raise FileFormatError(failure) from cause
    raise FileFormatError(f"{path} is replaced faster than it can be read. Try again.")


def _identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced.

    Raises:
        FileFormatError: there is no regular file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{path} cannot be read ({short(error)}). Give a file that this package wrote."
        ) from error
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_directory(
    path: str | Path, kind: str, schema: int, form: type[T], *, surrogates: bool = False
) -> tuple[dict[str, Tensor], T]:
    """The tensors and notes that `write_directory` wrote; texts may hold half surrogates where that is allowed.

    Raises:
        FileFormatError: missing, truncated, foreign, damaged, of another kind or schema, or notes of another form.
    """
    path = Path(path)
    file = path / f"{kind}.safetensors"
    if not file.exists():
        others = sorted(other.stem for other in path.glob("*.safetensors"))
        there = f" A saved {others[0]} is there, to be loaded as such." if others else ""
        raise FileFormatError(
            f"expected saved {kind} at {path}, but {file.name} is missing.{there} Give the directory that {kind} was "
            "saved to."
        )
    tensors, content, _ = read_tensors(file)
    if content is None and (path / f"{kind}.json").exists():
        raise FileFormatError(
            f"{path} was written by a version of this package that kept settings in {kind}.json, beside the numbers. "
            "Load and save it with that version's successor, or make it again."
        )
    try:
        head = msgspec.convert(parse_json(content or "null", surrogates=surrogates, constants=True), _Head)
    except ValueError as error:
        raise FileFormatError(
            f"expected {file} to hold {kind} saved by {_GENERATOR}; it holds something else. "
            "Give the directory that save() wrote."
        ) from error
    if head.kind != kind:
        raise FileFormatError(f"expected {file} to hold {kind}; it holds {head.kind}. Give the directory of {kind}.")
    if head.schema != schema:
        raise FileFormatError(
            f"expected schema {schema} in {file}; got {head.schema}. "
            f"It was written by version {head.versions.get('tl-neuron-circuits')} of this package: "
            "install that version, or save it again with this one."
        )
    return tensors, formed(head.notes, form, file)


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    kind: str
    schema: int
    versions: dict[str, str]
    notes: dict[str, Any]


def require_shapes(
    path: str | Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int | None, ...]]
) -> None:
    """Raise unless these tensors, and no others, have these shapes; None is any length.

    Raises:
        FileFormatError: with the tensor at fault.
    """
    if set(tensors) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise FileFormatError(
            f"the tensors in {path} are not those of its settings: {short(str(missing))} missing, "
            f"{short(str(unknown))} unknown. Save it again."
        )
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if len(found) != len(shape) or any(a not in (None, b) for a, b in zip(shape, found, strict=True)):
            wanted = ["any" if length is None else length for length in shape]
            raise FileFormatError(f"{name} in {path} has the shape {list(found)}, expected {wanted}. Save it again.")


def _checksum(content: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()
