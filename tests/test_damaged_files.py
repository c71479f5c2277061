"""Damaged files of every reader give errors of this package or equal results, nothing else, in bounded time and memory.

Files without a checksum (those of other programs) give our errors or results that can be used. `TNC_FUZZ_CASES` is how
many files are damaged: 200 unless given, always the same ones; others each time where it is given.
"""

import json
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.saved_files import Saved, plain, use, write_all
from tl_neuron_circuits import NeuronCircuitsError
from tl_neuron_circuits._files import _checksum, read_tensors

CASES = int(os.environ.get("TNC_FUZZ_CASES", "200"))
LONGEST, LARGEST = 20, 500 * 2**20  # seconds of one case, bytes that the process may grow by
READERS = (
    *("scores", "circuit", "lasso", "curve", "edge_curve", "comparison", "edges", "cli", "sums", "blocks"),
    *(
        "checkpoint",
        "sae",
        "sae_config",
        "sae_by_others",
        "pairs",
        "described",
        "labels",
        "bios",
        "prompts",
        "graph",
        "graph_by_others",
        "tracr",
    ),
)
DEEP = "[" * 100_000 + "]" * 100_000
NASTY = (
    *("null", "true", "-1", "0", "2", "1.5", "1e999", "NaN", "-Infinity", "9223372036854775808", "9" * 5000, '""'),
    *('"x"', r'"\ud800"', '" \\u2028"', "[]", "[[]]", "{}", '{"a": {}}', DEEP, "[" * 80 + "]" * 80, '"-1"', '"nan"'),
)


def _flip(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 3))):
        if changed:
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _cut(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content) + 1)]


def _splice(content: bytes, dice: random.Random) -> bytes:
    """Leave out, double, or fill a part."""
    start, end = sorted(dice.randrange(len(content) + 1) for _ in range(2))
    part = content[start:end]
    return content[:start] + dice.choice((b"", part + part, bytes(len(part)), b"\xff" * len(part))) + content[end:]


def _insert(content: bytes, dice: random.Random) -> bytes:
    what = dice.choice(("\ufeff", "\u2028", "\u0085", "\f", "\r\n", "\0", "{", '"', "\n\n", '{"a": 1}')).encode()
    start = dice.choice((0, 0, dice.randrange(len(content) + 1)))
    return content[:start] + what + content[start:]


def _edit_json(content: bytes, dice: random.Random) -> bytes:
    """Change a value or a name of the JSON: of a text file, a line of it, or a safetensors header."""
    size = int.from_bytes(content[:8], "little")
    if 2 <= size <= len(content) - 8 and content[8:9] == b"{":
        header = _edited(content[8 : 8 + size].decode(), dice).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    text = content.decode("utf-8")
    lines = text.split("\n")
    place = dice.randrange(len(lines))
    try:
        lines[place] = _edited(lines[place], dice)
        return "\n".join(lines).encode()
    except ValueError:
        pass
    try:
        return _edited(text, dice).encode()
    except ValueError:  # not JSON
        return _splice(content, dice)


def _edited(text: str, dice: random.Random) -> str:
    """JSON with one thing changed; the new value goes in as text, which may be what no value can be."""
    mark = "\x01the place\x01"
    value = json.loads(text)
    holders = [value]
    for holder in holders:
        children = holder.values() if isinstance(holder, dict) else holder
        holders += [child for child in children if isinstance(child, dict | list)]
    holders = [holder for holder in holders if holder]
    if not holders:
        raise ValueError("nothing to change")
    holder = dice.choice(holders)
    key = dice.choice(list(holder)) if isinstance(holder, dict) else dice.randrange(len(holder))
    what = dice.choice(("replace", "replace", "remove", "rename", "add"))
    if what == "remove":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[key[:-1] + "~"] = holder.pop(key)
    elif what == "add" and isinstance(holder, dict):
        holder["another"] = mark
    elif what == "add":
        holder.insert(key, mark)
    else:
        holder[key] = mark
    return json.dumps(value).replace(json.dumps(mark), dice.choice(NASTY))


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _cut, _splice, _insert, _edit_json)
DAMAGES = (*(change.__name__ for change in BYTES), "replaced", "forged")


def damage(file: Path, kind: str, dice: random.Random) -> None:
    """Change a file; "forged" gives it a checksum that holds."""
    if kind == "replaced":
        file.unlink()
        what = dice.choice(("nothing", "pipe", "folder", "device", "empty", "loop"))
        if what == "pipe":
            os.mkfifo(file)
        elif what == "folder":
            file.mkdir()
        elif what == "empty":
            file.touch()
        elif what != "nothing":
            file.symlink_to("/dev/zero" if what == "device" else file)
    elif kind == "forged":
        _forge(file, dice)
    else:
        (change,) = (change for change in BYTES if change.__name__ == kind)
        file.write_bytes(change(file.read_bytes(), dice))


def _forge(file: Path, dice: random.Random) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if file.suffix != ".safetensors" or b"tl_neuron_circuits" not in content[: 8 + size]:
        file.write_bytes(_edit_json(content, dice) if file.suffix != ".safetensors" else _flip(content, dice))
        return
    header = json.loads(content[8 : 8 + size])
    tensors, text, _ = read_tensors(file)
    text = _edited(text or "", dice)
    header["__metadata__"] = {"tl_neuron_circuits": text, "sha256": _checksum(text, tensors)}
    new = json.dumps(header).encode()
    del tensors
    replaced = file.with_name("new")
    replaced.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])
    replaced.replace(file)


@contextmanager
def bounded() -> Iterator[None]:
    """Raise in a case that takes too long, as one that waits for a pipe would."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"longer than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Saved], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved")
    saved = {one.name: one for one in write_all(folder)}
    assert set(saved) == set(READERS)
    return folder, saved, {name: plain(one.load(folder / name)) for name, one in saved.items()}


def outcome(one: Saved, original: Path, expected: Any, kind: str, seed: int, place: Path) -> str:
    """Damage a copy, load and use it; "error" (one of ours), "equal" or "other"."""
    dice = random.Random(seed)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(original, place / "it")
    damage(place / "it" / dice.choice(one.files), kind, dice)
    try:
        with bounded():
            found = one.load(place / "it")
            same = plain(found) == expected
            if not same:
                use(found, place)
    except NeuronCircuitsError:
        return "error"
    return "equal" if same else "other"


def test_damaged_files_give_our_errors_or_equal_results(
    files: tuple[Path, dict[str, Saved], dict[str, Any]], tmp_path: Path
) -> None:
    folder, saved, expected = files
    counts: Counter[str] = Counter()
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()

    @settings(
        max_examples=CASES,
        derandomize="TNC_FUZZ_CASES" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.sampled_from(READERS), st.sampled_from(DAMAGES), st.integers(0, 2**32))
    def check(name: str, kind: str, seed: int) -> None:
        what = outcome(saved[name], folder / name, expected[name], kind, seed, tmp_path / "case")
        counts[what] += 1
        if saved[name].checked and kind != "forged":
            assert what != "other", "a change went unnoticed"

    check()
    print(f"{sum(counts.values())} damaged files: {dict(counts)}, {time.monotonic() - start:.1f} s")
    assert counts["error"] > CASES / 3
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < LARGEST
