"""An attribution that was stopped goes on from its directory and ends with the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bases.site_dictionaries import dictionaries, pairs
from tests.families import model_cases
from tests.loops import for_each
from tests.nodes.plain import random_pairs
from tl_neuron_circuits import attribute
from tl_neuron_circuits._errors import FileFormatError, SettingsError
from tl_neuron_circuits.bases import MLPOutputs, Neurons
from tl_neuron_circuits.tasks import answer_logit, logit_difference

PAIRS = random_pairs(5, 4, 5, 6, 5, 5, 4)
quiet = pytest.mark.filterwarnings("ignore:dictionaries leave more than 0.9")


class Stopped(Exception):
    """What stops a run in these tests."""


@pytest.fixture(scope="module")
def model() -> Any:
    return model_cases("gpt2")[0].build(torch.float32)


def stops_at(call: int) -> Any:
    """The logit difference, until it is called that often."""
    calls: list[int] = []

    def metric(logits: Any, batch: Any) -> Any:
        calls.append(len(batch))
        if len(calls) == call:
            raise Stopped
        return logit_difference(logits, batch)

    metric.calls = calls  # pyright: ignore[reportFunctionMemberAccess]
    return metric


@pytest.mark.parametrize(
    "settings",
    [
        {"basis": [Neurons(), MLPOutputs()]},
        {"baseline": "mean"},
        {"method": "integrated_gradients_inputs(steps=2)"},
        {"batch_size": "auto"},
    ],
    ids=["two bases", "mean", "steps", "auto"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(model: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"positions": "sum", "batch_size": 2, **settings}
    expected = attribute(model, PAIRS, metric=stops_at(99), **settings)
    estimates = 3 if settings["batch_size"] == "auto" else 0  # batches that the first call sees before the real ones
    for call in (2 + estimates, 2):  # stopped twice
        with pytest.raises(Stopped):
            attribute(model, PAIRS, metric=stops_at(call), resume=tmp_path / "here", **settings)
    last = stops_at(99)
    found = attribute(model, PAIRS, metric=last, resume=tmp_path / "here", **settings)
    assert torch.equal(found.flat(), expected.flat())
    assert found.settings == expected.settings
    again = stops_at(1)  # a finished run computes nothing any more
    assert torch.equal(attribute(model, PAIRS, metric=again, resume=tmp_path / "here", **settings).flat(), found.flat())


@quiet
def test_unexplained_variance_is_that_of_all_batches(model: Any, tmp_path: Path) -> None:
    data, settings = pairs(model, seed=1), {"basis": dictionaries("transcoder"), "batch_size": 2}
    expected = attribute(model, data, metric=stops_at(99), **settings)
    with pytest.raises(Stopped):
        attribute(model, data, metric=stops_at(2), resume=tmp_path / "here", **settings)
    found = attribute(model, data, metric=stops_at(99), resume=tmp_path / "here", **settings)
    assert found.settings["variance_unexplained"] == expected.settings["variance_unexplained"]
    assert torch.equal(found.flat(), expected.flat())


def stopped(model: Any, directory: Path) -> None:
    with pytest.raises(Stopped):
        attribute(model, PAIRS, metric=stops_at(2), positions="sum", batch_size=2, resume=directory)


def test_only_what_was_left_is_computed(model: Any, tmp_path: Path) -> None:
    stopped(model, tmp_path)
    rest = stops_at(99)
    attribute(model, PAIRS, metric=rest, positions="sum", batch_size=2, resume=tmp_path)
    assert sum(rest.calls) == len(PAIRS) - 2


@for_each(
    "changes",
    [
        {"method": "gradient"},
        {"baseline": "zero"},
        {"batch_size": 3},
        {"metric": answer_logit},
        {"basis": MLPOutputs()},
    ],
    ids=["method", "baseline", "batch_size", "metric", "basis"],
)
def test_another_runs_directory_is_refused(model: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    stopped(model, tmp_path)
    settings = {"metric": stops_at(99), "positions": "sum", "batch_size": 2, **changes}
    with pytest.raises(FileFormatError, match=next(iter(changes))):
        attribute(model, PAIRS, resume=tmp_path, **settings)


def test_other_weights_are_refused(model: Any, tmp_path: Path) -> None:
    stopped(model, tmp_path)
    other = model_cases("gpt2")[0].build(torch.float32, seed=1)
    with pytest.raises(FileFormatError, match="weights"):
        attribute(other, PAIRS, metric=stops_at(99), positions="sum", batch_size=2, resume=tmp_path)


def test_a_foreign_directory_and_a_damaged_one_are_refused(model: Any, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(FileFormatError, match=r"thesis\.tex"):
        attribute(model, PAIRS, positions="sum", resume=foreign)
    with pytest.raises(FileFormatError, match="there is a file"):
        attribute(model, PAIRS, positions="sum", resume=foreign / "thesis.tex")
    stopped(model, tmp_path / "damaged")
    (tensors,) = (tmp_path / "damaged").glob("*/*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:50])
    with pytest.raises(FileFormatError, match="truncated"):
        attribute(model, PAIRS, metric=stops_at(99), positions="sum", batch_size=2, resume=tmp_path / "damaged")


def test_a_batch_of_nothing_is_still_an_error(model: Any) -> None:
    with pytest.raises(SettingsError, match="batch_size"):
        attribute(model, PAIRS, positions="sum", batch_size=0)
