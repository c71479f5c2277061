"""Saves that are killed, that race, and that meet a full disk: `python -m tests.killed_saves --trials 100` counts.

Every kind of save alternates between two contents at one path. Whatever happens, what can be read there afterwards, or
meanwhile, is one of the two as a whole. Processes are forked, so that a kill costs milliseconds, not an import.
"""

import argparse
import errno
import os
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import tl_neuron_circuits as tnc
from tests.saved_files import plain, results
from tl_neuron_circuits._errors import SaveError
from tl_neuron_circuits._files import read_directory, read_text
from tl_neuron_circuits.components import EdgeScores
from tl_neuron_circuits.lasso._lasso_circuit import LassoCircuit
from tl_neuron_circuits.transcoders._train import SCHEMA, _Notes, newest_checkpoint, write_checkpoint


@dataclass(frozen=True)
class Kind:
    """One way to save; `contents` are the two that alternate, as `load` gives them."""

    name: str
    save: Callable[[int, Path], Any]
    load: Callable[[Path], Any]
    contents: tuple[Any, Any]


def kinds(folder: Path, names: Collection[str] | None = None) -> list[Kind]:
    """Every kind of save, or some."""
    made = results(None if names is None else {*names, *({"circuit"} if {"graph", "page"} & set(names) else ())})
    every = []
    for name, (contents, write, load) in _ways(made).items():
        if names is None or name in names:
            read = lambda path, load=load: _without_name(load(path))  # noqa: E731
            save = lambda which, path, contents=contents, write=write: write(contents[which], path)  # noqa: E731
            for which in (0, 1):
                save(which, folder / f"{name}{which}" / name)
            found = tuple(read(folder / f"{name}{which}" / name) for which in (0, 1))
            every.append(Kind(name, save, read, (found[0], found[1])))
    return every


def _ways(made: dict[str, Any]) -> dict[str, tuple[Sequence[Any], Callable[[Any, Path], Any], Callable[[Path], Any]]]:
    """By name: two contents, how one is written, how it is read."""
    ways: dict[str, Any] = {}
    save = lambda content, path: content.save(path)  # noqa: E731
    if "circuit" in made:
        circuits = made["circuit"], made["circuit"].prune(count=5)
        ways["circuit"] = circuits, save, tnc.Circuit.load
        ways["graph"] = circuits, lambda circuit, path: circuit.to_neuronpedia(path), tnc.Circuit.from_neuronpedia
        ways["page"] = circuits, lambda circuit, path: circuit.to_html(path), read_text
    if "scores" in made:
        scores = made["scores"]
        other = {hook: values + 1 for hook, values in scores.values.items()}
        others = replace(scores, values=other, settings={**scores.settings, "seed": 1})
        ways["scores"] = (scores, others), save, tnc.NodeScores.load
    if "lasso" in made:
        ways["lasso"] = (made["lasso"], made["lasso"].prune(edges=3)), save, LassoCircuit.load
    if "curve" in made:
        curve = made["curve"]
        curves = curve, replace(curve, kept=curve.kept + 1, settings={**curve.settings, "seed": 1})
        ways["curve"] = curves, save, tnc.SparsityCurve.load
    if "comparison" in made:
        found = made["comparison"]
        shifted = {key: replace(curve, kept=curve.kept + 1) for key, curve in found.curves.items()}
        ways["comparison"] = (found, replace(found, curves=shifted)), save, tnc.Comparison.load
    if "edges" in made:
        edges = made["edges"], replace(made["edges"], scores=made["edges"].scores + 1)
        ways["edges"] = edges, save, EdgeScores.load
    if "pairs" in made:
        pairs = made["pairs"], made["pairs"][:2]
        ways["pairs"] = pairs, lambda content, path: content.to_jsonl(path), tnc.PromptPairs.from_jsonl
    saes = tnc.load_demo_dictionaries("sae")[:2]
    overwrite = lambda sae, path: tnc.save_dictionary(sae, path, overwrite=True)  # noqa: E731
    ways["dictionary"] = saes, overwrite, tnc.load_dictionary
    state = {"config": {}, "material": {}, "buffer": {}, "history": [], "sums": {}, "sites": [], "seconds": {}}

    def write(step: int, path: Path) -> None:
        write_checkpoint(path, step, {"x": torch.ones(50_000) * step}, state | {"positions": 1}, 1)

    read = lambda path: read_directory(newest_checkpoint(path), "checkpoint", SCHEMA, _Notes)  # noqa: E731
    ways["checkpoint"] = (1, 2), write, read
    return ways


