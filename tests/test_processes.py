"""Two gloo processes on the CPU find what one finds, and an error in one is an error in both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from filelock import FileLock

from tests import worker_of_two as worker
from tests.families import random_tokens
from tests.loops import for_each
from tests.transcoders.two_processes import CASES, IN_ORDER, TOKENS
from tl_neuron_circuits import Comparison, NodeScores, SparsityCurve, attribute, evaluate
from tl_neuron_circuits._errors import ProcessesError
from tl_neuron_circuits._processes import TIMEOUT, Processes, _connected
from tl_neuron_circuits.bases import load_dictionary
from tl_neuron_circuits.lasso import LassoCircuit
from tl_neuron_circuits.transcoders import train

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote; the second one was killed at the end. Workers of pytest-xdist share one."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            launch(path)
    return path


def launch(path: Path) -> None:
    path.mkdir()
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), TIMEOUT: "120"}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.worker_of_two", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **common}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400
    )
    shown = done.stdout.decode()
    assert (path / "0" / "killed.json").exists(), shown
    assert "ended: [0, -9]" in shown, shown


@pytest.fixture(scope="module")
def model() -> Any:
    return worker.model()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


@for_each("name", worker.CALLS)
def test_scores_are_those_of_one_process_on_every_process(folder: Path, model: Any, name: str) -> None:
    expected = attribute(model, worker.PAIRS[name], **worker.CALLS[name])
    first, second = (NodeScores.load(folder / rank / name) for rank in "01")
    assert torch.equal(first.flat(), second.flat())
    assert_close(first.flat(), expected.flat())
    alone, differ = json.loads(json.dumps(expected.settings)), {"batch_size", "learning"}
    assert {k: v for k, v in first.settings.items() if k not in differ} == {
        k: v for k, v in alone.items() if k not in differ
    }
    if "learning" in alone:  # numbers that sums over two processes round differently
        assert first.settings["learning"]["losses"] == pytest.approx(alone["learning"]["losses"], rel=1e-4)


def test_a_lasso_sees_the_blocks_of_both_processes(folder: Path, model: Any) -> None:
    expected = worker.LASSO.fit(model, random_tokens(model, batch=15, pos=4))
    for rank in "01":
        pd.testing.assert_frame_equal(LassoCircuit.load(folder / rank / "lasso").edges, expected.edges)


@for_each("ablation", worker.ABLATIONS)
def test_curves_are_those_of_one_process(folder: Path, model: Any, ablation: Any) -> None:
    pairs = worker.PAIRS["kept"]
    expected = evaluate(model, pairs, attribute(model, pairs), sizes=[1, 10], ablation=ablation, batch_size=2)
    for rank in "01":
        found = SparsityCurve.load(folder / rank / f"curve {ablation}")
        for field in ("kept", "removed", "full", "empty", "predicted"):
            assert_close(getattr(found, field), getattr(expected, field))


def test_the_first_process_writes_a_comparison_that_all_have(folder: Path) -> None:
    written, *had = (Comparison.load(folder / place) for place in ("comparison", "0/comparison", "1/comparison"))
    for one in had:
        for key, curve in written.curves.items():
            assert torch.equal(curve.kept, one.curves[key].kept)


def weights_of(folder: Path, rank: str, name: str) -> dict[str, torch.Tensor]:
    layers = [load_dictionary(folder / rank / "trained" / name / f"layer-0{layer}") for layer in range(2)]
    return {f"{layer} {key}": value for layer, each in enumerate(layers) for key, value in each.tensors().items()}


@for_each("name", [*CASES, "resumed"])
def test_trained_weights_are_the_same_on_every_process(folder: Path, name: str) -> None:
    first, second = (weights_of(folder, rank, name) for rank in "01")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_two_processes_train_what_one_does_on_both_halves(folder: Path, model: Any) -> None:
    found = weights_of(folder, "0", "in order")
    for layer, dictionary in enumerate(train(model, TOKENS, IN_ORDER, verbose=False).dictionaries):
        for key, value in dictionary.tensors().items():
            torch.testing.assert_close(found[f"{layer} {key}"], value, atol=1e-5, rtol=1e-4)


def test_two_processes_resume_bit_for_bit(folder: Path) -> None:
    whole, resumed = weights_of(folder, "1", "shuffled"), weights_of(folder, "1", "resumed")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    names = [
        sorted(path.name for path in (folder / "checkpoints" / own).glob("checkpoint-*")) for own in ("", "process-1")
    ]
    assert names == [["checkpoint-00000018", "checkpoint-00000020"], [f"checkpoint-000000{n}" for n in ("09", 18, 20)]]


def test_one_process_can_work_alone(folder: Path, model: Any) -> None:
    expected = attribute(model, worker.PAIRS["kept"], batch_size=3)
    assert torch.equal(NodeScores.load(folder / "0" / "alone").flat(), expected.flat())


@for_each("where", ["raises", "raises inside compare"])
def test_an_error_in_one_process_raises_in_both(folder: Path, where: str) -> None:
    first, second = (json.loads((folder / rank / "failures.json").read_text())[where] for rank in "01")
    assert second["kind"] == "ArithmeticError" and first["kind"] == "ProcessesError"
    assert "process 1: ArithmeticError: the second process cannot count" in first["text"]


def test_processes_that_make_different_calls_are_told(folder: Path) -> None:
    for rank in "01":
        found = json.loads((folder / rank / "failures.json").read_text())["other settings"]
        assert found["kind"] == "ProcessesError" and "single_process" in found["text"]


def test_what_the_first_process_cannot_read_raises_in_both(folder: Path) -> None:
    for rank in "01":
        assert (
            json.loads((folder / rank / "failures.json").read_text())["foreign directory"]["kind"] == "FileFormatError"
        )


def test_work_goes_on_after_errors(folder: Path) -> None:
    first, second = (NodeScores.load(folder / rank / "after errors").flat() for rank in "01")
    assert torch.equal(first, second)


def test_a_killed_process_is_an_error_and_not_a_hang(folder: Path) -> None:
    found = json.loads((folder / "0" / "killed.json").read_text())
    assert found["kind"] == "ProcessesError" and "died" in found["text"] and found["seconds"] < 60


def test_shares_are_a_partition() -> None:
    parts = [list(Processes(rank, 3).share(range(10))) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == list(range(10)) and Processes(0, 3).fair(8, 10) == 4


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate")])
def test_running_out_of_memory_in_a_sum_is_no_lost_connection(error: Exception) -> None:
    with pytest.raises(type(error)), _connected():
        raise error
    with pytest.raises(ProcessesError, match="did not answer"), _connected():
        raise RuntimeError("Connection closed by peer")
