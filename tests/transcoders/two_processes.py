"""What one of two processes trains: called by `tests.worker_of_two`, judged by `tests/test_processes.py`."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.transcoders.conftest import SMALL
from tl_neuron_circuits.transcoders import train
from tl_neuron_circuits.transcoders._trainee import Trainee

TOKENS = torch.randint(2, 20, (24, 8), generator=torch.Generator().manual_seed(3))
IN_ORDER = SMALL.replace(
    activation="topk", buffer_size=0, batch_size=32, forward_rows=2, dead_features="none", steps=12
)
"""A step's two halves are two forward passes: one process takes both, two processes one each."""
SHUFFLED = SMALL.replace(activation="batchtopk", k=1, d_dict=64, dead_after=100, steps=20)
RESAMPLED = SMALL.replace(activation="relu", penalty=0.3, dead_features="resample", dead_after=50, steps=20)
CASES = {"in order": IN_ORDER, "shuffled": SHUFFLED, "resampled": RESAMPLED}


def train_and_save(model: Any, folder: Path, own: Path) -> None:
    """Every case once, and one of them interrupted and resumed."""
    for name, config in CASES.items():
        train(model, TOKENS, config, verbose=False).save(own / "trained" / name)
    original = Trainee.step

    def stopping(self: Trainee, x: Tensor, y: Tensor, now: int) -> dict[str, float]:
        if now == 13:
            raise ArithmeticError
        return original(self, x, y, now)

    try:
        with mock.patch.object(Trainee, "step", stopping):
            train(model, TOKENS, SHUFFLED, directory=folder / "checkpoints", verbose=False)
    except ArithmeticError:
        resumed = train(model, TOKENS, SHUFFLED, directory=folder / "checkpoints", resume=True, verbose=False)
        resumed.save(own / "trained" / "resumed")