def _without_name(value: Any) -> Any:
    return plain(replace(value, name="") if hasattr(value, "d_dict") else value)


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A process that does the work and ends with 0, or with 1 after an exception."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:  # noqa: BLE001
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    yield child


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(kind: Kind, folder: Path, trials: int, dice: random.Random) -> Counter[str]:
    """Kill a saving process at random, over an existing save. Counts trials, and what was lost, mixed or left over."""
    counts: Counter[str] = Counter()
    path = folder / kind.name / "it"
    kind.save(0, path)
    started = time.perf_counter()
    kind.save(1, path)
    once = time.perf_counter() - started

    def save_for_ever() -> None:
        while True:
            kind.save(0, path)
            kind.save(1, path)

    for _ in range(trials):
        with forked(save_for_ever) as child:
            time.sleep(dice.uniform(0.2, 4) * once)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        counts["kills"] += 1
        counts["kills within a save"] += any(path.parent.rglob("*.stage"))
        try:
            counts["mixed"] += kind.load(path) not in kind.contents
        except tnc.NeuronCircuitsError:
            counts["lost"] += 1
    kind.save(0, path)
    counts["left over"] = len(list(path.parent.glob("*.stage")))
    if kind.name != "checkpoint":  # its folders are removed whole, by the step after the next
        counts["left over"] = len(list(path.parent.rglob("*.stage")))
    return counts


def race(kind: Kind, folder: Path, saves: int) -> Counter[str]:
    """Two processes save to one path, a third reads."""
    counts: Counter[str] = Counter(saves=2 * saves)
    path = folder / kind.name / "it"
    kind.save(0, path)

    def save_often() -> None:
        for number in range(saves):
            kind.save(number % 2, path)

    with forked(save_often) as one, forked(save_often) as other:
        running = {one, other}
        while running:
            for child in list(running):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    running.remove(child)
                    counts["writers failed"] += os.waitstatus_to_exitcode(status) != 0
            counts["reads"] += 1
            try:
                counts["mixed"] += kind.load(path) not in kind.contents
            except tnc.NeuronCircuitsError as error:
                counts["lost"] += 1
                print(kind.name, error)
    counts["left over"] = len(list(path.parent.rglob("*.stage")))
    return counts


@contextmanager
def small_files(most: int = 200) -> Iterator[None]:
    """Every write beyond so many bytes of a file is refused, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def small_disk() -> Iterator[Path]:
    """A disk of 4 MiB."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True, capture_output=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def refused(kind: Kind, path: Path, expected: int | None) -> str:
    """Save where no save can succeed: "refused" with our error, and the old content still there; else what is wrong."""
    try:
        kind.save(1, path)
    except SaveError as error:
        if expected is not None and error.errno != expected:
            return f"errno {error.errno}"
    except Exception as error:  # noqa: BLE001
        return f"raw {type(error).__name__}"
    else:
        return "saved"
    return "refused" if kind.load(path) == kind.contents[0] and not list(path.parent.rglob("*.stage")) else "lost"


def full_disk(kind: Kind) -> Counter[str]:
    """A disk filled to its last byte, then one that is read-only."""
    counts: Counter[str] = Counter()
    with small_disk() as disk:
        path = disk / "folder" / "it"
        kind.save(0, path)
        for free in (0, 1, 5000, 20_000):
            with (disk / "filler").open("wb", buffering=0) as filler:
                with _suppressed(errno.ENOSPC):
                    while True:
                        filler.write(bytes(1000))
                filler.truncate(max(0, filler.tell() - free))
            found = refused(kind, path, errno.ENOSPC)
            counts["fits" if found == "saved" and free > 1 else f"full: {found}"] += 1
            (disk / "filler").unlink()
            kind.save(0, path)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        counts[f"read-only: {refused(kind, path, errno.EROFS)}"] += 1
    return counts


def limited(kind: Kind, folder: Path) -> Counter[str]:
    """A limit on the size of files, where no small disk can be mounted."""
    place = folder / kind.name
    kind.save(0, place)
    with small_files():
        return Counter([f"full: {refused(kind, place, errno.EFBIG)}"])


@contextmanager
def _suppressed(number: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != number:
            raise


def main(arguments: Sequence[str] | None = None) -> None:
    """Count what is lost; exit with a message where something is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100, help="kills of each kind")
    parser.add_argument("--saves", type=int, default=150, help="of each of two processes, of each kind")
    parser.add_argument("--kinds", nargs="*", help="all unless given")
    parser.add_argument("--disk", action="store_true", help="mount a small disk, where allowed; else limit file sizes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    dice = random.Random(options.seed)
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in kinds(folder / "contents", options.kinds):
            found = {"killed": kill(kind, folder / "killed", options.trials, dice)}
            if kind.name != "checkpoint":  # of which one process writes, and removes the older ones
                found["raced"] = race(kind, folder / "raced", options.saves)
            found["full disk"] = full_disk(kind) if options.disk else limited(kind, folder / "limited")
            print(f"{kind.name:12}", {what: dict(counts) for what, counts in found.items()}, flush=True)
            for what, counts in found.items():
                totals.update({f"{what}: {key}": count for key, count in counts.items()})
    print("all", dict(totals))
    harmless = ("kills", "kills within a save", "saves", "reads", "refused", "fits")
    if failures := {key: count for key, count in totals.items() if count and not key.endswith(harmless)}:
        raise SystemExit(f"failures: {failures}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
