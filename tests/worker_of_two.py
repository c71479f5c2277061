"""Two processes, which `tests/test_processes.py` launches; each writes what it found to a folder of its own.

WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 python -m tests.worker_of_two FOLDER

They are forks of one that has imported everything. It prints how they ended.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.families import model_cases, random_tokens
from tests.nodes.plain import random_pairs
from tests.transcoders.two_processes import train_and_save
from tl_neuron_circuits import NeuronCircuitsError, Random, attribute, compare, evaluate
from tl_neuron_circuits._processes import current_processes, single_process
from tl_neuron_circuits.bases import MLPOutputs, Neurons
from tl_neuron_circuits.lasso import CircuitLasso, Share
from tl_neuron_circuits.tasks import logit_difference

CALLS: dict[str, dict[str, Any]] = {
    "ragged": {"positions": "sum", "batch_size": 2},
    "kept": {"batch_size": 3},
    "mean": {"baseline": "mean", "positions": "sum", "batch_size": 2},
    "fewer pairs than processes": {"batch_size": 1},
    "patching": {"method": "patching", "basis": MLPOutputs(), "batch_size": 2},
    "random": {"method": "random"},
    "auto": {"batch_size": "auto"},
    "learned": {"method": "learned_mask(steps=6, pairs_per_step=3)", "positions": "sum", "batch_size": 2},
}
PAIRS = {
    "ragged": random_pairs(5, 4, 5, 6, 5),
    "kept": random_pairs(5, 5, 5, 5, 5, 5, 5),
    "mean": random_pairs(5, 4, 5, 5, 4),
    "fewer pairs than processes": random_pairs(5),
    "patching": random_pairs(4, 4, 4),
    "random": random_pairs(4, 4, 4),
    "auto": random_pairs(5, 5, 5),
    "learned": random_pairs(5, 4, 5, 6, 5),
}
ABLATIONS = ("mean", "resample")
LASSO = CircuitLasso(penalty=Share(0.3), shares=(0.5,), readout="logits", blocks=3, noise=0.1, skip_positions=0)


def model() -> Any:
    return model_cases("gpt2")[0].build(torch.float32)


def curves(of: Any, pairs: Any, directory: Path | None) -> Any:
    bases, sizes = [Neurons(), MLPOutputs()], [1, 10]
    return compare(of, pairs, pairs, bases=bases, methods=["relp"], sizes=sizes, batch_size=2, directory=directory)


def broken_on_second(logits: Any, batch: Any) -> Any:
    if current_processes().rank == 1:
        raise ArithmeticError("the second process cannot count")
    return logit_difference(logits, batch)


def deadly_on_second(logits: Any, batch: Any) -> Any:
    if current_processes().rank == 1:
        os.kill(os.getpid(), 9)
    return logit_difference(logits, batch)


def failure(work: Any) -> dict[str, Any]:
    """The error that `work` ended with, and after how many seconds."""
    start = time.monotonic()
    try:
        work()
    except (ArithmeticError, NeuronCircuitsError) as error:
        return {"kind": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start}
    return {"kind": "none", "text": "", "seconds": time.monotonic() - start}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    of, mine = model(), current_processes()
    own = folder / str(mine.rank)
    LASSO.fit(of, random_tokens(of, batch=15, pos=4), resume=folder / "resume" / "lasso").save(own / "lasso")
    for name, settings in CALLS.items():
        attribute(of, PAIRS[name], **settings, resume=folder / "resume" / name).save(own / name)
    scores = attribute(of, PAIRS["kept"])
    for ablation in ABLATIONS:
        evaluate(of, PAIRS["kept"], scores, sizes=[1, 10], ablation=ablation, batch_size=2).save(
            own / f"curve {ablation}"
        )
    curves(of, PAIRS["kept"], folder / "comparison").save(own / "comparison")
    train_and_save(of, folder, own)
    if mine.first:
        with single_process():
            attribute(of, PAIRS["kept"], batch_size=3).save(own / "alone")
    found = {
        "raises": failure(lambda: attribute(of, PAIRS["kept"], metric=broken_on_second)),
        "raises inside compare": failure(
            lambda: compare(of, PAIRS["kept"], PAIRS["kept"], methods=["relp"], metric=broken_on_second)
        ),
        "other settings": failure(lambda: attribute(of, PAIRS["kept"], method=Random(mine.rank))),
        "foreign directory": failure(lambda: curves(of, PAIRS["kept"], folder / str(0))),
    }
    attribute(of, PAIRS["kept"], batch_size=3).save(own / "after errors")
    (own / "failures.json").write_text(json.dumps(found))
    killed = failure(lambda: attribute(of, PAIRS["kept"], metric=deadly_on_second))
    (own / "killed.json").write_text(json.dumps(killed))


def fork(rank: int, folder: Path) -> int:
    """Start the process of this rank; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        main(folder)
        code = 0
    except BaseException:  # noqa: BLE001 (shown, and an exit code)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the other process was killed on purpose, and gloo may abort where it takes its connection down


if __name__ == "__main__":
    children = [fork(rank, Path(sys.argv[1])) for rank in range(2)]
    print("ended:", [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
