"""kill -9 at random moments of a long call, then the same call again: does every resume equal the reference?

    python -m tests.benchmarks.kill_resume [--trials 20] [--kills 3] [--job attribute compare lasso] [--seed 0]

Each trial starts the call in a child process, kills it up to `--kills` times at moments drawn over the length of the
uninterrupted call, and lets the last one finish. Its result must have the same bits as the reference, which is that of
a call that was never killed and had no directory. Children are forked from one process that holds the model, so that a
kill falls into the call itself and not into imports. Exit code 1 where a result differs. Linux.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_neuron_circuits as tnc

Job = Callable[[Any, Path | None, Path], None]


def attribute(model: Any, directory: Path | None, out: Path) -> None:
    pairs = tnc.tasks.subject_verb_agreement("nounpp", n=128)
    tnc.attribute(model, pairs, positions="sum", batch_size=4, resume=directory).save(out)


def compare(model: Any, directory: Path | None, out: Path) -> None:
    train, test = tnc.tasks.subject_verb_agreement("simple", n=64).split(0.5, by="label")
    methods, sizes = ["relp", "gradient", "random"], [1, 10, 100]
    tnc.compare(model, train, test, methods=methods, sizes=sizes, directory=directory).save(out)


def lasso(model: Any, directory: Path | None, out: Path) -> None:
    pairs = tnc.tasks.subject_verb_agreement("nounpp", n=96)
    settings = {
        "nodes": tnc.bases.MLPOutputs(layers=[0]),
        "blocks": 12,
        "penalty": tnc.lasso.Share(0.3),
        "bootstrap": 0,
    }
    fitted = tnc.lasso.CircuitLasso(**settings).fit(model, pairs, batch_size=2, resume=directory)
    out.mkdir(parents=True)
    fitted.edges.to_json(out / "edges.json", double_precision=15)
    fitted.nodes.to_json(out / "nodes.json", double_precision=15)


JOBS: dict[str, Job] = {"attribute": attribute, "compare": compare, "lasso": lasso}


def same(name: str, found: Path, expected: Path) -> bool:
    """Whether two results have the same bits."""
    if name == "attribute":
        one, other = tnc.NodeScores.load(found), tnc.NodeScores.load(expected)
        return torch.equal(one.flat(), other.flat()) and one.settings == other.settings
    if name == "compare":
        one, other = tnc.Comparison.load(found), tnc.Comparison.load(expected)
        fields = ("kept", "removed", "full", "empty", "predicted")
        curves = [(one.curves[key], other.curves[key]) for key in other.curves]
        equal = all(torch.equal(getattr(a, field), getattr(b, field)) for a, b in curves for field in fields)
        return equal and list(one.curves) == list(other.curves) and one.settings == other.settings
    tables = [pd.read_json(folder / "edges.json") for folder in (found, expected)]
    return tables[0].equals(tables[1]) and len(tables[0]) > 0


def started(job: Job, model: Any, directory: Path | None, out: Path) -> int:
    """The id of a child that runs the call."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job(model, directory, out)
        code = 0
    except BaseException:  # noqa: BLE001 - the child's last words
        traceback.print_exc()
    finally:
        os._exit(code)


def finished(child: int, within: float | None) -> bool:
    """Whether the child ended by itself within so many seconds; killed otherwise.

    Raises:
        RuntimeError: it ended with an error.
    """
    end = None if within is None else time.monotonic() + within
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"the call ended with status {status}")
            return True
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)


def trial(name: str, model: Any, folder: Path, reference: Path, seconds: float, kills: int, rng: random.Random) -> int:
    """How many kills fell into the call, or -1 where the result differs."""
    directory, out, hit = folder / "partial", folder / "out", 0
    for _ in range(kills):
        if finished(started(JOBS[name], model, directory, out), rng.uniform(0, seconds)):
            break
        hit += 1
    else:
        finished(started(JOBS[name], model, directory, out), None)
    return hit if same(name, out, reference) else -1


def measure(name: str, trials: int, kills: int, seed: int) -> dict[str, Any]:
    """Run all trials of one job."""
    rng, model = random.Random(seed), tnc.load_demo_model()
    with tempfile.TemporaryDirectory() as place:
        reference = Path(place) / "reference"
        start = time.monotonic()
        finished(started(JOBS[name], model, None, reference), None)
        seconds, outcomes = time.monotonic() - start, []
        for number in range(trials):
            folder = Path(place) / str(number)
            outcomes.append(trial(name, model, folder, reference, seconds, kills, rng))
            shutil.rmtree(folder, ignore_errors=True)
    equal = sum(outcome >= 0 for outcome in outcomes)
    return {"trials": trials, "equal": equal, "kills": sum(max(outcome, 0) for outcome in outcomes), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="at most, in one trial")
    parser.add_argument("--job", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(name, options.trials, options.kills, options.seed) for name in options.job}
    for name, row in found.items():
        cost = f"{row['kills']} kills, {row['seconds']:.1f} s a call"
        print(f"{name}: {row['equal']} of {row['trials']} equal the reference ({cost})")
    print(json.dumps(found))
    raise SystemExit(any(row["equal"] < row["trials"] for row in found.values()))


if __name__ == "__main__":
    main()
